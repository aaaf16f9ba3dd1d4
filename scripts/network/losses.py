"""The label-driven objective of Hu et al. (MedIA 2018), §2.1-2.2: multiscale label losses and field regularisers.

Multiscale Dice is computed in closed form. With G the (linear) Gaussian filter of one scale, a the fixed and b the
warped label, ``Σ (G a)(G b) = ⟨GᵀG a, b⟩`` and ``Σ G b = ⟨Gᵀ1, b⟩``: inner products of b with fields that do not depend
on the network. It equals Eq. (5) exactly, zero padding and kernel truncation included, because G is just a matrix.

The label losses and the bending energy compute their gradient along with their value, scale by scale: nothing but that
gradient is kept for the backward pass. They can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from monai.losses import BendingEnergyLoss
from monai.transforms.utils import distance_transform_edt
from torch import Tensor, nn

from scripts.network.fields import at_points, identity_grid, jacobian_determinant, warp

PAPER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # mm, §3.2


class _KnownGradient(torch.autograd.Function):
    """Values (B,) of x (B, …) whose gradient, of the shape of x, was computed along with them."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient).view(-1, *[1] * (gradient.ndim - 1)), None, None


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


class Filters(NamedTuple):
    """One scale's filter G on one grid: per axis, as matrices of the labels' dtype and device."""

    sigma: float  # mm
    g: list[Tensor]  # G, shape (n, n)
    k: list[Tensor]  # GᵀG, shape (n, n), symmetric
    weight: list[Tensor]  # Gᵀ1, shape (n,): the weight with which each voxel enters Σ G b


@lru_cache(maxsize=512)
def _matrices(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """G, GᵀG and Gᵀ1 along one axis, rounded from float64 and kept."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        g = gaussian_matrix(size, sigma)
        return tuple(m.to(device, dtype) for m in (g, g.T @ g, g.sum(0)))


def _filters(scales: Sequence[float], label: Tensor, spacing: Sequence[float]) -> list[Filters]:
    """The filters of all scales for a label (B, X, Y, Z) of voxel size `spacing` mm."""
    found = []
    for sigma in scales:
        axes = zip(label.shape[1:], spacing, strict=True)
        matrices = [_matrices(n, sigma / float(mm), label.dtype, label.device) for n, mm in axes]
        found.append(Filters(sigma, *map(list, zip(*matrices, strict=True))))
    return found


def _apply(matrices: Sequence[Tensor], label: Tensor, room: Sequence[Tensor] | None = None) -> Tensor:
    """A separable linear map, one matrix per axis: (B, X, Y, Z) -> (B, X, Y, Z), three matrix products.

    Args:
        room: two tensors like `label`; the result lies in the first and both are overwritten. A filter needs 10 to 50
            megabytes, which cost as much to get from the system, page by page, as the products themselves.
    """
    x, y, z = matrices
    batch, nx, ny, nz = label.shape
    first, second = room or (torch.empty_like(label), torch.empty_like(label))
    torch.mm(label.reshape(-1, nz), z.T, out=first.view(-1, nz))
    planes = batch * nx
    torch.bmm(y.expand(planes, -1, -1), first.view(planes, ny, nz), out=second.view(planes, ny, nz))
    torch.bmm(x.expand(batch, -1, -1), second.flatten(2), out=first.flatten(2))
    return first


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

    def forward(self, warped: Tensor, fixed: Tensor, spacing: Tensor, fields: Tensor | None = None) -> Tensor:
        """Mean over the batch.

        Args:
            warped, fixed: labels in [0, 1], shape (B, 1, X, Y, Z); `fixed` gets no gradient.
            spacing: voxel size in mm, shape (B, 3).
            fields: what `fields` gives for `fixed`, where it is the same in many calls.

        Raises:
            ValueError: the shapes do not fit together.
        """
        _check_labels(warped, fixed, spacing)
        if fields is not None:
            if not bool((spacing == spacing[:1]).all()):
                raise ValueError("known fields need one voxel size for the whole batch")
            return 1 - self._dice(warped, fixed.detach(), spacing[0], fields).mean()
        return 1 - _by_spacing(self._dice, warped, fixed.detach(), spacing)

    @torch.no_grad()
    def fields(self, fixed: Tensor, spacing: Sequence[float]) -> Tensor:
        """The fields GᵀG a of a label (B, 1, X, Y, Z) of voxel size `spacing`: (scales, B, X, Y, Z)."""
        a = fixed[:, 0].contiguous()
        return torch.stack([_apply(f.k, a) for f in _filters(self.scales, a, spacing)])

    @staticmethod
    def _mass(label: Tensor, filters: Sequence[Filters]) -> Tensor:
        """Σ G b of each scale: (B, scales), float64."""
        x, y, z = (torch.stack([f.weight[axis] for f in filters], dim=1) for axis in range(3))
        return ((label @ z * y).sum(2) * x).double().sum(1)

    def _dice(self, warped: Tensor, fixed: Tensor, spacing: Tensor, known: Tensor | None = None) -> Tensor:
        """Mean over scales of the Dice: shape (B,), float64."""
        with torch.no_grad():
            a, b = fixed[:, 0].contiguous(), warped.detach()[:, 0].contiguous()
            filters = _filters(self.scales, a, spacing)
            room = torch.empty_like(a), torch.empty_like(a)
            mass = (self._mass(a, filters) + self._mass(b, filters)).clamp_min(1e-6)
            inner, gradient = [], torch.zeros_like(b) if warped.requires_grad else None
            slope = (2 / mass / len(filters)).to(a)  # of the value with respect to Σ (G a)(G b)
            for i, scale in enumerate(filters):
                field = known[i] if known is not None else a if scale.sigma == 0 else _apply(scale.k, a, room)
                # each x-slab, then float64: summing 1e6 small products in float32 would lose digits
                inner.append(torch.mul(field, b, out=room[1]).sum((2, 3)).double().sum(1))
                if gradient is not None:
                    gradient.addcmul_(field, slope[:, i].view(-1, 1, 1, 1))
            inner = torch.stack(inner, dim=1)
            value = (2 * inner / mass).mean(1)
            if gradient is not None:  # minus that of Σ G b: a sum of products of one vector per axis
                x, y, z = (torch.stack([f.weight[axis] for f in filters]) for axis in range(3))
                yz = (y[:, :, None] * z[:, None]).flatten(1).expand(len(b), -1, -1)
                share = (2 * inner / mass**2 * (mass > 1e-6) / len(filters)).to(a)
                gradient.flatten(2).baddbmm_(torch.einsum("bs,sx->bxs", share, x), yz, alpha=-1)
                gradient = gradient.unsqueeze(1)
        return value if gradient is None else _KnownGradient.apply(warped, value, gradient)


class MultiscaleSquaredDiceLoss(nn.Module):
    """One minus the mean over scales of ``2 Σ ab / (Σ a² + Σ b²)`` of the filtered labels (not in the paper): 0 for
    equal labels at any scale. ``Σ (G b)² = ⟨GᵀG b, b⟩``. Arguments as in `MultiscaleDiceLoss`."""

    def __init__(self, scales: Sequence[float] = PAPER_SCALES) -> None:
        super().__init__()
        self.scales = tuple(float(s) for s in scales)

    def forward(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        """Mean over the batch; arguments as in `MultiscaleDiceLoss.forward`."""
        _check_labels(warped, fixed, spacing)
        return 1 - _by_spacing(self._dice, warped, fixed.detach(), spacing)

    def _dice(self, warped: Tensor, fixed: Tensor, spacing: Tensor) -> Tensor:
        """Mean over scales of the Dice: shape (B,), float64."""

        def inner(one: Tensor, other: Tensor) -> Tensor:
            return (one * other).sum((2, 3)).double().sum(1)

        with torch.no_grad():
            a, b = fixed[:, 0].contiguous(), warped.detach()[:, 0].contiguous()
            value, gradient = 0, torch.zeros_like(b) if warped.requires_grad else None
            for scale in _filters(self.scales, a, spacing):
                of_a, of_b = _apply(scale.k, a), _apply(scale.k, b)
                both, size = inner(of_a, b), (inner(of_a, a) + inner(of_b, b)).clamp_min(1e-6)
                value = value + 2 * both / size / len(self.scales)
                if gradient is not None:
                    slopes = (2 / size, -4 * both / size**2)
                    for field, slope in zip((of_a, of_b), slopes, strict=True):
                        gradient.addcmul_(field, (slope / len(self.scales)).to(a).view(-1, 1, 1, 1))
        return value if gradient is None else _KnownGradient.apply(warped, value, gradient.unsqueeze(1))


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
        with torch.no_grad():
            a, b = fixed[:, 0].contiguous(), warped.detach()[:, 0].contiguous()
            value, gradient = 0, torch.zeros_like(b) if warped.requires_grad else None
            share, one = 1 / (len(self.scales) * b[0].numel()), torch.ones((), dtype=a.dtype, device=a.device)
            rooms = [torch.empty_like(a) for _ in range(4)]
            for scale in _filters(self.scales, a, spacing):
                p = _apply(scale.g, a, rooms[:2]).clamp_(1e-6, 1 - 1e-6)
                smooth = _apply(scale.g, b, rooms[2:])
                q = torch.clamp(smooth, 1e-6, 1 - 1e-6, out=rooms[1])
                clipped = q != smooth
                log_q, log_rest = torch.log(q, out=smooth), torch.log1p(-q, out=rooms[3])
                # p log q + (1 − p) log(1 − q)
                terms = torch.addcmul(log_rest, p, log_q.sub_(log_rest), out=log_q)
                value = value - share * terms.sum((2, 3)).double().sum(1)
                if gradient is not None:  # (1 − p)/(1 − q) − p/q = (q − p) / (q (1 − q)); none where q is clipped
                    slope = torch.sub(q, p, out=rooms[2]).div_(torch.sub(one, q, out=rooms[3]).mul_(q))
                    slope.masked_fill_(clipped, 0)
                    gradient += _apply([g.T for g in scale.g], slope, (rooms[0], rooms[3]))
            if gradient is not None:
                gradient = (share * gradient).unsqueeze(1)
        return value if gradient is None else _KnownGradient.apply(warped, value, gradient)


def _second_differences() -> list[tuple[int, list[tuple[tuple[int, ...], float]]]]:
    """Central differences applied twice, for each pair of axes: how often it counts, and its (offset, weight) terms."""
    found = []
    axes = np.eye(3, dtype=int)
    for i in range(3):
        for j in range(i, 3):
            terms: dict[tuple[int, ...], float] = {}
            for one in (1, -1):
                for two in (1, -1):
                    offset = tuple((one * axes[i] + two * axes[j]).tolist())
                    terms[offset] = terms.get(offset, 0) + one * two / 4
            found.append((1 if i == j else 2, list(terms.items())))
    return found


SECOND_DIFFERENCES = _second_differences()


def _shifted(f: Tensor, offset: Sequence[int]) -> Tensor:
    """View of f (B, C, X, Y, Z) at `offset` from each voxel that lies two or more from every face."""
    return f[(..., *(slice(2 + o, n - 2 + o) for n, o in zip(f.shape[2:], offset, strict=True)))]


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

        with torch.no_grad():
            f = ddf.detach()
            gradient = torch.zeros_like(f) if ddf.requires_grad else None
            energy = torch.zeros(len(f), dtype=torch.float64, device=f.device)
            share = 1 / (f[0].numel() / f[0, 0].numel() * np.prod([n - 4 for n in f.shape[2:]]))
            for count, stencil in SECOND_DIFFERENCES:
                (offset, weight), *others = stencil
                second = _shifted(f, offset) * weight
                for offset, weight in others:
                    second.add_(_shifted(f, offset), alpha=weight)
                energy += count * share * second.square().sum((3, 4)).double().sum((1, 2))
                if gradient is not None:
                    for offset, weight in stencil:
                        _shifted(gradient, offset).add_(second, alpha=2 * count * share * weight)
        energy = energy.to(ddf.dtype)
        return (energy if gradient is None else _KnownGradient.apply(ddf, energy, gradient)).mean()


class FoldingPenalty(nn.Module):
    """How much a DDF folds space: the mean over inner voxels of ``max(0, −det J)``, J the Jacobian of p + u(p).

    The discussion in §5 proposes to regularise the Jacobian without saying how. This is the local orientation
    consistency of Mok & Chung (CVPR 2020): 0 wherever the determinant, by central differences, is not negative.
    """

    def forward(self, ddf: Tensor) -> Tensor:
        """Scalar, without unit; `ddf` has shape (B, 3, X, Y, Z), voxels.

        Raises:
            ValueError: a side shorter than 3 voxels.
        """
        if min(ddf.shape[2:]) < 3:
            raise ValueError(f"folding needs at least 3 voxels along each axis, got {tuple(ddf.shape[2:])}")
        return torch.relu(-jacobian_determinant(ddf)).mean()


class WeightedSum(nn.Module):
    """Several regularisers as one: ``Σ_i w_i Ω_i(u)``.

    Args:
        regularisers: each called with the DDF.
        weights: w, one for each; α multiplies their sum.

    Raises:
        ValueError: not one weight for each regulariser.
    """

    def __init__(self, regularisers: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(regularisers) != len(weights):
            raise ValueError(f"{len(regularisers)} regularisers need as many weights, got {len(weights)}")
        self.regularisers = nn.ModuleList(regularisers)
        self.weights = tuple(weights)

    def forward(self, ddf: Tensor) -> Tensor:
        """Scalar; `ddf` has shape (B, 3, X, Y, Z), voxels."""
        return sum(w * regulariser(ddf) for w, regulariser in zip(self.weights, self.regularisers, strict=True))


def _at_least_float32(ddf: Tensor) -> Tensor:
    return ddf.float() if ddf.dtype in (torch.float16, torch.bfloat16) else ddf


def reached(warped: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """How much of each moving label a field reaches: ``Σ warp(l_m, u) / min(Σ l_m, Σ l_f)``, shape (B,), without unit.

    About 1 or more where labels are aligned, 0 where a label has left the grid, 1 where either label is empty.

    Args:
        warped: the moving labels pulled by the field, zero outside, shape (B, 1, X, Y, Z).
        targets: as in `LabelDrivenLoss.forward`.
    """
    mass = torch.minimum(*(targets[key].flatten(1).sum(1) for key in ("moving_label", "fixed_label")))
    return torch.where(mass > 0, warped.flatten(1).sum(1) / mass.clamp_min(1e-6), 1)


def way_back(ddf: Tensor, warped: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """What leads a label back that the field has pushed off the grid (not in the paper): the mean over the batch of
    ``max(0, 1 − 2 r) · d``, with r what is `reached` of the moving label and d the distance from where the field takes
    the fixed label's centre to the moving label's centre, in diagonals of the grid.

    Overlaps and distances read at the samples have no gradient where no sample meets the label; d has one everywhere.
    While half of each label is reached, value and gradient are exactly 0.

    Args:
        ddf, targets: as in `LabelDrivenLoss.forward`.
        warped: as in `reached`.
    """
    moving, fixed, spacing = (targets[key] for key in ("moving_label", "fixed_label", "spacing"))
    grid = identity_grid(ddf.shape[2:], ddf.dtype, ddf.device)
    apart = _mean(grid, fixed) + _mean(ddf, fixed) - _mean(grid, moving)  # voxels
    voxel = spacing / (spacing * spacing.new_tensor(ddf.shape[2:])).norm(dim=1, keepdim=True)  # in diagonals
    voxel = voxel.to(ddf.device, ddf.dtype, non_blocking=True)
    return (torch.relu(1 - 2 * reached(warped, targets)) * (apart * voxel).norm(dim=1)).mean()


def _mean(field: Tensor, label: Tensor) -> Tensor:
    """Of a field (3, X, Y, Z) or (B, 3, X, Y, Z) over each label (B, 1, X, Y, Z): shape (B, 3)."""
    return (field * label).sum((2, 3, 4)) / label.sum((2, 3, 4)).clamp_min(1e-6)


class LabelDrivenLoss(nn.Module):
    """The objective, Eq. (1)-(2): label dissimilarity of one drawn label per pair plus α times the regulariser; and a
    `way_back` for labels that have left the grid, else 0.

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
        ddf = _at_least_float32(ddf)
        warped = warp(targets["moving_label"], ddf)
        similarity = self.similarity(warped, targets["fixed_label"], targets["spacing"])
        return similarity + self.alpha * self.regulariser(ddf) + way_back(ddf, warped, targets)


class LandmarkDrivenLoss(nn.Module):
    """The gland by its overlap, and every label's centroid as a point (not in the paper).

    A landmark of a few voxels overlaps with nothing when it is off by its own size, so Eq. (5) sees it at coarse scales
    alone, where its neighbourhood has little gradient; and one label a step is all that Eq. (3) draws. As a point it
    counts at any distance, with the same pull, and all labels of a pair count in every step. The distance is squared
    where it is small and linear beyond (Huber), since landmarks are placed with errors of millimetres.

    It counts both ways: from where the field takes the fixed point to the moving one, and from the fixed point to where
    the moving one comes to lie, as a warped label does (§3.3). The first alone is least, as any regression is, where
    the field takes all points towards their mean; its inverse then drives them apart.

    Args:
        similarity: of the gland, called with (warped label, fixed label, spacing).
        regulariser: called with the DDF.
        alpha: weight of the regulariser.
        points: weight of a point's distance, per mm.
        near: where the distance becomes linear, mm.
    """

    def __init__(
        self, similarity: nn.Module, regulariser: nn.Module, alpha: float = 0.5, points: float = 0.2, near: float = 4.0
    ) -> None:
        super().__init__()
        self.similarity, self.regulariser = similarity, regulariser
        self.alpha, self.points, self.near = alpha, points, near

    def forward(self, ddf: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar.

        Args:
            ddf, targets: as of `LabelDrivenLoss.forward`; and `moving_points`, `fixed_points` (B, K, 3), voxels, NaN
                where there is none. Points of a pair beyond its first are landmarks, the first is the gland's centroid.
        """
        ddf = _at_least_float32(ddf)
        warped = warp(targets["moving_label"], ddf)
        similarity = self.similarity(warped, targets["fixed_label"], targets["spacing"])
        fixed, moving = targets["fixed_points"], targets["moving_points"]
        there = (fixed + moving).isfinite().all(-1)
        fixed, moving = fixed.nan_to_num(), moving.nan_to_num()
        forth = fixed + at_points(ddf, fixed) - moving
        back = moving - at_points(ddf, _came_from(ddf.detach(), moving)) - fixed
        off = torch.cat([forth, back], 1) * targets["spacing"][:, None].to(ddf.device, ddf.dtype, non_blocking=True)
        off = off.square().sum(-1).clamp_min(1e-6).sqrt()
        off = torch.where(off < self.near, off.square() / (2 * self.near), off - self.near / 2)
        distance = (off * there.repeat(1, 2)).sum() / (2 * there.sum()).clamp_min(1)
        value = similarity + self.points * distance + self.alpha * self.regulariser(ddf)
        return value + way_back(ddf, warped, targets)


def _came_from(ddf: Tensor, points: Tensor, steps: int = 5) -> Tensor:
    """Where a field takes points (B, K, 3) from, voxels: x with ``x + ddf(x)`` = point, as near as so many steps come.

    Enough for a field that the bending energy keeps smooth; an exact inverse is `scripts.network.fields.inverse`.
    """
    x = points
    for _ in range(steps):
        x = points - at_points(ddf, x)
    return x


def _maps_then_warp(
    ddf: Tensor,
    targets: Mapping[str, Tensor],
    maps: Callable[[Tensor, Tensor], Tensor],
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """Maps of the fixed label, and those of the moving label warped: what is made of both before the warp.

    Args:
        ddf, targets: as in `LabelDrivenLoss.forward`.
        maps: of a label, called with it and the spacing.
        padding_mode: of the warp.

    Raises:
        ValueError: the shapes do not fit together.
    """
    moving, fixed, spacing = (targets[key] for key in ("moving_label", "fixed_label", "spacing"))
    _check_labels(moving, fixed, spacing)
    return maps(fixed, spacing), warp(maps(moving, spacing), ddf, padding_mode=padding_mode)


class PrefilteredLoss(nn.Module):
    """The objective of Baseline-preFilt (§2.2, §3.2.2): both labels are filtered first, at every scale σ, the filtered
    moving maps are warped together, and the plain soft Dice, Eq. (4), of each scale is averaged.

    The paper filters once, on disk, which took about a quarter off its training time. Here the labels are filtered
    when they are drawn, on the working grid, that is after initial transform and augmentation and before the warp by
    the DDF: σ is in mm of that grid and not scaled by the augmentation, and a label ends where the grid does. No
    gradient goes through the filter, but it stays in the loop, and as many maps as scales are warped instead of one: do
    not expect the paper's gain in time.

    Args:
        regulariser: called with the DDF.
        alpha: α, its weight; the paper's 0.5.
        scales: σ in mm; 0 is the identity.
    """

    def __init__(self, regulariser: nn.Module, alpha: float = 0.5, scales: Sequence[float] = PAPER_SCALES) -> None:
        super().__init__()
        self.regulariser = regulariser
        self.alpha = alpha
        self.scales = tuple(float(s) for s in scales)

    def forward(self, ddf: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar; arguments as in `LabelDrivenLoss.forward`.

        Raises:
            ValueError: the shapes do not fit together.
        """
        ddf = _at_least_float32(ddf)
        a, b = _maps_then_warp(ddf, targets, self.filtered)
        dice = 2 * self._sum(a * b) / (self._sum(a) + self._sum(b)).clamp_min(1e-6)
        back = way_back(ddf, warp(targets["moving_label"], ddf), targets)
        return 1 - dice.mean() + self.alpha * self.regulariser(ddf) + back

    @torch.no_grad()
    def filtered(self, label: Tensor, spacing: Tensor) -> Tensor:
        """The label at each scale, `spacing` (B, 3) in mm: (B, 1, X, Y, Z) -> (B, scales, X, Y, Z)."""
        maps = []
        for volume, mm in zip(label[:, 0].contiguous().split(1), spacing.detach().cpu().double(), strict=True):
            maps.append(torch.stack([_apply(f.g, volume) for f in _filters(self.scales, volume, mm)], dim=1))
        return torch.cat(maps)

    @staticmethod
    def _sum(maps: Tensor) -> Tensor:
        """Over the voxels of each map, x-slabs first, then float64: (B, scales, X, Y, Z) -> (B, scales)."""
        return maps.sum((3, 4)).double().sum(2)


class SignedDistanceLoss(nn.Module):
    """An objective on signed distances instead of overlaps (not in the paper): the distance map of the moving label is
    warped, and its mean absolute difference from the fixed label's, over all that is at most `reach` from the fixed
    label, counts, in units of `reach`. A distance says where to go where two labels do not touch, and it says it alike
    for a gland and for a small landmark.

    Args:
        regulariser: called with the DDF.
        alpha: α, its weight.
        reach: mm; distances are cut off at plus and minus this.
    """

    def __init__(self, regulariser: nn.Module, alpha: float = 0.5, reach: float = 20.0) -> None:
        super().__init__()
        self.regulariser = regulariser
        self.alpha = alpha
        self.reach = reach

    def forward(self, ddf: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Scalar; arguments as in `LabelDrivenLoss.forward`.

        Raises:
            ValueError: the shapes do not fit together.
        """
        ddf = _at_least_float32(ddf)
        a, b = _maps_then_warp(ddf, targets, self.distances, "border")
        near = (a < self.reach).flatten(1)
        apart = ((b - a).abs().flatten(1) * near).sum(1) / near.sum(1).clamp_min(1) / self.reach
        back = way_back(ddf, warp(targets["moving_label"], ddf), targets)
        return apart.mean() + self.alpha * self.regulariser(ddf) + back

    @torch.no_grad()
    def distances(self, label: Tensor, spacing: Tensor) -> Tensor:
        """Distance to the surface of a label (B, 1, X, Y, Z) in mm, negative inside, at most `reach`; same shape.

        The surface lies half-way between voxels that are in the label, at least one half, and those that are not. An
        empty label is `reach` away from everywhere.
        """
        maps = []
        for volume, mm in zip(label[:, 0] >= 0.5, spacing.tolist(), strict=True):
            outside, inside = (distance_transform_edt(m[None].float(), sampling=mm) for m in (~volume, volume))
            half = min(mm) / 2
            signed = torch.where(volume, half - inside[0], outside[0] - half)
            full = torch.full_like(signed, self.reach)
            maps.append(signed.clamp(-self.reach, self.reach) if volume.any() and not volume.all() else full)
        return torch.stack(maps)[:, None].to(label)
