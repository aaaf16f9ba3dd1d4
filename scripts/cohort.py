"""Training batches from a cohort that lives on the device: draw, start alignment and augmentation as one map.

Nothing is resampled before it is drawn. A step draws pairs, a label of each and a random affine for each side, composes
them with the start alignment into one affine map per volume, and interpolates each volume once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scripts import fields
from scripts.checks import InputError
from scripts.transforms import from_grid

SIDES = ("moving", "fixed")


def corner_affine(uniform: np.ndarray, strength: float) -> np.ndarray:
    """label-reg's random affine: four corners of [−1, 1]³ move inward by `strength * uniform` per coordinate (§3.2).

    Args:
        uniform: numbers in [0, 1], shape (4, 3), one row per corner.
        strength: the largest shift in normalised units; 0.1 in label-reg.

    Returns:
        Shape (3, 4), output -> input coordinates in [−1, 1]³: at 0.1 the diagonal lies in [.9, 1], the off-diagonal
        in ±.05, the translation in ±.1.
    """
    corners = np.array([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    moved = corners - np.sign(corners) * strength * uniform
    return np.linalg.solve(np.c_[corners, np.ones(4)], moved).T


class CohortLoader:
    """Endless variety from a small cohort: each pass gives `epoch_length` batches, drawn with replacement.

    The draw is the paper's two-stage sampling, Eq. (3): a pair uniformly, then one of its labels uniformly. A label
    that is empty in either image on the working grid is never drawn. The moving and the fixed side of a pair move
    independently, an image and its label alike (§3.2). Images keep their border beyond their field of view, labels are
    zero there. Where the working grids of a batch differ in size, the smaller ones lie in the middle, padded by zeros.

    A batch is a dictionary: `image` (B, 2, X, Y, Z), channel 0 moving, 1 fixed; `moving_label` and `fixed_label`
    (B, 1, X, Y, Z), all on the device; `spacing` (B, 3) in mm, on the CPU; `case`, a list.

    Args:
        dataset: pairs as `scripts.transforms.PlanFixedGridd` leaves them.
        batch_size: pairs of a batch.
        epoch_length: batches of a pass.
        device: where the cohort lives and the batches are made.
        augmentation: the strength of `corner_affine`; 0 switches it off.
        seed: of the draws.
        num_workers: processes that read the files.

    Raises:
        InputError: no pair, or a pair without a label that can be drawn.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        epoch_length: int,
        device: torch.device | str,
        augmentation: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.epoch_length = epoch_length
        self.device = torch.device(device)
        self.augmentation = augmentation
        self.random = np.random.default_rng(seed)
        read = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        self.pairs = [self._keep(pair) for pair in tqdm(read, desc="Reading", unit="pair", disable=len(dataset) < 2)]
        if not self.pairs:
            raise InputError("no pair to train on")

    def __len__(self) -> int:
        return self.epoch_length

    def _keep(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What of a pair stays on the device: images in float32, labels in uint8, and the maps from its grid."""
        pair = {k: data[k] for k in ("case", "spacing")} | {"size": tuple(data["grid_size"])}
        present = []
        for side in SIDES:
            pair[side] = {"to_volume": from_grid(data, f"{side}_image")}
            pair[side]["image"] = data[f"{side}_image"].as_tensor().to(self.device)
            label = data[f"{side}_label"].as_tensor().to(self.device)
            on_grid = fields.resample(
                label[None].float(), pair[side]["to_volume"], pair["size"], padding_mode="outside"
            )
            present.append((on_grid[0] >= 0.5).flatten(1).any(1).tolist())
            pair[side]["label"] = label.to(torch.uint8)
        pair["drawable"] = np.flatnonzero(np.all(present, axis=0))
        if not len(pair["drawable"]):
            raise InputError(f"{pair['case']}: no label is present in both images on the working grid")
        return pair

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.epoch_length):
            pairs = [self.pairs[i] for i in self.random.integers(len(self.pairs), size=self.batch_size)]
            size = tuple(max(pair["size"][axis] for pair in pairs) for axis in range(3))
            drawn = [self._draw(pair, size) for pair in pairs]
            batch = {key: torch.cat([volumes[key] for volumes in drawn]) for key in drawn[0]}
            yield {
                "image": torch.cat([batch.pop("moving_image"), batch.pop("fixed_image")], dim=1),
                **batch,
                "spacing": torch.stack([pair["spacing"] for pair in pairs]),
                "case": [pair["case"] for pair in pairs],
            }

    def _draw(self, pair: Mapping[str, Any], size: Sequence[int]) -> dict[str, Tensor]:
        """Both images of a pair and one of its labels on a grid of `size`, each (1, 1, *size)."""
        m = int(self.random.choice(pair["drawable"]))
        own = pair["size"]
        low = [(n - k) // 2 for n, k in zip(size, own, strict=True)]
        from_padded, to_normalised = torch.eye(4, dtype=torch.float64), fields.normalised(own)
        from_padded[:3, 3] = -torch.tensor(low, dtype=torch.float64)
        volumes = {}
        for side in SIDES:
            affine = torch.eye(4, dtype=torch.float64)
            if self.augmentation:
                affine[:3] = torch.from_numpy(corner_affine(self.random.random((4, 3)), self.augmentation))
            moved = torch.linalg.inv(to_normalised) @ affine @ to_normalised @ from_padded
            kept = pair[side]
            volume = torch.cat([kept["image"], kept["label"][m : m + 1].to(kept["image"].dtype)])[None]
            to_volume = kept["to_volume"] @ moved
            sampled = fields.resample(volume, to_volume, size, padding_mode=("border", "outside"))
            if tuple(size) != own:
                inside = (..., *(slice(a, a + n) for a, n in zip(low, own, strict=True)))
                padded = torch.zeros_like(sampled)
                padded[inside] = sampled[inside]
                sampled = padded
            volumes[f"{side}_image"], volumes[f"{side}_label"] = sampled.split(1, dim=1)
        return volumes
