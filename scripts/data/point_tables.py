"""Tables of points in mm, as spreadsheets and 3D Slicer write them: CSV of any delimiter and encoding, and .fcsv.

Columns x, y, z do not say where their axes point and have to be told; r, a, s and l, p, s do. A result has the
delimiter, the decimal sign, the encoding and the other columns of the file it comes from.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.data.checks import InputError
from scripts.data.files import written_whole
from scripts.data.lps import FLIP

AXES = {"xyz": None, "ras": "RAS", "lps": "LPS"}  # columns, and what they say of the coordinate system
DELIMITERS = (",", ";", "\t")
UNIT = re.compile(r"\s*[\[(_ ]?\s*mm\s*[\])]?$")  # after the name of a column
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
NOTES = ("residual_mm", "status")  # columns of a result
NAMES = ("name", "label", "id")  # columns that name a point
SLICER = {"0": "RAS", "1": "LPS"}  # coordinate systems as early versions of 3D Slicer write them


class Points(NamedTuple):
    """Points of a file.

    Attributes:
        world: shape (N, 3), float64, RAS mm; NaN where the file has none.
        save: writes a file of the same kind with other positions, residuals in mm (NaN: none) and a status each; of a
            table with radii further columns by name.
        lost: what becomes of a point without a position in such a file.
        what: they are, in the plural.
        radii: of the spheres around them, shape (N,), mm, NaN where there is none; None of a file without.
        names: of the points, where the file has them.
    """

    world: Tensor
    save: Callable[..., None]
    lost: str = "written without a position"
    what: str = "points"
    radii: Tensor | None = None
    names: Sequence[str] = ()


class Table(NamedTuple):
    """The cells of a CSV, and how it is written.

    Attributes:
        names, rows: the header, and the cells below it by name.
        axes: the three columns of the coordinates.
        radius: the column of the radius, None without.
        system: "RAS" or "LPS" where their names say it.
        delimiter, comma, encoding, first: comma for a decimal comma; first is a line before the header (`sep=;`).
    """

    names: list[str]
    rows: list[dict[str, str]]
    axes: list[str]
    system: str | None
    delimiter: str
    comma: bool
    encoding: str
    first: str
    radius: str | None = None


def sign(coordinates: str) -> Tensor:
    """What RAS is multiplied by to give a coordinate system, and the other way round."""
    return FLIP if coordinates == "LPS" else torch.ones(3, dtype=torch.float64)


def read_table(path: str, coordinates: str | None) -> Points:
    """The points of a CSV; `coordinates` as of `scripts.data.points.read_points`.

    Raises:
        InputError: no columns of coordinates; a cell that is no number, or could be two; no coordinate system, or two.
    """
    table = _parse(path)
    if table.system is None and coordinates is None:
        raise InputError(f"{path}: a CSV does not say where its axes point; pass --coordinates RAS or LPS")
    if table.system not in (None, coordinates) and coordinates is not None:
        raise InputError(f"{path}: its columns {', '.join(table.axes)} are {table.system}, not {coordinates}")
    axes = sign(table.system or coordinates)
    defined = next((name for name in table.names if name.strip().lower() == "defined"), None)
    read = torch.tensor([_position(path, table, row) for row in table.rows], dtype=torch.float64)
    if defined is not None:
        read[[row[defined].strip() == "0" for row in table.rows]] = torch.nan
    _check_positions(path, read)
    radii = None if table.radius is None else torch.tensor([_radius(path, table, row) for row in table.rows]).double()
    named = next((name for name in table.names if name.strip().lower() in NAMES), None)

    def save(
        target: Path,
        world: Tensor,
        residuals: Tensor,
        status: Sequence[str],
        more: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        text = io.StringIO()
        more = more or {}
        names = [*(name for name in table.names if name not in (*NOTES, *more)), *NOTES, *more]
        writer = csv.DictWriter(text, names, extrasaction="ignore", delimiter=table.delimiter)
        writer.writeheader()
        rows = zip(table.rows, world * axes, residuals, status, strict=True)
        for number, (row, point, residual, state) in enumerate(rows):
            cells = [_written(value, table.comma) for value in (*point, residual)]
            moved = dict(zip((*table.axes, *NOTES), (*cells, state), strict=True))
            if defined is not None and point.isnan().any():
                moved[defined] = "0"
            told = {name: values[number] for name, values in more.items()}
            moved |= {k: v if isinstance(v, str) else _written(torch.tensor(v), table.comma) for k, v in told.items()}
            writer.writerow(row | moved)
        with written_whole(target, "wb") as file:
            file.write((table.first + text.getvalue()).encode(table.encoding))

    names = [row[named] for row in table.rows] if named is not None else ()
    return Points(read * axes, save, radii=radii, names=names)


def read_fcsv(path: str, coordinates: str | None) -> Points:
    """The points of a .fcsv of 3D Slicer, whose first lines say its columns and its coordinate system.

    Raises:
        InputError: they do not, or say another; a coordinate that is no number.
    """
    text, encoding = _text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    head = [line for line in lines if line.startswith("#")]
    told = dict((part.strip() for part in line[1:].split("=", 1)) for line in head if "=" in line)
    system = next((value for key, value in told.items() if key.lower() == "coordinatesystem"), coordinates)
    system = SLICER.get(str(system), system)
    names = [name.strip() for name in told.get("columns", "").split(",")]
    if not {"x", "y", "z"} <= set(names):
        raise InputError(f"{path}: not a .fcsv of 3D Slicer: no line says that its columns are x, y and z")
    if system is None:
        raise InputError(f"{path}: it does not say where its axes point; pass --coordinates RAS or LPS")
    if system not in ({coordinates} if coordinates else {"RAS", "LPS"}):
        raise InputError(f"{path}: its coordinate system is {system}, not {coordinates or 'RAS or LPS'}")
    rows = [
        dict(zip(names, cells, strict=False))
        for cells in csv.reader(line for line in lines if not line.startswith("#"))
    ]
    table = Table(names, rows, ["x", "y", "z"], system, ",", False, encoding, "")
    read = torch.tensor([_position(path, table, row) for row in rows], dtype=torch.float64).reshape(-1, 3)
    _check_positions(path, read)
    axes = sign(system)

    def save(target: Path, world: Tensor, residuals: Tensor, status: Sequence[str]) -> None:
        written = io.StringIO("".join(f"{line}\n" for line in head))
        written.seek(0, io.SEEK_END)
        writer = csv.DictWriter(written, names, lineterminator="\n")
        for row, point, residual in zip(rows, world * axes, residuals, strict=True):
            if point.isnan().any():  # a .fcsv has no such point: an empty cell would be 0 to 3D Slicer
                continue
            moved = dict(zip("xyz", (_written(value) for value in point), strict=True))
            if "desc" in names and not residual.isnan():
                moved["desc"] = "; ".join(t for t in (row.get("desc"), f"inverse off by {residual:.4f} mm") if t)
            writer.writerow(row | moved)
        with written_whole(target, "wb") as file:
            file.write(written.getvalue().encode(encoding))

    labels = [row.get("label") or f"point {k + 1}" for k, row in enumerate(rows)]
    lost = "left out, because a .fcsv has no points without a position"
    return Points(read * axes, save, lost=lost, names=labels)


def _text(path: str) -> tuple[str, str]:
    """What is written in a file, and its encoding: UTF-8 or UTF-16 if it is that, else Windows' Latin-1."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: not a readable CSV file: {error.strerror}") from error
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    guess = [encoding for mark, encoding in marks.items() if data.startswith(mark)] or ["utf-8", "cp1252"]
    if data[1:2] == b"\0" or data[:1] == b"\0":
        guess = ["utf-16-le" if data[1:2] == b"\0" else "utf-16-be"]
    for encoding in guess:
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise InputError(f"{path}: not a readable CSV file: it is not text in UTF-8, UTF-16 or Latin-1")


def _parse(path: str) -> Table:
    text, encoding = _text(path)
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=(.)\s*", first.strip('"\r '), re.IGNORECASE)  # a spreadsheet's own
    first, text = (f"{first}\n", rest) if told else ("", text)
    for delimiter in (told[1],) if told else DELIMITERS:
        lines = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(cell.strip() for cell in row)]
        header = lines[0] if lines else []
        found = _axes_among(path, header)
        if found is not None:
            break
    else:
        shown = (text.strip().splitlines() or ["nothing"])[0][:60]
        raise InputError(f"{path}: expected a header with x, y and z, and points in mm; found {shown}")
    if len(lines) < 2:
        raise InputError(f"{path}: expected a header with x, y and z, and points in mm; found no points")
    while not header[-1].strip():  # a comma at the end
        header = header[:-1]
    rows = [dict(zip(header, [*cells, *[""] * len(header)], strict=False)) for cells in lines[1:]]
    axes, system = found
    radius = next((name for name in header if UNIT.sub("", name.strip().lower()) == "radius"), None)
    numbers = [*axes, *([radius] if radius is not None else [])]
    comma = _has_decimal_comma(path, [row[name].strip() for row in rows for name in numbers], delimiter)
    return Table(header, rows, axes, system, delimiter, comma, encoding, first, radius)


def _axes_among(path: str, header: Sequence[str]) -> tuple[list[str], str | None] | None:
    """The three columns of coordinates, and the coordinate system they name; None if there are no three.

    Raises:
        InputError: a column twice, or both x, y, z and others.
    """
    plain = [UNIT.sub("", name.strip().lower()) for name in header]
    there = [axes for axes in AXES if all(axis in plain for axis in axes)]
    if not there:
        return None
    named = [axes for axes in there if AXES[axes]] or there
    if len(named) > 1 or any(plain.count(axis) > 1 for axis in named[0]):
        raise InputError(f"{path}: more than one set of coordinates in its columns {', '.join(header)}; keep one")
    return [header[plain.index(axis)] for axis in named[0]], AXES[named[0]]


def _has_decimal_comma(path: str, cells: Sequence[str], delimiter: str) -> bool:
    """Whether the numbers of a table have a decimal comma.

    Raises:
        InputError: they could as well have commas between thousands.
    """
    commas = [cell for cell in cells if "," in cell]
    if not commas:
        return False
    if any("." in cell for cell in cells) or any(cell.count(",") > 1 for cell in commas):
        raise InputError(f"{path}: a coordinate is no number: {commas[0]!r}; write a point for the decimals")
    if delimiter == "," and all(THOUSANDS.fullmatch(cell) for cell in commas):
        raise InputError(f"{path}: {commas[0]!r} could be a fraction or thousands; write a point for the decimals")
    return True


def _position(path: str, table: Table, row: dict[str, str]) -> list[float]:
    """The coordinates of a row; NaN if all three cells are empty."""
    cells = [row.get(name, "").strip().replace("\u2212", "-") for name in table.axes]
    if not any(cells):
        return [np.nan] * 3
    try:
        position = [float(cell.replace(",", ".") if table.comma else cell) for cell in cells]
    except ValueError as error:
        raise InputError(f"{path}: a coordinate is no number: {', '.join(map(repr, cells))}") from error
    if not np.isfinite(position).all():
        raise InputError(f"{path}: a coordinate is no number: {', '.join(map(repr, cells))}")
    return position


def _radius(path: str, table: Table, row: dict[str, str]) -> float:
    """The radius of a row, mm; NaN of an empty cell."""
    cell = row.get(table.radius, "").strip()
    try:
        radius = float(cell.replace(",", ".") if table.comma else cell) if cell else np.nan
    except ValueError:
        radius = 0.0
    if not (np.isnan(radius) and not cell or 0 < radius < np.inf):
        raise InputError(f"{path}: a radius is no number above 0: {cell!r}")
    return radius


def _check_positions(path: str, read: Tensor) -> None:
    if read.isnan().any(dim=1).all():
        raise InputError(f"{path}: no point has a position")


def _written(value: Tensor, comma: bool = False) -> str:
    text = "" if value.isnan() else f"{value:.6f}"
    return text.replace(".", ",") if comma else text
