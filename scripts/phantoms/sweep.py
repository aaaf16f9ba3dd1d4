"""Rotational TRUS sweep -> Cartesian volume (Hu et al. 2018, §3.1: 57–112 parasagittal frames, recorded angles).

A side-firing probe turns about its axis and takes a frame at each angle; every frame's plane contains the axis. A
sweep is frames (F, D, Z): frame, depth (row 0 nearest the axis), axial position (column 0 most inferior); F angles in
degrees; the pixel spacing (depth, axial) in mm; and the radius of row 0 in mm, `axis_offset`. Pixel (f, d, j) is at

    x = r sin θ_f,   y = r cos θ_f,   z = j · axial,   r = axis_offset + d · depth

in RAS mm from the point of the axis at column 0: the axis runs along z, 0° is straight anterior, 90° the patient's
right. Seen from below with anterior up, as a transverse TRUS image is shown, angles grow anticlockwise.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.data import checks, itk_images
from scripts.data.checks import InputError
from scripts.data.colour import grey
from scripts.data.dicom import reader
from scripts.data.files import readable
from scripts.data.kept import refuse_overlap
from scripts.network import fields

MAX_GAP = 5.0  # degrees; see `reconstruct`
STACKS = (".dcm", ".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".npy")
TOLERANCE = 1e-6  # of a degree or a pixel: keeps the voxels that lie on the sweep's own faces


class Sweep(NamedTuple):
    """Frames as recorded.

    Attributes:
        frames: float32, grey levels of the file, shape (F, D, Z).
        angles: float64, degrees, shape (F,).
        pixel_spacing: (depth, axial) in mm; None where the file has none.
    """

    frames: Tensor
    angles: Tensor
    pixel_spacing: tuple[float, float] | None


class SweptVolume(NamedTuple):
    """A sweep on a Cartesian grid.

    Attributes:
        volume: the frames' dtype, shape (X, Y, Z); zero outside the sweep.
        affine: voxel -> RAS mm, shape (4, 4), float64.
        inside: bool, shape (X, Y, Z); where the sweep was interpolated.
    """

    volume: Tensor
    affine: Tensor
    inside: Tensor


def reconstruct(
    frames: Tensor,
    angles: Tensor | Sequence[float],
    pixel_spacing: Sequence[float],
    axis_offset: float,
    spacing: float | Sequence[float],
    axis_point: Sequence[float] = (0.0, 0.0, 0.0),
    max_gap: float = MAX_GAP,
) -> SweptVolume:
    """The Cartesian volume of a sweep: trilinear in (angle, depth, axial position), never extrapolated.

    A gap of more than `max_gap` between two frames is left outside rather than refused, so that a sweep that lost some
    frames still serves, with an honest mask. 57 frames over 140° are 2.5° apart: the default bridges one lost frame,
    over 5 mm at most of an arc 60 mm from the axis, and not two.

    Args:
        frames: shape (F, D, Z), floating point; see the module for the geometry.
        angles: degrees, shape (F,); rising or falling, uniform or not, spanning at most 360.
        pixel_spacing: (depth, axial) in mm.
        axis_offset: radius of the first row in mm, 0 or more.
        spacing: voxel size in mm, one number or (x, y, z).
        axis_point: world position in RAS mm of the axis at the first column; voxel centres are whole steps from it.
        max_gap: degrees.

    Returns:
        The smallest grid that holds every voxel centre in the sweep.

    Raises:
        InputError: the sweep has no such geometry, or the volume would be empty or too large.
    """
    angles = torch.as_tensor(angles, dtype=torch.float64, device=frames.device)
    _check_frames("frames", frames)
    _check_angles("angles", angles.cpu(), len(frames))
    depth, axial = _lengths("pixel_spacing", pixel_spacing, 2)
    spacing = _lengths("spacing", spacing, 3)
    _check_number("axis_offset", axis_offset, "the radius of the first row in mm")
    _check_number("max_gap", max_gap, "the largest gap that is bridged in degrees")
    if angles[0] > angles[-1]:
        angles, frames = angles.flip(0), frames.flip(0)
    if (angles.diff() > max_gap + TOLERANCE).all():
        raise InputError(
            f"angles: neighbouring frames are at least {angles.diff().min():.3g} degrees apart, more than the largest"
            f" gap that is bridged, {max_gap:g}; are they in degrees? --max_gap changes it"
        )
    radius = axis_offset + depth * (frames.shape[1] - 1)
    low, high = _extent(angles, axis_offset, radius)
    low, high = np.append(low, 0.0), np.append(high, axial * (frames.shape[2] - 1))
    first = np.ceil(low / spacing - TOLERANCE)
    size = (np.floor(high / spacing + TOLERANCE) - first + 1).astype(int)
    if size.min() < 2 or np.prod(size, dtype=np.int64) > checks.MAX_VOXELS:
        raise InputError(f"spacing {spacing.tolist()} mm: the volume would have size {size.tolist()}; choose another")
    x, y, z = (
        (torch.arange(n, dtype=torch.float64, device=frames.device) + start) * step
        for n, start, step in zip(size.tolist(), first.tolist(), spacing.tolist(), strict=True)
    )

    # the axial position is the same in every frame: interpolate it once, then each (x, y) for all z together
    column = (z / axial).clamp(max=frames.shape[2] - 1)
    left = column.long().clamp(max=frames.shape[2] - 2)
    stack = torch.lerp(frames[..., left], frames[..., left + 1], (column - left).to(frames))

    row = (torch.hypot(x[:, None], y) - axis_offset) / depth
    turn = torch.remainder(torch.rad2deg(torch.atan2(x[:, None], y)) - angles[0], 360)
    turn = torch.where(turn > 360 - TOLERANCE, 0.0, turn)
    turns = angles - angles[0]
    before = torch.searchsorted(turns, turn, right=True).sub(1).clamp(0, len(turns) - 2)
    gap = turns.diff()[before]
    frame = before + (turn - turns[before]) / gap
    inside = (row >= -TOLERANCE) & (row <= frames.shape[1] - 1 + TOLERANCE)
    inside &= (turn <= turns[-1] + TOLERANCE) & (gap <= max_gap + TOLERANCE)

    points = torch.stack([frame, row, torch.zeros_like(row)])[None, ..., None]
    volume = fields.sample(stack.permute(2, 0, 1)[None, ..., None], points)[0, ..., 0].permute(1, 2, 0)
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.from_numpy(np.asarray(axis_point, dtype=float) + first * spacing)
    inside = inside[..., None].expand(volume.shape)
    return SweptVolume((volume * inside).contiguous(), affine, inside.contiguous())


def acquire(
    volume: Tensor,
    affine: Tensor,
    angles: Tensor | Sequence[float],
    pixel_spacing: Sequence[float],
    frame_shape: Sequence[int],
    axis_point: Sequence[float],
    axis_offset: float,
) -> Tensor:
    """The sweep of a volume, frame by frame: the inverse of `reconstruct`.

    Args:
        volume: shape (X, Y, Z), floating point.
        affine: voxel -> RAS mm, shape (4, 4).
        angles: degrees, shape (F,).
        pixel_spacing: (depth, axial) in mm.
        frame_shape: pixels (depth, axial).
        axis_point: world position in RAS mm of the probe's axis at the first column.
        axis_offset: radius of the first row in mm.

    Returns:
        Shape (F, *frame_shape); zero outside the volume.
    """
    real = {"dtype": torch.float64, "device": volume.device}
    r = axis_offset + pixel_spacing[0] * torch.arange(frame_shape[0], **real)[:, None]
    z = pixel_spacing[1] * torch.arange(frame_shape[1], **real)
    origin = torch.tensor([*axis_point], **real).view(1, 3, 1, 1, 1)
    to_voxel = torch.linalg.inv(torch.as_tensor(affine, **real))
    frames = []
    for some in torch.deg2rad(torch.as_tensor(angles, **real)).split(16):  # all at once would need gigabytes
        angle = some.view(-1, 1, 1)
        points = torch.stack(torch.broadcast_tensors(r * angle.sin(), r * angle.cos(), z))[None] + origin
        voxels = fields.transform_points(to_voxel, points)
        frames.append(fields.sample(volume[None, None], voxels, padding_mode="outside")[0, 0])
    return torch.cat(frames)


def _extent(angles: Tensor, inner: float, outer: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest (x, y) in mm of the ring sector between two radii; angles rising, degrees."""
    first, last = angles[0].item(), angles[-1].item()
    quarters = 90 * np.arange(np.ceil(first / 90), np.floor(last / 90) + 1)  # where x or y turns back
    theta = np.deg2rad([first, last, *quarters])
    corners = np.outer([inner, outer], [np.sin(theta), np.cos(theta)]).reshape(2, 2, -1)
    return corners.min(axis=(0, 2)), corners.max(axis=(0, 2))


def angles_of(path: str | Path, angles: str | Path | None) -> Path:
    """The table of the angles of a source of frames: the one that is named, else the one that lies with it."""
    path = Path(path)
    return Path(angles) if angles is not None else (path if path.is_dir() else path.parent) / "angles.csv"


def read_frames(
    path: str | Path, angles: str | Path | None = None, probe: str = "top", superior: str = "right"
) -> Sweep:
    """Read a sweep from one of three kinds of source.

    - A DICOM multi-frame file, or a NIfTI, MetaImage or NRRD stack, indexed (column, row, frame) as those hold a video.
    - A .npy array, shape (frame, row, column), as NumPy holds one; colour channels last.
    - A folder of PNG files in natural order (frame 2 before frame 10).

    Colour becomes grey: the common value where the channels are equal in every pixel, else the luminance (BT.601). An
    alpha channel is ignored. The pixel spacing is the header's; 1 × 1 mm counts as none, because ITK reports it for a
    header without spacing, and that of a PNG is not used: it describes a print.

    Args:
        path: the file or folder.
        angles: CSV with a header; column `angle_deg` and, if rows are not in the order of the frames, `frame`: their
            numbers from 0 or from 1, or the names of the PNG files. None for the `angles.csv` in the folder, or in the
            file's folder.
        probe: where the frames show the probe, "top" or "bottom".
        superior: which side of the frames is superior, "right" or "left".

    Raises:
        InputError: the source cannot be read, or is no sweep.
    """
    path = Path(path)
    if probe not in ("top", "bottom") or superior not in ("right", "left"):
        raise InputError(
            f'{path}: probe is "top" or "bottom" and superior "right" or "left"; found {probe}, {superior}'
        )
    if not path.exists():
        raise InputError(f"{path}: not found; give a multi-frame file or a folder of PNG frames")
    names, spacing = [], None
    if path.is_dir():
        array, names = _read_folder(path)
    elif path.suffix.lower() == ".npy":
        array = _read_npy(path)
    else:
        array, spacing = _read_image(path)
    if array.ndim != 3:
        raise InputError(f"{path}: expected frames of rows and columns, found {array.ndim} axes {array.shape}")
    frames = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    frames = frames.flip([axis for axis, turned in ((1, probe == "bottom"), (2, superior == "left")) if turned])
    _check_frames(path, frames)
    checks.check_image(path, array)
    table = angles_of(path, angles)
    recorded = torch.tensor(_read_angles(table, len(frames), names), dtype=torch.float64)
    _check_angles(table, recorded, len(frames))
    return Sweep(frames, recorded, spacing)


def _read_image(path: Path) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Grey levels, shape (..., row, column), and pixel spacing (row, column) in mm of DICOM or whatever ITK reads."""
    if reader.is_dicom(path):
        array, size = reader.read_frames(path)
        return array, None if size is None or (size == 1).all() else (float(size[1]), float(size[0]))
    try:
        array, (column, row, *_) = itk_images.read_frames(str(path))
    except Exception as error:  # whatever a reader raises on a damaged file is one thing to the user
        raise InputError(f"{path}: cannot be read as an image; expected one of {', '.join(STACKS)}") from error
    return grey(array)[0], None if row == column == 1 else (row, column)


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a NumPy array of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise InputError(f"{path}: expected one array of real numbers")
    return grey(array)[0] if array.ndim == 4 and array.shape[-1] in (1, 2, 3, 4) else array


def _read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Grey levels, shape (frame, row, column), of a folder of PNG files, and their names."""
    paths = [p for p in folder.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith(".")]
    paths.sort(key=lambda p: [int(t) if t.isdecimal() else t for t in re.split("([0-9]+)", p.name.lower())])
    if len(paths) < 2:
        raise InputError(f"{folder}: {len(paths)} PNG files; a sweep needs 2 frames or more")
    frames = []
    for p in paths:
        frames.append(_read_image(p)[0])
        if frames[-1].shape != frames[0].shape:
            raise InputError(f"{p}: frame size {frames[-1].shape} differs from {paths[0].name}: {frames[0].shape}")
    return np.stack(frames), [p.name for p in paths]


def _read_angles(path: Path, count: int, names: list[str]) -> list[float]:
    """The angles in the order of the frames, degrees.

    Args:
        path: the CSV, see `read_frames`.
        count: number of frames.
        names: the frames' file names; empty if they share a file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)]
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; pass --angles FILE, a CSV with the column angle_deg") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from error
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    if "angle_deg" not in header:
        raise InputError(f"{path}: no column angle_deg in the header ({', '.join(header)}); add it, in degrees")
    if len(rows) != count:
        raise InputError(f"{path}: {len(rows)} angles for {count} frames; give one row per frame")
    angles = []
    for i, row in enumerate(rows, start=1):
        try:
            angles.append(float(row[header.index("angle_deg")]))
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: row {i} has no number in the column angle_deg: {','.join(row)}") from error
    if "frame" not in header:
        return angles
    column = header.index("frame")
    called = [row[column] if column < len(row) else "" for row in rows]
    known = [[str(i) for i in range(count)], [str(i + 1) for i in range(count)], names, [Path(n).stem for n in names]]
    for order in known:
        if sorted(called) == sorted(order):
            return [angles[called.index(name)] for name in order]
    strange = next((name for name in called if name not in known[2] + known[3]), called[0])
    raise InputError(
        f"{path}: the column frame is neither 0 to {count - 1}, nor 1 to {count}, nor the PNG names: {strange!r}"
    )


def _check_frames(name: str | Path, frames: Tensor) -> None:
    """Refuse what is no stack of frames (F, D, Z): too few, too small, too large, NaN."""
    if frames.ndim != 3 or frames.shape[0] < 2:
        raise InputError(f"{name}: shape {tuple(frames.shape)}; a sweep needs 2 frames or more of rows and columns")
    if min(frames.shape[1:]) < 2:
        raise InputError(f"{name}: frames of {tuple(frames.shape[1:])} pixels; a frame needs 2 rows and 2 columns")
    if frames.numel() > checks.MAX_VOXELS:
        raise InputError(f"{name}: size {tuple(frames.shape)} is beyond the cap of {checks.MAX_VOXELS} pixels")
    bad = int((~torch.isfinite(frames)).sum())
    if bad:
        raise InputError(f"{name}: {bad} pixels are NaN or infinite; clean the frames first")


def _check_angles(name: str | Path, angles: Tensor, count: int) -> None:
    """Refuse angles (F,), in degrees, that are not one turn in one direction."""
    if angles.shape != (count,):
        raise InputError(f"{name}: {angles.numel()} angles for {count} frames; give one per frame")
    if not torch.isfinite(angles).all():
        bad = (~torch.isfinite(angles)).nonzero()[0].item()
        raise InputError(f"{name}: the angle of frame {bad + 1} of {count} is {angles[bad]}; expected degrees")
    steps = angles.diff() * torch.sign(angles[-1] - angles[0])
    if (steps <= 0).any():
        bad = (steps <= 0).nonzero()[0].item()
        raise InputError(
            f"{name}: angles must rise or fall from frame to frame; frame {bad + 1} has {angles[bad]:g}, the next"
            f" {angles[bad + 1]:g} degrees. Sort the frames, drop repeats, and count on past 360"
        )
    if (angles[-1] - angles[0]).abs() > 360 + TOLERANCE:
        raise InputError(f"{name}: the angles span {angles[-1] - angles[0]:g} degrees; give one turn, at most 360")


def _check_number(name: str, value: float, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < np.inf:
        raise InputError(f"{name} {value}: expected {meaning}, 0 or more")


def _lengths(name: str, value: float | Sequence[float], count: int) -> np.ndarray:
    """`count` lengths in mm from one number or as many."""
    try:
        lengths = np.broadcast_to(np.asarray(value, dtype=float), count)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} {value}: expected {count} numbers in mm") from error
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise InputError(f"{name} {value}: every length must be positive, in mm")
    return lengths


def volume_and_mask(output: str | Path) -> tuple[Path, Path]:
    """The two files that a sweep becomes.

    Raises:
        InputError: the name is not that of a NIfTI file.
    """
    output = Path(output)
    suffix = next((s for s in (".nii.gz", ".nii") if output.name.endswith(s)), None)
    if suffix is None:
        raise InputError(f"{output}: the volume is written as NIfTI; choose a name that ends in .nii.gz")
    return output, output.with_name(output.name.removesuffix(suffix) + "_inside" + suffix)


def save_sweep(output: str | Path, swept: SweptVolume) -> Path:
    """Write NAME.nii.gz, float32, and its mask NAME_inside.nii.gz, uint8, beside it; returns the mask's path.

    Both files appear when both are complete.

    Raises:
        InputError: the name is not that of a NIfTI file, or cannot be written.
    """
    # a second of MONAI and matplotlib, which reading and geometry need not
    from scripts.data.files import written_together
    from scripts.data.volumes import save_volume

    output, mask = volume_and_mask(output)
    affine = swept.affine.cpu().numpy()
    try:
        with written_together(output.parent) as partial:
            save_volume(partial / mask.name, swept.inside.cpu().numpy(), affine, dtype=np.uint8)
            save_volume(partial / output.name, swept.volume.cpu().numpy(), affine, dtype=np.float32)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    return mask


def convert(
    frames: str | Path,
    output: str | Path,
    axis_offset: float,
    angles: str | Path | None = None,
    pixel_spacing: Sequence[float] | None = None,
    spacing: float | Sequence[float] = 0.8,
    max_gap: float = MAX_GAP,
    probe: str = "top",
    superior: str = "right",
) -> SweptVolume:
    """Read a sweep, reconstruct it, write it and say what came of it; see the `sweep` verb.

    Raises:
        InputError: any refusal of the above; no pixel spacing; the output would replace the frames or
            the angles, or lie in their folder.
    """
    frames = readable(frames)
    refuse_overlap([frames, angles_of(frames, angles)], volume_and_mask(output), "--output")
    sweep = read_frames(frames, angles, probe, superior)
    pixel_spacing = sweep.pixel_spacing if pixel_spacing is None else pixel_spacing
    if pixel_spacing is None:
        raise InputError(f"{frames}: no pixel spacing in the file; pass --pixel_spacing '[depth,axial]' in mm")
    swept = reconstruct(sweep.frames, sweep.angles, pixel_spacing, axis_offset, spacing, max_gap=max_gap)
    mask = save_sweep(output, swept)
    depth, axial = _lengths("pixel_spacing", pixel_spacing, 2)
    gaps = int((sweep.angles.diff().abs() > max_gap + TOLERANCE).sum())
    print(
        f"{len(sweep.frames)} frames, {sweep.angles[0]:g} to {sweep.angles[-1]:g} degrees, pixels of {depth:g} (depth)"
        f" × {axial:g} mm (axial)" + (f"; {gaps} gaps of more than {max_gap:g} degrees left out" if gaps else "")
    )
    size, voxel = (" × ".join(f"{n:g}" for n in v) for v in (swept.volume.shape, swept.affine.diagonal()[:3]))
    covered = 100 * swept.inside.double().mean()
    print(f"{output}: {size} voxels of {voxel} mm, {covered:.1f} % of them in the sweep ({mask.name})")
    print("Research use only.")
    return swept
