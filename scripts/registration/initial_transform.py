"""The initial transform: between the glands found in the two images, or as a name or a file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from scipy.optimize import minimize
from torch import Tensor

from scripts.data import checks, formats
from scripts.network import fields
from scripts.registration.likelihood import SameGlandLoss, evidence
from scripts.registration.pairwise import rigid_transform
from scripts.registration.segmentation import moments

STRETCH = 0.05  # standard deviation of the logarithm of the stretch along an axis, of the maximum a posteriori
EVERY = 2  # so-manieth voxel of the fixed map is compared, on a lattice that meets each plane: as all, within 0.1 mm
TOGETHER = 50 / 32**3  # of a gland's cube counts as one observation there: neighbouring voxels say the same


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(1e-9) ** exponent @ vectors.T


def align_moments(fixed: tuple[Tensor, Tensor], moving: tuple[Tensor, Tensor], kind: str = "affine") -> Tensor:
    """Fixed world -> moving world, shape (4, 4), float64, that takes the fixed gland's centroid to the moving one's.

    Args:
        fixed, moving: `moments` of the two glands.
        kind: "translation"; "scaling", with the cube root of the volumes' ratio; "affine", the one symmetric positive
            matrix that takes one covariance to the other (the optimal transport between two Gaussians): it scales along
            the glands' own axes and never turns or mirrors.
    """
    matrix = torch.eye(4, dtype=torch.float64)
    if kind == "scaling":
        matrix[:3, :3] *= (torch.linalg.det(moving[1]) / torch.linalg.det(fixed[1])) ** (1 / 6)
    elif kind == "affine":
        root, inverse = _power(fixed[1], 0.5), _power(fixed[1], -0.5)
        matrix[:3, :3] = inverse @ _power(root @ moving[1] @ root, 0.5) @ inverse
    elif kind != "translation":
        raise ValueError(f'kind must be "maximum_a_posteriori", "translation", "scaling" or "affine", got {kind!r}')
    matrix[:3, 3] = moving[0] - matrix[:3, :3] @ fixed[0]
    return matrix


def maximum_a_posteriori(fixed: MetaTensor, moving: MetaTensor) -> Tensor:
    """Fixed world -> moving world, shape (4, 4), float64, under which two soft glands are most likely one and the same.

    Translation and stretch along the fixed map's axes minimise `likelihood.SameGlandLoss` over every second voxel of
    its grid, every `TOGETHER` of it counted as one, plus half the square of each axis' log stretch in units of
    `STRETCH`: the largest a posteriori probability with a Gaussian for the stretch. Along no axis does it leave the
    centroids by more than the gland's radius (of standard deviations), however little the maps say. It never turns or
    mirrors.

    Args:
        fixed, moving: probabilities (1, X, Y, Z), each with its own affine.
    """
    with torch.inference_mode(False), torch.enable_grad():
        p, q = (evidence(gland.as_tensor().clone().cpu())[None] for gland in (fixed, moving))
        to_world, to_moving = fixed.affine.double().cpu().clone(), torch.linalg.inv(moving.affine.double().cpu())
        (centre, covariance), (target, _) = moments(fixed), moments(moving)
        axes = to_world[:3, :3] / to_world[:3, :3].norm(dim=0)
        radius = torch.linalg.det(covariance) ** (1 / 6)
        unlike = SameGlandLoss()
        voxels = fields.identity_grid(p.shape[2:], torch.float64, "cpu")
        kept = voxels.sum(0) % EVERY == 0
        # anywhere within their voxels: at whole ones all would meet the kinks of interpolation at once
        within = torch.quasirandom.SobolEngine(3).draw(int(kept.sum())).double().T - 0.5
        places = voxels[:, kept] + within
        p = fields.sample(p, places[None, :, :, None, None].float())[..., 0, 0]
        points = to_world @ torch.cat([places, torch.ones_like(places[:1])])

        def transform(found: Tensor) -> Tensor:
            linear = axes @ torch.diag((STRETCH * found[3:]).exp()) @ torch.linalg.inv(axes)
            shift = target + radius * (STRETCH * found[:3]).tanh() - linear @ centre
            return torch.cat([torch.cat([linear, shift[:, None]], dim=1), torch.eye(4, dtype=torch.float64)[3:]])

        def cost(values: np.ndarray) -> tuple[float, np.ndarray]:
            found = torch.tensor(values, requires_grad=True)
            at = (to_moving @ transform(found) @ points)[None, :3, :, None, None].float()
            value = unlike(fields.sample(q, at)[..., 0, 0], p) + found[3:].square().sum() / 2 * TOGETHER
            value.backward()
            return value.item(), found.grad.numpy()

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a third of the time: SciPy's BLAS has threads of its own, which wait by running
        try:  # not by PyTorch's optimisers, which load its compiler
            best = minimize(cost, np.zeros(6), jac=True, method="L-BFGS-B", options={"ftol": 1e-9, "gtol": 1e-5})
        finally:
            torch.set_num_threads(threads)
        return transform(torch.from_numpy(best.x)).detach()


def align_glands(fixed: MetaTensor, moving: MetaTensor, kind: str) -> Tensor:
    """The initial transform between two glands found: "maximum_a_posteriori", or a kind of `align_moments`."""
    if kind in ("maximum_a_posteriori", "likelihood"):  # the latter is its name of before version 0.5
        return maximum_a_posteriori(fixed, moving)
    return align_moments(moments(fixed), moments(moving), kind)


def read_initial_transform(named: str, moving: MetaTensor, fixed: MetaTensor) -> list[formats.Step]:
    """The steps of a initial transform, fixed world -> moving world, RAS mm, float64.

    Args:
        named: "centre" (the volumes' centres coincide, axes keep their world directions), "header" (world coordinates
            as they are), "rigid" (from the centres on, elastix registers the images rigidly, see
            `pairwise.rigid_transform`), or a file (fixed -> moving), see `scripts.data.formats.read_transform`.
        moving, fixed: the images, shape (1, X, Y, Z).

    Raises:
        InputError: no such file, or none that can be read; no elastix.
    """
    matrix = torch.eye(4, dtype=torch.float64)
    if named in ("centre", "rigid"):
        for volume, sign in ((moving, 1), (fixed, -1)):
            middle = (torch.tensor(volume.shape[1:], dtype=torch.float64) - 1) / 2
            matrix[:3, 3] += sign * (volume.affine[:3, :3].double() @ middle + volume.affine[:3, 3].double())
        return [matrix if named == "centre" else rigid_transform(moving, fixed, matrix)]
    if named == "header":
        return [matrix]
    if not Path(named).is_file():
        raise checks.InputError(
            f'{named}: not found; an initial transform is "centre", "header", "learned", "rigid" or a transform file'
        )
    return formats.read_transform(named)
