"""The TRUS probe: where it lies, the sector it sees, and what in the gland changes its beam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.phantoms.anatomy import Anatomy, TrueMap


class Probe(NamedTuple):
    """A cylinder in the rectum and the sector it sees, in the fixed world; lengths in mm, angles in radians.

    Attributes:
        position: x, y and z of a point of its axis.
        slopes: of x and y along z.
        radius: of the probe; nothing is seen within.
        depth: distance from the axis where the picture ends.
        half_angle: of the sector; None: the picture fills the volume.
        roll: of the sector about the axis.
    """

    position: tuple[float, float, float]
    slopes: tuple[float, float]
    radius: float
    depth: float
    half_angle: float | None
    roll: float

    def beam(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset from the axis along x and along y, and distance from it, of fixed world points, mm."""
        z = z - self.position[2]
        across, ahead = x - self.position[0] - self.slopes[0] * z, y - self.position[1] - self.slopes[1] * z
        return across, ahead, (across**2 + ahead**2).sqrt()

    def shadow(
        self, across: Tensor, ahead: Tensor, distance: Tensor, z: Tensor, centre: Sequence[float], radius: float
    ) -> tuple[Tensor, Tensor, float]:
        """How deep beams pass within a ball, mm; 0 before it to 1 behind it; and how far ahead of the axis it lies, mm.

        Args:
            across, ahead, distance: of the points, see `beam`; z: theirs in the fixed world.
            centre: of the ball, in the fixed world.
        """
        c_across, c_ahead, c_distance = (v.item() for v in self.beam(*torch.tensor(centre)[:, None]))
        beside = (across * c_ahead - ahead * c_across) / distance.clamp_min(1)  # from the beam to the centre
        covered = radius - (beside**2 + (z - centre[2]) ** 2).sqrt()
        return covered, ((distance - c_distance - 0.6 * radius) / 2).clamp(0, 1), c_ahead

    def margin(self, across: Tensor, ahead: Tensor, distance: Tensor) -> Tensor:
        """Distance inside the border of the sector, mm, negative outside."""
        if self.half_angle is None:
            return torch.full_like(distance, torch.inf)
        left, right = self.half_angle - self.roll, self.half_angle + self.roll
        sides = ahead * np.sin(left) + across * np.cos(left), ahead * np.sin(right) - across * np.cos(right)
        # beyond a half-angle of 90 degrees the sector is not convex: either side suffices
        wings = torch.minimum(*sides) if self.half_angle < np.pi / 2 else torch.maximum(*sides)
        return torch.minimum(torch.minimum(distance - self.radius, self.depth - distance), wings)


def draw_probe(rng: np.random.Generator, anatomy: Anatomy, true_map: TrueMap, wild: bool) -> Probe:
    """A probe behind the gland: its surface a rectal wall away from it, wherever the motion has put it."""
    surface = anatomy.axes[1] + min(0.0, anatomy.contact + 0.5)  # in the midline
    behind = torch.tensor(true_map.moving_centre) - torch.tensor([0, surface, 0])
    x, y, z = (p.item() for p in true_map.inverse(*behind[:, None]))
    radius = anatomy.rectum[1] * rng.uniform(0.8, 1.05)  # it fills the rectum
    gap = rng.uniform(-1, 8) if wild else rng.uniform(1, 5)
    half_angle = np.deg2rad(rng.uniform(35, 110) if wild else rng.uniform(48, 80))
    return Probe(
        position=(x + rng.normal(0, 2), y - gap - radius, z),
        slopes=(rng.normal(0, 0.03), rng.normal(0, 0.1)),
        radius=radius,
        depth=radius + (rng.uniform(45, 110) if wild else rng.uniform(55, 90)),
        half_angle=None if wild and rng.random() < 0.15 else half_angle,
        roll=rng.normal(0, np.deg2rad(8 if wild else 3)),
    )


def hard_and_soft(anatomy: Anatomy, true_map: TrueMap) -> list[tuple[list[float], float, float]]:
    """(centre in the fixed world, radius, grey levels lost behind) of calcifications, and of cysts, which lose less."""
    found = []
    for name, centre in anatomy.centres.items():
        kind = name.removesuffix("_2")
        if kind in ("calcification", "cyst"):
            moving = torch.tensor(true_map.moving_centre) + torch.tensor(centre)
            fixed = [p.item() for p in true_map.inverse(*moving[:, None])]
            found.append((fixed, anatomy.radii[name], 90.0 if kind == "calcification" else -20.0))
    return found
