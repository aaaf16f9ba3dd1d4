"""Training batches for the gland segmentation network: cubes of single volumes as its passes see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from scripts.data.checks import InputError
from scripts.registration.orientation import turned
from scripts.registration.segmentation import SIDE, WHOLE, close_up, cube_affine, frame, on_cube, standardised
from scripts.training.cohort import SIDES, CohortLoader

KNOTS = 5  # along each axis, between which the random warp of a cube is linear


class Draw(NamedTuple):
    """A random cube of a volume, and how what it shows is changed.

    Attributes:
        volume: image and gland, (2, X, Y, Z).
        affine: voxel of the cube -> world.
        knots: displacement at the knots of the random warp, in edges of the cube, (1, 3, KNOTS, KNOTS, KNOTS).
        way: how the cube is stored, see `scripts.registration.orientation`.
        gamma, slope: of the grey levels, and relative slope along each axis.
        sigma: of a blur, voxels of a cube of `WHOLE`; None for none.
        noise: standard deviation of the noise, of the brightest voxel.
    """

    volume: MetaTensor
    affine: Tensor
    knots: Tensor
    way: int
    gamma: float
    slope: np.ndarray
    sigma: float | None
    noise: float


class GlandLoader(CohortLoader):
    """Batches for the gland network: cubes of single volumes, MR and TRUS alike, real and simulated.

    The cubes of a batch are either whole volumes, or close to the gland, coarse or fine, as the three passes see them.
    Each lies at random: moved, turned, stretched, bent, mirrored left to right, nearer or farther; and some are stored
    another way round than their header says, as wrong headers do. Grey levels are bent, blurred and made noisy.

    Volumes of a group, a data set or one side of its pairs, are drawn as often as the square root of their number
    says, so that neither a large data set drowns a small one nor a small one is learned by heart.

    A batch is a dictionary: `image` and `label` (B, 1, side, side, side), `orientation` (B,), the way each is stored,
    on the device; `case`, a list.

    Args:
        arguments: those of `CohortLoader`; items are as `scripts.data.pairs.LoadSingled` leaves them, label 0 the
            gland, or simulated pairs, of which each volume is one; `batch_size` counts volumes.
        augmentation: scale of all the above; 1 is the default, 0 switches it off.
        seed: of the draws.
        misoriented_share: the share of cubes that are stored in any of the eight ways.
    """

    def __init__(
        self, *arguments: Any, augmentation: float = 1.0, seed: int = 0, misoriented_share: float = 0.0, **named: Any
    ) -> None:
        super().__init__(*arguments, augmentation=augmentation, seed=seed, **named)
        self.misoriented_share = misoriented_share
        self.noise = torch.Generator(self.device).manual_seed(seed)
        groups = defaultdict(list)
        for item in self.pool.pairs:
            groups[item["group"]].append(item)
        self.groups = list(groups.values())
        often = np.sqrt([len(group) for group in self.groups])
        self.often = often / often.sum()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"noise": self.noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.noise.set_state(state["noise"].cpu())

    def _keep(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A volume, or the two of a simulated pair, with where its gland lies."""
        if "image" in data:
            parts = [(data["image"], data["label"])]
        else:
            parts = [(data[f"{side}_image"], data[f"{side}_label"]) for side in SIDES]
        kept = {"case": data["case"], "group": data.get("group"), "volumes": []}
        for image, label in parts:
            gland = label[:1].as_tensor().to(self.device, torch.float32)
            if not gland.any():
                raise InputError(f"{data['case']}: label 0, the gland, is empty")
            dark = image.as_tensor().to(gland)
            volume = MetaTensor(torch.cat([dark - dark.min(), gland]), affine=image.affine)  # nothing is darker
            kept["volumes"].append((volume, frame(image), close_up(label[:1])))
        return kept

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.epoch_length):
            near, side = ((False, WHOLE), (True, WHOLE), (True, SIDE))[self.random.choice(3, p=(0.25, 0.35, 0.4))]
            cases, drawn = zip(*[self._draw(near) for _ in range(self.batch_size)], strict=True)
            noise = torch.randn((self.batch_size, 1, *[side] * 3), generator=self.noise, device=self.device)
            self.pool.renew()
            cubes = [self._cube(draw, side, level) for draw, level in zip(drawn, noise, strict=True)][self.mine]
            image, label = torch.cat(cubes).split(1, dim=1)
            ways = torch.tensor([draw.way for draw in drawn[self.mine]], device=self.device)
            yield {"image": standardised(image), "label": label, "orientation": ways, "case": list(cases[self.mine])}

    def _drawn_volume(self) -> tuple[str, MetaTensor, tuple, tuple]:
        if self.pool.simulates(self.random):
            among = self.pool.phantoms
        else:
            among = self.groups[self.random.choice(len(self.groups), p=self.often)]
        item = among[self.random.integers(len(among))]
        return item["case"], *item["volumes"][self.random.integers(len(item["volumes"]))]

    def _draw(self, near: bool) -> tuple[str, Draw]:
        """A case, and a random cube of one of its volumes: of the whole, or near the gland."""
        random, strength = self.random, self.augmentation
        case, volume, (centre, axes, length), close = self._drawn_volume()
        if near:
            centre, length = close
        turn = Rotation.from_rotvec(random.normal(0, 6 * strength, 3), degrees=True)
        stretch = np.exp(random.normal(0, 0.08 * strength, 3))
        if strength and random.random() < 0.5:
            stretch[0] *= -1
        axes = axes @ torch.from_numpy(np.diag(stretch) @ turn.as_matrix())
        shift = torch.from_numpy(random.uniform(-0.1, 0.1, 3) * strength * length)
        nearer = np.exp(random.uniform(-0.25 if near else -0.35, 0.2) * strength)
        knots = random.normal(0, 0.02 * strength, (1, 3, *[KNOTS] * 3)) * (random.random() < 0.5)
        way = int(random.integers(8)) if random.random() < self.misoriented_share else 0
        gamma, slope = float(np.exp(random.normal(0, 0.3 * strength))), random.normal(0, 0.3 * strength, 3)
        sigma = float(random.uniform(0.4, 1.0)) * strength if random.random() < 0.3 and strength else None
        noise = float(random.uniform(0, 0.06)) * strength
        cube = cube_affine(centre + shift, axes, length * nearer, WHOLE)
        return case, Draw(volume, cube, torch.from_numpy(knots).float(), way, gamma, slope, sigma, noise)

    def _cube(self, draw: Draw, side: int, noise: Tensor) -> Tensor:
        """Image and gland (1, 2, side, side, side) of a draw; `noise` is (1, side, side, side)."""
        grow = torch.diag(torch.tensor([WHOLE / side] * 3 + [1.0], dtype=torch.float64))
        grow[:3, 3] = (WHOLE / side - 1) / 2  # the same cube in other voxels
        ddf = None
        if draw.knots.any():
            ddf = F.interpolate(draw.knots.to(self.device), [side] * 3, mode="trilinear", align_corners=True) * side
        image, label = on_cube(draw.volume, draw.affine @ grow, side, ddf).split(1, dim=1)
        if self.augmentation:
            image = _bent(image, draw.gamma, draw.slope)
            if draw.sigma is not None:
                image = GaussianFilter(3, draw.sigma * side / WHOLE).to(self.device)(image)
            image = image + draw.noise * noise
        return turned(torch.cat([image, label], dim=1), draw.way)


def _bent(image: Tensor, gamma: float, slope: np.ndarray) -> Tensor:
    """Grey levels (1, 1, X, Y, Z), ≥ 0, to a power, and brighter along each axis."""
    image = (image / image.amax().clamp_min(1e-6)) ** gamma
    x, y, z = torch.from_numpy(slope).to(image)
    i, j, k = (torch.linspace(-1, 1, size, device=image.device) for size in image.shape[2:])
    return image * (x * i[:, None, None] + y * j[:, None] + z * k).exp()
