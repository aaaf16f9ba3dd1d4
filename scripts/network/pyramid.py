"""A warping pyramid (not in the paper): features of either image, compared level by level where the field so far leads.

The summed-DDF network sees both images as channels of one volume, so its first filters must match what has not been
aligned yet. Here each image has an encoder of its own; from the coarsest level on, the moving features are warped by
the field of the level before, correlated with the fixed ones over a small neighbourhood, and a residual field is added
(PWC-Net, Sun et al., CVPR 2018; for volumes Dual-PRNet, Kang et al., MedIA 2022).
"""

from __future__ import annotations

from itertools import product

import torch
from monai.networks.blocks import Convolution, UnetBasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.network.fields import warp

NORM = ("instance", {"affine": True})


def local_correlation(moving: Tensor, fixed: Tensor, reach: int) -> Tensor:
    """Cosine between the fixed features at each voxel and the moving ones at every offset up to `reach` voxels.

    Args:
        moving, fixed: shape (B, C, X, Y, Z); beyond the border `moving` has the values of the border.

    Returns:
        Shape (B, (2 reach + 1)³, X, Y, Z); offsets in the order of x, y, z, z fastest.
    """
    moving, fixed = F.normalize(moving, dim=1), F.normalize(fixed, dim=1)
    around = F.pad(moving, [reach] * 6, mode="replicate")
    nx, ny, nz = moving.shape[2:]
    offsets = product(range(2 * reach + 1), repeat=3)
    return torch.stack([(around[:, :, x : x + nx, y : y + ny, z : z + nz] * fixed).sum(1) for x, y, z in offsets], 1)


class WarpingPyramid(nn.Module):
    """Moving and fixed image -> DDF in voxels, as `scripts.network.networks.SummedDDFNet`; zero at initialisation.

    Takes sizes that 2**(levels − 1) divides, see `scripts.network.wrapped.Padded`. Cannot be exported to TorchScript.

    Args:
        initial_channels: features of the finest level; each coarser one has twice as many.
        in_channels: 2, moving and fixed image; 4 with the glands found in them.
        levels: of the pyramid, each half as fine as the one before.
        reach: of the correlation, voxels of each level.
    """

    def __init__(self, initial_channels: int = 8, in_channels: int = 2, levels: int = 4, reach: int = 1) -> None:
        super().__init__()
        self.reach = reach
        channels = [initial_channels * 2**k for k in range(levels)]
        into = [in_channels // 2, *channels]
        self.moving, self.fixed = (
            nn.ModuleList(UnetBasicBlock(3, into[k], n, 3, 2 if k else 1, NORM) for k, n in enumerate(channels))
            for _ in range(2)
        )
        compared = (2 * reach + 1) ** 3
        self.estimate = nn.ModuleList(
            nn.Sequential(
                UnetBasicBlock(3, compared + n + 3, n, 3, 1, NORM),
                Convolution(3, n, 3, kernel_size=3, conv_only=True),
            )
            for n in channels
        )
        for _, last in self.estimate:
            nn.init.zeros_(last.conv.weight)
            nn.init.zeros_(last.conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Argument and result as in `scripts.network.networks.SummedDDFNet.forward`."""
        moving, fixed = image[:, 0::2], image[:, 1::2]  # images, and their glands
        levels = []
        for of_moving, of_fixed, estimate in zip(self.moving, self.fixed, self.estimate, strict=True):
            moving, fixed = of_moving(moving), of_fixed(fixed)
            levels.append((moving, fixed, estimate))
        ddf = torch.zeros_like(fixed[:, :1], dtype=torch.float32).repeat(1, 3, 1, 1, 1)
        for moving, fixed, estimate in reversed(levels):
            if ddf.shape[2:] != fixed.shape[2:]:
                ddf = 2 * F.interpolate(ddf, fixed.shape[2:], mode="trilinear", align_corners=False)
            compared = local_correlation(warp(moving.float(), ddf, padding_mode="border"), fixed.float(), self.reach)
            ddf = ddf + estimate(torch.cat([compared, fixed, ddf], dim=1)).float()
        return ddf
