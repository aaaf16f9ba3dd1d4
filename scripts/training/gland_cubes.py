"""Training batches for the gland segmentation network: cubes of single volumes as its passes see them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.checks import InputError
from scripts.network import fields
from scripts.network.segmentation import ORIENTATIONS
from scripts.registration.orientation import upright_axes
from scripts.registration.segmentation import SIDE, WHOLE, close_up, coarsened, cube_affine, frame, standardised
from scripts.training.cohort import SIDES, largest, sample_each
from scripts.training.cubes import KNOTS, CubeLoader, bent, moved, seen
from scripts.training.on_disk import on_device

PASSES = ((False, WHOLE), (True, WHOLE), (True, SIDE))  # close to the gland or not, and voxels along an edge
SHARES = (0.25, 0.35, 0.4)  # of the batches
FINER = 0.85  # a volume is kept as coarse as cubes need of which the voxels are so much smaller than a pass's
MARGIN = 1.5  # of what is kept around the gland, so that what is moved or turned is still there
STORED = torch.stack([upright_axes(torch.eye(3), way).T for way in range(ORIENTATIONS)])  # of a stored cube -> upright


class Kept(NamedTuple):
    """What one of the passes needs of a volume.

    Attributes:
        volume: image, from 0 to 1, and gland, (2, X, Y, Z), half precision.
        to_voxel: from the cube that the pass sees, its centre 0 and its edges 1, to the volume's voxels, (3, 4).
        image: the voxels, relative to these, at the two ends of the image, which goes beyond what is kept, (2, 3).
        last: the last voxel that is kept, (3,).
    """

    volume: Tensor
    to_voxel: Tensor
    image: Tensor
    last: Tensor


def kept(volume: MetaTensor, centre: Tensor, axes: Tensor, length: float, side: int, margin: float) -> Kept:
    """Of a volume (2, X, Y, Z) the surroundings of a cube, see `cube_affine`, of `margin` times its edges."""
    coarse = coarsened(volume, cube_affine(centre, axes, FINER * length, side))
    size = torch.tensor(coarse.shape[1:])
    to_voxel = torch.linalg.inv(coarse.affine.double()) @ cube_affine(centre, axes, length, 1)
    reach = margin / 2 * to_voxel[:3, :3].abs().sum(1)
    first = (to_voxel[:3, 3] - reach).floor().clamp_min(0).minimum(size - 1).long()
    last = (to_voxel[:3, 3] + reach).ceil().minimum(size - 1).long().maximum(first)
    cut = [slice(low, high + 1) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
    to_voxel[:3, 3] -= first
    image = torch.stack([-0.5 - first, size - 0.5 - first])
    data = coarse.as_tensor()[(slice(None), *cut)].half()
    return Kept(data.contiguous(), *(t.to(data.device, torch.float32) for t in (to_voxel[:3], image, last - first)))


class GlandLoader(CubeLoader):
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
        self, *arguments: Any, augmentation: float = 1.0, misoriented_share: float = 0.0, **named: Any
    ) -> None:
        super().__init__(*arguments, augmentation=augmentation, **named)
        self.misoriented_share, self.stored = misoriented_share, STORED.to(self.device)
        groups = defaultdict(list)
        for item in self.pool.pairs:
            groups[item["group"]].append(item)
        self.groups = list(groups.values())
        often = np.sqrt([len(group) for group in self.groups])
        self.often = often / often.sum()

    def _keep(self, data: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What each of the passes needs of a volume, or of the two of a simulated pair."""
        if "image" in data:
            parts = [(data["image"], data["label"])]
        else:
            parts = [(data[f"{side}_image"], data[f"{side}_label"]) for side in SIDES]
        item = {"case": data["case"], "group": data.get("group"), "volumes": []}
        for image, label in parts:
            gland = label[:1].as_tensor().to(device, torch.float32)
            if not gland.any():
                raise InputError(f"{data['case']}: label 0, the gland, is empty")
            dark = image.as_tensor().to(gland)
            dark = dark - dark.min()  # nothing is darker
            volume = MetaTensor(torch.cat([dark / dark.max().clamp_min(1e-6), gland]), affine=image.affine)
            centre, axes, length = frame(image)
            where = {False: (centre, axes, length), True: (close_up(label[:1])[0], axes, close_up(label[:1])[1])}
            margins = {False: math.inf, True: MARGIN}
            item["volumes"].append([kept(volume, *where[near], side, margins[near]) for near, side in PASSES])
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.epoch_length):
            number = self.random.choice(len(PASSES), p=SHARES)
            cases, volumes = zip(*[self._drawn() for _ in range(self.batch_size)], strict=True)
            change = {key: value[self.mine] for key, value in self._changes(*PASSES[number]).items()}
            self.pool.renew()
            shown = [Kept(*volume[number]) for volume in volumes]
            size = largest(one.volume.shape[1:] for one in shown)
            shown = [Kept(*(on_device(part, self.device) for part in one)) for one in shown[self.mine]]
            batch = self._batch(shown, size, change, PASSES[number][1])
            yield batch | {"case": list(cases[self.mine])}

    def _drawn(self) -> tuple[str, Sequence[Kept]]:
        """A case, and what each pass needs of one of its volumes."""
        if self.pool.simulates(self.random):
            among = self.pool.phantoms
        else:
            among = self.groups[self.random.choice(len(self.groups), p=self.often)]
        item = among[self.random.integers(len(among))]
        return item["case"], item["volumes"][self.random.integers(len(item["volumes"]))]

    def _changes(self, near: bool, side: int) -> dict[str, Tensor]:
        """Everything random of a batch, (B, …); lengths are in edges of the cube that the pass sees."""
        strength, least = self.augmentation, -0.25 if near else -0.35
        linear = self._frame(6)
        nearer = ((least + (0.2 - least) * self._uniform(1, 1)) * strength).exp()
        way = (self._uniform() * ORIENTATIONS).long() * (self._uniform() < self.misoriented_share)
        return {
            "linear": linear * nearer,
            "shift": 0.1 * strength * (2 * self._uniform(3) - 1),
            "knots": 0.02 * strength * self._normal(3, *[KNOTS] * 3) * (self._uniform(1, 1, 1, 1) < 0.5),
            "way": way,
            **self._looks(1, side),
        }

    def _batch(
        self, volumes: Sequence[Kept], size: Sequence[int], change: Mapping[str, Tensor], side: int
    ) -> dict[str, Tensor]:
        """Cubes of `side` voxels along an edge, changed; `size` is the largest of the volumes' edges."""
        grid = (fields.identity_grid([side] * 3, torch.float32, self.device) - (side - 1) / 2) / side
        grid = torch.einsum("bij,j...->bi...", self.stored[change["way"]], grid)
        grid = moved(change["linear"], change["shift"], grid + bent(change["knots"], side))
        to_voxel, image, last = (torch.stack(parts) for parts in list(zip(*volumes, strict=True))[1:])
        points = moved(to_voxel[:, :, :3], to_voxel[:, :, 3], grid)
        low, high = image[..., None, None, None].unbind(1)
        inside = ((points >= low) & (points <= high)).all(1, keepdim=True)
        sampled = sample_each([one.volume for one in volumes], size, last, points) * inside
        image, label = sampled.split(1, dim=1)
        image = image / image.amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
        return {"image": standardised(seen(image, change)), "label": label, "orientation": change["way"]}
