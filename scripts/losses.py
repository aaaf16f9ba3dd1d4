"""The label-driven objective of Hu et al. (MedIA 2018), §2.1-2.2: multiscale label losses and field regularisers.

Multiscale Dice is computed in closed form. With G the (linear) Gaussian filter of one scale, a the fixed and b the
warped label, ``Σ (G a)(G b) = ⟨GᵀG a, b⟩`` and ``Σ G b = ⟨Gᵀ1, b⟩``: inner products of b with fields that do not depend
on the network. It equals Eq. (5) exactly, zero padding and kernel truncation included, because G is just a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from monai.losses import BendingEnergyLoss
from torch import Tensor, nn

from scripts.fields import warp

PAPER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # mm, §3.2


@lru_cache(maxsize=512)
def gaussian_matrix(size: int, sigma: float) -> Tensor:
    """The filter f_σ along one axis as a matrix: zero padding, kernel normalised to 1, tail int(3σ) as in label-reg.

    Args:
        size: voxels along the axis.
        sigma: standard deviation in voxels; 0 gives the identity.

    Returns:
        Shape (size, size), float64, CPU.
    """
    tail = int(3 * sigma + 1e-6)  # a spacing that came through float32 must not shorten it
    x = np.arange(-tail, tail + 1)
    kernel = np.exp(-0.5 * (x / sigma) ** 2) if tail else np.ones(1)
    kernel /= kernel.sum()
    offset = np.arange(size)[None] - np.arange(size)[:, None]
    matrix = np.where(np.abs(offset) <= tail, kernel[np.clip(offset + tail, 0, 2 * tail)], 0.0)
    return torch.from_numpy(matrix)


def _filter(label: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A separable linear map, one matrix per axis: (B, X, Y, Z) -> (B, X, Y, Z)."""
    for axis, matrix in enumerate(matrices, start=1):
        label = torch.tensordot(label, matrix, dims=([axis], [1])).movedim(-1, axis)
    return label


def _by_spacing(function, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
    """Mean over the batch of `function(warped, fixed, spacing)`, called once if all items share one voxel size."""
    spacing = spacing.detach().cpu().double()
    if bool((spacing == spacing[:1]).all()):
        return function(warped, fixed, spacing[0]).mean()
    items = zip(warped.split(1), fixed.split(1), spacing, strict=True)
    return torch.cat([function(w, f, s) for w, f, s in items]).mean()


def _check_labels(warped: Tensor, fixed: Tensor, spacing: Tensor) -> None:
    if warped.shape != fixed.shape or warped.ndim != 5 or warped.shape[1] != 1:
        raise ValueError(f"labels must share one shape (B, 1, X, Y, Z): {tuple(warped.shape)}, {tuple(fixed.shape)}")
    if spacing.shape != (warped.shape[0], 3):
        raise ValueError(f"spacing must have shape ({warped.shape[0]}, 3), got {tuple(spacing.shape)}")


class MultiscaleDiceLoss(nn.Module):
    """One minus multiscale soft Dice, Eq. (4) and (5): the mean over scales σ of ``2 Σ ab / (Σ a + Σ b)`` of the two
    labels filtered by a Gaussian of σ mm. Perfect alignment does not give 0: the Dice has no squares.

    Args:
        scales: σ in mm; 0 is the identity.
    """

    def __init__(self, scales: Sequence[float] = PAPER_SCALES) -> None:
        super().__init__()
        self.scales = tuple(float(s) for s in scales)

    def forward(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        """Mean over the batch.

        Args:
            warped, fixed: labels in [0, 1], shape (B, 1, X, Y, Z); `fixed` gets no gradient.
            spacing: voxel size in mm, shape (B, 3).

        Raises:
            ValueError: the shapes do not fit together.
        """
        _check_labels(warped, fixed, spacing)
        return 1 - _by_spacing(self._dice, warped, fixed.detach(), spacing)

    def _dice(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        """Mean over scales of the Dice: shape (B,), float64."""
        size = fixed.shape[2:]
        a, b = fixed[:, 0], warped[:, 0]
        filters = [
            [gaussian_matrix(n, s / float(mm)) for n, mm in zip(size, spacing, strict=True)] for s in self.scales
        ]
        with torch.no_grad():
            fields = [
                a if scale == 0 else _filter(a, [(g.T @ g).to(a) for g in axes])
                for scale, axes in zip(self.scales, filters, strict=True)
            ]
            fields = torch.stack(fields, dim=2).flatten(3)  # (B, X, scales, Y·Z)
            # Gᵀ1 of each axis, shape (n, scales): the weight with which each voxel enters Σ G b
            weights = [torch.stack([axes[i].sum(0) for axes in filters], dim=1).to(a) for i in range(3)]

        def mass(label: Tensor) -> Tensor:
            by_column = (label @ weights[2] * weights[1]).sum(2)  # (B, X, scales)
            return (by_column * weights[0]).double().sum(1)

        # one product per x-slab, then float64: summing 1e6 small products in float32 would lose digits
        overlap = (fields @ b.flatten(2).unsqueeze(-1)).squeeze(-1).double().sum(1)
        return (2 * overlap / (mass(a) + mass(b)).clamp_min(1e-6)).mean(1)


class MultiscaleCrossEntropyLoss(nn.Module):
    """Multiscale cross-entropy, Eq. (6): foreground plus background, the fixed label as target, the mean over voxels
    and scales; filtered labels are clipped to [1e-6, 1 − 1e-6]. Arguments as in `MultiscaleDiceLoss`."""

    def __init__(self, scales: Sequence[float] = PAPER_SCALES) -> None:
        super().__init__()
        self.scales = tuple(float(s) for s in scales)

    def forward(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        """Mean over the batch; arguments as in `MultiscaleDiceLoss.forward`."""
        _check_labels(warped, fixed, spacing)
        return _by_spacing(self._cross_entropy, warped, fixed.detach(), spacing)

    def _cross_entropy(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        total = torch.zeros(len(fixed), dtype=torch.float64, device=fixed.device)
        for scale in self.scales:
            axes = zip(fixed.shape[2:], spacing, strict=True)
            matrices = [gaussian_matrix(n, scale / float(mm)).to(fixed) for n, mm in axes]
            p, q = (_filter(label[:, 0], matrices).clamp(1e-6, 1 - 1e-6) for label in (fixed, warped))
            terms = p * q.log() + (1 - p) * (1 - q).log()
            total = total - terms.mean((2, 3)).double().mean(1)
        return total / len(self.scales)


class BendingEnergy(nn.Module):
    """Bending energy of a DDF in voxels (§2.2): the mean over voxels and the three components of
    ``xx² + yy² + zz² + 2xy² + 2xz² + 2yz²``.

    Args:
        stencil: "label-reg", central differences (f[i+1] − f[i−1])/2 applied twice, as the authors' code, blind to a
            wave of two voxels; or "compact", MONAI's [1, −2, 1]. Equal on smooth fields.

    Raises:
        ValueError: an unknown stencil; a side shorter than 5 voxels.
    """

    def __init__(self, stencil: str = "label-reg") -> None:
        super().__init__()
        if stencil not in ("label-reg", "compact"):
            raise ValueError(f'stencil must be "label-reg" or "compact", got {stencil!r}')
        self.compact = BendingEnergyLoss() if stencil == "compact" else None

    def forward(self, ddf: Tensor) -> Tensor:
        """Scalar; `ddf` has shape (B, 3, X, Y, Z), voxels."""
        if min(ddf.shape[2:]) < 5:
            raise ValueError(f"bending energy needs at least 5 voxels along each axis, got {tuple(ddf.shape[2:])}")
        if self.compact is not None:
            return self.compact(ddf)

        def difference(f: Tensor, axis: int) -> Tensor:  # all axes are cropped alike
            crop = [slice(None)] * 2 + [slice(1, -1)] * 3
            ahead, behind = list(crop), list(crop)
            ahead[axis], behind[axis] = slice(2, None), slice(None, -2)
            return (f[tuple(ahead)] - f[tuple(behind)]) / 2

        energy = torch.zeros((), dtype=ddf.dtype, device=ddf.device)
        for i in (2, 3, 4):
            first = difference(ddf, i)
            for j in range(i, 5):
                energy = energy + (1 if i == j else 2) * difference(first, j).square().mean()
        return energy


class LabelDrivenLoss(nn.Module):
    """The objective, Eq. (1)-(2): label dissimilarity of one drawn label per pair plus α times the regulariser.

    Args:
        similarity: called with (warped label, fixed label, spacing).
        regulariser: called with the DDF.
        alpha: α, its weight; the paper's 0.5.
    """

    def __init__(self, similarity: nn.Module, regulariser: nn.Module, alpha: float = 0.5) -> None:
        super().__init__()
        self.similarity = similarity
        self.regulariser = regulariser
        self.alpha = alpha

    def forward(self, ddf: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar.

        Args:
            ddf: shape (B, 3, X, Y, Z), voxels of the fixed grid.
            targets: `moving_label` and `fixed_label` (B, 1, X, Y, Z), both on the fixed grid; `spacing` (B, 3) in mm.
        """
        ddf = ddf.float() if ddf.dtype in (torch.float16, torch.bfloat16) else ddf
        warped = warp(targets["moving_label"], ddf)
        similarity = self.similarity(warped, targets["fixed_label"], targets["spacing"])
        return similarity + self.alpha * self.regulariser(ddf)
