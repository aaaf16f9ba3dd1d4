"""What a registration says about itself: figures a clinician can question, and flags where they leave their limits.

`configs/qc_schema.json` says what each figure of qc.json is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from torch import Tensor

from scripts.data import renamed
from scripts.data.checks import InputError
from scripts.network import fields
from scripts.registration import metrics
from scripts.registration.initial_transform import read_initial_transform
from scripts.registration.transforms import transform_on

MEANINGS = {  # what a figure beyond its limits means, in the words of a flag
    "folded_percent": "the field folds",
    "jacobian_min": "the field squeezes tissue to nearly nothing",
    "covered_percent": "little of the fixed image is covered by the moving one",
    "initial_stretch_min": "implausible initial transform, the glands found differ too much",
    "initial_stretch_max": "implausible initial transform, the glands found differ too much",
    "inverse_consistency_mm": "registering the other way round gives another result",
    "agreement": "the networks do not agree on the gland in the {side} image",
    "blur": "the gland in the {side} image is found without confidence",
    "drift": "a closer look at the {side} image finds the gland elsewhere",
    "growth": "a closer look at the {side} image finds a gland of another size",
    "cut_percent": "the {side} image does not show the whole gland",
    "border_difference": "the images seem to be exchanged, the moving one is dark at its borders as ultrasound is",
    "orientation": "the {side} image seems to be stored with the axes {axes}, look at it and declare them"
    " by --{option}_axes {axes}",
}


def doubts(engine: Engine) -> list[dict[str, float | None]]:
    """What speaks against the field of each pair of the batch, voxels of the working grid; None where nothing is said.

    `inverse_consistency` is `refine.RefinedInferer`'s, `spread` `ensemble.FieldEnsemble`'s.
    """
    silent = [None] * len(engine.state.output)
    said = {
        "inverse_consistency": getattr(engine.inferer, "inconsistency", None) or silent,
        "spread": getattr(engine.network, "spread", None) or silent,
    }
    return [dict(zip(said, values, strict=True)) for values in zip(*said.values(), strict=True)]


def deformation(item: Mapping[str, Any]) -> Tensor:
    """The displacement without the initial transform on the same grid, (1, 3, X, Y, Z), mm in the fixed world."""
    ddf, grid_affine = torch.as_tensor(item["pred"])[None].cpu(), item["grid_affine"].cpu()
    size = item["displacement"].shape[1:]
    return fields.world_displacement(ddf, grid_affine, torch.eye(4), item["field_affine"], size)


def moved_from_centres(item: Mapping[str, Any]) -> Tensor:
    """How far the initial transform moves the fixed image's centre from where both centres coincide, mm, shape ()."""
    fixed = item["original_fixed_image"]
    (centred,) = read_initial_transform("centre", item["original_moving_image"], fixed)
    centre = fixed.affine.double().cpu().clone()
    centre[:3, 3] += centre[:3, :3] @ ((torch.tensor(fixed.shape[1:], dtype=torch.float64) - 1) / 2)
    moved = transform_on(item, torch.zeros_like(torch.as_tensor(item["pred"])), centre, (1, 1, 1)).flatten()
    return (moved - centred[:3, 3]).norm()


def in_gland(item: Mapping[str, Any], length: Tensor, x: Tensor) -> float:
    """The largest of lengths (1, 1, X, Y, Z) at world points x within the fixed gland, found or labelled; else NaN."""
    gland = next((item[key] for key in ("original_fixed_gland", "original_fixed_label") if key in item), None)
    if gland is None:
        return math.nan
    voxels = fields.transform_points(torch.linalg.inv(gland.affine.double().cpu()), x)
    there = fields.sample(gland.as_tensor()[None, :1].cpu().double(), voxels, padding_mode="outside") > 0.5
    return length[there].max().item() if there.any() else math.nan


def motion(record: Mapping[str, Any]) -> str:
    """What moved how far, in words, of the figures of a QC record; "" for one of before, without them."""
    if "translation_mm" not in record:
        return ""
    said = [f"MR moved by {record['translation_mm']:.1f} mm from aligned centres"]
    if record.get("initial_matrix"):
        stretch = 1 / torch.linalg.svdvals(torch.tensor(record["initial_matrix"], dtype=torch.float64)[:3, :3])
        said.append(f"stretched by {stretch.min():.2f} to {stretch.max():.2f}")
    deformed = f"deformed by up to {record['max_displacement_mm']:.1f} mm"
    if record.get("gland_displacement_mm") is not None:
        deformed += f", in the gland {record['gland_displacement_mm']:.1f} mm"
    return ", ".join([*said, deformed])


def border_brightness(image: Tensor) -> float:
    """How bright an image (1, X, Y, Z) is at its borders, above its darkest voxel, as a share of its mean.

    Of an axis it is the mean over the outer tenths at its two ends, of the image the median of the three axes.
    Ultrasound is a fan, dark at the borders of two axes; an MR fills a box, and is dark at those of one at most.
    """
    bright = torch.as_tensor(image)[0].double()
    bright = bright - bright.min()
    shares = []
    for axis, size in enumerate(bright.shape):
        width = max(1, size // 10)
        ends = bright.narrow(axis, 0, width).mean() + bright.narrow(axis, size - width, width).mean()
        shares.append(ends / 2 / bright.mean())
    return torch.stack(shares).median().item()


def quality(
    item: Mapping[str, Any],
    before: Mapping[str, Tensor],
    moved: Tensor,
    doubts: Mapping[str, float | None] | None = None,
) -> dict[str, float | None]:
    """The figures of one registration; None where one is not defined.

    Args:
        item: what `scripts.registration.transforms.ToOriginalGridd` leaves.
        before: `scripts.registration.transforms.to_original_grid` of the initial transform alone.
        moved: its `deformation`.
        doubts: of the pair, see there.
    """
    affine = item["original_fixed_image"].affine
    displacement, field_affine = item["displacement"][None], item["field_affine"]
    x = fields.world_grid(displacement.shape[2:], field_affine)
    shown = fields.covers(item["original_fixed_image"].shape[1:], affine.double(), x)  # not what lies beyond the image
    borders = [border_brightness(item[f"original_{side}_image"]) for side in ("moving", "fixed")]
    moving = item["original_moving_image"]
    covered = fields.covers(moving.shape[1:], moving.affine.double(), x + displacement)[shown]
    voxel = torch.as_tensor(item["grid_affine"])[:3, :3].norm(dim=0).mean().item()
    record = metrics.jacobian_statistics(displacement[0], field_affine) | {
        "max_displacement_mm": moved.norm(dim=1, keepdim=True)[shown].max().item(),
        "covered_percent": 100 * covered.double().mean().item(),
        "initial_stretch_min": item["initial_stretch"].min().item(),
        "initial_stretch_max": item["initial_stretch"].max().item(),
        "border_difference": borders[0] - borders[1],
        "translation_mm": moved_from_centres(item).item(),
        "gland_displacement_mm": in_gland(item, moved.norm(dim=1, keepdim=True), x),
    }
    for name in ("inverse_consistency", "spread"):
        doubt = (doubts or {}).get(name)
        record[f"{name}_mm"] = math.nan if doubt is None else doubt * voxel
    for side in ("moving", "fixed"):
        record |= {f"{side}_{name}": value for name, value in plain(item.get(f"{side}_confidence", {})).items()}
    if "original_fixed_label" in item and "warped_moving_label" in item:
        fixed = item["original_fixed_label"].as_tensor()
        for suffix, warped in (("_before", before["moving_label"]), ("", item["warped_moving_label"])):
            scores, _ = metrics.score_case(warped, fixed, affine[:3, :3].norm(dim=0))
            record[f"gland_dsc{suffix}"] = scores["dsc"]
            record[f"tre{suffix}_mm"] = scores["tre_mm"]
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def plain(confidence: Mapping[str, Any]) -> dict[str, float | str]:
    """The confidence in a gland, see `scripts.registration.segmentation.SegmentGlandsd`, as JSON takes it."""
    return {name: value if isinstance(value, str) else float(value) for name, value in confidence.items()}


def flags(
    record: Mapping[str, Any],
    limits: Mapping[str, tuple[float | None, float | None]],
    sides: Sequence[str] = ("moving_", "fixed_"),
) -> list[str]:
    """What about a registration should make its reader doubt it, in words, with the figure and its limit.

    Args:
        record: of `quality`; or of a single image.
        limits: the lowest and the highest value that raises no flag of each figure, None for no such limit; of both
            images if the name is without `moving_` or `fixed_`.
        sides: what the figures of an image begin with; an empty text for those of a single image.

    Raises:
        InputError: limits of a figure that there is none of.
    """
    found = []
    for name, (low, high) in renamed.current(limits, renamed.FIGURES).items():
        if name not in MEANINGS:
            raise InputError(f"limits: {name} is none of {', '.join(MEANINGS)}")
        for side in sides if "{side}" in MEANINGS[name] else ("",):
            value = record.get(f"{side}{name}")
            if value is None:
                continue
            limit = low if low is not None and value < low else high if high is not None and value > high else None
            if limit is not None:
                one = side.strip("_")
                meaning = MEANINGS[name].replace("{side} ", f"{one} ".lstrip())
                meaning = meaning.format(axes=record.get(f"{side}axes"), option=one or "image")
                found.append(f"{meaning} ({side}{name} {value:.3g}, limit {limit:g})")
    return found
