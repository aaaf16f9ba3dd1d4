"""What the page of a registration shows, as its JavaScript takes it: images, outlines, deformation and targets.

All is on one grid, its axes towards R, A, S as nearly as the fixed image's lie.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from scripts.data.datalist import LABELS
from scripts.data.formats import forward
from scripts.data.volumes import load_volume
from scripts.network import fields
from scripts.registration.initial_transform import read_initial_transform
from scripts.registration.metrics import centroid
from scripts.registration.outputs import GLANDS
from scripts.registration.reread import Reread, pulled
from scripts.registration.segmentation import on_grid
from scripts.registration.transforms import as_declared

OUTLINE = 3.0  # mm around a gland's outline in which the distance to it is kept
NODE = 3.0  # mm between the nodes of the field that is drawn, about
GLAND_CENTRE, GLAND_LABEL, LARGEST_DEFORMATION = "centre of the gland on TRUS", "gland, by label", "largest deformation"


class Target(NamedTuple):
    """A place to jump to: what it is, and its voxel on the page's grid."""

    name: str
    voxel: list[float]


def shown_data(
    shown: Reread, marked: Sequence[tuple[str, Tensor]], voxels: int
) -> tuple[dict[str, Any], dict[str, list[int]], list[str]]:
    """What `view.js` reads, of a grid of at most so many voxels.

    Args:
        marked: targets, by name, in the fixed world as declared, RAS mm, (3,).

    Returns:
        The data, as JSON takes it; of "trus" and "mr", what is black and white at first; and what is left out or
        coarser than in the files, in sentences.
    """
    affine, size = grid_of(shown.pair["fixed_image"], voxels)
    moving, fixed = shown.pair["moving_image"], shown.pair["fixed_image"]
    (centred,) = read_initial_transform("centre", moving, fixed)

    def unmoved(volume: MetaTensor) -> MetaTensor:
        return MetaTensor(volume.as_tensor(), affine=torch.linalg.inv(centred) @ moving.affine.double())

    images = {"fixed": fixed, "after": shown.warped, "before": unmoved(moving)}
    grey = {name: on_grid(image, affine, size)[0, 0].numpy() for name, image in images.items()}
    ends, windows = {}, {}
    for side, image in (("trus", fixed), ("mr", moving)):
        ends[side] = np.percentile(image.numpy(), (0.1, 99.9))
        windows[side] = bytes_of(np.percentile(image.numpy(), (1, 99)), *ends[side]).tolist()
    grey = {name: bytes_of(image, *ends["trus" if name == "fixed" else "mr"]) for name, image in grey.items()}
    masks = list(_masks(shown, affine, size, unmoved))
    field = _field(shown, affine, size)
    remarks = list(shown.remarks)
    targets = list(_targets(masks, marked, affine, size, field, remarks))
    spacing = affine[:3, :3].norm(dim=0).tolist()
    plain = nib.Nifti1Image(np.zeros(size, np.uint8), np.diag([*spacing, 1.0]))
    gland = next((target.voxel for target in targets if target.name.startswith((GLAND_CENTRE, GLAND_LABEL))), None)
    data = {
        "size": size,
        "spacing": spacing,
        "affine": affine[:3].tolist(),
        "start": gland or [(n - 1) / 2 for n in size],
        "grid": base64.b64encode(gzip.compress(plain.to_bytes(), mtime=0)).decode(),
        "images": {name: packed(image) for name, image in grey.items()},
        "masks": [mask | {"values": packed(mask["values"])} for mask in masks],
        "field": field and field | {"values": packed(field["values"])},
        "targets": [target._asdict() for target in targets],
    }
    own = shown.pair["fixed_image"].shape[1:]
    drawn = f"{' × '.join(map(str, size))} voxels of {' × '.join(f'{mm:.2g}' for mm in spacing)} mm"
    if math.prod(size) < math.prod(own):
        remarks.append(
            f"The images are coarser here than in the files: {drawn}, where the TRUS has {' × '.join(map(str, own))}."
        )
    return data, windows, remarks


def grid_of(image: MetaTensor, voxels: int) -> tuple[Tensor, list[int]]:
    """A grid over an image, its axes towards R, A, S as nearly as they lie, of at most so many voxels: affine, size."""
    upright = Orientation(axcodes="RAS", labels=None)(MetaTensor(image.as_tensor()[:1], affine=image.affine.double()))
    own, count = upright.affine.double(), torch.tensor(upright.shape[1:], dtype=torch.float64)
    spacing = own[:3, :3].norm(dim=0)
    finest = spacing.clone()
    while (count * spacing / finest).ceil().prod() > voxels:  # the finest axes first, they lose least
        finest = torch.maximum(finest, finest.min() * 1.02)
    size = (count * spacing / finest - 1e-6).ceil()
    affine = own.clone()
    affine[:3, :3] *= finest / spacing
    affine[:3, 3] += own[:3, :3] @ ((count - 1) / 2) - affine[:3, :3] @ ((size - 1) / 2)
    return affine, size.int().tolist()


def rounded(mask: MetaTensor) -> MetaTensor:
    """A binary mask (1, X, Y, Z) in [0, 1], 0.5 at its outline, that has no steps between thick slices.

    Shape-based interpolation (Raya and Udupa 1990): what is interpolated is the distance to the outline in a slice.
    """
    inside, spacing = mask.numpy()[0] > 0.5, mask.affine[:3, :3].norm(dim=0).numpy().copy()
    if not inside.any():
        return mask
    margins = np.ceil(OUTLINE / spacing).astype(int) + 1
    ends = zip(np.argwhere(inside).min(0) - margins, np.argwhere(inside).max(0) + margins + 1, strict=True)
    box = tuple(slice(max(0, low), high) for low, high in ends)
    spacing[spacing.argmax()] = 1e6  # mm: nothing in another slice is near
    within, without = (distance_transform_edt(side, sampling=spacing) for side in (inside[box], ~inside[box]))
    values = np.zeros(inside.shape, np.float32)
    values[box] = np.clip(0.5 + (within - without) / (2 * OUTLINE), 0, 1)
    return MetaTensor(torch.from_numpy(values[None]), affine=mask.affine)


def bytes_of(image: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Grey levels between two values as 0 to 255."""
    return np.rint(255 * np.clip((image - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)


def packed(values: NDArray) -> str:
    """An array (X, Y, Z) or (3, X, Y, Z) as JavaScript unpacks it: the first of X, Y, Z fastest; gzip, base64."""
    flat = values.reshape(-1, *values.shape[-3:]).transpose(0, 3, 2, 1)
    return base64.b64encode(gzip.compress(np.ascontiguousarray(flat).tobytes(), 6, mtime=0)).decode()


def _masks(shown: Reread, affine: Tensor, size: list[int], unmoved: Any) -> Iterator[dict[str, Any]]:
    """Glands and labels on the page's grid, as probabilities from 0 to 255, and which image they are of."""

    def mask(kind: str, side: str, values: NDArray, when: str | None = None) -> dict[str, Any]:
        return {"kind": kind, "side": side, "when": when, "values": bytes_of(values, 0, 1)}

    found = all((shown.folder / name).is_file() for name in GLANDS)
    labelled = {key: shown.pair[key] for key in LABELS if key in shown.pair}
    if found:
        moving, fixed = (rounded(load_volume(str(shown.folder / name))) for name in GLANDS)
        fixed = MetaTensor(fixed.as_tensor(), affine=shown.pair["fixed_image"].affine)
        yield mask("glands", "fixed", on_grid(fixed, affine, size)[0, 0].numpy())
        yield mask("glands", "moving", pulled(shown, moving, affine, size)[0].numpy(), "after")
        yield mask("glands", "moving", on_grid(unmoved(moving), affine, size)[0, 0].numpy(), "before")
    if "fixed_label" in labelled:
        for values in on_grid(labelled["fixed_label"], affine, size)[0].numpy():
            yield mask("labels", "fixed", values)
    if "moving_label" in labelled:
        for values in pulled(shown, labelled["moving_label"], affine, size).numpy():
            yield mask("labels", "moving", values, "after")
        for values in on_grid(unmoved(labelled["moving_label"]), affine, size)[0].numpy():
            yield mask("labels", "moving", values, "before")


def _field(shown: Reread, affine: Tensor, size: list[int]) -> dict[str, Any] | None:
    """The deformation beyond the initial transform on nodes of the page's grid, mm / 100 along its axes; None without
    the initial transform as a matrix."""
    matrix = shown.record.get("initial_matrix")
    if matrix is None:
        return None
    spacing = affine[:3, :3].norm(dim=0)
    every = [max(1, round(NODE / mm)) for mm in spacing.tolist()]
    count = [-(-n // k) for n, k in zip(size, every, strict=True)]
    nodes = affine @ torch.diag(torch.tensor([*every, 1], dtype=torch.float64))
    x = fields.world_grid(count, nodes)
    to_header = torch.linalg.inv(as_declared(shown.pair, "fixed"))
    y, known = forward(shown.steps, fields.transform_points(to_header, x))
    y = fields.transform_points(as_declared(shown.pair, "moving"), y)
    back = torch.linalg.inv(torch.tensor(matrix, dtype=torch.float64))
    moved = (fields.transform_points(back, y) - x) * known
    along = torch.einsum("ji,bjxyz->ixyz", affine[:3, :3] / spacing, moved)
    length = along.norm(dim=0)
    most = torch.unravel_index(length.argmax(), length.shape)
    return {
        "size": count,
        "every": every,
        "most": max(1.0, round(length.max().item(), 1)),
        "place": [int(i) * k for i, k in zip(most, every, strict=True)],
        "values": np.rint(100 * along.numpy()).clip(-32767, 32767).astype("<i2"),
    }


def _targets(
    masks: Sequence[Mapping[str, Any]],
    marked: Sequence[tuple[str, Tensor]],
    affine: Tensor,
    size: Sequence[int],
    field: Mapping[str, Any] | None,
    remarks: list[str],
) -> Iterator[Target]:
    """The places that the page's list jumps to: points given, landmarks, the gland, the largest deformation."""
    for name, point in marked:
        voxel = (torch.linalg.inv(affine) @ torch.cat([point, torch.ones(1, dtype=torch.float64)]))[:3]
        if all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel.tolist(), size, strict=True)):
            yield Target(name, voxel.tolist())
        else:
            remarks.append(f"{name} is not shown: it lies outside the TRUS.")

    def centre(mask: dict) -> Tensor:
        return centroid(torch.from_numpy(mask["values"] / 255)[None, None], (1, 1, 1))[0]

    labels = {
        side: [m for m in masks if m["kind"] == "labels" and m["side"] == side and m["when"] != "before"]
        for side in ("fixed", "moving")
    }
    centres = {side: [centre(mask) for mask in of_one] for side, of_one in labels.items()}
    spacing = affine[:3, :3].norm(dim=0)
    for number, place in enumerate(centres["fixed"]):
        name = GLAND_LABEL if number == 0 else f"landmark {number}"
        if len(centres["moving"]) > number:
            apart = ((centres["moving"][number] - place) * spacing).norm().item()
            name += f", {apart:.1f} mm from the MR's" if math.isfinite(apart) else ", lost in warping"
        if not place.isnan().any():
            yield Target(name, place.tolist())
    glands = [mask for mask in masks if mask["kind"] == "glands" and mask["side"] == "fixed"]
    if glands and not centre(glands[0]).isnan().any():
        yield Target(GLAND_CENTRE, centre(glands[0]).tolist())
    if field is not None:
        yield Target(LARGEST_DEFORMATION, [float(v) for v in field["place"]])
