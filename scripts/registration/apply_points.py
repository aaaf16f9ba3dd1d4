"""Points through a transform, forward or by its inverse, with what is wrong with each; see the `apply` verb."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scripts.data.checks import InputError
from scripts.data.formats import Displacement, Step, forward
from scripts.data.point_tables import Points
from scripts.data.points import kind_of, read_points
from scripts.network import fields
from scripts.registration import targets

MAX_RESIDUAL = 0.1  # mm; a point whose inverse misses by more is not written
OUTSIDE, FOLDS = "outside the field", "the field folds here"


def forth(steps: Sequence[Step], points: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Fixed points to moving points; as `backward`, with a residual of NaN, because nothing is inverted."""
    moved, known = forward(steps, points)
    folded, at = torch.zeros(points.shape[2], dtype=torch.bool), points
    for step in steps:
        if isinstance(step, Displacement):
            folded |= torch.linalg.det(fields.gradient(step.field[None], step.affine, at)) <= 0
        at, _ = forward([step], at)
    told = zip(known.flatten().tolist(), folded.tolist(), strict=True)
    status = [OUTSIDE if not inside else FOLDS if folds else "ok" for inside, folds in told]
    return moved, torch.full((points.shape[2],), torch.nan, dtype=torch.float64), status


def backward(steps: Sequence[Step], points: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Moving points to fixed points, by the inverse.

    Args:
        points: shape (1, 3, N, 1, 1), float64, RAS mm.

    Returns:
        The same shape; the distance in mm between each point and where the transform takes its result, shape (N,); and
        what is wrong with each, "ok" if nothing is.
    """
    found, folded = points, torch.zeros(points.shape[2], dtype=torch.bool)
    for step in reversed(steps):
        if isinstance(step, Displacement):
            found, _, jacobian = fields.inverse(step.field[None], step.affine, found)
            folded |= jacobian <= 0
        else:
            found = fields.transform_points(torch.linalg.inv(step), found)
    again, known = forward(steps, found)
    residual = (again - points).norm(dim=1).flatten()
    status = []
    for far, inside, folds in zip(residual.tolist(), known.flatten().tolist(), folded.tolist(), strict=True):
        missed = f"no inverse: off by {far:.2f} mm" if far > MAX_RESIDUAL else "ok"
        status.append(OUTSIDE if not inside else FOLDS if folds else missed)
    return found, residual, status


def carried(through: Callable, world: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Points in the other image, NaN of those without a place here or there.

    Args:
        through: `forth` or `backward` of a transform.
        world: shape (N, 3), float64, RAS mm; NaN where there is no position.

    Returns:
        The same shape; the residuals of an inverse in mm, shape (N,); and what is wrong with each, "ok" if nothing is.
    """
    there = ~world.isnan().any(dim=1)
    residuals, status = torch.full((len(world),), torch.nan, dtype=torch.float64), ["no position"] * len(world)
    moved, residuals[there], states = through(world[there].T[None, :, :, None, None])
    result = world.clone()
    result[there] = moved[0, :, :, 0, 0].T
    for index, state in zip(there.nonzero().flatten().tolist(), states, strict=True):
        status[index] = state
        if state != "ok":
            result[index] = torch.nan
    return result, residuals, status


def apply_to_points(
    steps: Sequence[Step],
    transforms: Sequence[str],
    points: str,
    points_from: str,
    coordinates: str | None,
    output: str,
) -> None:
    """Take the points of a file to the other image and write them as a file of the same kind; see the `apply` verb."""
    found = read_points(points, coordinates)
    kind = kind_of(points)
    if not output.lower().endswith(kind):
        raise InputError(f"{output}: the points of {points} are written as {kind}; choose a name that ends so")
    there = ~found.world.isnan().any(dim=1)
    through = partial(forth if points_from == "fixed" else backward, steps)
    result, residuals, status = carried(through, found.world)
    more = [] if found.radii is None else [_targets(found, result, points_from, through, transforms)]
    try:
        found.save(Path(output), result, residuals, status, *more)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    there_too = "moving" if points_from == "fixed" else "fixed"
    told = f"{status.count('ok')} of {len(status)} {found.what} of the {points_from} image"
    print(f"{output}: {told}, in the {there_too} image")
    if points_from == "moving" and there.any():
        print(
            f"residual of the inverse: {residuals[there].median():.2g} mm median, {residuals[there].max():.2g} mm most"
        )
    names = found.names or [f"point {number + 1}" for number in range(len(status))]
    for name, state in zip(names, status, strict=True):
        if state != "ok":
            print(f"CHECK: {name}: {state}; {found.lost}")
    for columns in more:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        for name, radius, row in zip(names, found.radii.tolist(), rows, strict=True):
            if row["doubt"] or not math.isnan(row["volume_ratio"]):
                print(targets.line(name, row, radius))
        print(targets.WEAK)


def _targets(
    found: Points, result: Tensor, points_from: str, through: Callable, transforms: Sequence[str]
) -> dict[str, list]:
    """The figures of `targets.figures`, a column each; NaN and no doubt of points that have no radius or no place."""
    known = ~(found.radii.isnan() | result.isnan().any(dim=1))
    columns: dict[str, list] = {}
    if known.any():
        centres, radii = found.world[known], found.radii[known]
        axes, states = targets.spheres(through, centres, radii)
        places = {points_from: centres, "moving" if points_from == "fixed" else "fixed": result[known]}
        columns = targets.figures(targets.evidence(transforms), places, axes, radii, states)
    rows = known.nonzero().flatten().tolist()
    return {
        name: [values[rows.index(n)] if n in rows else "" if name == "doubt" else math.nan for n in range(len(known))]
        for name, values in columns.items()
    }
