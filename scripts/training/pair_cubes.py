"""Training batches for the second stage: pairs in the cube of the fixed gland, aligned as an initial transform would.

Pairs are aligned by the centroids of their *labelled* glands, and each draw adds the error that a learned initial
transform makes: so no pair begins better than it will because the gland networks have learned from it. They only add
the glands that they find as channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.nn import functional as F

from scripts.data.checks import InputError
from scripts.network import fields
from scripts.registration.segmentation import CLOSE, NOMINAL, close_up, coarsened, cube_affine, frame, moments
from scripts.training.cohort import SIDES
from scripts.training.cubes import KNOTS, CubeLoader, bent, moved, rotation, seen
from scripts.training.on_disk import on_device

MARGIN = {"fixed": 1.25, "moving": 1.5}  # of the cubes that are kept, so that what is turned or moved is still there
START = {"shift": 2.2, "stretch": 0.05, "turn": 3.0}  # error of a learned start: mm, relative, degrees; per axis
HEAVY, HEAVY_SHARE = 2.5, 0.15  # so much larger is the shift of so many draws


def nominal_voxel(side: int) -> float:
    """Edge of a voxel of the gland's cube, in millimetres of a gland of nominal length."""
    return CLOSE * NOMINAL / side


class PairCubeLoader(CubeLoader):
    """Endless variety from labelled pairs, real and simulated, each in the cube of its fixed gland.

    A draw turns, stretches, mirrors and shifts both images together; the moving one alone once more, by the error of an
    initial transform and by a smooth random warp. The grey levels of each are bent, blurred and made noisy by
    themselves. Labels come along: the gland as a map, the centroid of every label as a point.

    A batch is a dictionary, all on the device but for `spacing` and `case`: `image` (B, 2, S, S, S), channel 0 moving,
    1 fixed, and where glands were found those as channels 2 and 3; `moving_label`, `fixed_label` (B, 1, S, S, S), the
    gland; `moving_points`, `fixed_points` (B, K, 3), voxels of the cube, NaN where a pair has fewer labels or one lies
    outside the cube; `spacing` (B, 3), nominal mm.

    Args:
        arguments: those of `CohortLoader`; pairs are as `scripts.data.pairs.LoadPaird` leaves them, label 0 the gland.
        side: voxels along each edge of the cube.
        augmentation: scale of what both images share and of the grey levels; 0 switches it off.
        start_error: scale of the error of the initial transform.
        warp: standard deviation of the random warp at its knots, nominal mm.
        seed: of the draws.

    Raises:
        InputError: no pair, a pair without a gland, or a batch that cannot be shared out evenly.
    """

    def __init__(
        self,
        *arguments: Any,
        side: int = 32,
        augmentation: float = 1.0,
        start_error: float = 1.0,
        warp: float = 0.0,
        **named: Any,
    ) -> None:
        self.side, self.start_error, self.warp = side, start_error, warp
        super().__init__(*arguments, augmentation=augmentation, **named)

    def _kept_by(self) -> dict[str, Any]:
        return {"side": self.side}

    def _keep(self, data: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Image and gland of either side in its cube, half precision, and the labels' centroids from its centre."""
        fixed_gland = data["fixed_label"][:1]
        if not fixed_gland.any() or not data["moving_label"][:1].any():
            raise InputError(f"{data['case']}: label 0, the gland, is empty")
        centre, length = close_up(fixed_gland)
        axes = frame(data["fixed_image"])[1]
        start = torch.eye(4, dtype=torch.float64)
        start[:3, 3] = moments(data["moving_label"][:1])[0] - moments(fixed_gland)[0]
        kept: dict[str, Any] = {"case": data["case"]}
        both = [m for m in range(len(data["fixed_label"])) if all(data[f"{s}_label"][m].any() for s in SIDES)]
        for name in SIDES:
            to_world = start if name == "moving" else torch.eye(4, dtype=torch.float64)
            side = 2 * math.ceil(self.side * MARGIN[name] / 2)
            cube = to_world @ cube_affine(centre, axes, length * side / self.side, side)
            volumes = []
            for key in (k for k in (f"{name}_image", f"{name}_label", f"{name}_gland") if k in data):
                padding = "border" if key.endswith("image") else "outside"
                volume = coarsened(MetaTensor(data[key][:1].as_tensor().float(), affine=data[key].affine), cube)
                to_volume = torch.linalg.inv(volume.affine.double()) @ cube
                volumes.append(fields.resample(volume.as_tensor()[None], to_volume, [side] * 3, padding_mode=padding))
            image = volumes[0] - volumes[0].amin()
            kept[name] = torch.cat([image / image.amax().clamp_min(1e-6), *volumes[1:]], 1)[0].half().to(device)
            centroids = torch.stack([moments(data[f"{name}_label"][m : m + 1])[0] for m in both])
            to_cube = torch.linalg.inv(to_world @ cube_affine(centre, axes, length, self.side))
            points = centroids @ to_cube[:3, :3].T + to_cube[:3, 3] - (self.side - 1) / 2
            kept[f"{name}_points"] = points.float().to(device)
        return kept

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.epoch_length):
            pairs = self._drawn()
            self.pool.renew()
            changes = self._changes()
            pairs = [
                {key: part if key == "case" else on_device(part, self.device) for key, part in pair.items()}
                for pair in pairs[self.mine]
            ]
            yield self._batch(pairs, {key: value[self.mine] for key, value in changes.items()})

    def _drawn(self) -> list[dict[str, Any]]:
        return [self.pool.draw(self.random) for _ in range(self.batch_size)]

    def _changes(self) -> dict[str, Tensor]:
        """Everything random of a batch, (B, …)."""
        strength, error, mm = self.augmentation, self.start_error, 1 / nominal_voxel(self.side)
        frame = self._frame(8)
        heavy = torch.where(self._uniform(1) < HEAVY_SHARE, HEAVY, 1.0)
        wrong_turn = rotation(math.radians(START["turn"] * error) * self._normal(3))
        wrong_stretch = (START["stretch"] * error * self._normal(3)).exp()
        return {
            "frame": frame,  # of the batch -> of what is kept
            "centre": 2 * strength * mm * self._normal(3),
            "wrong": torch.diag_embed(wrong_stretch) @ wrong_turn,
            "shift": START["shift"] * error * mm * heavy * self._normal(3),
            "knots": self.warp * mm * self._normal(3, *[KNOTS] * 3) * (self._uniform(1, 1, 1, 1) < 0.7),
            **self._looks(2, self.side),
        }

    def _batch(self, pairs: list[dict[str, Any]], change: Mapping[str, Tensor]) -> dict[str, Any]:
        side = self.side
        grid = fields.identity_grid([side] * 3, torch.float32, self.device) - (side - 1) / 2
        grid = grid.expand(len(pairs), -1, -1, -1, -1)
        frame, centre = change["frame"], change["centre"]
        warp = bent(change["knots"], side)
        places = {
            "fixed": moved(frame, centre, grid),
            "moving": moved(frame, centre, moved(change["wrong"], change["shift"], grid) + warp),
        }
        back = torch.linalg.inv_ex(frame).inverse  # `inv` waits for the device to say that there is one
        images, labels, glands, points = {}, {}, [], {}
        most = max(len(pair["fixed_points"]) for pair in pairs)
        for name in SIDES:
            kept = torch.stack([pair[name] for pair in pairs]).float()
            padding = ["border"] + ["outside"] * (kept.shape[1] - 1)
            sampled = fields.sample(kept, places[name] + (kept.shape[-1] - 1) / 2, padding_mode=padding)
            images[name], labels[name], *found = sampled.split(1, dim=1)
            glands += found
            known = [
                F.pad(p[f"{name}_points"], (0, 0, 0, most - len(p["fixed_points"])), value=math.nan) for p in pairs
            ]
            away = torch.stack(known) - centre[:, None]
            points[name] = torch.einsum("bij,bkj->bki", back, away)
        points["moving"] = _before(points["moving"], change, warp if self.warp else None)
        outside = (points["fixed"].abs() > side / 2 - 1).any(-1, keepdim=True)
        points["fixed"] = points["fixed"].masked_fill(outside, math.nan)
        image = torch.cat([images[name] for name in SIDES], dim=1)
        return {
            "image": torch.cat([seen(image, change), *glands], dim=1),
            **{f"{name}_label": labels[name] for name in SIDES},
            **{f"{name}_points": points[name] + (side - 1) / 2 for name in SIDES},
            "spacing": torch.full((len(pairs), 3), nominal_voxel(side), dtype=torch.float64),
            "case": [pair["case"] for pair in pairs],
        }


def _before(points: Tensor, change: Mapping[str, Tensor], warp: Tensor | None) -> Tensor:
    """Where points (B, K, 3) came from: y with ``wrong y + shift + warp(y)`` = point, from the middle of the cube."""
    back, away = torch.linalg.inv_ex(change["wrong"]).inverse, points - change["shift"][:, None]
    at = torch.einsum("bij,bkj->bki", back, away)
    if warp is None:
        return at
    for _ in range(20):  # a warp that does not fold contracts
        there = fields.at_points(warp, at.nan_to_num() + (warp.shape[-1] - 1) / 2)
        at = torch.einsum("bij,bkj->bki", back, away - there)
    return at
