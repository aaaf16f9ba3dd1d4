"""Training batches for the gland segmentation network: cubes of single volumes as its two passes see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from scipy.spatial.transform import Rotation
from torch import Tensor

from scripts.data.checks import InputError
from scripts.registration.segmentation import SIDE, close_up, cube_affine, frame, on_cube, standardised
from scripts.training.cohort import SIDES, CohortLoader


class GlandLoader(CohortLoader):
    """Batches for the network of the learned initial transform: cubes of single volumes, MR and TRUS in equal numbers.

    Every second cube is the whole volume, the others are close to the gland, as the first and the second pass see it,
    and each lies at random: moved, turned, stretched, mirrored left to right, nearer or farther. Every second simulated
    volume is turned by a quarter about the long axis: public data sets have headers whose first axis is
    called left-right but runs front to back. Grey levels are bent, blurred and made noisy. A share of the cubes shows
    the body upside down, back to front, or both, as wrong headers do: there is no gland to find in these.

    A batch is a dictionary: `image` and `label` (B, 1, SIDE, SIDE, SIDE), on the device; `case`, a list.

    Args:
        arguments: those of `CohortLoader`; pairs are as `scripts.data.pairs.LoadPaird` leaves them, label 0 the gland,
            and `batch_size` counts volumes.
        augmentation: scale of all the above; 1 is the default, 0 switches it off.
        seed: of the draws.
        left_right: which of the cohort's axes, in the order nearest to RAS, runs from left to right: 0 where headers
            tell the truth, 1 in label-reg's public sample.
        misoriented_share: the share of cubes that are upside down or back to front.
    """

    def __init__(
        self,
        *arguments: Any,
        augmentation: float = 1.0,
        seed: int = 0,
        left_right: int = 0,
        misoriented_share: float = 0.0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, augmentation=augmentation, seed=seed, **named)
        self.left_right, self.misoriented_share = left_right, misoriented_share
        self.noise = torch.Generator(self.device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"noise": self.noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.noise.set_state(state["noise"].cpu())

    def _keep(self, data: Mapping[str, Any]) -> dict[str, Any]:
        pair = {"case": data["case"], "simulated": data.get("simulated", False)}
        for side in SIDES:
            image = data[f"{side}_image"].as_tensor().to(self.device)
            gland = data[f"{side}_label"][:1].as_tensor().to(image)
            if not gland.any():
                raise InputError(f"{data['case']}: label 0, the gland, is empty in the {side} image")
            volumes = torch.cat([image - image.min(), gland])  # nothing is darker than what is outside
            pair[side] = MetaTensor(volumes, affine=data[f"{side}_image"].affine)
            pair[f"{side}_frame"] = frame(data[f"{side}_image"])
            pair[f"{side}_close"] = close_up(data[f"{side}_label"][:1])
        return pair

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.epoch_length):
            drawn = [self._draw(SIDES[i % 2]) for i in range(self.batch_size)]
            bends = [self._draw_bend() for _ in drawn if self.augmentation]
            self.pool.renew()
            cases, volumes, affines, right_way = zip(*drawn[self.mine], strict=True)
            cubes = torch.cat([on_cube(*pair) for pair in zip(volumes, affines, strict=True)])
            image, label = cubes.split(1, dim=1)
            label = label * torch.tensor(right_way).to(label)[:, None, None, None, None]
            if bends:
                image = torch.cat([self._bend(cube, *bend) for cube, bend in zip(image, bends[self.mine], strict=True)])
            yield {"image": standardised(image), "label": label, "case": list(cases)}

    def _draw(self, side: str) -> tuple[str, MetaTensor, Tensor, bool]:
        """A case, its volume with its gland (2, X, Y, Z), voxel -> world of a random cube, and is it the right way?"""
        pair, strength = self.pool.draw(self.random), self.augmentation
        centre, axes, length = pair[f"{side}_frame"]
        near = strength and self.random.random() < 0.5  # as the second pass sees it
        if near:
            centre, length = pair[f"{side}_close"]
        turn = Rotation.from_rotvec(self.random.normal(0, 6 * strength, 3), degrees=True)
        if strength and pair["simulated"] and self.random.random() < 0.5:
            turn = turn * Rotation.from_rotvec([0, 0, -90], degrees=True)  # first axis: towards the rectum
        stretch = np.exp(self.random.normal(0, 0.08 * strength, 3))
        left_right = 0 if pair["simulated"] else self.left_right
        if strength and self.random.random() < 0.5:
            stretch[left_right] *= -1
        wrong = [[2], [1 - left_right], [2, 1 - left_right]]
        right_way = not self.misoriented_share or self.random.random() >= self.misoriented_share
        if not right_way:
            stretch[wrong[self.random.integers(3)]] *= -1
        axes = axes @ torch.from_numpy(np.diag(stretch) @ turn.as_matrix())
        shift = torch.from_numpy(self.random.uniform(-0.1, 0.1, 3) * strength * length)
        nearer = np.exp(self.random.uniform(-0.25 if near else -0.35, 0.2) * strength)
        return pair["case"], pair[side], cube_affine(centre + shift, axes, length * nearer), right_way

    def _draw_bend(self) -> tuple[float, np.ndarray, float | None, Tensor]:
        """How the grey levels of one cube change: gamma, slope along each axis, sigma of a blur, noise."""
        strength = self.augmentation
        gamma, slope = float(np.exp(self.random.normal(0, 0.3 * strength))), self.random.normal(0, 0.3 * strength, 3)
        sigma = float(self.random.uniform(0.4, 1.0)) if self.random.random() < 0.3 else None
        noise = torch.randn((1, 1, SIDE, SIDE, SIDE), generator=self.noise, device=self.device)
        return gamma, slope, sigma, self.random.uniform(0, 0.06) * strength * noise

    @staticmethod
    def _bend(cube: Tensor, gamma: float, slope: np.ndarray, sigma: float | None, noise: Tensor) -> Tensor:
        """Grey levels (1, SIDE, SIDE, SIDE), ≥ 0, changed as drawn; (1, 1, SIDE, SIDE, SIDE)."""
        cube = (cube[None] / cube.amax().clamp_min(1e-6)) ** gamma
        x, y, z = torch.from_numpy(slope).to(cube)
        where = torch.linspace(-1, 1, SIDE, device=cube.device)
        cube = cube * (x * where[:, None, None] + y * where[:, None] + z * where).exp()
        if sigma is not None:
            cube = GaussianFilter(3, sigma).to(cube.device)(cube)
        return cube + noise
