"""Networks around networks, (B, C, X, Y, Z) -> DDF (B, 3, X, Y, Z) in voxels: any size, a velocity, fewer channels,
and what the second stage makes of the paper's network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import DVF2DDF
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.network.networks import SummedDDFNet


class Padded(nn.Module):
    """A network that takes only sizes that 16 divides, such as MONAI's LocalNet, for any size: zeros around the pair.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[2:]
        missing = [-n % 16 for n in size]
        padding = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        x, y, z = (slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True))
        return self.network(F.pad(image, padding))[:, :, x, y, z]


class Integrated(nn.Module):
    """A network's field read as a stationary velocity and integrated by scaling and squaring, so that it does not fold
    (Arsigny et al., MICCAI 2006; Dalca et al., MedIA 2019). Cannot be exported to TorchScript.

    Args:
        network: gives the velocity in voxels.
        steps: squarings.
    """

    def __init__(self, network: nn.Module, steps: int = 7) -> None:
        super().__init__()
        self.network = network
        self.integrate = DVF2DDF(steps, mode="bilinear", padding_mode="border")

    def forward(self, image: Tensor) -> Tensor:
        return self.integrate(self.network(image).float())


class ImagesAlone(nn.Module):
    """A network that sees the two images and not the glands that were found in them: what those are worth as input.

    Args:
        network: takes two channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image[:, :2])


class Standardised(nn.Module):
    """A network that sees each image with zero mean and unit variance on the grid it is given, as in training so later,
    and the glands found, probabilities, from −1 to 1.

    Args:
        network: takes as many channels: the moving and the fixed image, and the glands where there are any.
        images: False hides the images: the network sees two glands, which look alike whatever the scanner, and has no
            grey level to remember a pair by.
    """

    def __init__(self, network: nn.Module, images: bool = True) -> None:
        super().__init__()
        self.network, self.images = network, images

    def forward(self, image: Tensor) -> Tensor:
        glands = 2 * image[:, 2:] - 1
        if not self.images:
            return self.network(glands)
        pair = image[:, :2]
        mean, sd = pair.mean((2, 3, 4), keepdim=True), pair.std((2, 3, 4), keepdim=True)
        return self.network(torch.cat([(pair - mean) / sd.clamp_min(1e-6), glands], dim=1))


class Folded(nn.Module):
    """A network that works at half the resolution, where each 2³ voxels of a channel are eight channels.

    It sees all there is at an eighth of the cost; its field is as smooth as one without the finest summand. Sides are
    even.

    Args:
        network: takes eight times the channels; gives a field in voxels of its own grid.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        b, c, x, y, z = image.shape  # MONAI's pixelunshuffle computes the same, but not in TorchScript
        blocks = image.reshape(b, c, x // 2, 2, y // 2, 2, z // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        folded = blocks.reshape(b, 8 * c, x // 2, y // 2, z // 2)
        field = self.network(folded.contiguous(memory_format=torch.channels_last_3d))
        return F.interpolate(2 * field, scale_factor=2.0, mode="trilinear", align_corners=False)


class SecondStageNet(Standardised):
    """The network of the second stage: the paper's summed-DDF network at half the resolution of the gland's cube, with
    small kernels and group normalisation, upon the glands found.

    Args:
        initial_channels, summands, additive: see `SummedDDFNet`.
        images: True shows it the images beside the glands.
    """

    def __init__(
        self,
        initial_channels: int = 8,
        images: bool = False,
        summands: Sequence[int] = (0,),
        additive: bool = True,
    ) -> None:
        network = SummedDDFNet(
            initial_channels,
            in_channels=32 if images else 16,  # eight voxels of each map
            summands=summands,
            additive=additive,
            levels=3,
            first_kernel=3,
            groups=1,
        )
        super().__init__(Folded(network), images)
