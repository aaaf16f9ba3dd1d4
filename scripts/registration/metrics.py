"""TRE, DSC and folding (Hu et al. 2018, §3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

from scripts.network import fields


def centroid(label: Tensor, spacing: Sequence[float]) -> Tensor:
    """Centre of mass of the label binarised at ≥ 0.5, in mm along the grid's axes: (B, 1, X, Y, Z) -> (B, 3).

    NaN where the binarised label is empty.
    """
    mask = (label >= 0.5).double()
    grid = fields.identity_grid(label.shape[2:], torch.float64, label.device)
    centre = torch.einsum("bxyz,cxyz->bc", mask[:, 0], grid) / mask.sum((2, 3, 4))
    return centre * torch.as_tensor(spacing, dtype=torch.float64, device=label.device)


def centroid_distance(a: Tensor, b: Tensor, spacing: Sequence[float]) -> Tensor:
    """Distance between label centroids in mm: the error of one landmark (Hu et al. 2018, §3.3).

    Args:
        a, b: label maps in [0, 1], shape (B, 1, X, Y, Z), on one grid.
        spacing: voxel size (x, y, z) in mm.

    Returns:
        Shape (B,); NaN where either label is empty.

    Raises:
        ValueError: the shapes of `a` and `b` differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"labels are not on one grid: {tuple(a.shape)} and {tuple(b.shape)}")
    return (centroid(a, spacing) - centroid(b, spacing)).norm(dim=1)


def dice(a: Tensor, b: Tensor) -> Tensor:
    """DSC of two labels binarised at ≥ 0.5: (B, 1, X, Y, Z) twice -> (B,); NaN where both are empty (§3.3)."""
    a, b = a >= 0.5, b >= 0.5
    return 2 * (a & b).sum((1, 2, 3, 4)).double() / (a.sum((1, 2, 3, 4)) + b.sum((1, 2, 3, 4)))


def hausdorff95(a: Tensor, b: Tensor, spacing: Sequence[float]) -> float:
    """95th percentile of the distances between two surfaces in mm, the larger of both directions; NaN if one is empty.

    Args:
        a, b: label maps in [0, 1], shape (X, Y, Z), binarised at ≥ 0.5.
        spacing: voxel size (x, y, z) in mm.
    """
    a, b = a >= 0.5, b >= 0.5
    if not (a.any() and b.any()):
        return math.nan
    spacing = [float(s) for s in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, about an argument of its own
        return compute_hausdorff_distance(a[None, None], b[None, None], True, percentile=95, spacing=spacing).item()


def target_registration_error(distances: Sequence[float]) -> float:
    """TRE of one case in mm: root mean square of its centroid distances (§3.3).

    Distances that are NaN (an empty warped label) are left out; the caller counts and names them. NaN if none is left.
    """
    known = [d for d in distances if not math.isnan(d)]
    return math.sqrt(sum(d * d for d in known) / len(known)) if known else math.nan


def jacobian_statistics(displacement: Tensor, affine: Tensor, inside: Tensor | None = None) -> dict[str, float]:
    """Of det J over interior voxels: folded (≤ 0) percent, smallest, mean, standard deviation of its logarithm.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm.
        affine: of its grid.
        inside: a label (X, Y, Z), ≥ 0.5; then `folded_gland_percent` too, NaN where it is empty.
    """
    jacobian = fields.jacobian_determinant(displacement[None], affine)[0].double()
    found = {
        "folded_percent": 100 * (jacobian <= 0).double().mean().item(),
        "jacobian_min": jacobian.min().item(),
        "jacobian_mean": jacobian.mean().item(),
        "jacobian_sd_log": jacobian.clamp_min(1e-9).log().std().item(),
    }
    if inside is not None:
        gland = jacobian[inside[1:-1, 1:-1, 1:-1] >= 0.5]
        found["folded_gland_percent"] = 100 * (gland <= 0).double().mean().item()
    return found


def true_error(displacement: Tensor, truth: Tensor, gland: Tensor) -> float:
    """Median over the gland of the distance in mm between a displacement and the true one, which a phantom has.

    Args:
        displacement, truth: shape (3, X, Y, Z), mm, on the fixed grid.
        gland: label (X, Y, Z) on that grid.
    """
    return (displacement - truth).norm(dim=0)[gland >= 0.5].median().item()


def evaluate_labels(warped: Tensor, fixed: Tensor, spacing: Sequence[float]) -> list[dict[str, float]]:
    """One row per label: `dsc` and `distance_mm`; both (M, X, Y, Z) on the fixed grid, channel m the same structure.

    A label that is absent, empty in the fixed image, gives NaN for both; one that is empty after warping gives DSC 0
    and distance NaN.
    """
    a, b = warped[:, None], fixed[:, None]
    absent = (fixed < 0.5).all(-1).all(-1).all(-1)
    scores = zip(dice(a, b).masked_fill(absent, math.nan), centroid_distance(a, b, spacing), strict=True)
    return [{"dsc": d.item(), "distance_mm": c.item()} for d, c in scores]


def forward_distances(displacement: Tensor, fixed: MetaTensor, moving: MetaTensor) -> list[float]:
    """How far from each label's moving centroid its fixed centroid is taken, mm; NaN where either label is empty.

    The distance of `evaluate_labels` is between the warped label and the fixed one: a point of the moving image taken
    to the fixed one. The two are nearly the same, unless the field takes all points towards their mean: that makes this
    one small and the other large.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, on the fixed grid.
        fixed, moving: labels (M, …), each on its own grid, channel m the same structure.
    """
    found = []
    for labels in zip(fixed.as_tensor(), moving.as_tensor(), strict=True):
        (at, x), (_, target) = (
            (voxel, affine[:3, :3] @ voxel + affine[:3, 3])
            for label, affine in zip(labels, (fixed.affine.double().cpu(), moving.affine.double().cpu()), strict=True)
            for voxel in centroid(label[None, None], (1, 1, 1)).cpu()
        )
        u = fields.at_points(displacement[None].double(), at.nan_to_num()[None, None])[0, 0]
        found.append((x + u - target).norm().item())
    return found


def warped_away(label: Mapping[str, float]) -> bool:
    """Whether a label's scores, see `evaluate_labels`, say that it is empty after warping."""
    return not math.isnan(label["dsc"]) and math.isnan(label["distance_mm"])


def score_case(
    warped: Tensor, fixed: Tensor, spacing: Sequence[float]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Scores of one case, and of each of its labels; arguments and label scores as in `evaluate_labels`.

    The case's are `dsc` (channel 0, the gland), `tre_mm` (the landmarks) and `tre_with_gland_mm`.
    """
    labels = evaluate_labels(warped, fixed, spacing)
    distances = [label["distance_mm"] for label in labels]
    tre, with_gland = target_registration_error(distances[1:]), target_registration_error(distances)
    return {"dsc": labels[0]["dsc"], "tre_mm": tre, "tre_with_gland_mm": with_gland}, labels
