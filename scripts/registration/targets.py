"""Targets: what a transform makes of a sphere around a point, and what makes its place in the other image doubtful.

None of it is an error bar. The glands found say whether the field is held by anything there, the spread whether the
networks agree; that of a network and its mirror image did not rank the errors of 78 pairs (Spearman -0.07), that of two
networks did so weakly (0.43 on 21 pairs), of three not (0.03 on 44).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from monai.data import MetaTensor
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from scripts.data.volumes import load_volume
from scripts.network import fields
from scripts.registration.outputs import GLANDS, SPREAD

FIELDS = ("ddf.nii.gz", "ddf.h5")  # whose folder is that of a registration
BESIDE = {"moving_gland": GLANDS[0], "fixed_gland": GLANDS[1], "spread": SPREAD}
OUTSIDE = 2.0  # mm outside a gland found that are doubtful: about a voxel of the field
DEPTHS = 3.0  # mm by which the depths in the two glands may differ
APART = 1.0  # mm of spread
STRETCH = (0.7, 1.5)  # of the initial transform's limits, configs/inference.json
WEAK = "these figures are no error bars: a small spread promises nothing (docs/transforms.md)"


def spheres(through: Callable, centres: Tensor, radii: Tensor) -> tuple[Tensor, list[str]]:
    """What becomes of spheres, by the differences between their poles.

    Args:
        through: takes points (1, 3, N, 1, 1), float64, RAS mm, to the other image; see `scripts.registration.apply`.
        centres: shape (N, 3), float64, RAS mm.
        radii: shape (N,), mm.

    Returns:
        The semi-axes of the ellipsoids in mm, the longest first, shape (N, 3), NaN where a pole has no place; and what
        is wrong with the poles of each sphere, "ok" if nothing is.
    """
    ends = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    poles = centres[:, None] + radii[:, None, None] * ends
    moved, _, states = through(poles.reshape(-1, 3).T[None, :, :, None, None])
    moved = moved[0, :, :, 0, 0].T.reshape(-1, 6, 3)
    axes = torch.linalg.svdvals((moved[:, :3] - moved[:, 3:]) / 2)
    wrong = [[state for state in states[6 * n : 6 * n + 6] if state != "ok"] for n in range(len(centres))]
    axes[[bool(found) for found in wrong]] = torch.nan
    return axes, [found[0] if found else "ok" for found in wrong]


def evidence(transforms: Sequence[str]) -> dict[str, MetaTensor]:
    """The glands found, 1 inside, and the networks' spread, mm, that lie beside the one field of a registration."""
    if len(transforms) != 1 or Path(transforms[0]).name not in FIELDS:
        return {}
    files = {name: Path(transforms[0]).parent / file for name, file in BESIDE.items()}
    return {name: load_volume(str(file)) for name, file in files.items() if file.is_file()}


def outside(gland: MetaTensor, points: Tensor) -> Tensor:
    """How far points (N, 3), RAS mm, lie outside a gland (1, X, Y, Z), to about half a voxel: mm, shape (N,).

    Negative inside; NaN beyond the image, which does not show how far the gland reaches, and where there is no gland.
    """
    inside = gland[0].numpy() > 0.5
    if not inside.any():
        return torch.full((len(points),), torch.nan, dtype=torch.float64)
    voxel = gland.affine[:3, :3].norm(dim=0).tolist()
    away = distance_transform_edt(~inside, voxel) - distance_transform_edt(inside, voxel)
    away -= (1 - 2 * inside) * (sum(voxel) / 6)  # from the centre of the nearest other voxel to the face between
    return sampled(MetaTensor(torch.from_numpy(away)[None], affine=gland.affine), points)


def sampled(volume: MetaTensor, points: Tensor) -> Tensor:
    """A volume (1, X, Y, Z) at points (N, 3), RAS mm: shape (N,), NaN beyond it."""
    at, affine = points.T[None, :, :, None, None], volume.affine.double()
    there = fields.covers(volume.shape[1:], affine, at)
    values = fields.sample(volume.as_tensor()[None].double(), fields.transform_points(torch.linalg.inv(affine), at))
    return torch.where(there, values, torch.nan).flatten()


def figures(
    found: Mapping[str, MetaTensor], places: Mapping[str, Tensor], axes: Tensor, radii: Tensor, states: Sequence[str]
) -> dict[str, list]:
    """The figures of targets, a column each, and what makes their places doubtful, an empty text if nothing does.

    Args:
        found: see `evidence`.
        places: of the targets in the "moving" and the "fixed" image, (N, 3), RAS mm.
        axes, states: see `spheres`; radii: of the spheres, (N,), mm.
    """
    columns = {
        "radius_min_mm": axes[:, 2],
        "radius_max_mm": axes[:, 0],
        "volume_ratio": axes.prod(dim=1) / radii**3,
    }
    for side, points in places.items():
        if f"{side}_gland" in found:
            columns[f"outside_{side}_gland_mm"] = outside(found[f"{side}_gland"], points)
    if "spread" in found:
        columns["spread_mm"] = sampled(found["spread"], places["fixed"])
    told = {name: values.tolist() for name, values in columns.items()}
    rows = [dict(zip(told, values, strict=True)) for values in zip(*told.values(), strict=True)]
    missing = [file for name, file in BESIDE.items() if name not in found]
    doubts = [_doubts(row, radius, state) for row, radius, state in zip(rows, radii.tolist(), states, strict=True)]
    lacking = [f"not asked, because there is no {', no '.join(missing)}"] if missing else []
    return told | {"doubt": ["; ".join([*doubt, *lacking]) for doubt in doubts]}


def _doubts(row: Mapping[str, float], radius: float, state: str) -> list[str]:
    doubts = [f"part of its sphere: {state}"] * (state != "ok")
    depths = [(side, row.get(f"outside_{side}_gland_mm")) for side in ("moving", "fixed")]
    depths = [(side, depth) for side, depth in depths if depth is not None]
    for side, depth in depths:
        doubts += [f"beyond the {side} image, or no gland in it"] * math.isnan(depth)
        doubts += [f"{depth:.1f} mm outside the gland found in the {side} image"] * (depth > OUTSIDE)
    one, other = (depths[0][1], depths[-1][1]) if depths else (0, 0)
    if min(one, other) < 0 and abs(one - other) > DEPTHS:
        doubts.append(f"the two glands found disagree how deep it lies, {-one:.1f} and {-other:.1f} mm")
    spread = row.get("spread_mm", 0.0)
    doubts += [f"the networks are {spread:.1f} mm apart"] * (spread > APART)
    stretched = (row["radius_min_mm"] / radius, row["radius_max_mm"] / radius)
    if stretched[0] < STRETCH[0] or stretched[1] > STRETCH[1]:
        doubts.append("its sphere is stretched {:.2f} to {:.2f} times".format(*stretched))
    return doubts


def line(name: str, row: Mapping[str, float | str], radius: float) -> str:
    """What is printed of a target."""
    axes = "{radius_min_mm:.1f} to {radius_max_mm:.1f} mm, {volume_ratio:.2f} of its volume".format(**row)
    whole = not math.isnan(row["volume_ratio"])
    said = [f"{name}: sphere of {radius:g} mm " + (f"becomes {axes}" if whole else "reaches beyond what is known")]
    for side in ("moving", "fixed"):
        depth = row.get(f"outside_{side}_gland_mm", math.nan)
        if not math.isnan(depth):
            said.append(f"{abs(depth):.1f} mm {'outside' if depth > 0 else 'inside'} the gland of the {side} image")
    if not math.isnan(row.get("spread_mm", math.nan)):
        said.append(f"spread {row['spread_mm']:.2f} mm")
    return "; ".join([*said, *([f"CHECK: {row['doubt']}"] if row["doubt"] else [])])
