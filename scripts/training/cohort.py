"""Training batches from a cohort that lives on the device: draw, initial transform and augmentation as one map.

Nothing is resampled before it is drawn. A step draws pairs, a label of each and a random affine for each side, composes
them with the initial transform into one affine map per volume, and interpolates each volume once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.data.gate import leave_interrupts
from scripts.network import fields
from scripts.phantoms.clinical import draw_grids
from scripts.phantoms.phantom import MODES, PhantomPair, simulate_pair
from scripts.registration.transforms import from_grid
from scripts.training.on_disk import InFile, kept, on_device, stored

SIDES = ("moving", "fixed")
MIXTURES = {"mixed": ("realistic", "randomised"), "all": MODES}
CLINICAL_PIXELS = (96, 144)  # along an edge of a slice


def as_loaded(phantom: PhantomPair) -> dict[str, Any]:
    """A phantom's images and labels as `scripts.data.pairs.LoadPaird` leaves those of files."""
    pair = {}
    for side in SIDES:
        affine = torch.as_tensor(getattr(phantom, f"{side}_affine"))
        image, label = getattr(phantom, f"{side}_image"), getattr(phantom, f"{side}_label")
        pair[f"{side}_image"] = MetaTensor(image[None], affine=affine)
        pair[f"{side}_label"] = MetaTensor(label.movedim(-1, 0).float(), affine=affine)
    return pair


class SimulatedPairs(Dataset):
    """New phantoms without end, as `scripts.data.pairs.LoadPaird` leaves a pair: item k is drawn from (seed, k) alone.

    Fields of view and voxel sizes vary as those of clinical scans do; some 40 to 60 voxels along the longest edge. In
    the clinical mode slices are as thick as clinics', and 96 to 144 pixels wide: a network sees the whole in 32 to 48.

    Args:
        mode: see `scripts.phantoms.phantom.simulate_pair`; or a mixture of modes with equal chances: "mixed" of
            "realistic" and "randomised", "all" of these and "clinical".
        seed: of all pairs.
        device: where they are made and left.
        transform: applied to each pair.
    """

    def __init__(
        self,
        mode: str = "randomised",
        seed: int = 0,
        device: torch.device | str = "cpu",
        transform: Callable[[dict], dict] | None = None,
    ) -> None:
        self.mode, self.seed, self.device, self.transform = mode, seed, device, transform

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, index])
        trus, mr = random.uniform((80, 60, 55), (115, 95, 85)), random.uniform((90, 90, 70), (170, 150, 115))  # mm
        voxels = [edges.max() / random.uniform(40, 60) for edges in (trus, mr)]
        shapes = [np.ceil(e / v).astype(int).tolist() for e, v in zip((trus, mr), voxels, strict=True)]
        modes = MIXTURES.get(self.mode)
        mode = modes[random.integers(len(modes))] if modes else self.mode
        grids = (shapes[0], voxels[0], shapes[1], voxels[1])
        if mode == "clinical":
            drawn = draw_grids(random, CLINICAL_PIXELS)
            grids = [drawn[k] for k in ("fixed_shape", "fixed_spacing", "moving_shape", "moving_spacing")]
        made = simulate_pair(random, *grids, mode, device=self.device)
        pair = as_loaded(made) | {"case": f"phantom{index}", "simulated": True}
        return self.transform(pair) if self.transform else pair


class Pool:
    """Pairs to draw from: a cohort, and simulated pairs, the oldest replaced every few batches.

    Args:
        pairs: what is kept of the cohort; may be empty where pairs are simulated.
        simulated: makes a new pair for each index, without end; None to draw from the cohort alone.
        share: of the draws that are simulated pairs.
        size: simulated pairs kept at a time.
        keep: what to keep of a simulated pair.
        num_workers: processes that make simulated pairs ahead; 0 for this one.
        renewal: batches until the oldest simulated pair is replaced by a new one.

    Raises:
        InputError: nothing to draw from.
    """

    def __init__(
        self,
        pairs: Sequence[dict[str, Any]],
        simulated: Dataset | None,
        share: float,
        size: int,
        keep: Callable[[Mapping[str, Any]], dict[str, Any]],
        num_workers: int = 0,
        renewal: int = 4,
    ) -> None:
        self.pairs = pairs
        self.simulated, self.keep, self.renewal, self.share = simulated, keep, renewal, share if self.pairs else 1.0
        self.num_workers = num_workers
        count = range(size if simulated is not None and self.share > 0 else 0)
        if count:
            self._begin(0)
        self.phantoms = [keep(next(self.coming)) for _ in tqdm(count, "Simulating", unit="pair", disable=not count)]
        self.made, self.batches = len(self.phantoms), 0
        if not self.pairs and not self.phantoms:
            raise InputError("no pair to train on")

    def _begin(self, index: int) -> None:
        """Let the next simulated pair be number `index`; processes of their own make it and some that follow."""
        cuda = self.num_workers and torch.cuda.is_available()  # which a forked process could not use
        self.coming = iter(
            DataLoader(
                self.simulated,
                batch_size=None,
                sampler=range(index, len(self.simulated)),
                num_workers=self.num_workers,
                worker_init_fn=leave_interrupts,
                multiprocessing_context="spawn" if cuda else None,
                generator=torch.Generator(),  # leaves the others where they are
            )
        )

    def simulates(self, random: np.random.Generator) -> bool:
        """Whether the next draw is of the simulated pairs."""
        return bool(self.phantoms) and (self.share >= 1 or random.random() < self.share)

    def draw(self, random: np.random.Generator) -> dict[str, Any]:
        """One pair, each of its kind equally likely."""
        among = self.phantoms if self.simulates(random) else self.pairs
        return among[random.integers(len(among))]

    def renew(self) -> None:
        """Count a batch; after every `renewal` of them replace the oldest simulated pair by a new one."""
        self.batches += 1
        if self.phantoms and self.batches % self.renewal == 0:
            self.phantoms[self.made % len(self.phantoms)] = self.keep(next(self.coming))
            self.made += 1

    def load_place(self, made: int, batches: int) -> None:
        """Go on where a run was that had simulated `made` pairs and counted `batches`."""
        size = len(self.phantoms)
        first = max(self.made, made - size)
        if size and first > self.made:
            self._begin(first)
        for index in range(first, made):
            self.phantoms[index % size] = self.keep(next(self.coming))
        self.made, self.batches = made, batches


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

    A batch is a dictionary: `image` (B, 2, X, Y, Z), channel 0 moving, 1 fixed, and where glands
    were found those as channels 2 and 3; `moving_label` and `fixed_label`
    (B, 1, X, Y, Z), all on the device; `spacing` (B, 3) in mm, on the CPU; `case`, a list.

    Where several processes train together, each draws every batch as a single process would and makes its share of it.

    Args:
        dataset: pairs as `scripts.registration.transforms.PlanFixedGridd` leaves them.
        batch_size: pairs of a batch, of all processes together.
        epoch_length: batches of a pass.
        device: where the cohort lives and the batches are made.
        augmentation: the strength of `corner_affine`; 0 switches it off.
        seed: of the draws.
        num_workers: processes that read the files, and make simulated pairs ahead.
        simulated, share, pool, renewal: see `Pool`.
        rank, world_size: which of how many processes this is.
        folder: where what is kept of the cohort lies, see `scripts.training.on_disk`, in place of the device's memory;
            simulated pairs are in memory.

    Raises:
        InputError: no pair, a pair without a label that can be drawn, or a batch that cannot be shared out evenly.
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
        simulated: Dataset | None = None,
        share: float = 0.0,
        pool: int = 32,
        renewal: int = 4,
        rank: int = 0,
        world_size: int = 1,
        folder: str | None = None,
    ) -> None:
        if batch_size % world_size:
            raise InputError(f"batch_size {batch_size}: {world_size} processes cannot share it evenly; give a multiple")
        own = batch_size // world_size
        self.mine = slice(rank * own, (rank + 1) * own)  # of a batch
        self.batch_size = batch_size
        self.epoch_length = epoch_length
        self.device = torch.device(device)
        self.augmentation = augmentation
        self.random = np.random.default_rng(seed)
        if folder is None:
            keep = partial(self._keep, device=self.device)
            pairs = list(kept(dataset, keep, num_workers, "Reading"))
        else:
            keep = partial(self._keep, device=torch.device("cpu"))
            pairs = stored(folder, dataset, keep, (type(self), self._kept_by()), num_workers)
        self.pool = Pool(pairs, simulated, share, pool, partial(self._keep, device=self.device), num_workers, renewal)

    def __len__(self) -> int:
        return self.epoch_length

    def state_dict(self) -> dict[str, Any]:
        """The place in the draws, for a checkpoint: a resumed run draws what an uninterrupted one would have drawn."""
        # numpy's state has integers of 128 bits, which only text holds safely in a file of plain tensors
        random = json.dumps(self.random.bit_generator.state)
        return {"random": random, "made": self.pool.made, "batches": self.pool.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.random.bit_generator.state = json.loads(state["random"])
        self.pool.load_place(state["made"], state["batches"])

    def _kept_by(self) -> dict[str, Any]:
        """Settings that `_keep` depends on."""
        return {}

    def _keep(self, data: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What is kept of a pair, on a device: images in float32, labels in uint8, and the maps from its grid."""
        pair = {k: data[k] for k in ("case", "spacing")} | {"size": tuple(data["grid_size"])}
        present = []
        for side in SIDES:
            pair[side] = {"to_volume": from_grid(data, f"{side}_image")}
            image, gland = data[f"{side}_image"], data.get(f"{side}_gland")
            volume = image.as_tensor()
            if gland is not None:  # on the image's own grid, so that one interpolation serves both
                to_gland = torch.linalg.inv(gland.affine.double()) @ image.affine.double()
                found = gland.as_tensor()[None].float()
                found = fields.resample(found, to_gland, image.shape[1:], padding_mode="outside")
                volume = torch.cat([volume, found[0].to(volume)])
            pair[side]["image"] = volume.to(device)
            label = data[f"{side}_label"].as_tensor().to(device)
            on_grid = fields.resample(
                label[None].float(), pair[side]["to_volume"], pair["size"], padding_mode="outside"
            )
            present.append((on_grid[0] >= 0.5).flatten(1).any(1).tolist())
            pair[side]["label"] = label.to(torch.uint8)
        pair["drawable"] = np.flatnonzero(np.all(present, axis=0)).tolist()
        if not pair["drawable"]:
            raise InputError(f"{pair['case']}: no label is present in both images on the working grid")
        return pair

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.epoch_length):
            pairs = [self.pool.draw(self.random) for _ in range(self.batch_size)]
            self.pool.renew()
            size = largest(pair["size"] for pair in pairs)
            whole = largest(pair[side]["image"].shape[1:] for pair in pairs for side in SIDES)
            labels, affines = zip(*[self._draw(pair) for pair in pairs], strict=True)
            pairs, affines = pairs[self.mine], torch.stack(affines[self.mine], dim=1)
            moving, fixed = self._batch(pairs, size, whole, labels[self.mine], affines)
            yield {
                # moving, fixed, and the same of their glands
                "image": torch.stack([moving[:, :-1], fixed[:, :-1]], dim=2).flatten(1, 2),
                "moving_label": moving[:, -1:],
                "fixed_label": fixed[:, -1:],
                "spacing": torch.stack([pair["spacing"] for pair in pairs]),
                "case": [pair["case"] for pair in pairs],
            }

    def _draw(self, pair: Mapping[str, Any]) -> tuple[int, Tensor]:
        """One label of a pair, and the augmentation of its moving and fixed side, (2, 4, 4) in [−1, 1]³."""
        m, affines = int(self.random.choice(pair["drawable"])), torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
        for affine in affines if self.augmentation else ():
            affine[:3] = torch.from_numpy(corner_affine(self.random.random((4, 3)), self.augmentation))
        return m, affines

    def _batch(
        self,
        pairs: Sequence[Mapping[str, Any]],
        size: Sequence[int],
        whole: Sequence[int],
        labels: Sequence[int],
        affines: Tensor,
    ) -> Tensor:
        """Images of pairs, with their glands, and of each pair one label, on a grid of `size`: (2, B, C, *size).

        Args:
            whole: the largest of the volumes' edges.
            affines: the augmentation, (2, B, 4, 4).
        """
        volumes, to_volume = [], []
        for side in SIDES:
            for pair, m in zip(pairs, labels, strict=True):
                image, label = pair[side]["image"], pair[side]["label"]
                label = label.part(m, m + 1) if isinstance(label, InFile) else label[m : m + 1]
                image, label = (on_device(one, self.device) for one in (image, label))
                volumes.append(torch.cat([image, label.to(image.dtype)]))
                to_volume.append(pair[side]["to_volume"])
        own = torch.tensor([pair["size"] for pair in pairs])
        low = (torch.tensor(size) - own) // 2  # of a working grid in that of the batch
        from_batch, to_normalised = torch.eye(4, dtype=torch.float64).repeat(len(pairs), 1, 1), fields.normalised(own)
        from_batch[:, :3, 3] = -low
        change = torch.linalg.inv_ex(to_normalised).inverse @ affines @ to_normalised @ from_batch
        to_volume = (torch.stack(to_volume) @ change.flatten(0, 1)).float()
        ends = torch.tensor([volume.shape[1:] for volume in volumes]).float() - 1
        to_volume, ends, low, high = (on_device(one, self.device) for one in (to_volume, ends, low, low + own))

        grid = fields.identity_grid(size, torch.float32, self.device)
        points = torch.einsum("bij,j...->bi...", to_volume[:, :3, :3], grid) + to_volume[:, :3, 3, None, None, None]
        inside = ((points >= -0.5) & (points <= ends[..., None, None, None] + 0.5)).all(1, keepdim=True)
        sampled = sample_each(volumes, whole, ends, points)
        sampled[:, 1:] *= inside  # an image keeps its border beyond it
        within = ((grid >= low[..., None, None, None]) & (grid < high[..., None, None, None])).all(1, keepdim=True)
        return sampled.unflatten(0, (2, -1)) * within


def largest(sizes: Iterable[Sequence[int]]) -> list[int]:
    """Along each axis the most voxels of any grid."""
    return [max(edges) for edges in zip(*sizes, strict=True)]


def sample_each(volumes: Sequence[Tensor], size: Sequence[int], last: Tensor, points: Tensor) -> Tensor:
    """Of each volume (C, X, Y, Z) the values at points of its own, float32, its border beyond it; in one interpolation.

    Args:
        volumes: B of them.
        size: the largest of their edges.
        last: the last voxel of each, (B, 3).
        points: shape (B, 3, X', Y', Z'), voxels.

    Returns:
        Shape (B, C, X', Y', Z').
    """
    batch = volumes[0].new_zeros((len(volumes), len(volumes[0]), *size), dtype=torch.float32)
    for one, volume in zip(batch, volumes, strict=True):
        one[(slice(None), *(slice(n) for n in volume.shape[1:]))] = volume
    return fields.sample(batch, points.clamp_min(0).minimum(last[..., None, None, None]))
