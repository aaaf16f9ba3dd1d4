"""The network that finds the prostate gland in one image (not in the paper)."""

from __future__ import annotations

from monai.networks.blocks import SubpixelDownsample, SubpixelUpsample
from monai.networks.nets import DynUNet
from torch import nn


def gland_network() -> nn.Sequential:
    """Cubes (B, 1, SIDE, SIDE, SIDE) -> logits of the gland, same shape: a residual U-Net.

    Its finest level has half the resolution, with each 2³ voxels as eight channels: twice the channels of a network at
    full resolution at about half its cost.
    """
    return nn.Sequential(
        SubpixelDownsample(3, 1, 8, conv_block=None),
        DynUNet(
            3,
            in_channels=8,
            out_channels=32,
            kernel_size=[3] * 4,
            strides=[1, 2, 2, 2],
            upsample_kernel_size=[2] * 3,
            filters=[32, 64, 128, 128],
            norm_name=("instance", {"affine": True}),
            res_block=True,
        ),
        SubpixelUpsample(3, 32, 1),
    )
