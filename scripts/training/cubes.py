"""What the batches of cubes have in common: where their random numbers come from, and what changes the grey levels.

Everything random of a batch is drawn on its device and applied to all of its cubes in a few tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.training.cohort import CohortLoader

KNOTS = 5  # along each axis, between which a random warp is linear


class CubeLoader(CohortLoader):
    """A loader whose random numbers are drawn on the device, but for those that choose what is drawn."""

    def __init__(self, *arguments: Any, seed: int = 0, **named: Any) -> None:
        super().__init__(*arguments, seed=seed, **named)
        self.draws = torch.Generator(self.device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"draws": self.draws.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.draws.set_state(state["draws"].cpu())

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.draws, device=self.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch_size, *shape, generator=self.draws, device=self.device)

    def _frame(self, degrees: float) -> Tensor:
        """Random linear maps (B, 3, 3): turned about each axis, stretched along each, and half of them mirrored."""
        strength = self.augmentation
        stretch = (0.08 * strength * self._normal(3)).exp()
        half = self._uniform() < 0.5 * bool(strength)
        stretch[:, 0] *= 1 - 2 * half
        return rotation(math.radians(degrees * strength) * self._normal(3)) * stretch[:, None]

    def _looks(self, channels: int, side: int) -> dict[str, Tensor]:
        """What `seen` changes of cubes (B, channels, side, side, side)."""
        strength = self.augmentation
        return {
            "gamma": (0.3 * strength * self._normal(channels, 1, 1, 1)).exp(),
            "slope": 0.3 * strength * self._normal(channels, 3),
            "blur": (self._uniform(channels) < 0.3) * (0.4 + 0.6 * self._uniform(channels)) * strength * side / 32,
            "noise": 0.06 * strength * self._uniform(channels, 1, 1, 1) * self._normal(channels, *[side] * 3),
        }


def seen(image: Tensor, look: Mapping[str, Tensor]) -> Tensor:
    """Images (B, C, S, S, S), from 0 to 1, as another scanner might show them.

    Args:
        look: `gamma` (B, C, 1, 1, 1), a power; `slope` (B, C, 3), of the logarithm from the middle to the border;
            `blur` (B, C), standard deviation in voxels, 0 for none; `noise` (B, C, S, S, S), added.
    """
    along = torch.linspace(-1, 1, image.shape[-1], device=image.device)
    x, y, z = (look["slope"][..., axis, None] * along for axis in range(3))
    slope = x[..., None, None] + y[..., None, :, None] + z[..., None, None, :]
    return blurred(image.clamp_min(1e-6) ** look["gamma"] * slope.exp(), look["blur"]) + look["noise"]


def blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Images (B, C, S, S, S), each blurred by a Gaussian of its own; beyond the border lies what is within.

    Args:
        sigma: standard deviations in voxels, (B, C); 0 leaves an image as it is.
    """
    at = torch.arange(image.shape[-1], device=image.device, dtype=image.dtype)
    apart = (at[:, None] - at).square()
    weight = torch.exp(-apart / (2 * sigma.clamp_min(1e-3).square())[..., None, None])
    weight = weight / weight.sum(-1, keepdim=True)
    for _ in range(3):  # along the first axis, which then is the last
        image = torch.einsum("bcix,bcxyz->bcyzi", weight, image)
    return image


def bent(knots: Tensor, side: int) -> Tensor:
    """A displacement that is linear between knots (B, 3, K, K, K): (B, 3, side, side, side)."""
    return F.interpolate(knots, [side] * 3, mode="trilinear", align_corners=True)


def rotation(turn: Tensor) -> Tensor:
    """Rotation vectors (B, 3), radians -> matrices (B, 3, 3), by Rodrigues' formula."""
    zero = torch.zeros_like(turn[:, 0])
    x, y, z = turn.unbind(1)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
    angle = turn.norm(dim=1)[:, None, None].clamp_min(1e-6)
    eye = torch.eye(3, device=turn.device, dtype=turn.dtype)
    return eye + cross * (angle.sin() / angle) + cross @ cross * ((1 - angle.cos()) / angle.square())


def moved(linear: Tensor, shift: Tensor, points: Tensor) -> Tensor:
    """Linear maps (B, 3, 3) and shifts (B, 3) applied to points (B, 3, X, Y, Z)."""
    return torch.einsum("bij,bj...->bi...", linear, points) + shift[..., None, None, None]
