"""The summed-DDF network of Hu et al. (MedIA 2018), §2.3 and Fig. 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LEVELS = 4  # down-samplings; the deepest feature map is 2**LEVELS times coarser than the input
BN_EPS = 1e-3  # label-reg; the paper is silent


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalisation: (B, in, X, Y, Z) -> (B, out, X', Y', Z').

    In eval mode the normalisation is one scale and one shift per channel and is folded into the convolution: a pass
    over the features less, equal up to rounding.

    Args:
        conv: the convolution, transposed or not, without bias.
    """

    def __init__(self, conv: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm3d(conv.out_channels, eps=BN_EPS)
        self.transposed = conv.transposed

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.norm(self.conv(x))
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None  # TorchScript wants to be told
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        shift = self.norm.bias - mean * scale
        if self.transposed:
            weight = self.conv.weight * scale.view(1, -1, 1, 1, 1)
            return F.conv_transpose3d(x, weight, shift, stride=2, padding=1, output_padding=1)
        weight = self.conv.weight * scale.view(-1, 1, 1, 1, 1)
        return F.conv3d(x, weight, shift, padding=weight.shape[2] // 2)


def conv_bn(in_channels: int, out_channels: int, kernel: int = 3) -> ConvBN:
    """`ConvBN` that keeps the size."""
    return ConvBN(nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False))


@contextmanager
def _statistics_counted_already(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisation as they are, for a forward pass that is run once more."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm3d)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(counted)


def additive_upsampling(x: Tensor) -> Tensor:
    """Trilinear additive up-sampling, no parameters (§2.3): (B, 2C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z).

    The two contiguous halves of the channels are added, not averaged. They are added before the resize, which is
    linear, so the value is the same at half the cost.
    """
    first, second = torch.chunk(x, 2, dim=1)
    return F.interpolate(first + second, scale_factor=2.0, mode="trilinear", align_corners=False)


def max_pool(x: Tensor) -> Tensor:
    """Largest of each 2³ voxels, in the precision of `x`: autocast on a CPU would go through float32 and back."""
    if torch.jit.is_scripting():
        return F.max_pool3d(x, 2)
    with torch.autocast(x.device.type, enabled=False):
        return F.max_pool3d(x, 2)


def resize_and_crop(field: Tensor, size: list[int], low: list[int], kept: list[int]) -> Tensor:
    """Trilinear resize (half-pixel) of a field, of which only a part is computed: one matrix product per axis.

    Args:
        field: shape (B, C, x, y, z).
        size: what x, y, z are resized to.
        low, kept: the part's first voxel and its size, along each axis.

    Returns:
        Shape (B, C, *kept).
    """
    for axis in range(3):
        n = field.shape[2 + axis]
        if n == size[axis]:
            field = field.narrow(2 + axis, low[axis], kept[axis])
            continue
        unit = torch.eye(n, dtype=field.dtype, device=field.device).unsqueeze(0)
        matrix = F.interpolate(unit, size=size[axis], mode="linear", align_corners=False)[0]
        matrix = matrix[:, low[axis] : low[axis] + kept[axis]]
        field = torch.matmul(field.movedim(2 + axis, -1), matrix).movedim(-1, 2 + axis)
    return field


class ResidualUnit(nn.Module):
    """conv-BN-ReLU, conv-BN, plus the shortcut, ReLU (Fig. 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(channels, channels)
        self.conv2 = conv_bn(channels, channels)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        h = F.relu(self.conv1(x), inplace=True)
        return F.relu(self.conv2(h).add_(shortcut), inplace=True)


class DownBlock(nn.Module):
    """One encoder level (Fig. 4): returns the pooled features and the skip, which is taken before the residual unit."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = conv_bn(in_channels, out_channels, kernel)
        self.residual = ResidualUnit(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = F.relu(self.conv(x), inplace=True)
        return max_pool(self.residual(skip, skip)), skip


class UpBlock(nn.Module):
    """One decoder level (Fig. 4): transposed convolution plus additive up-sampling, skip summation, residual unit."""

    def __init__(self, channels: int, additive: bool, skip_in_shortcut_only: bool) -> None:
        super().__init__()
        self.deconv = ConvBN(
            nn.ConvTranspose3d(2 * channels, channels, 3, stride=2, padding=1, output_padding=1, bias=False)
        )
        self.residual = ResidualUnit(channels)
        self.additive = additive
        self.skip_in_shortcut_only = skip_in_shortcut_only

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h = F.relu(self.deconv(x), inplace=True)
        if self.additive:
            h = additive_upsampling(x).add_(h)
        summed = h + skip
        return self.residual(h if self.skip_in_shortcut_only else summed, summed)


class Summand(nn.Module):
    """Displacement summand δ_k (§2.3): conv 3 with bias, zero-initialised, then the trilinear resize; voxels of the
    full grid."""

    def __init__(self, channels: int, level: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.index = LEVELS - level  # of its feature map; TorchScript reads attributes, not globals

    def forward(self, features: list[Tensor], size: list[int], low: list[int], kept: list[int]) -> Tensor:
        """Arguments as in `resize_and_crop`."""
        x = features[self.index]
        # in float32, also under autocast: half precision resolves a displacement of 10 voxels only to 0.06
        if torch.jit.is_scripting():
            return resize_and_crop(self.conv(x.float()), size, low, kept)
        with torch.autocast(x.device.type, enabled=False):
            return resize_and_crop(self.conv(x.float()), size, low, kept)


class SummedDDFNet(nn.Module):
    """Moving and fixed image -> dense displacement field, the sum of the summands δ_k (Hu et al. 2018, §2.3, Fig. 4).

    The field is in voxels of the input grid, order x, y, z, and pulls: ``warped(p) = moving(p + ddf(p))``. At
    initialisation it is zero. Sizes that are not a multiple of 16 are padded inside and cropped again.

    Args:
        initial_channels: channels of level 0 (the paper's n0 = 32); level k has n0 * 2**k.
        summands: the levels k whose δ_k are summed; (0,) is the paper's Baseline-δ0, (1, 2, 3, 4) Baseline-δ1-4.
        additive: trilinear additive up-sampling in the decoder; False is the paper's ablation.
        skip_in_shortcut_only: label-reg's code adds the skip only to the shortcut of the decoder's residual unit,
            Fig. 4 adds it before the unit (the default).
        in_channels: 2, the moving and the fixed image; 4 with the glands found in them.
        checkpointing: in training keep only what enters each block and compute the rest again in the backward pass:
            less memory, about a third more time, the same gradients.

    Raises:
        ValueError: `summands` is empty, repeats a level or names one outside 0..4.

    Example:
        >>> SummedDDFNet(initial_channels=4)(torch.rand(1, 2, 20, 31, 17)).shape
        torch.Size([1, 3, 20, 31, 17])
    """

    def __init__(
        self,
        initial_channels: int = 32,
        summands: Sequence[int] = (0, 1, 2, 3, 4),
        additive: bool = True,
        skip_in_shortcut_only: bool = False,
        checkpointing: bool = False,
        in_channels: int = 2,
    ) -> None:
        super().__init__()
        if not summands or len(set(summands)) != len(summands) or not set(summands) <= set(range(LEVELS + 1)):
            raise ValueError(f"summands must be distinct levels out of 0..{LEVELS}, got {tuple(summands)}")
        self.checkpointing = checkpointing
        self.unit = 2**LEVELS  # the network's inner sizes are multiples of this
        n = [initial_channels * 2**k for k in range(LEVELS + 1)]
        into = [in_channels, *n]
        self.down = nn.ModuleList(DownBlock(into[k], n[k], kernel=3 if k else 7) for k in range(LEVELS))
        self.deep = conv_bn(n[LEVELS - 1], n[LEVELS])
        lowest = min(summands)  # decoder levels that no summand needs are not built
        self.up = nn.ModuleList(
            UpBlock(n[k], additive, skip_in_shortcut_only) for k in range(LEVELS - 1, lowest - 1, -1)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.xavier_uniform_(module.weight)
        self.summands = nn.ModuleList(Summand(n[k], k) for k in sorted(summands, reverse=True))
        if initial_channels >= 16:  # with fewer channels the default layout is faster on a CPU
            self.to(memory_format=torch.channels_last_3d)  # the features follow the weights

    def features(self, image: Tensor) -> list[Tensor]:
        """Feature maps of levels 4, 3, … down to the lowest summand; `image` (B, 2, X, Y, Z), sides multiples of 16."""
        skips: list[Tensor] = []
        x = image
        for down in self.down:
            if torch.jit.is_scripting():
                x, skip = down(x)
            else:
                x, skip = self._block(down, x)
            skips.append(skip)
        x = F.relu(self.deep(x))
        features = [x]
        for i, up in enumerate(self.up):
            skip = skips[len(skips) - 1 - i]
            if torch.jit.is_scripting():
                x = up(x, skip)
            else:
                x = self._block(up, x, skip)
            features.append(x)
        return features

    @torch.jit.unused
    def _block(self, block: nn.Module, *inputs: Tensor):
        """Run a block, or in training mark it to be computed again in the backward pass."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        again = lambda: (nullcontext(), _statistics_counted_already(block))  # noqa: E731
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=again)

    def displacement_summands(self, image: Tensor) -> list[Tensor]:
        """The fields δ_k before their sum, deepest level first: each (B, 3, X, Y, Z), voxels of the input grid."""
        size, unit = list(image.shape[2:]), self.unit
        padding = [(-n) % unit for n in size]
        low = [p // 2 for p in padding]
        sides = [low[2], padding[2] - low[2], low[1], padding[1] - low[1], low[0], padding[0] - low[0]]
        image = F.pad(image, sides)  # zero is the mean of a normalised image
        padded = list(image.shape[2:])
        features = self.features(image)
        fields: list[Tensor] = []
        for summand in self.summands:
            fields.append(summand(features, padded, low, size))
        return fields

    def forward(self, image: Tensor) -> Tensor:
        """DDF of an image pair.

        Args:
            image: shape (B, 2, X, Y, Z): channel 0 the moving, channel 1 the fixed image, on the fixed grid; with
                four `in_channels` also the moving and the fixed gland.

        Returns:
            Shape (B, 3, X, Y, Z), voxels of that grid.
        """
        # MONAI's LocalNet averages the levels; the paper sums them
        fields = self.displacement_summands(image)
        ddf = fields[0]
        for field in fields[1:]:
            ddf = ddf + field
        return ddf


class NoField(nn.Module):
    """A network that leaves a pair as the start alignment put it: (B, C, X, Y, Z) -> zeros (B, 3, X, Y, Z)."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros_like(image[:, :1], dtype=torch.float32).repeat(1, 3, 1, 1, 1)
