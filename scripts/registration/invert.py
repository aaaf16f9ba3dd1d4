"""The inverse of a transform as a displacement field of its own; see the `invert` verb."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.data.files import readable, written_together
from scripts.data.formats import Step, save_displacement
from scripts.data.kept import refuse_overlap
from scripts.data.volumes import load_volume, save_volume
from scripts.network import fields
from scripts.registration.apply import compose
from scripts.registration.apply_points import backward
from scripts.registration.outputs import NOTICE

AT_ONCE = 2**17  # points inverted at a time
SHARES = (50, 99, 100)  # percentiles of the residual that are said


def inverse_field(steps: Sequence[Step], affine: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The displacement from moving to fixed points at the voxels of a grid of the moving world.

    Args:
        steps: fixed to moving, see `scripts.data.formats.read_transform`.
        affine: voxel -> RAS mm of the grid, shape (4, 4), float64.
        size: its voxels.

    Returns:
        Shape (3, *size), float64, RAS mm; where no inverse is known, the displacement of the nearest voxel that has
        one. Whether it is known, (*size) bool; the residual, how far each voxel is taken back from itself, mm.

    Raises:
        InputError: it is known nowhere on the grid.
    """
    points = fields.world_grid(size, affine).flatten(2)[..., None, None]
    found, residual, known = [], [], []
    for part in tqdm(points.split(AT_ONCE, dim=2), desc="invert", disable=points.shape[2] <= AT_ONCE):
        to, off, status = backward(steps, part)
        found, residual = [*found, to - part], [*residual, off]
        known += [state == "ok" for state in status]
    field, mask = torch.cat(found, dim=2).reshape(3, *size), torch.tensor(known).reshape(*size)
    if not mask.any():
        raise InputError("no inverse anywhere on the reference; is that an image of the moving world?")
    nearest = distance_transform_edt(~mask.numpy(), return_distances=False, return_indices=True)
    return field[(slice(None), *nearest)], mask, torch.cat(residual).reshape(*size)


def invert(transforms: Sequence[str], reference: str, output: str) -> None:
    """Write the inverse of one or several transforms, and where it is known; see the `invert` verb.

    Raises:
        InputError: a file that cannot be used or written.
    """
    if not output.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{output}: the inverse is written as NIfTI; choose a name that ends in .nii.gz")
    target = Path(output)
    mask_file = target.with_name(re.sub(r"(\.nii(\.gz)?)$", r"_known\1", target.name, flags=re.IGNORECASE))
    refuse_overlap([*transforms, reference], [target, mask_file], "--output")
    grid = load_volume(readable(reference))
    affine, size = grid.affine.double(), tuple(grid.shape[1:])
    field, known, residual = inverse_field(compose(transforms), affine, size)
    with written_together(target.parent) as partial:
        save_displacement(partial / target.name, field.numpy(), affine.numpy())
        save_volume(partial / mask_file.name, known.numpy(), affine.numpy(), dtype=np.uint8)
    said = ", ".join(
        f"{value:.2g} mm at {share} %"
        for share, value in zip(SHARES, np.percentile(residual[known], SHARES), strict=True)
    )
    print(f"{output}: moving to fixed points, LPS mm, on the grid of {reference}; it pulls fixed images onto it")
    print(f"{mask_file}: known at {100 * known.double().mean():.1f} % of the voxels, residual {said}")
    print(NOTICE)
