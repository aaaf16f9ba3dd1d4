"""How likely two soft glands, found by networks in two images, are one and the same: by their confidence.

The networks' predictions for the two images are two observers of one gland. With p and q what they say of a point, and
π the share of gland where they are compared, ``p q / π + (1 − p)(1 − q) / (1 − π)`` is how much likelier it is that
both saw the same point than that they saw any two. An end of the gland that is seen without confidence then says
little, and the other edges decide, while moments and overlaps take every outline at its word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONFIDENCE = 0.5  # factor on the networks' logits, which are surer than they should be
LEAST = 0.02  # no voxel is less probable, in or out of a gland
SHARE = 0.3  # π


def evidence(probability: Tensor) -> Tensor:
    """What a network's probability is worth, in [LEAST, 1 − LEAST]; same shape, float32, differentiable."""
    return LEAST + (1 - 2 * LEAST) * (CONFIDENCE * torch.logit(probability.float(), 1e-4)).sigmoid()


class SameGlandLoss(nn.Module):
    """Minus the mean over voxels of the logarithm of how likely two observers saw the same gland (see above)."""

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Scalar, float64; `warped` and `fixed` are `evidence` of the two glands on one grid, of any shape."""
        return -(warped * fixed / SHARE + (1 - warped) * (1 - fixed) / (1 - SHARE)).log().double().mean()
