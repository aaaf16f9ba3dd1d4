"""The field of several networks, and how far they are from one another."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from monai.utils import ensure_tuple
from torch import Tensor, nn

from scripts.data.weights import load_weights


class FieldEnsemble(nn.Module):
    """The mean field of networks of one kind, each straight and in the mirror, at a share of its strength.

    Patients are nearly symmetric from left to right, so a pair and its mirror image have fields that mirror each other
    (test-time augmentation). A mean of fields is smoother than each, and errors that networks do not share fall out.
    Where they disagree it is too short rather than wrong; a network that overfits moves too far, which the strength
    takes back: it is set on held-out pairs.

    Args:
        network: (B, C, X, Y, Z) -> field (B, 3, X, Y, Z) in voxels, x from left to right.
        paths: weights of each member.
        strength: of the field.

    Attributes:
        spread: of each pair of the last call, how far the fields are from their mean, voxels: root mean square over
            them, mean over the fixed gland found, channel 3, or over all where there is none.
        apart: the same at each voxel, shape (B, X, Y, Z), of the last call; None before it.

    Raises:
        InputError: the weights do not fit, see `scripts.data.weights.check_weights`.
    """

    def __init__(self, network: nn.Module, paths: str | Sequence[str], strength: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(copy.deepcopy(network) for _ in ensure_tuple(paths))
        for member, path in zip(self.members, ensure_tuple(paths), strict=True):
            load_weights(path, member)
        self.strength = strength
        self.spread: list[float] = []
        self.apart: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        fields = []
        both = torch.cat([image, image.flip(2)])  # at once: a CPU convolves a single small cube at half the speed
        for member in self.members:
            straight, mirrored = member(both).float().chunk(2)
            mirrored = mirrored.flip(2) * mirrored.new_tensor([-1, 1, 1]).view(3, 1, 1, 1)
            fields += [straight, mirrored]
        every = self.strength * torch.stack(fields)
        mean = every.mean(0)
        self.apart = apart = (every - mean).square().sum(2).mean(0).sqrt()
        where = image[:, 3] > 0.5 if image.shape[1] > 3 else torch.ones_like(apart, dtype=torch.bool)
        self.spread = [one[gland].mean().item() for one, gland in zip(apart, where, strict=True)]
        return mean
