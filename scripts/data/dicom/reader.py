"""A DICOM file or folder as a volume: geometry from the tags, never from a default; voxels by pydicom.

Several volumes are named and refused unless one is chosen, a size that nothing states is refused unless it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.dicom.frames import (
    Frame,
    as_text,
    by,
    frame_count,
    frame_distance,
    frames_of,
    of_eigen,
    pixel_size,
    pydicom,
)
from scripts.data.dicom.pixels import decode, first_line
from scripts.data.dicom.segmentation import SEGMENTATIONS, read_segments
from scripts.data.dicom.series import PLACES, called, numbers, one_volume, places_of
from scripts.data.lps import FLIP

SUFFIXES = (".dcm", ".dicom", ".ima")


def is_dicom(path: str | Path) -> bool:
    """Whether a path is a folder or a DICOM file, whatever its name."""
    path = Path(path)
    if path.is_dir() or path.name.lower().endswith(SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:  # who reads it says why
        return False
    bare = start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"  # old files begin with their first element
    return start[128:] == b"DICM" or bare


def holds_slices(folder: str | Path) -> bool:
    """Whether a folder holds the slices of a series, a file each, rather than files of a volume each."""
    return any(frame_count(header) == 1 for _, header in _headers(Path(folder)))


def read_headers(path: str | Path) -> list[tuple[Path, Any]]:
    """The images of a DICOM file, or of a folder without its sub-folders: their files and data sets without voxels.

    Raises:
        InputError: a damaged DICOM file; a file that holds no image; a folder without any.
    """
    path = Path(path)
    found = _headers(path)
    if not found:
        deeper = "; it has sub-folders" if any(p.is_dir() for p in path.iterdir()) else ""
        raise InputError(f"{path}: no DICOM image in this folder{deeper}; give the folder with the files of one series")
    return found


def _headers(path: Path) -> list[tuple[Path, Any]]:
    found = []
    files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")] if path.is_dir() else [path]
    for file in sorted(files, key=lambda p: (len(p.name), p.name)):  # a copy, "IM1 (1)", after "IM1"
        if not is_dicom(file):
            continue
        try:
            header = pydicom().dcmread(file, stop_before_pixels=True, force=True)
            kind = header.get("SOPClassUID") or getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")
            image = bool(header.get("Rows") and header.get("Columns"))
        except Exception as error:  # pydicom raises many kinds
            raise InputError(f"{file}: cannot be read as an image: {first_line(error)}") from error
        if not kind and not image and "DirectoryRecordSequence" not in header:
            raise InputError(f"{file}: cannot be read as an image: as DICOM it is empty, or damaged")
        if image:  # a report, a plan or a DICOMDIR is none
            found.append((file, header))
        elif file == path:
            raise InputError(f"{file}: holds no image, but {getattr(kind, 'name', kind)}; give the images' own file")
    return found


def modality(path: str | Path) -> str | None:
    """The modality of an image as DICOM states it, "MR" or "US" for example; None where it states none, or several."""
    path = Path(path)
    found = {str(header.get("Modality", "")) for _, header in read_headers(path)} if is_dicom(path) else set()
    return found.pop() or None if len(found) == 1 else None


def is_segmentation(path: str | Path) -> bool:
    """Whether a path is a DICOM segmentation: a file, or a folder of nothing else."""
    return is_dicom(path) and _all_segments(read_headers(path))


def _all_segments(headers: Sequence[tuple[Path, Any]]) -> bool:
    return all(header.get("SOPClassUID") in SEGMENTATIONS for _, header in headers)


def read(
    path: str | Path,
    spacing: np.ndarray | None = None,
    chosen: str | int | None = None,
    side: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (1, X, Y, Z), float32, X along a row, and voxel -> RAS mm (4, 4); segments as channels.

    Args:
        path: a file, or a folder with the files of a series.
        spacing: voxel size (x, y, z) in mm where the files do not state it.
        chosen: which of several volumes, see `scripts.data.dicom.series.one_volume`.
        side: "moving" or "fixed", whose options a refusal names.

    Raises:
        InputError: several volumes; a size, an order or a direction that nothing states; slices missing.
    """
    headers = read_headers(path)
    if _all_segments(headers):
        return read_segments(path, headers)
    headers = [(file, header) for file, header in headers if header.get("SOPClassUID") not in SEGMENTATIONS]
    return read_volume(path, headers, spacing, chosen, side)


def read_volume(
    path: str | Path,
    headers: Sequence[tuple[Path, Any]],
    spacing: np.ndarray | None = None,
    chosen: str | int | None = None,
    side: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same of files wherever they lie, with their headers, see `read_headers`; `path` is what a message names."""
    frames = [frame for file, header in headers for frame in frames_of(file, header)]
    frames, affine = grid(path, one_volume(path, frames, chosen, side), spacing, side)
    checks.check_size(path, (*frames[0].shape, len(frames)))
    volume = np.stack([image.T for image in decode(path, frames)], axis=-1)
    return volume[None], affine


def read_frames(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey levels of a file's frames in its order, (frame, row, column), float32, and its `pixel_size`."""
    ((file, header),) = read_headers(path)
    frames = frames_of(file, header)
    checks.check_size(path, (*frames[0].shape, len(frames)))
    return np.stack(decode(path, frames)), pixel_size(frames[0], path)


def grid(
    path: str | Path, frames: list[Frame], given: np.ndarray | None = None, side: str | None = None
) -> tuple[list[Frame], np.ndarray]:
    """The frames of one volume in the order of their places, and voxel -> RAS mm (4, 4).

    Args:
        given: voxel size (x, y, z) in mm where the frames do not state it.

    Raises:
        InputError: a single slice; places that are uneven, or stated for some only; a size that nothing states.
    """
    shape = (*frames[0].shape, len(frames))
    if len(frames) == 1:
        raise InputError(f"{path}: a single slice, size {shape}; give the whole volume")
    placed = [f for f in frames if f.position is not None]
    one_file = len({f.path for f in frames}) == 1
    if len(placed) == len(frames) and frames[0].axes is not None:
        frames = [f for _, f in sorted(zip(places_of(frames), frames, strict=True), key=lambda one: one[0])]
        first, step = frames[0].position, _step(path, frames)
        across = float(np.linalg.norm(step))
    elif placed and not (one_file and placed == frames[:1]):
        lacking = "directions of its images" if len(placed) == len(frames) else "positions of some of its images"
        raise InputError(f"{path}: the {lacking} are not stated; export the series again")
    else:
        frames, across = _in_order(path, frames)
        first, step = placed[0].position if placed else None, None
    flat = pixel_size(frames[0], path)
    size = np.array([*((np.nan, np.nan) if flat is None else flat), across or np.nan])
    if not np.isfinite(size).all():
        if given is None:
            option = f" by --{side}_spacing '[x,y,z]', in mm" if side else " in its header"
            raise InputError(f"{path}: {_wanting(frames, size)}; state the voxel size{option}")
        size = np.where(np.isfinite(size), size, given)
    if step is None and of_eigen(frames[0]):
        lps = eigen_grid(path, shape, size)
    else:
        axes = np.eye(3)[:2] if frames[0].axes is None else frames[0].axes
        across = np.cross(*axes) * size[2] if step is None else step
        lps = np.column_stack([*(axes * size[:2, None]), across, np.zeros(3) if first is None else first])
        if step is None:
            told = "rows to the left, columns to the back, frames to the head"
            lies = told if frames[0].axes is None else "one behind the other from the first"
            checks.repaired(path, f"nothing says where its frames lie, so they are taken in their order, {lies}")
        elif frames[0].own:
            checks.repaired(path, "its positions are those within its own volume, not in the patient")
    affine = np.eye(4)
    affine[:3] = FLIP.numpy()[:, None] * lps
    return frames, affine


def _step(path: str | Path, frames: Sequence[Frame]) -> np.ndarray:
    """From one slice to the next, LPS mm, shape (3,); `frames` are in order.

    Raises:
        InputError: a slice lies more than a tenth of a voxel from where the others put it.
    """
    at = np.array([f.position for f in frames])
    step = (at[-1] - at[0]) / (len(at) - 1)
    off = np.linalg.norm(at - at[0] - np.arange(len(at))[:, None] * step, axis=1).max()
    flat = pixel_size(frames[0])
    if off > 0.1 * min([np.linalg.norm(step), *(() if flat is None else flat)]):
        moves = np.diff(at, axis=0)
        usual = np.median(moves, axis=0)
        odd = int(np.linalg.norm(moves - usual, axis=1).argmax())
        raise InputError(
            f"{path}: slices are unevenly spaced, by up to {off:.2f} mm: {np.linalg.norm(moves[odd]):.4g} mm between"
            f" {called(frames[odd])} and {called(frames[odd + 1])}, else {np.linalg.norm(usual):.4g}; is one missing?"
        )
    return step


def _in_order(path: str | Path, frames: list[Frame]) -> tuple[list[Frame], float | None]:
    """Frames without positions in the order that is stated otherwise, and their distance in mm; None if not stated.

    Raises:
        InputError: files that nothing puts in order; places that are not even.
    """
    for name, group in PLACES:
        along = numbers(frames, name, group)
        if along is None:
            continue
        order = np.argsort(along)
        frames, along = [frames[k] for k in order], along[order]
        gaps = np.diff(along)
        if np.ptp(gaps) > 0.1 * np.median(gaps):
            k = int(gaps.argmax())
            raise InputError(
                f"{path}: slices are unevenly spaced, {name} {along[k]:g} is followed by {along[k + 1]:g};"
                " is one missing?"
            )
        return frames, float(gaps.mean()) if name == "SliceLocation" else frame_distance(frames[0], path)
    if len({f.path for f in frames}) > 1:
        raise InputError(f"{path}: nothing puts its {len(frames)} images in order; export the series again")
    return frames, frame_distance(frames[0], path)


def _wanting(frames: Sequence[Frame], size: np.ndarray) -> str:
    """What of a voxel size is not stated, and what is; `size` has NaN for what is not."""
    flat, across = not np.isnan(size[:2]).any(), not np.isnan(size[2])
    in_time = any(as_text(frames[0].header.get(name)) != "none" for name in ("FrameTime", "FrameTimeVector"))
    lacking = [] if flat else ["how large a pixel is"]
    lacking += [] if across else [f"how far apart its {len(frames)} frames lie" + ", which follow in time" * in_time]
    there = f" (its pixels are {by(size[:2])} mm)" * flat + f" (its slices lie {size[2]:.6g} mm apart)" * across
    return f"nothing says {' and '.join(lacking)}{there}"


def eigen_grid(path: str | Path, shape: Sequence[int], size: Sequence[float]) -> np.ndarray:
    """voxel -> LPS mm, shape (3, 4), of a TRUS volume of TCIA's Prostate-MRI-US-Biopsy.

    x runs along the rows' index, y along the frames' backwards, z along the columns' index backwards, each from
    −size × count / 2 on.
    """
    lps = np.zeros((3, 4))
    for world, voxel, way in ((0, 1, 1), (1, 2, -1), (2, 0, -1)):
        lps[world, voxel] = way * size[voxel]
        lps[world, 3] = size[voxel] * (-shape[voxel] / 2 + (0 if way > 0 else shape[voxel] - 1))
    checks.repaired(path, "no position, so laid out as the TRUS volumes of TCIA's Prostate-MRI-US-Biopsy, around 0")
    return lps
