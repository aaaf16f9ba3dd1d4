"""The network that finds the prostate gland in one image, and its loss (not in the paper)."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from monai.networks.blocks import SubpixelDownsample, SubpixelUpsample
from monai.networks.nets import DynUNet
from torch import Tensor, nn
from torch.nn import functional as F

ORIENTATIONS = 8  # ways a volume can be stored that a network can tell, see `scripts.registration.orientation`
SEEN_AT = 4  # places along each axis at which the features count that say which


class InstanceNorm(nn.InstanceNorm3d):
    """Instance normalisation that in eval mode leaves channels last as they are: a fifth of the network's time less."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # in bfloat16 the gradient is faster so
            return super().forward(x)
        return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class GlandNetwork(nn.Module):
    """A residual U-Net that says where the gland is in a cube, and which way round the cube is.

    Its finest level has half the resolution, with each 2³ voxels as eight channels: twice the channels of a network at
    full resolution at about half its cost. The cube's sides are multiples of 16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fold = SubpixelDownsample(3, 1, 8, conv_block=None)
        self.unet = DynUNet(
            3,
            in_channels=8,
            out_channels=32,
            kernel_size=[3] * 4,
            strides=[1, 2, 2, 2],
            upsample_kernel_size=[2] * 3,
            filters=[32, 64, 128, 128],
            norm_name=("instance", {"affine": True}),
            res_block=True,
        )
        self.unfold = SubpixelUpsample(3, 32, 1)
        for module in self.unet.modules():
            if isinstance(module, nn.InstanceNorm3d):
                module.__class__ = InstanceNorm  # DynUNet takes MONAI's own by name
        # where something lies says which way round it is; the mean over all of an instance-normalised map says nothing
        where = 32 * SEEN_AT**3
        self.orientation = nn.Sequential(nn.Flatten(), nn.LayerNorm(where), nn.Linear(where, ORIENTATIONS))
        self.to(memory_format=torch.channels_last_3d)  # a third of a CPU's time less

    def forward(self, cubes: Tensor) -> Tensor:
        """Cubes (B, 1, X, Y, Z) -> (B, 1 + ORIENTATIONS, X, Y, Z): logits of the gland, then of each orientation.

        The latter are of the cube as a whole, the same at each voxel.
        """
        features = self.unet(self.fold(cubes).contiguous(memory_format=torch.channels_last_3d))
        gland = self.unfold(features)
        orientation = self.orientation(F.adaptive_avg_pool3d(features, SEEN_AT))
        return torch.cat([gland, orientation[..., None, None, None].expand(-1, -1, *cubes.shape[2:])], dim=1)


class GlandLoss(nn.Module):
    """Dice and cross-entropy of the gland, plus a share of the cross-entropy of the orientation.

    Args:
        share: of the latter.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share, self.overlap = share, DiceCELoss(sigmoid=True)

    def forward(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Scalar.

        Args:
            predicted: of `GlandNetwork`.
            target: `label` (B, 1, X, Y, Z), soft, and `orientation` (B,), the index of the true one.
        """
        gland = self.overlap(predicted[:, :1], target["label"])
        return gland + self.share * F.cross_entropy(predicted[:, 1:, 0, 0, 0], target["orientation"])
