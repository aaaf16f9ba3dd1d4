"""The networks of Hu et al. (MedIA 2018): summed-DDF (§2.3, Fig. 4), Global-Net and Composite-Net (§3.2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scripts.network.fields import affine_field, compose, warp

LEVELS = 4  # the paper's down-samplings; the deepest feature map is 2**levels times coarser than the input
BN_EPS = 1e-3  # label-reg; the paper is silent


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalisation: (B, in, X, Y, Z) -> (B, out, X', Y', Z').

    In eval mode the normalisation is one scale and one shift per channel and is folded into the convolution: a pass
    over the features less, equal up to rounding.

    Args:
        conv: the convolution, transposed or not, without bias.
    """

    __constants__ = ["grouped"]  # TorchScript then leaves out the branch that is not taken

    def __init__(self, conv: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv
        self.norm: nn.Module = nn.BatchNorm3d(conv.out_channels, eps=BN_EPS)
        self.transposed = conv.transposed
        self.grouped = False

    def normalise_by_groups(self, groups: int) -> None:
        """Group normalisation (Wu and He, ECCV 2018) in place of batch normalisation."""
        self.norm, self.grouped = nn.GroupNorm(groups, self.conv.out_channels), True

    def forward(self, x: Tensor) -> Tensor:
        if self.grouped:
            return self.norm(self.conv(x))
        else:  # noqa: RET505  TorchScript
            return self._by_batch(x)

    def _by_batch(self, x: Tensor) -> Tensor:
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

    def __init__(self, channels: int, index: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.index = index  # of its feature map, the deepest first

    def forward(self, features: list[Tensor], size: list[int], low: list[int], kept: list[int]) -> Tensor:
        """Arguments as in `resize_and_crop`."""
        x = features[self.index]
        # in float32 also under autocast: half precision resolves a displacement of 10 voxels only to 0.06
        if torch.jit.is_scripting():
            return resize_and_crop(self.conv(x.to(self.conv.weight.dtype)), size, low, kept)
        with torch.autocast(x.device.type, enabled=False):
            return resize_and_crop(self.conv(x.to(self.conv.weight.dtype)), size, low, kept)


class Encoder(nn.Module):
    """The encoder that the networks share (Fig. 4): down-samplings, then one convolution at the deepest level.

    Args:
        initial_channels: channels of level 0; level k has 2**k times as many.
        checkpointing, in_channels, levels, first_kernel: as in `SummedDDFNet`.
    """

    def __init__(
        self, initial_channels: int, checkpointing: bool, in_channels: int, levels: int = LEVELS, first_kernel: int = 7
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.unit = 2**levels  # the network's inner sizes are multiples of this
        self.channels = [initial_channels * 2**k for k in range(levels + 1)]  # of each level
        into = [in_channels, *self.channels]
        self.down = nn.ModuleList(
            DownBlock(into[k], into[k + 1], kernel=3 if k else first_kernel) for k in range(levels)
        )
        self.deep = conv_bn(*self.channels[-2:])

    def _start(self, groups: int) -> None:
        """Of every convolution there is so far: its normalisation, by groups or by batch, and Xavier weights."""
        for module in list(self.modules()):
            if isinstance(module, ConvBN) and groups:
                module.normalise_by_groups(groups)
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.xavier_uniform_(module.weight)

    def _lay_out(self) -> None:
        """Choose the memory layout of the weights, which the features follow."""
        if self.channels[0] >= 16:  # with fewer channels the default layout is faster on a CPU
            self.to(memory_format=torch.channels_last_3d)

    def padded(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """The image in the middle of zeros, sides multiples of 2**levels, and where it begins on each axis."""
        padding = [(-n) % self.unit for n in image.shape[2:]]
        low = [p // 2 for p in padding]
        sides = [low[2], padding[2] - low[2], low[1], padding[1] - low[1], low[0], padding[0] - low[0]]
        return F.pad(image, sides), low  # zero is the mean of a normalised image

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest feature map and the skips of levels 0, 1, …; `image` as `padded` gives it."""
        skips: list[Tensor] = []
        x = image
        for down in self.down:
            if torch.jit.is_scripting():
                x, skip = down(x)
            else:
                x, skip = self._block(down, x)
            skips.append(skip)
        return F.relu(self.deep(x)), skips

    @torch.jit.unused
    def _block(self, block: nn.Module, *inputs: Tensor):
        """Run a block, or in training mark it to be computed again in the backward pass."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        again = lambda: (nullcontext(), _statistics_counted_already(block))  # noqa: E731
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=again)


class SummedDDFNet(Encoder):
    """Moving and fixed image -> dense displacement field, the sum of the summands δ_k (Hu et al. 2018, §2.3, Fig. 4).

    The field is in voxels of the input grid, order x, y, z, and pulls: ``warped(p) = moving(p + ddf(p))``. At
    initialisation it is zero. Sizes that are not a multiple of 16 are padded inside and cropped again.

    Args:
        initial_channels: channels of level 0 (the paper's n0 = 32); level k has n0 * 2**k.
        summands: the levels k whose δ_k are summed; (0,) is the paper's Baseline-δ0, (1, 2, 3, 4) Baseline-δ1-4.
        additive: trilinear additive up-sampling in the decoder; False is the paper's ablation.
        skip_in_shortcut_only: label-reg's code adds the skip only to the shortcut of the decoder's residual unit,
            Fig. 4 adds it before the unit (the default).
        composed: compose the summands instead of adding them, which §5 proposes; coarse first: δ_4 warps the moving
            image, δ_3 the result, and so on down to δ_0. Values beyond the grid are its border's. Cannot be exported
            to TorchScript.
        in_channels: 2, the moving and the fixed image; 4 with the glands found in them.
        checkpointing: in training keep only what enters each block and compute the rest again in the backward pass:
            less memory, about a third more time, the same gradients.
        levels: down-samplings; the paper's 4.
        first_kernel: edge of the first convolution's kernel; the paper's 7.
        groups: of group normalisation, which is the same in training and after it, where the statistics of a batch of
            four or eight are not; 0 is the paper's batch normalisation.

    Raises:
        ValueError: `summands` is empty, repeats a level or names one outside 0..`levels`.

    Example:
        >>> SummedDDFNet(initial_channels=4)(torch.rand(1, 2, 20, 31, 17)).shape
        torch.Size([1, 3, 20, 31, 17])
    """

    __constants__ = ["composed"]  # TorchScript then leaves out the branch that is not taken

    def __init__(
        self,
        initial_channels: int = 32,
        summands: Sequence[int] = (0, 1, 2, 3, 4),
        additive: bool = True,
        skip_in_shortcut_only: bool = False,
        checkpointing: bool = False,
        in_channels: int = 2,
        composed: bool = False,
        levels: int = LEVELS,
        first_kernel: int = 7,
        groups: int = 0,
    ) -> None:
        super().__init__(initial_channels, checkpointing, in_channels, levels, first_kernel)
        if not summands or len(set(summands)) != len(summands) or not set(summands) <= set(range(levels + 1)):
            raise ValueError(f"summands must be distinct levels out of 0..{levels}, got {tuple(summands)}")
        self.composed = composed
        n = self.channels
        lowest = min(summands)  # decoder levels that no summand needs are not built
        self.up = nn.ModuleList(
            UpBlock(n[k], additive, skip_in_shortcut_only) for k in range(levels - 1, lowest - 1, -1)
        )
        self._start(groups)
        self.summands = nn.ModuleList(Summand(n[k], levels - k) for k in sorted(summands, reverse=True))
        self._lay_out()

    def features(self, image: Tensor) -> list[Tensor]:
        """Feature maps from the deepest level to the lowest summand's; `image` (B, C, X, Y, Z) as `padded` makes it."""
        x, skips = self.encode(image)
        features = [x]
        for i, up in enumerate(self.up):
            skip = skips[len(skips) - 1 - i]
            if torch.jit.is_scripting():
                x = up(x, skip)
            else:
                x = self._block(up, x, skip)
            features.append(x)
        return features

    def displacement_summands(self, image: Tensor) -> list[Tensor]:
        """The fields δ_k before they are joined, deepest level first: each (B, 3, X, Y, Z), voxels of the grid."""
        size = list(image.shape[2:])
        image, low = self.padded(image)
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
            if self.composed:
                ddf = compose(ddf, field)
            else:
                ddf = ddf + field
        return ddf


class GlobalNet(Encoder):
    """Moving and fixed image -> the DDF of one affine map: Global-Net (Hu et al. 2018, §3.2.2), the encoder and a fully
    connected layer from its deepest features to 12 parameters.

    The map acts on the grid's coordinates in [-1, 1]³ (`fields.affine_field`), as the augmentation does:
    there the twelve parameters matter alike at every size, while in voxels, as label-reg counts from a corner, a
    translation would take as many steps as a change of shape that moves the far corner a hundred times farther. The
    weights start at zero and the bias at the identity, so the first field is zero.

    The paper has one input size and connects every deepest feature. Here sizes differ, so the deepest map is first
    averaged onto `deep_size`, which keeps where things are. The default is the deepest map of grids from 81 × 113 × 81
    to 96 × 128 × 96 voxels, a transrectal volume at 0.8 mm: there nothing is averaged and the layer is the paper's.

    Args:
        initial_channels: channels of level 0; the paper's 8.
        deep_size: what the deepest map is averaged onto, along x, y, z; where it is smaller, values are repeated.
        checkpointing, in_channels, levels, first_kernel, groups: as in `SummedDDFNet`.

    Example:
        >>> GlobalNet()(torch.rand(2, 2, 20, 31, 17)).shape
        torch.Size([2, 3, 20, 31, 17])
    """

    def __init__(
        self,
        initial_channels: int = 8,
        deep_size: Sequence[int] = (6, 8, 6),
        checkpointing: bool = False,
        in_channels: int = 2,
        levels: int = LEVELS,
        first_kernel: int = 7,
        groups: int = 0,
    ) -> None:
        super().__init__(initial_channels, checkpointing, in_channels, levels, first_kernel)
        self._start(groups)
        self.deep_size = list(deep_size)
        self.connected = nn.Linear(self.channels[-1] * math.prod(deep_size), 12)
        nn.init.zeros_(self.connected.weight)
        with torch.no_grad():
            self.connected.bias.copy_(torch.eye(3, 4).flatten())
        self._lay_out()

    def _connect(self, deep: Tensor) -> Tensor:
        return self.connected(
            F.adaptive_avg_pool3d(deep.to(self.connected.weight.dtype), self.deep_size).flatten(1)
        ).view(-1, 3, 4)

    def affine(self, image: Tensor) -> Tensor:
        """The affine map A, fixed -> moving coordinates in [-1, 1]³, shape (B, 3, 4); `image` as in `forward`."""
        deep, _ = self.encode(self.padded(image)[0])
        # in float32, as the summands
        if torch.jit.is_scripting():
            return self._connect(deep)
        with torch.autocast(deep.device.type, enabled=False):
            return self._connect(deep)

    def forward(self, image: Tensor) -> Tensor:
        """DDF of an image pair; argument and result as in `SummedDDFNet.forward`."""
        return affine_field(self.affine(image), list(image.shape[2:]))


class CompositeNet(nn.Module):
    """Composite-Net (§3.2.2): Global-Net warps the moving image, a local network sees the warped and the fixed image.

    The paper says that the two fields are composed; label-reg and NiftyNet add them, which is the default here.
    Cannot be exported to TorchScript.

    Args:
        global_net: gives the first field (B, 3, X, Y, Z), as `GlobalNet`.
        local_net: gives the second, as `SummedDDFNet` with summand δ_0 alone.
        composed: compose the fields: one warp by the global, then one by the local field.
    """

    def __init__(self, global_net: nn.Module, local_net: nn.Module, composed: bool = False) -> None:
        super().__init__()
        self.global_net = global_net
        self.local_net = local_net
        self.composed = composed

    def displacement_parts(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The global and the local field, each (B, 3, X, Y, Z) in voxels; `image` as in `forward`."""
        whole = self.global_net(image)
        moving, fixed = image[:, 0::2], image[:, 1::2]  # images, and their glands
        warped = warp(moving, whole, padding_mode="border")
        return whole, self.local_net(torch.stack([warped, fixed], dim=2).flatten(1, 2))

    def forward(self, image: Tensor) -> Tensor:
        """DDF of an image pair; argument and result as in `SummedDDFNet.forward`."""
        whole, local = self.displacement_parts(image)
        return compose(whole, local) if self.composed else whole + local


class NoField(nn.Module):
    """A network that leaves a pair as the initial transform put it: (B, C, X, Y, Z) -> zeros (B, 3, X, Y, Z)."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros_like(image[:, :1], dtype=torch.float32).repeat(1, 3, 1, 1, 1)


class MeanField(nn.Module):
    """One field for all pairs, which sees no image: (B, C, X, Y, Z) -> DDF (B, 3, X, Y, Z) in voxels.

    A yardstick for networks that do: in the cube of the gland it learns the motion that the pairs of a cohort have in
    common, and what a network gains over it has been read from what it sees. Linear between its knots; begins at zero.

    Args:
        knots: along each axis, from the first to the last voxel.
        step: voxels that the field changes by when a knot changes by 1, so that it keeps up with a network's rate.
    """

    def __init__(self, knots: int = 5, step: float = 10.0) -> None:
        super().__init__()
        self.knots, self.step = nn.Parameter(torch.zeros(1, 3, knots, knots, knots)), step

    def forward(self, image: Tensor) -> Tensor:
        size = list(image.shape[2:])
        field = F.interpolate(self.step * self.knots.float(), size, mode="trilinear", align_corners=True)
        return field.expand(len(image), -1, -1, -1, -1)
