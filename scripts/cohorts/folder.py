"""One's own folder of any names, and a table that says which file is what.

A line of the table is a pair. Columns, paths relative to the folder:

    case, moving_image, fixed_image, moving_label, fixed_label    these must be there
    moving_label_2, fixed_label_2, moving_label_3, ...            further structures, in the order of the channels
    patient                                                       whose pair it is
    moving_label_values, fixed_label_values                       of index maps, the gland first, for example 1 3 2
    moving_axes, fixed_axes, moving_spacing, fixed_spacing,       of images whose headers do not say it, as for register
    moving_series, fixed_series

A label file may hold several structures. One that a side lacks is an empty cell, and an empty channel.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scripts.cohorts.writing import Case, Found, LeftOut, Side, named
from scripts.data import checks
from scripts.data.axes import checked_axes
from scripts.data.checks import InputError
from scripts.data.datalist import IMAGES, KEYS, OPTIONS
from scripts.data.labels import checked_values
from scripts.data.pairs import LoadPaird

MAPPING = "mapping.csv"
SIDES = ("moving", "fixed")
OTHERS = ("patient", *OPTIONS, "moving_label_values", "fixed_label_values")
FURTHER = re.compile(r"(moving|fixed)_label_([2-9]|[1-9]\d)")
ABOUT = ["A data set of one's own. Licence and origin: as of the source."]


def find(
    source: Path,
    mapping: str | None = None,
    label_values: Sequence[int] | None = None,
    moving_axes: str | None = None,
    fixed_axes: str | None = None,
) -> Found:
    """The pairs of a table.

    Args:
        mapping: the table, CSV; mapping.csv in the folder by default.
        label_values, moving_axes, fixed_axes: for all pairs whose line does not say it.

    Raises:
        InputError: no table, or one of other columns or without lines; files of a line that are not there.
    """
    table = source / MAPPING if mapping is None else Path(mapping)
    rows = _rows(table)
    default = {"moving_axes": moving_axes, "fixed_axes": fixed_axes} | dict.fromkeys(
        ("moving_label_values", "fixed_label_values"), label_values
    )
    cases, left_out, patients = [], [], {}
    for line, row in rows:
        case = row["case"]
        patient = row.get("patient", "")
        try:
            told = default | {name: value for name, value in row.items() if name in OTHERS and value}
            load = partial(load_row, _there(table, line, source, row), _read(told))
            if "patient" in row and not patient:
                raise InputError(f"{table}, line {line}: no patient, while others have one")
        except InputError as error:
            left_out.append(LeftOut(case or f"line {line}", checks.one_line(error)))
            continue
        if patients.setdefault(patient.replace("_", "-"), patient) != patient:
            raise InputError(f"{table}: patients {patients[patient.replace('_', '-')]} and {patient} differ in - and _")
        own = not patient or case.startswith(f"{patient.replace('_', '-')}_")
        cases.append(Case(case if own else named(patient, case), load, patient or case))
    return Found(cases, left_out, ABOUT, **({} if rows and "patient" in rows[0][1] else {"patient_pattern": None}))


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of a table with their numbers, cells without white space around them."""
    needed = ("case", *KEYS)
    if not table.is_file():
        raise InputError(f"{table}: no such table; it needs the columns {', '.join(needed)}, a line for each pair")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [
                (reader.line_num, {name: (cell or "").strip() for name, cell in row.items() if name is not None})
                for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a readable CSV file: {error}") from error
    lacking = [name for name in needed if name not in names]
    odd = [name for name in names if name not in (*needed, *OTHERS) and not FURTHER.fullmatch(name)]
    if lacking or odd or not rows:
        what = f"no column {lacking[0]}" if lacking else f"unknown column {odd[0]!r}" if odd else "no line"
        raise InputError(f"{table}: {what}; needed are {', '.join(needed)}, known also {', '.join(OTHERS)}")
    return rows


def _there(table: Path, line: int, source: Path, row: Mapping[str, str]) -> dict[str, str]:
    """Column -> path of the files of a line.

    Raises:
        InputError: no case name; an image that is not named; a file that is not there.
    """
    if not row["case"]:
        raise InputError(f"{table}, line {line}: no case name")
    checks.check_case_name(row["case"])
    for name in IMAGES:
        if not row[name]:
            raise InputError(f"{table}, line {line}: no {name}")
    files = {name: str(source / row[name]) for name in row if (name in KEYS or FURTHER.fullmatch(name)) and row[name]}
    absent = next((path for path in files.values() if not Path(path).exists()), None)
    if absent:
        raise InputError(f"{absent}: named in {table}, line {line}, but not found")
    return files


def _read(told: Mapping) -> dict:
    """Settings of a line as they are used."""
    found: dict = {}
    for side in SIDES:
        values = _numbers(told.get(f"{side}_label_values"))
        found[f"{side}_label_values"] = checked_values(values and ",".join(map(str, values)))
        size = _numbers(told.get(f"{side}_spacing"))
        size = checks.voxel_size(f"{side}_spacing", size[0] if size and len(size) == 1 else size)
        found[f"{side}_spacing"] = None if size is None else size.tolist()
        found[f"{side}_series"] = told.get(f"{side}_series")
        found[f"{side}_axes"] = checked_axes(f"{side}_axes", told.get(f"{side}_axes"))
    return found


def _numbers(cell: str | Sequence | None) -> Sequence | None:
    """The parts of a cell, which spaces or commas separate; a list stays one, and None None."""
    return re.split(r"[\s,]+", cell.strip(" []()")) if isinstance(cell, str) else cell


def load_row(files: Mapping[str, str], told: Mapping) -> tuple[Side, Side, dict[str, str]]:
    """The two sides of a line through the input gate; a label that a side lacks is an empty channel.

    Raises:
        InputError: see `scripts.data.pairs.LoadPaird`; no label on a side; other numbers of structures.
    """
    images = {name: files[name] for name in IMAGES}
    options = {name: told[name] for name in OPTIONS}
    places = sorted({int((FURTHER.fullmatch(name) or [0, 0, 1])[2]) for name in files if name not in IMAGES})
    loaded: dict[str, dict[int, np.ndarray]] = {side: {} for side in SIDES}
    item = LoadPaird(**options)(images)
    for side in SIDES:
        load = LoadPaird(told[f"{side}_label_values"], **options)
        for place in places:
            name = f"{side}_label" + f"_{place}" * (place > 1)
            if name in files:
                loaded[side][place] = load(images | {f"{side}_label": files[name]})[f"{side}_label"].numpy()
        if 1 not in loaded[side]:
            raise InputError(f"{files[f'{side}_image']}: no {side}_label, which holds the gland")
    for place in places:
        counts = [len(loaded[side][place]) for side in SIDES if place in loaded[side]]
        if len(set(counts)) > 1:
            raise InputError(
                f"{files['moving_image']}: {counts[0]} structures in label {place} of the moving image, {counts[1]} of"
                " the fixed one; label m must be the same structure in both"
            )
    sides = []
    for side, other in (SIDES, SIDES[::-1]):
        image = item[f"{side}_image"]
        channels = []
        for place in places:
            own = loaded[side].get(place)
            channels.append(np.zeros((len(loaded[other][place]), *image.shape[1:])) if own is None else own)
        sides.append(Side(image[0].numpy(), np.concatenate(channels), image.affine.numpy()))
    checks.check_drawable(images["moving_image"], sides[0].labels, images["fixed_image"], sides[1].labels)
    return sides[0], sides[1], {}
