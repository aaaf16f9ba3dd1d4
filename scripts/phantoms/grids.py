"""Arithmetic on grids: smooth noise, separable blur and interpolation, soft ridges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ridge(distance: Tensor) -> Tensor:
    """1 at a distance of 0, falling off on both sides within about 1."""
    return 1 / (1 + distance**2) ** 2


def smooth_noise(noise: torch.Generator, shape: Sequence[int], spacing: Sequence[float], wavelength: float) -> Tensor:
    """A smooth random function of the voxels, mean 0, variance about 1: blurred noise of a coarse lattice."""
    step = wavelength / 2
    sizes = [int(n * s / step) + 4 for n, s in zip(shape, spacing, strict=True)]
    matrices = []
    for n, s, size in zip(shape, spacing, sizes, strict=True):
        rows = gaussian_rows(n, size, 0.8, noise.device, s / step)
        matrices.append(rows / rows.norm(dim=1, keepdim=True))
    return along_axes(torch.randn(sizes, generator=noise, device=noise.device), matrices)


def gaussian_rows(n: int, size: int, sigma: float, device: torch.device | str, step: float = 1.0) -> Tensor:
    """Gaussian weights (n, size) of `size` samples for n points a `step` apart, both centred; rows sum to 1."""
    offset = step * (torch.arange(n) - (n - 1) / 2)[:, None] - (torch.arange(size) - (size - 1) / 2)
    weights = torch.exp(-0.5 * (offset / max(sigma, 0.05)) ** 2) * (offset.abs() <= max(4 * sigma, 0.5))
    return (weights / weights.sum(1, keepdim=True)).to(device)


def along_axes(volume: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A matrix along each axis of (X, Y, Z): separable blur or interpolation, at a matrix product's speed."""
    x, y, z = matrices
    volume = volume @ z.T
    volume = y @ volume
    return (x @ volume.flatten(1)).view(-1, *volume.shape[1:])
