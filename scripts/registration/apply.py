"""Apply transform files to images, labels and points; see the `apply` verb and `scripts.data.formats`.

A transform maps fixed points to moving points. So an image of the moving world is pulled onto the fixed grid by it, a
point of the fixed image goes forward through it, and a point of the moving image needs its inverse. A list of steps is
in the order a fixed point goes through them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates, spline_filter
from torch import Tensor
from tqdm import tqdm

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.datalist import image_files
from scripts.data.dicom.reader import holds_slices, is_segmentation, read_headers
from scripts.data.dicom.registration import read_series
from scripts.data.dicom.segmentation_out import check_reference, save_segmentation, segments
from scripts.data.files import readable, written_together
from scripts.data.formats import Displacement, Step, forward, read_transform
from scripts.data.kept import refuse_overlap
from scripts.data.labels import load_maps
from scripts.data.volumes import load_volume, save_volume
from scripts.network import fields
from scripts.registration.apply_points import apply_to_points, backward
from scripts.registration.outputs import NOTICE

INTERPOLATIONS = ("linear", "cubic", "nearest")
ASKED = 20_000  # voxels of a segment that are asked whether they have a place in the other image


def compose(paths: Sequence[str | Path]) -> list[Step]:
    """The steps of several transform files, named in the order in which the moving image goes through them."""
    return [step for path in reversed(paths) for step in read_transform(readable(path))]


def warp(
    steps: Sequence[Step], volume: MetaTensor, affine: Tensor, size: Sequence[int], interpolation: str = "linear"
) -> Tensor:
    """A moving image on a grid of the fixed world, in one interpolation.

    Args:
        volume: shape (C, X, Y, Z), at its own resolution.
        affine: voxel -> RAS mm of the grid, shape (4, 4), float64.
        size: its voxels.
        interpolation: "linear", "cubic" (B-spline) or "nearest".

    Returns:
        Shape (C, *size), float32; zero outside the moving image and where the transform is unknown.
    """
    image = volume.as_tensor().double()
    spline = [spline_filter(channel, order=3, mode="mirror") for channel in image.numpy()] * (interpolation == "cubic")
    slabs = []
    for points, known in points_to_pull(steps, volume, affine, size):
        if spline:
            cubic = [map_coordinates(c, points[0].numpy(), order=3, mode="mirror", prefilter=False) for c in spline]
            inside = fields.covers(image.shape[1:], torch.eye(4, dtype=torch.float64), points)
            values = torch.from_numpy(np.stack(cubic))[None] * inside
        else:
            mode = "bilinear" if interpolation == "linear" else "nearest"
            values = fields.sample(image[None], points, mode, padding_mode="outside")
        slabs.append((values * known)[0].float())
    return torch.cat(slabs, dim=1)


def points_to_pull(
    steps: Sequence[Step], volume: MetaTensor, affine: Tensor, size: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Where the voxels of a grid lie in the voxels of the moving volume, in slabs along the grid's first axis.

    Yields:
        Voxel coordinates, (1, 3, n, Y, Z), float64, and whether the transform is known there, (1, 1, n, Y, Z).
    """
    for first, count in fields.slabs(size):
        voxels = fields.identity_grid((count, *size[1:]), torch.float64, "cpu")[None]
        voxels[:, 0] += first
        points, known = forward(steps, fields.transform_points(affine, voxels))
        yield fields.transform_points(torch.linalg.inv(volume.affine.double()), points), known


def warp_label(
    path: str | Path, steps: Sequence[Step], volume: MetaTensor, affine: Tensor, size: Sequence[int]
) -> np.ndarray:
    """Moving labels on a grid of the fixed world: each is interpolated linearly on its own, then one is decided for.

    Of an integer index map the value with the largest share wins, a structure before the background; of maps one a
    channel, each is where its share is ≥ 0.5.

    Args:
        volume: shape (1, X, Y, Z), an index map, or (M, X, Y, Z), binary maps.

    Returns:
        Shape (X', Y', Z') or (X', Y', Z', M), in the smallest of uint8, int16 and int32 that holds the values.

    Raises:
        InputError: values that are no integers; binary maps that are not binary.
    """
    labels = volume.as_tensor()
    if len(labels) > 1:
        checks.check_labels(path, labels.numpy())
        return (warp(steps, volume, affine, size) >= 0.5).movedim(0, -1).numpy().astype(np.uint8)
    values = labels.unique()
    odd = values[(values != values.round()) | (values.abs() > 2**24)]
    if len(odd):
        raise InputError(f"{path}: value {odd[0]:g} in a label; expected integers")
    slabs = []
    for points, known in points_to_pull(steps, volume, affine, size):
        best, decided = torch.zeros(known.shape, dtype=torch.float64), torch.zeros(known.shape)
        for value in sorted(values.tolist(), key=abs, reverse=True):  # the background last: it wins no tie
            share = fields.sample((labels == value).double()[None], points, padding_mode="outside") * known
            decided = torch.where(share > best + 1e-9, value, decided)
            best = torch.maximum(best, share)
        slabs.append(decided[0, 0])
    span = min(0, int(values.min())), int(values.max())
    kind = next(k for k in (np.uint8, np.int16, np.int32) if np.iinfo(k).min <= span[0] and span[1] <= np.iinfo(k).max)
    return torch.cat(slabs).numpy().astype(kind)


def grid_of(steps: Sequence[Step], reference: str | None) -> tuple[Tensor, tuple[int, ...]]:
    """Affine (RAS mm, float64) and size of the grid to warp onto: the reference's, else the fixed image's of
    a registration, else the transform's own.

    Raises:
        InputError: no reference, and the transform that a fixed point meets first has no grid.
    """
    if reference is not None:
        volume = load_volume(reference)
        return volume.affine.double(), tuple(volume.shape[1:])
    if not steps or not isinstance(steps[0], Displacement):
        raise InputError("a linear transform has no grid of its own; name the grid to warp onto by --reference FILE")
    if steps[0].fixed is not None:
        return torch.from_numpy(steps[0].fixed.affine), steps[0].fixed.size
    return steps[0].affine, tuple(steps[0].field.shape[1:])


def apply_to_images(
    steps: Sequence[Step],
    transforms: Sequence[str],
    moving: str,
    reference: str | None,
    output: str,
    label: bool,
    interpolation: str,
    moving_spacing: float | Sequence[float] | None = None,
    moving_series: str | int | None = None,
) -> None:
    """Warp one image, or every image of a folder, by `steps` of the files `transforms`; see the `apply` verb.

    Raises:
        InputError: a file that cannot be used; of a folder, after the others are done.
    """
    as_segmentation = output.lower().endswith(".dcm")
    if as_segmentation:
        if not (label and Path(moving).exists() and is_segmentation(moving)):
            raise InputError(f"{output}: .dcm is for a DICOM segmentation as --moving, with --label True; else .nii.gz")
        check_reference(moving, reference)
    affine, size = grid_of(steps, reference)

    def one(source: str | Path, target: Path, said: bool = False) -> None:
        load = load_maps if label else load_volume
        volume = load(str(source), moving_spacing, moving_series, "moving")
        checks.check_finite(source, volume.numpy())
        if label:
            warped = warp_label(source, steps, volume, affine, size)
        else:
            warped = warp(steps, volume, affine, size, interpolation).movedim(0, -1).numpy()
            warped = warped[..., 0] if len(volume) == 1 else warped
        with written_together(target.parent) as folder:
            if as_segmentation:
                if not warped.any():
                    raise InputError(f"{source}: no segment reaches the fixed grid; is it of the moving image?")
                parts = warped if warped.ndim == 4 else warped[..., None]
                save_segmentation(folder / target.name, parts, affine.numpy(), source, reference)
            else:
                save_volume(folder / target.name, warped, affine.numpy(), dtype=warped.dtype.type)
        if label and said:
            _say_labels(steps, source, volume, warped, affine)

    files = image_files(Path(moving)) if Path(moving).is_dir() and not holds_slices(moving) else {}
    if not files:  # one file, or a folder with one DICOM series
        if not output.lower().endswith((".nii", ".nii.gz", ".dcm")):
            raise InputError(f"{output}: the image is written as NIfTI; choose a name that ends in .nii.gz")
        one(moving, Path(output), said=True)
        print(f"{output}: {moving} on the fixed grid, {' × '.join(map(str, size))} voxels")
        return
    targets = {case: Path(output) / f"{case}.nii.gz" for case in files}
    reads = [moving, *files.values(), *transforms, *([reference] if reference is not None else [])]
    refuse_overlap(reads, targets.values(), "--output")
    refused = []
    for case, source in tqdm(files.items(), desc="apply", unit="image"):
        try:
            one(source, targets[case])
        except InputError as error:
            refused.append(str(error))
            tqdm.write(f"refused: {error}")
    print(f"{output}: {len(files) - len(refused)} of {len(files)} images on the fixed grid")
    if refused:
        raise InputError(f"{len(refused)} of {len(files)} images refused, the others are written; first {refused[0]}")


def _say_labels(steps: Sequence[Step], path: str, moving: MetaTensor, warped: np.ndarray, affine: Tensor) -> None:
    """Print the volume of each label before and after, and how much of it has no place in the other image.

    Args:
        path, moving: the labels' file, and what it holds, see `scripts.data.labels.load_maps`.
        warped: of `warp_label`, on the grid of `affine`.
    """
    values = [1] * len(moving)
    names = [f"label {number}" for number in range(1, len(moving) + 1)]
    if is_segmentation(path):
        names = [str(segment.get("SegmentLabel", segment.SegmentNumber)) for segment in segments(path)]
    elif len(moving) == 1:
        values = [int(value) for value in moving.unique() if value]
        names = [f"label {value}" for value in values]
    voxel_ml = [grid[:3, :3].det().abs().item() / 1000 for grid in (moving.affine, affine)]
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        channel = number if len(moving) > 1 else 0
        voxels = (moving[channel] == value).nonzero()
        left = int(((warped[..., channel] if warped.ndim == 4 else warped) == value).sum())
        lost = 0.0
        if len(voxels):
            every = voxels[:: math.ceil(len(voxels) / ASKED)].T[None, :, :, None, None].double()
            status = backward(steps, fields.transform_points(moving.affine.double(), every))[2]
            lost = 100 - 100 * status.count("ok") / len(status)
        doubts = ["nothing of it is left"] if len(voxels) and not left else []
        doubts += [f"{lost:.2g} % of it lies outside the field or in a fold"] if lost else []
        doubt = f"; CHECK: {', '.join(doubts)}" if doubts else ""
        print(f"{name}: {len(voxels) * voxel_ml[0]:.2f} ml, on the fixed grid {left * voxel_ml[1]:.2f} ml{doubt}")


def apply_to_segmentations(
    transform: Path, files: Sequence[Path], moving: Path, fixed: Path, folder: Path
) -> list[Path]:
    """Take DICOM segmentations of a moving series to the fixed one, as targets_1.dcm and so on in a folder.

    One that does not lie in the moving series' frame of reference is left out, and named.

    Returns:
        What was written.

    Raises:
        InputError: any refusal of `apply`.
    """
    frame, written = read_series(moving)[0].FrameOfReferenceUID, []
    for number, file in enumerate(files, start=1):
        ((_, header),) = read_headers(file)
        if header.get("FrameOfReferenceUID") != frame:
            print(f"CHECK: {header.get('SeriesDescription', file)}: not in the moving image's frame, left out")
            continue
        written.append(folder / f"targets_{number}.dcm")
        apply([str(transform)], str(written[-1]), moving=str(file), reference=str(fixed), label=True)
    return written


def apply(
    transforms: Sequence[str],
    output: str,
    moving: str | None = None,
    reference: str | None = None,
    label: bool = False,
    interpolation: str | None = None,
    points: str | None = None,
    points_from: str | None = None,
    coordinates: str | None = None,
    moving_spacing: float | Sequence[float] | None = None,
    moving_series: str | int | None = None,
) -> None:
    """Check what was asked for, then warp images or take points to the other image; see the `apply` verb.

    Raises:
        InputError: settings that do not go together; any refusal of the above.
    """
    _check_settings(locals())
    moving, reference, points = (None if p is None else readable(p) for p in (moving, reference, points))
    refuse_overlap([*transforms, *(p for p in (moving, reference, points) if p is not None)], [output], "--output")
    steps = compose(transforms)
    if points is not None:
        apply_to_points(steps, transforms, points, points_from, coordinates, output)
    else:
        files = (moving, reference, output)
        told = (label, interpolation or "linear", moving_spacing, moving_series)
        apply_to_images(steps, transforms, *files, *told)
    print(NOTICE)


def _check_settings(given: dict[str, Any]) -> None:
    if (given["moving"] is None) == (given["points"] is None):
        raise InputError("give either --moving, an image, labels or a folder of them, or --points, a file of points")
    if given["points"] is not None:
        if given["points_from"] not in ("fixed", "moving"):
            raise InputError(
                f"points_from {given['points_from']}: say which image the points were marked in, --points_from fixed or"
                " --points_from moving"
            )
        idle = ("reference", "label", "interpolation", "moving_spacing", "moving_series")
        idle = [name for name in idle if given[name]]
    else:
        idle = [name for name in ("points_from", "coordinates") if given[name] is not None]
        if given["label"] and given["interpolation"]:
            raise InputError("--label True interpolates each label linearly; leave out --interpolation")
        if given["interpolation"] not in (None, *INTERPOLATIONS):
            raise InputError(f"interpolation {given['interpolation']}: expected one of {', '.join(INTERPOLATIONS)}")
    if idle:
        raise InputError(f"--{idle[0]} has no meaning for {'points' if given['points'] is not None else 'images'}")
