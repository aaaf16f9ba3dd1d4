"""Files of points in mm: a CSV, which has to be told where its axes point, and 3D Slicer's .mrk.json, which says it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.files import written_whole
from scripts.data.lps import FLIP


class Points(NamedTuple):
    """Points of a file.

    Attributes:
        world: shape (N, 3), float64, RAS mm; NaN where the file has none.
        save: writes a file of the same kind with other positions, residuals in mm (NaN: none) and a status each.
    """

    world: Tensor
    save: Callable[[Path, Tensor, Tensor, Sequence[str]], None]


def read_points(path: str, coordinates: str | None) -> Points:
    """The points of a CSV or a 3D Slicer .mrk.json file.

    Args:
        coordinates: "RAS" or "LPS", which a CSV cannot say; a .mrk.json says it itself.

    Raises:
        InputError: no such file, or not one of the two; no coordinate system, or two.
    """
    if coordinates not in (None, "RAS", "LPS"):
        raise InputError(f"coordinates {coordinates}: expected RAS or LPS")
    if not Path(path).is_file():
        raise InputError(f"{path}: points file not found")
    if path.lower().endswith(".json"):
        return _read_markups(path, coordinates)
    if not path.lower().endswith(".csv"):
        raise InputError(f"{path}: expected points as .csv with the columns x, y, z in mm, or .mrk.json of 3D Slicer")
    if coordinates is None:
        raise InputError(f"{path}: a CSV does not say where its axes point; pass --coordinates RAS or LPS")
    return _read_csv(path, coordinates)


def _axes(coordinates: str) -> Tensor:
    """What RAS is multiplied by to give a coordinate system, and the other way round."""
    return FLIP if coordinates == "LPS" else torch.ones(3, dtype=torch.float64)


def _written(value: Tensor) -> str:
    return "" if value.isnan() else f"{value:.6f}"


def _read_csv(path: str, coordinates: str) -> Points:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from error
    names = [next((c for c in columns if c.strip().lower() == axis), None) for axis in "xyz"]
    if None in names or not rows:
        raise InputError(f"{path}: expected a header with x, y and z, and points in mm; found {', '.join(columns)}")
    try:
        read = torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a coordinate is no number: {error}") from error
    checks.check_finite(path, read.numpy())
    axes = _axes(coordinates)

    def save(target: Path, world: Tensor, residuals: Tensor, status: Sequence[str]) -> None:
        kept = [column for column in columns if column not in ("residual_mm", "status")]
        with written_whole(target) as file:
            writer = csv.DictWriter(file, [*kept, "residual_mm", "status"], extrasaction="ignore")
            writer.writeheader()
            for row, point, residual, state in zip(rows, world * axes, residuals, status, strict=True):
                moved = {name: _written(value) for name, value in zip(names, point, strict=True)}
                writer.writerow(row | moved | {"residual_mm": _written(residual), "status": state})

    return Points(read * axes, save)


def _read_markups(path: str, coordinates: str | None) -> Points:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        markups = content["markups"]
        controls = [(m, p) for m in markups for p in m["controlPoints"]]
        systems = [str(m.get("coordinateSystem", "LPS")) for m in markups]
        systems = [{"0": "RAS", "1": "LPS"}.get(system, system) for system in systems]  # as early versions wrote them
        defined = ["position" in p and p.get("positionStatus", "defined") == "defined" for _, p in controls]
        read = [p["position"] if there else [np.nan] * 3 for (_, p), there in zip(controls, defined, strict=True)]
        read = torch.tensor(read, dtype=torch.float64).reshape(len(controls), 3)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a readable markups file of 3D Slicer: {error!r}") from error
    wrong = sorted(set(systems) - ({coordinates} if coordinates else {"RAS", "LPS"}))
    if wrong:
        raise InputError(f"{path}: its coordinate system is {wrong[0]}, not {coordinates or 'RAS or LPS'}")
    units = {str(np.ravel(m.get("coordinateUnits", "mm"))[0]) for m in markups} - {"mm"}
    if units:
        raise InputError(f"{path}: coordinates in {units.pop()}; expected mm")
    if not any(defined):
        raise InputError(f"{path}: no point has a position")
    axes = torch.stack([_axes(system) for m, system in zip(markups, systems, strict=True) for _ in m["controlPoints"]])

    def save(target: Path, world: Tensor, residuals: Tensor, status: Sequence[str]) -> None:
        for (_, control), point, residual, state in zip(controls, world * axes, residuals, status, strict=True):
            lost = point.isnan().any().item()
            control |= {"position": [0.0] * 3 if lost else point.tolist()}
            control["positionStatus"] = "undefined" if lost else "defined"
            notes = [state] * (state != "ok") + [f"inverse off by {residual:.4f} mm"] * (not residual.isnan().item())
            control["description"] = "; ".join([text for text in (control.get("description"), *notes) if text])
        for markup in markups:
            markup.pop("measurements", None)  # of the points as they were
        with written_whole(target) as file:
            json.dump(content, file, indent=2)

    return Points(read * axes, save)
