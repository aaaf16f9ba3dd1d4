"""Files of points in mm: 3D Slicer's .mrk.json and .fcsv, which say where their axes point, tables, and surfaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.data.checks import InputError
from scripts.data.files import written_whole
from scripts.data.meshes import SUFFIXES, read_surface, write_surface
from scripts.data.point_tables import SLICER, Points, read_fcsv, read_table, sign

KINDS = {".json": ".mrk.json", ".fcsv": ".fcsv", ".csv": ".csv", ".tsv": ".tsv"}  # end of a name -> of a result's
KINDS |= {suffix: suffix for suffix in SUFFIXES}
POINTS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")  # markups that are their control points and no more


def kind_of(path: str) -> str | None:
    """How the name of a file of points ends, and that of a result; None of another file."""
    return next((result for ending, result in KINDS.items() if path.lower().endswith(ending)), None)


def read_points(path: str, coordinates: str | None) -> Points:
    """The points of a table (.csv, .tsv), of a .mrk.json or .fcsv file of 3D Slicer, or of a surface its vertices.

    Args:
        coordinates: "RAS" or "LPS", which columns x, y, z cannot say; other files say it themselves, and surfaces
            are LPS if they do not.

    Raises:
        InputError: no such file, or none of these; no coordinate system, or two; markups that are more than points;
            see `scripts.data.meshes.read_surface`.
    """
    if coordinates not in (None, "RAS", "LPS"):
        raise InputError(f"coordinates {coordinates}: expected RAS or LPS")
    if not Path(path).is_file():
        raise InputError(f"{path}: points file not found")
    readers = {".mrk.json": _read_markups, ".fcsv": read_fcsv, ".csv": read_table, ".tsv": read_table}
    readers |= dict.fromkeys(SUFFIXES, _read_vertices)
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: expected points as .csv with x, y, z in mm, .mrk.json or .fcsv of 3D Slicer, or a"
            " surface as .stl, .obj, .ply or .vtp"
        )
    return readers[kind](path, coordinates)


def _read_vertices(path: str, coordinates: str | None) -> Points:
    surface = read_surface(path, coordinates)

    def save(target: Path, world: Tensor, residuals: Tensor, status: Sequence[str]) -> None:
        lost = {state: status.count(state) for state in status if state != "ok"}
        if lost:
            named = ", ".join(f"{count} {state}" for state, count in lost.items())
            raise InputError(
                f"{path}: {sum(lost.values())} of {len(status)} vertices have no place in the other image ({named});"
                " nothing is written, because a surface with holes shows a smaller target; take its label map"
            )
        write_surface(target, surface._replace(vertices=world.numpy()))

    return Points(torch.from_numpy(surface.vertices), save, what="vertices")


def _read_markups(path: str, coordinates: str | None) -> Points:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        markups = content["markups"]
        kinds = {str(m.get("type", POINTS[0])) for m in markups} - set(POINTS)
        if kinds:
            raise InputError(
                f"{path}: a markup of the type {kinds.pop()}, which is more than its points and would not keep its"
                " shape; mark what matters by points and take those"
            )
        controls = [(m, p) for m in markups for p in m["controlPoints"]]
        systems = [str(m.get("coordinateSystem", "LPS")) for m in markups]
        systems = [SLICER.get(system, system) for system in systems]
        defined = ["position" in p and p.get("positionStatus", "defined") == "defined" for _, p in controls]
        read = [p["position"] if there else [np.nan] * 3 for (_, p), there in zip(controls, defined, strict=True)]
        read = torch.tensor(read, dtype=torch.float64).reshape(len(controls), 3)
    except InputError:
        raise
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
    axes = torch.stack([sign(system) for m, system in zip(markups, systems, strict=True) for _ in m["controlPoints"]])

    def save(target: Path, world: Tensor, residuals: Tensor, status: Sequence[str]) -> None:
        for (_, control), point, residual, state in zip(controls, world * axes, residuals, status, strict=True):
            lost = point.isnan().any().item()
            control |= {"position": [0.0] * 3 if lost else point.tolist()}
            control["positionStatus"] = "undefined" if lost else "defined"
            control.pop("orientation", None)  # of the point where it was
            notes = [state] * (state != "ok") + [f"inverse off by {residual:.4f} mm"] * (not residual.isnan().item())
            control["description"] = "; ".join([text for text in (control.get("description"), *notes) if text])
        for markup in markups:
            markup.pop("measurements", None)  # of the points as they were
        with written_whole(target) as file:
            json.dump(content, file, indent=2)

    names = [str(point.get("label") or f"point {k + 1}") for k, (_, point) in enumerate(controls)]
    return Points(read * axes, save, names=names)
