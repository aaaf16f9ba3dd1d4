"""Labels on disk -> binary channels on the grid of their image: maps, index maps, segmentations of 3D Slicer and DICOM.

3D Slicer's `.seg.nrrd` holds layers, each an index map of segments that do not overlap, cropped to what is segmented.
Its keys, `Segment0_Layer` and so on, say which layer and value a segment has; those of before 2020 have a layer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import ensure_tuple

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.dicom.reader import is_segmentation
from scripts.data.itk_images import read_header
from scripts.data.volumes import load_segmentation, load_volume

FULL = (255, 65535)  # the largest unsigned integers: of two values they are the label's, as pictures have it
ROUNDING = 1e-3  # what resampling a binary map may leave of 0 and 1; a soft map is farther off somewhere


class Segment(NamedTuple):
    """A segment of a `.seg.nrrd`: its name, and the value that marks it in one of the layers, counted from 0."""

    name: str
    layer: int
    value: int


def checked_values(values: Any) -> list[int] | None:
    """The values of an index map, from one number, several, or text with commas; None stays None.

    Raises:
        InputError: none, one twice, or one that is no whole number above 0.
    """
    if values is None:
        return None
    given = values.strip(" []()").split(",") if isinstance(values, str) else ensure_tuple(values)
    try:
        numbers = [float(value) for value in given]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or any(not n.is_integer() or n <= 0 for n in numbers):
        raise InputError(f"label_values {values}: expected whole numbers above 0, each once, for example '[1,2,3]'")
    return [int(number) for number in numbers]


def load_label(
    path: str,
    image_path: str,
    image: MetaTensor,
    values: Sequence[int] | None = None,
    spacing: float | Sequence[float] | None = None,
) -> MetaTensor:
    """The labels of an image (1, X, Y, Z): binary channels (M, X, Y, Z), float32, with an affine in RAS mm.

    Labels on the image's grid whose axes are stored in another order or direction are reordered, which loses nothing.

    Args:
        values: of an index map or of segments, in the order of the channels; None for binary maps, and for all
            segments in the order of the file.
        spacing: as of `scripts.data.volumes.load_volume`.

    Raises:
        InputError: see `scripts.data.checks`; a file that cannot be read.
    """
    if is_segmentation(path):
        label = load_segmentation(path, image, values)
        checks.check_labels(path, label.numpy())
        return label
    label = load_volume(path, spacing)
    segments = _segments(path)
    array, affine = _onto(path, label, image_path, image, cropped=bool(segments))
    array = whole(array)
    if segments:
        array = _split(path, array, segments, values)
    elif values is not None:
        array = _split_values(path, array, values)
    array = binary(path, array)
    checks.check_labels(path, array)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine)


def load_maps(path: str, *told) -> MetaTensor:
    """Labels as they are stored, for `apply`: an index map (1, X, Y, Z) or binary maps (M, X, Y, Z), float32.

    Those that hold no more than what is segmented get a margin of one empty voxel: there the label ends, not the image.

    Args:
        told: further arguments of `scripts.data.volumes.load_volume`.
    """
    label = load_volume(path, *told)
    array, segments, affine = whole(label.numpy()), _segments(path), label.affine.double()
    if len(array) > 1:
        array = binary(path, _split(path, array, segments, None) if segments else array)
    if segments or is_segmentation(path):
        array = np.pad(array, [(0, 0), *[(1, 1)] * 3])
        affine[:3, 3] -= affine[:3, :3].sum(dim=1)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine)


def whole(labels: np.ndarray) -> np.ndarray:
    """Labels without what rounding left on them: 0.99999994 is 1; those that are no whole numbers stay as they are."""
    nearest = labels.round()
    with np.errstate(invalid="ignore"):
        return nearest if (np.abs(labels - nearest) <= ROUNDING).all() else labels


def binary(path: str, labels: np.ndarray) -> np.ndarray:
    """Maps of 0 and 255 (or 65535) as maps of 0 and 1, aloud; others as they are."""
    values = np.unique(labels)
    if values[-1] not in FULL or not np.isin(values, (0, values[-1])).all():
        return labels
    checks.repaired(path, f"label values 0 and {values[-1]:g} taken as 0 and 1")
    return labels / values[-1]


def _segments(path: str) -> list[Segment]:
    """The segments of 3D Slicer's that the header of an NRRD names, in its order; none of another file."""
    header = read_header(Path(path))[0]
    found = []
    while f"Segment{len(found)}_ID" in header:
        at = f"Segment{len(found)}_"
        found.append(
            Segment(
                header.get(f"{at}Name", header[f"{at}ID"]),
                int(header.get(f"{at}Layer", len(found))),
                int(header.get(f"{at}LabelValue", 1)),
            )
        )
    return found


def _split(path: str, layers: np.ndarray, segments: Sequence[Segment], values: Sequence[int] | None) -> np.ndarray:
    """Segments as binary channels (M, X, Y, Z), of layers (L, X, Y, Z)."""
    known = {(segment.layer, segment.value) for segment in segments}
    for layer, values_there in enumerate(np.unique(one) for one in layers):
        stray = [value for value in values_there if value and (layer, value) not in known]
        if stray:
            raise InputError(f"{path}: value {stray[0]:g} of layer {layer} belongs to no segment; export it anew")
    if max(segment.layer for segment in segments) >= len(layers):
        raise InputError(f"{path}: it names more layers than the {len(layers)} it holds; export it anew")
    if values is not None:
        named = ", ".join(f"{segment.value} ({segment.name})" for segment in segments)
        if sorted(values) != sorted(segment.value for segment in segments):
            raise InputError(f"{path}: values {list(values)}, but its segments have {named}; leave out --label_values")
        segments = sorted(segments, key=lambda segment: values.index(segment.value))
    return np.stack([layers[segment.layer] == segment.value for segment in segments]).astype(np.float32)


def _split_values(path: str, label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The values of an index map (1, X, Y, Z) as binary channels (M, X, Y, Z)."""
    unknown = sorted(set(np.unique(label)) - {0, *values})
    if len(label) != 1 or unknown:
        found = f"value {unknown[0]:.8g}" if unknown else f"{len(label)} channels"
        raise InputError(f"{path}: {found} in an index map of values {list(values)}")
    return np.concatenate([label == value for value in values]).astype(np.float32)


def _onto(
    path: str, label: MetaTensor, image_path: str, image: MetaTensor, cropped: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """A label on its image's grid, with its affine: axes reordered and turned; a cropped one filled up with 0.

    Raises:
        InputError: its voxels are not the image's; it marks some outside the image.
    """
    array, affine = label.numpy(), label.affine.double().numpy()
    size, onto = tuple(image.shape[1:]), image.affine.double().numpy()
    steps = (np.linalg.inv(onto) @ affine).round()  # label voxel -> image voxel
    turned, far = steps[:3, :3], (np.array(array.shape[1:]) - 1, 1)
    on_grid = (np.abs(turned).sum(axis=0) == 1).all() and (np.abs(turned).sum(axis=1) == 1).all()
    apart = checks.distance(array.shape[1:], affine, onto @ steps)
    if on_grid and apart <= 0.1 * np.linalg.norm(onto[:3, :3], axis=0).min():
        axes = np.abs(turned).argmax(axis=1)  # of the label, for each of the image's
        first = np.minimum(steps[:3, 3], steps[:3] @ np.hstack(far)).astype(int)  # its place in the image
        there = np.flip(array.transpose(0, *(axes + 1)), [axis + 1 for axis in range(3) if turned[axis].sum() < 0])
        if there.shape[1:] == size and not first.any():
            return there, image.affine
        if cropped:
            return _filled(path, there, first, image_path, size), image.affine
    if cropped:
        raise InputError(f"{path}: its voxels are not those of its image {image_path}; take that as reference geometry")
    checks.check_label_geometry(path, tuple(array.shape[1:]), affine, image_path, size, onto)
    return array, label.affine


def _filled(path: str, part: np.ndarray, first: np.ndarray, image_path: str, size: Sequence[int]) -> np.ndarray:
    """Channels (M, X, Y, Z) of a part of a grid on the whole of it, 0 elsewhere; `first` is the part's place there."""
    filled = np.zeros((len(part), *size), part.dtype)
    begin, end = np.maximum(first, 0), np.maximum(np.minimum(first + part.shape[1:], size), 0)
    inside = tuple(slice(a, max(a, b)) for a, b in zip(begin - first, end - first, strict=True))
    there = tuple(slice(a, max(a, b)) for a, b in zip(begin, end, strict=True))
    filled[:, *there] = part[:, *inside]
    lost = np.count_nonzero(part) - np.count_nonzero(filled)
    if lost:
        raise InputError(f"{path}: {lost} labelled voxels lie outside its image {image_path}")
    return filled
