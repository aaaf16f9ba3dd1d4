"""A DICOM segmentation as binary channels, a segment each, on the grid of its image: moved, never interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.dicom.frames import Frame, frames_of, pixel_size
from scripts.data.dicom.pixels import stored
from scripts.data.lps import FLIP

SEGMENTATION, LABEL_MAP = SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
OFF_GRID = 0.1  # of a voxel: farther from the voxels of its image a frame is not on its grid


def read_segments(
    path: str | Path,
    headers: Sequence[tuple[Path, Any]],
    like: tuple[Sequence[int], np.ndarray] | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Channels (M, X, Y, Z), float32, and voxel -> RAS mm (4, 4).

    Frames without a labelled voxel are usually left out of such a file, so it does not tell the image's grid.

    Args:
        headers: of one file, see `scripts.data.dicom.reader.read_headers`.
        like: size and voxel -> RAS mm of the image's grid; None for the smallest that holds the frames.
        numbers: the segments in the order of the channels; None for the file's own.

    Raises:
        InputError: several files; no planes; shares instead of 0 and 1; frames off the image's grid, or outside it.
    """
    if len(headers) > 1:
        raise InputError(f"{path}: {len(headers)} segmentations in one folder; keep the one that is meant")
    ((file, header),) = headers
    frames = frames_of(file, header)
    if any(f.position is None or f.axes is None for f in frames) or pixel_size(frames[0]) is None:
        raise InputError(f"{path}: its frames do not say where they lie; export it with its image's planes")
    known = [int(item.SegmentNumber) for item in header.get("SegmentSequence") or ()]
    known = [number for number in known if number]  # 0 is the background of a label map
    wanted = known if numbers is None else [int(number) for number in numbers]
    shape, affine = like or own_grid(path, frames)
    checks.check_size(path, (*shape[:2], shape[2] * max(1, len(wanted))))
    channels = np.zeros((len(wanted), *shape), np.float32)
    highest = 1 if header.get("SegmentationType") == "BINARY" else int(header.get("MaximumFractionalValue") or 1)
    for frame, image in zip(frames, stored(frames), strict=True):
        if header.SOPClassUID == LABEL_MAP:
            parts = {int(value): image == value for value in np.unique(image) if value}
        else:
            if not np.isin(image, (0, highest)).all():
                raise InputError(f"{path}: shares of a voxel from 0 to {highest}; expected a binary segmentation")
            parts = {int(frame.find("ReferencedSegmentNumber", "SegmentIdentificationSequence")): image > 0}
        for number, part in parts.items():
            if number not in wanted:
                raise InputError(f"{path}: segment {number} is none of {wanted}; name its segments")
            place(path, channels[wanted.index(number)], affine, frame, part)
    return channels, affine


def own_grid(path: str | Path, frames: Sequence[Frame]) -> tuple[tuple[int, int, int], np.ndarray]:
    """Size and voxel -> RAS mm of the smallest grid that holds frames, which may leave out planes between them."""
    along = np.array([f.position @ frames[0].normal for f in frames])
    first = frames[int(along.argmin())]
    gaps = np.diff(np.unique(along.round(3)))
    stated = first.find("SpacingBetweenSlices", "PixelMeasuresSequence") or first.find(
        "SliceThickness", "PixelMeasuresSequence"
    )
    step = float(stated or (gaps.min() if len(gaps) else 0))
    if not step > 0:
        raise InputError(f"{path}: nothing says how far apart its frames lie; export it with its image's planes")
    lps = np.column_stack([*(first.axes * pixel_size(first)[:, None]), first.normal * step, first.position])
    affine = np.eye(4)
    affine[:3] = FLIP.numpy()[:, None] * lps
    return (*first.shape, max(2, int(round(np.ptp(along) / step)) + 1)), affine  # a volume, of a single plane too


def place(path: str | Path, channel: np.ndarray, affine: np.ndarray, frame: Frame, mask: np.ndarray) -> None:
    """Set the voxels of a channel (X, Y, Z) that a frame's mask (rows, columns) marks.

    Raises:
        InputError: the frame's pixels are not the grid's voxels; a marked one lies outside.
    """
    lps = np.column_stack([*(frame.axes * pixel_size(frame)[:, None]), frame.position])
    ras = FLIP.numpy()[:, None] * lps
    found = np.linalg.inv(affine)[:3] @ np.vstack([ras, [0, 0, 1]])  # columns, rows, 1 -> voxels
    nearest = found.round()
    corners = np.array([[x, y, 1] for x in (0, frame.shape[0] - 1) for y in (0, frame.shape[1] - 1)]).T
    off = np.abs((found - nearest) @ corners).max()
    if off > OFF_GRID or np.abs(nearest[:, :2]).sum() != 2:
        raise InputError(
            f"{path}: frame {frame.index + 1} lies up to {off:.1f} voxels off its image's; resample it onto the image"
        )
    rows, columns = np.nonzero(mask)
    voxels = (nearest @ np.stack([columns, rows, np.ones_like(rows)])).astype(int)
    outside = ((voxels < 0) | (voxels >= np.array(channel.shape)[:, None])).any(axis=0).sum()
    if outside:
        raise InputError(f"{path}: {outside} labelled voxels of frame {frame.index + 1} lie outside its image")
    channel[tuple(voxels)] = 1
