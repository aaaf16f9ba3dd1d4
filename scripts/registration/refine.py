"""Instance optimisation: after the network, fit the field of one pair to the two glands that were found in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.losses import DiffusionLoss
from scipy.interpolate import BSpline
from torch import Tensor, nn

from scripts.data.checks import InputError
from scripts.network.fields import compose, warp
from scripts.registration.likelihood import SameGlandLoss, evidence
from scripts.registration.precision import PrecisionInferer


def spline_matrix(size: int, apart: float) -> Tensor:
    """Uniform cubic B-splines on `size` voxels, shape (size, control points), rows sum to 1.

    Args:
        apart: the largest distance between control points, voxels.
    """
    pieces = int(np.ceil((size - 1) / apart))
    knots = np.arange(-3, pieces + 4, dtype=float)
    at = np.linspace(0, pieces, size)
    return torch.from_numpy(BSpline.design_matrix(at, knots, 3).toarray()).float()


def free_form(control: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Displacement of control points (1, 3, a, b, c) -> field (1, 3, X, Y, Z) (Rueckert et al., IEEE TMI 1999)."""
    for axis, matrix in enumerate(matrices):
        control = torch.movedim(torch.movedim(control, 2 + axis, -1) @ matrix.T, -1, 2 + axis)
    return control


class RefinedInferer(PrecisionInferer):
    """`PrecisionInferer`, and in prediction the DDF of each pair is then fitted to the glands found in its images.

    What is added to the network's field is a free-form deformation of cubic B-splines. It minimises Eq. (1)-(2) with
    the two soft glands in the label's place: how unlikely they are one and the same (`likelihood`), which is
    also what the learned initial transform minimises, plus α times the mean squared gradient of the sum (the paper's
    L2). Bending energy would not do: it does not see an affine map, and would bring back all of the stretch between the
    found glands, most of which is error (docs/results.md). No label of the pair is used, so it may be done on any pair.
    A fit with no better objective than the network's field is dropped.

    Where no network has moved anything, the pair is fitted once more with its images exchanged: one field after the
    other should lead back.

    Args:
        precision, tolerance: of the network, see `PrecisionInferer`.
        steps: the most iterations of L-BFGS; 0 switches the refinement off.
        alpha: α.
        apart: between control points, voxels.

    Attributes:
        inconsistency: of each pair of the last call, the mean distance in voxels over the fixed gland that is left when
            the two fits follow each other; None where there is no second one.

    Raises:
        InputError: the input has no glands, because no network looked for them.
    """

    def __init__(
        self,
        precision: str = "auto",
        tolerance: float = 0.05,
        steps: int = 30,
        alpha: float = 8.0,
        apart: float = 8.0,
    ) -> None:
        super().__init__(precision, tolerance)
        self.steps, self.apart = steps, apart
        self.inconsistency: list[float | None] = []
        self.unlike, self.rough, self.alpha = SameGlandLoss(), DiffusionLoss(), alpha

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        ddf = super().__call__(inputs, network, *args, **kwargs)
        self.inconsistency = [None] * len(ddf)
        if network.training or not self.steps:
            return ddf
        if inputs.shape[1] != 4:
            raise InputError(
                "refine_steps needs the glands that --initial_transform learned finds; or pass --refine_steps 0"
            )
        fitted = torch.cat([self._fit(*pair) for pair in zip(ddf.split(1), inputs[:, 2:].split(1), strict=True)])
        if not ddf.any():
            pairs = zip(fitted.split(1), inputs[:, 2:].split(1), strict=True)
            self.inconsistency = [self._left(there, glands) for there, glands in pairs]
        return fitted

    def _left(self, there: Tensor, glands: Tensor) -> float:
        back = self._fit(torch.zeros_like(there), glands.flip(1))
        return compose(back, there).norm(dim=1)[glands[:, 1] > 0.5].mean().item()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _fit(self, ddf: Tensor, glands: Tensor) -> Tensor:
        ddf, (moving, fixed) = ddf.clone(), evidence(glands).split(1, dim=1)
        matrices = [spline_matrix(n, self.apart).to(ddf) for n in ddf.shape[2:]]
        # a quarter of a voxel off: on the voxels themselves, where no network has moved them, interpolation has kinks
        control = ddf.new_full((1, 3, *(m.shape[1] for m in matrices)), 0.25).requires_grad_()
        optimizer = torch.optim.LBFGS([control], max_iter=self.steps, line_search_fn="strong_wolfe")

        def cost(field: Tensor) -> Tensor:
            # beyond its border the moving gland is as it is there: nothing is gained by leaving the grid
            return self.unlike(warp(moving, field, padding_mode="border"), fixed) + self.alpha * self.rough(field)

        def objective() -> Tensor:
            optimizer.zero_grad()
            value = fixed.numel() * cost(ddf + free_form(control, matrices))  # not lost in rounding
            value.backward()
            return value

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using a non-tuple sequence")  # MONAI's loss; nothing a user can mend
            optimizer.step(objective)
            fitted = (ddf + free_form(control, matrices)).detach()
            return fitted if cost(fitted) < cost(ddf) else ddf
