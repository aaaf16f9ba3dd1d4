"""The learned initial transform: a network finds the gland in each image, and the moments of the two glands align them.

The network sees one image at a time, MR and TRUS alike, as a cube: first the whole volume, then the surroundings of
what it found, then these finer. It learns from weak labels; to align, it needs the two images alone.
Positions are relative to the images, so a wrong voxel size in both headers does no harm.

Headers may lie about the axes. The network says which way round a cube is, and sees it upright; what is found lies on
the cube as the header has it, nothing is turned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Transform
from monai.utils import ensure_tuple
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.data.checks import InputError
from scripts.data.weights import load_weights
from scripts.network import fields
from scripts.network.segmentation import ORIENTATIONS
from scripts.registration.orientation import believed, codes, is_sure, turned, upright, votes
from scripts.registration.precision import computes_bfloat16

WHOLE = 32  # voxels along each axis of the cube of the first two passes
SIDE = 48  # and of the last
VIEWS = ((1, False), (1.15, True)), ((1, True), (0.85, False))  # of the last pass: size of cube, whether in the mirror
CLOSE = 1.5  # the second pass's cube, in lengths of the gland's longest diameter
NOMINAL = 50.0  # mm, the longest diameter every gland is taken to have on a grid that is measured by the gland


def cube_affine(centre: Tensor, axes: Tensor, length: float, side: int = SIDE) -> Tensor:
    """Voxel of a cube -> world, shape (4, 4), float64.

    Args:
        centre: of the cube, world mm, shape (3,).
        axes: unit vectors of its axes as columns, shape (3, 3).
        length: of its edges, outer face to outer face, mm.
        side: voxels along each of them.
    """
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = axes.double() * (length / side)
    affine[:3, 3] = centre.double() - affine[:3, :3] @ torch.full((3,), (side - 1) / 2, dtype=torch.float64)
    return affine


def frame(volume: MetaTensor) -> tuple[Tensor, Tensor, float]:
    """Centre (3,), unit axes (3, 3) in the order nearest to RAS, and longest edge in mm of a volume (C, X, Y, Z)."""
    affine = volume.affine.double().cpu()
    size = torch.tensor(volume.shape[1:], dtype=torch.float64)
    edges = affine[:3, :3].norm(dim=0) * size
    turned = Orientation(axcodes="RAS", labels=None)(volume).affine.double().cpu()[:3, :3]
    return affine[:3, :3] @ ((size - 1) / 2) + affine[:3, 3], turned / turned.norm(dim=0), edges.max().item()


def coarsened(volume: MetaTensor, affine: Tensor) -> MetaTensor:
    """A volume (C, X, Y, Z) by means of blocks, as many voxels as a voxel of a coarser grid covers whole.

    Args:
        affine: voxel -> world of the coarser grid, for example a cube's, see `cube_affine`.
    """
    own = volume.affine.double().cpu()
    covers = (torch.linalg.inv(own) @ affine)[:3, :3].abs().sum(1)  # voxels of the volume along each of its axes
    blocks = [max(1, min(int(c), n)) for c, n in zip(covers.tolist(), volume.shape[1:], strict=True)]
    grow = torch.diag(torch.tensor([*blocks, 1], dtype=torch.float64))
    grow[:3, 3] = (torch.tensor(blocks, dtype=torch.float64) - 1) / 2  # centre of the first block
    return MetaTensor(F.avg_pool3d(volume.as_tensor()[None].float(), blocks)[0], affine=own @ grow)


def on_cube(volume: MetaTensor, affine: Tensor, side: int = SIDE) -> Tensor:
    """A volume (C, X, Y, Z) on a cube, zero outside: (1, C, side, side, side), each voxel the mean of what it covers.

    Args:
        affine: voxel of the cube -> world, see `cube_affine`.
        side: voxels of the cube along each axis.
    """
    return on_grid(volume, affine, [side] * 3)


def on_grid(volume: MetaTensor, affine: Tensor, size: Sequence[int]) -> Tensor:
    """A volume (C, X, Y, Z) on another grid, zero outside: (1, C, *size), each voxel the mean of what it covers.

    Args:
        affine: voxel -> world of the grid, shape (4, 4), float64.
    """
    coarse = coarsened(volume, affine)
    to_coarse = torch.linalg.inv(coarse.affine.double()) @ affine
    return fields.resample(coarse.as_tensor()[None], to_coarse, size, padding_mode="outside")


def on_black(volume: MetaTensor) -> MetaTensor:
    """A volume whose darkest voxel is 0, as what is outside; on the CPU."""
    image = volume.as_tensor().cpu()
    return MetaTensor(image - image.min(), affine=volume.affine.cpu())


def standardised(cube: Tensor) -> Tensor:
    """Zero mean and unit variance of each item of (B, 1, SIDE, SIDE, SIDE)."""
    mean, sd = cube.mean((1, 2, 3, 4), keepdim=True), cube.std((1, 2, 3, 4), keepdim=True)
    return (cube - mean) / sd.clamp_min(1e-6)


def moments(gland: MetaTensor) -> tuple[Tensor, Tensor]:
    """Centroid (3,) in mm and covariance (3, 3) in mm² of where a map (1, X, Y, Z) is above one half, in its world.

    Voxels count as the bodies they are, not as their centres: even a single one has an extent.
    """
    affine = gland.affine.double().cpu()
    points = fields.identity_grid(gland.shape[1:], torch.float64, "cpu").flatten(1)
    points = affine[:3, :3] @ points + affine[:3, 3:]
    weight = (gland.as_tensor().cpu().flatten() > 0.5).double()
    weight = weight / weight.sum()
    centroid = points @ weight
    apart = points - centroid[:, None]
    return centroid, apart * weight @ apart.T + affine[:3, :3] @ affine[:3, :3].T / 12


def close_up(gland: MetaTensor) -> tuple[Tensor, float]:
    """Centre (3,) and edge in mm of the cube of the second pass at a gland (1, X, Y, Z)."""
    centre, covariance = moments(gland)
    # an ellipsoid's semi-axis is √5 standard deviations
    return centre, CLOSE * 2 * math.sqrt(5 * torch.linalg.eigvalsh(covariance)[-1].item())


def largest_component(probability: Tensor) -> Tensor:
    """A map (X, Y, Z) without its smaller regions above one half, and their rims; all zero without any region."""
    parts, count = ndimage.label((probability > 0.5).cpu().numpy())
    if not count:
        return torch.zeros_like(probability)
    largest = parts == ndimage.sum_labels(parts > 0, parts, range(1, count + 1)).argmax() + 1
    others = ndimage.binary_dilation((parts > 0) & ~largest) & ~largest
    return probability * torch.from_numpy(~others).to(probability.device)


def _seen(network: nn.Module, cubes: Tensor) -> tuple[Tensor, Tensor]:
    """What a network sees in cubes (N, 1, X, Y, Z): the probability of the gland, likewise, and of each way (N, 8).

    The latter are logits. A CPU convolves a single small cube at a third of the speed of two.
    """
    seen = network(cubes).float()
    return seen[:, :1].sigmoid(), seen[:, 1:, 0, 0, 0]


def look(network: nn.Module, cube: Tensor, way: int | None = None) -> tuple[Tensor, Tensor | None, int]:
    """What a network sees in a cube (1, 1, X, Y, Z) when it sees it upright, straight and in the mirror.

    Args:
        way: it is stored, see `scripts.registration.orientation`; None to ask the network. Where it is sure of another
            way than upright, it sees the cube made upright from that, too, and must be sure again; else, from all
            eight.

    Returns:
        The probability of the gland on the cube as it is, (2, 1, X, Y, Z), straight first; the logarithm of the
        probability of each way, (8,), or None where it was not asked; the way.
    """

    def both(way: int) -> tuple[Tensor, Tensor]:
        straight = upright(cube, way)
        seen, logits = _seen(network, torch.cat([straight, straight.flip(2)]))
        return seen, logits[:1].cpu()

    if way is not None:
        seen, said = both(way)[0], None
    else:
        seen, logits = both(0)
        turns, said = [0], votes(logits, [0])
        sure = is_sure(said)
        way = int(said.argmax()) if sure else 0
        if way:
            seen, more = both(way)
            turns, logits = [0, way], torch.cat([logits, more])
            said, upright_said = votes(logits, turns), votes(more, [way])
            sure = is_sure(upright_said) and int(upright_said.argmax()) == way
        if not sure:
            others = [turn for turn in range(ORIENTATIONS) if turn not in turns]
            more = _seen(network, torch.cat([upright(cube, turn) for turn in others]))[1].cpu()
            said = votes(torch.cat([logits, more]), [*turns, *others])
            looked_at, way = way, believed(said)
            seen = seen if way == looked_at else both(way)[0]
    straight, mirrored = seen
    return turned(torch.stack([straight, mirrored.flip(-3)]), way), said, way


def agreement(predictions: Tensor) -> float:
    """The smallest Dice between two predictions, (L, 1, X, Y, Z), above one half; 0 where one has nothing there."""
    seen = (predictions > 0.5).flatten(1).double()
    both, size = seen @ seen.T, seen.sum(1)
    return (2 * both / (size + size[:, None]).clamp_min(1)).min().item()


def cut_percent(gland: Tensor, inside: Tensor) -> float:
    """How much of the three voxels around a gland the image does not show.

    Args:
        gland: map (X, Y, Z), above one half.
        inside: on the same grid, 1 in the image and 0 outside.
    """
    near = torch.from_numpy(ndimage.binary_dilation((gland > 0.5).numpy(), iterations=3)) & (gland <= 0.5)
    return 100 * (inside[near] < 0.5).double().mean().item()


def on_image(gland: MetaTensor, image: MetaTensor) -> Tensor:
    """The probability of a gland that was found (1, …), on the grid of its image (1, X, Y, Z), float32."""
    to_gland = torch.linalg.inv(gland.affine.double()) @ image.affine.double().cpu()
    return fields.resample(gland.as_tensor()[None].float(), to_gland, image.shape[1:], padding_mode="outside")[0]


class SegmentGlandsd(Transform):
    """Add `moving_gland` and `fixed_gland`: the probability of the gland, found in each image by a network.

    Each is a `MetaTensor` (1, SIDE, SIDE, SIDE) with its own affine (RAS mm): a cube around the gland, without smaller
    regions than the largest. `moving_confidence` and `fixed_confidence` are what speaks against them, see `find`. Of a
    single image, `image`, they are `gland` and `confidence`.

    Args:
        network: see `scripts.network.segmentation.GlandNetwork`.
        path: its weights; or several files, whose networks' probabilities are averaged.
        device: where it runs.
        wanted: False leaves a pair as it is.
        at_labels: True looks once, where the labelled gland is, as training wants it. Adds no confidence.
        precision: "bfloat16" runs the networks in it where the hardware has it, see `PrecisionInferer`; all else is
            float32: what is found then depends on no processor.

    Raises:
        InputError: the weights do not fit (see `scripts.data.weights.check_weights`); no gland is found in an image.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | Sequence[str],
        device: torch.device | str = "cpu",
        wanted: bool = True,
        at_labels: bool = False,
        precision: str = "float32",
    ) -> None:
        self.network, self.paths, self.device, self.wanted = network, ensure_tuple(path), torch.device(device), wanted
        self.at_labels, self.half = at_labels, precision == "bfloat16" and computes_bfloat16(self.device)
        self.networks: list[nn.Module] = []

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        if not self.wanted:
            return dict(data)
        if not self.networks:  # threads that begin together may each load them; they are the same
            self.networks = self._loaded()
        d = dict(data)
        for side in ("",) if "image" in d else ("moving_", "fixed_"):
            if self.at_labels:
                if d[f"{side}label"][:1].any():
                    d[f"{side}gland"] = self.see(d[f"{side}image"], *close_up(d[f"{side}label"][:1]))
                continue
            found = self.find(d[f"{side}image"])
            if found is None:
                where = d.get(f"{side}file", f"the {side.replace('_', ' ')}image")
                raise InputError(f"{where}: no prostate found; is it the right image, with the whole gland in view?")
            d[f"{side}gland"], d[f"{side}confidence"] = found
        return d

    def _loaded(self) -> list[nn.Module]:
        networks = [copy.deepcopy(self.network) for _ in self.paths]
        for path, network in zip(self.paths, networks, strict=True):
            load_weights(path, network)
            network.to(self.device).eval()
            if self.half:  # the network alone: coordinates in bfloat16 would be voxels off
                network.forward = torch.autocast(self.device.type, torch.bfloat16)(network.forward)
        return networks

    @torch.inference_mode()
    def see(self, volume: MetaTensor, centre: Tensor, length: float) -> MetaTensor:
        """The gland of a volume (1, X, Y, Z) in a cube at `centre`, edges of `length` mm, axes as the header says."""
        axes = frame(volume)[1]
        mean = self._last_pass(on_black(volume), centre, axes, length, 0)[1]
        return MetaTensor(largest_component(mean)[None], affine=cube_affine(centre, axes, length))

    def _last_pass(
        self, dark: MetaTensor, centre: Tensor, axes: Tensor, length: float, way: int
    ) -> tuple[Tensor, Tensor]:
        """What all networks see in a cube, see `cube_affine`, (predictions, X, Y, Z), and the mean over three sizes.

        Each network sees one pair of `VIEWS`, a single one both; glands are as good as if each saw both.
        """
        grids = {size: cube_affine(centre, axes, size * length) for views in VIEWS for size, _ in views}
        cubes = {size: upright(standardised(on_cube(dark, grid)), way).to(self.device) for size, grid in grids.items()}
        seen: dict[float, list[Tensor]] = {size: [] for size in grids}
        for k in range(max(len(VIEWS), len(self.networks))):
            network, views = self.networks[k % len(self.networks)], VIEWS[k % len(VIEWS)]
            given = torch.cat([cubes[size].flip(2) if mirrored else cubes[size] for size, mirrored in views])
            for (size, mirrored), found in zip(views, _seen(network, given)[0][:, 0], strict=True):
                seen[size].append(turned(found.flip(0) if mirrored else found, way).cpu())
        predictions = torch.stack(seen.pop(1))
        total = predictions.mean(0)
        times = torch.ones_like(total)
        for size, found in seen.items():
            mean = torch.stack(found).mean(0)
            both = torch.stack([mean, torch.ones_like(mean)])[None]
            to_other = torch.linalg.inv(grids[size]) @ grids[1]
            mean, shown = fields.resample(both, to_other, mean.shape, padding_mode="outside")[0]
            total, times = total + mean, times + shown
        return predictions, total / times

    @torch.inference_mode()
    def find(self, volume: MetaTensor) -> tuple[MetaTensor, dict[str, Any]] | None:
        """The gland of a volume (1, X, Y, Z) and the confidence in it; None without one.

        It is found in the whole volume, then in its surroundings, both by the first network, then in these on a finer
        grid, by all networks and in cubes of three sizes. In the first pass the network is asked which way round the
        volume is stored.

        The confidence: `agreement` of the last pass (see there); `blur`, Σ p(1 − p) over the voxels of the gland;
        `drift`, how far the last pass moved its centre, in lengths of its cube; `growth`, its length over the one
        before; `cut_percent`; `orientation`, how much likelier, in logarithms, the likeliest other way is in which the
        volume can be stored than the header's, above 0 if it is; and `axes`, the directions of the voxel axes in the
        way that is believed, see `scripts.registration.orientation.believed`.
        """
        centre, axes, length = frame(volume)
        dark = on_black(volume)
        said, way = None, None
        for _ in range(2):
            affine = cube_affine(centre, axes, length, WHOLE)
            cube = standardised(on_cube(dark, affine, WHOLE)).to(self.device)
            predictions, asked, way = look(self.networks[0], cube, way)
            said = asked if said is None else said
            probability = largest_component(predictions.mean(0)[0].cpu())
            if not probability.any():
                return None
            centre, length = close_up(MetaTensor(probability[None], affine=affine))
        affine = cube_affine(centre, axes, length)
        predictions, at_sizes = self._last_pass(dark, centre, axes, length, way)
        mean = predictions.mean(0)
        probability = largest_component(mean)
        if not probability.any():
            return None
        gland = MetaTensor(probability[None], affine=affine)
        (before, first), (centre, length) = (centre, length), close_up(gland)
        blur = ((mean * (1 - mean)).sum() / (probability > 0.5).sum()).item()
        at_sizes = largest_component(at_sizes)
        gland = MetaTensor(at_sizes[None], affine=affine) if at_sizes.any() else gland
        inside = on_cube(MetaTensor(torch.ones_like(dark.as_tensor()), affine=dark.affine), affine)[0, 0]
        return gland, {
            "agreement": agreement(predictions),
            "blur": blur,
            "drift": (centre - before).norm().item() / length,
            "growth": length / first,
            "cut_percent": cut_percent(gland[0].as_tensor(), inside),
            "orientation": (said[1:].max() - said[0]).item(),
            "axes": codes(volume.affine.numpy(), way),
        }
