"""The tables of a report: which methods of a cross-validation are complete, a row for each, as CSV and as HTML."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.data.checks import InputError
from scripts.registration.metrics import target_registration_error, warped_away
from scripts.study.plan import DONE, WEIGHTS
from scripts.study.statistics import LEVEL, compare, describe, quartiles
from scripts.study.tables import by_patient, landmark_distances

Rows = list[dict[str, str]]
PATIENT, COMPARED = "patient_tre_mm", ("tre_mm", "dsc")
SPREAD = {  # name -> heading and digits; all but PATIENT are columns of cases.csv
    "tre_mm": ("TRE, mm", 2),
    "dsc": ("gland DSC", 3),
    PATIENT: ("TRE per patient, mm", 2),
    "hd95_mm": ("gland HD95, mm", 2),
    "true_error_mm": ("true error, mm", 2),
    "folded_percent": ("folded voxels, %", 2),
}
COUNTS = {  # name -> heading and digits
    "folded_cases": ("cases that fold", 0),
    "jacobian_min": ("smallest det J", 2),
    "empty_warped": ("labels warped away", 0),
    "flagged_cases": ("cases to check", 0),
}


class Method(NamedTuple):
    """A variant, or a row without training: its cases by name, its labels, whether it has weights for every fold."""

    cases: dict[str, dict[str, str]]
    labels: Rows
    trained: bool

    def values(self, metric: str) -> list[float]:
        """A column of its cases, NaN where there is no value."""
        return [float(row.get(metric) or "nan") for row in self.cases.values()]


def read_rows(path: Path) -> Rows:
    """The rows of a table that crossval wrote.

    Raises:
        InputError: no such file, no rows, rows of something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found; `python -m scripts crossval` writes it when a variant is complete")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "variant" not in rows[0]:
        raise InputError(
            f"{path}: {'no column variant' if rows else 'no rows'}; no variant is complete yet, or not crossval's"
        )
    return rows


def read_methods(output: Path, folds: Sequence[Mapping[str, Sequence[str]]]) -> tuple[dict[str, Method], list[str]]:
    """The methods all of whose folds are done, in the order of cases.csv, and why each of the others is not there.

    Args:
        output: the folder of a cross-validation.
        folds: of each fold, patient -> cases.

    Raises:
        InputError: no table, or no method is complete.
    """
    cases, labels = read_rows(output / "cases.csv"), read_rows(output / "landmarks.csv")
    wanted = sorted(case for fold in folds for patient in fold.values() for case in patient)
    started = [path.name for path in sorted((output / "runs").glob("*")) if path.is_dir()]
    methods, missing = {}, []
    for name in dict.fromkeys([row["variant"] for row in cases] + started):
        runs = [output / "runs" / name / f"fold{fold}" for fold in range(len(folds))]
        done, weights = (sum((run / file).is_file() for run in runs) for file in (DONE, WEIGHTS))
        own = {row["case"]: row for row in cases if row["variant"] == name}
        if done < len(runs):
            missing.append(f"{name}: {done} of {len(runs)} folds are done")
        elif sorted(own) != wanted:
            missing.append(f"{name}: cases.csv has {len(own)} of its {len(wanted)} cases; run crossval with it again")
        else:
            methods[name] = Method(own, [row for row in labels if row["variant"] == name], weights == len(runs))
    if not methods:
        raise InputError(f"{output}: no variant is complete: {'; '.join(missing)}")
    return methods, missing


def initial_alone(method: Method) -> Method:
    """What a method's cases were before registration, by its initial transform alone."""

    def before(row: Mapping[str, str]) -> dict[str, str]:
        return {k.replace("_before", ""): v for k, v in row.items() if "_before" in k}

    labels = [{k: row[k] for k in ("case", "patient", "label")} | before(row) for row in method.labels]
    away = [row["case"] for row in labels if warped_away({k: float(row[k] or "nan") for k in ("dsc", "distance_mm")})]
    cases = {
        case: {"patient": row["patient"], "empty_warped": str(away.count(case))} | before(row)
        for case, row in method.cases.items()
    }
    return Method(cases, labels, False)


def best_of(methods: Mapping[str, Method], trained: bool = True) -> str | None:
    """The trained (or not trained) method of lowest median TRE, or with the gland where no case has landmarks.

    A case whose labels were all warped away counts as the worst, where another method has a value for it.
    """
    chosen = [name for name, method in methods.items() if method.trained == trained]
    for metric in ("tre_mm", "tre_with_gland_mm"):
        table = np.array([method.values(metric) for method in methods.values()])
        table = table[:, ~np.isnan(table).all(0)]
        if table.size:
            middle = dict(zip(methods, np.median(np.nan_to_num(table, nan=np.inf), 1), strict=True))
            return min(chosen, key=middle.get, default=None)
    return next(iter(chosen), None)


def patient_tre(labels: Rows) -> list[float]:
    """TRE of each patient in mm: over the landmarks of all of the patient's cases, the gland left out."""
    return [target_registration_error(landmark_distances(own)) for own in by_patient(labels).values()]


def summary(name: str, method: Method, first: Method) -> dict[str, Any]:
    """A row of a table, compared with `first` unless it is that; what was not measured is not in it."""
    row: dict[str, Any] = {"variant": name, "cases": len(method.cases)}
    for metric in SPREAD:
        if metric == PATIENT:
            parts = zip(("median", "q1", "q3"), quartiles(patient_tre(method.labels)), strict=True)
            row |= {f"{metric}_{part}": value for part, value in parts}
        elif metric in next(iter(method.cases.values())):
            found = describe(method.cases, metric)
            if found["cases"]:
                row |= {f"{metric}_{part}": found[part] for part in ("cases", "median", "q1", "q3")}
    folded, smallest = ([v for v in method.values(m) if not math.isnan(v)] for m in ("folded_percent", "jacobian_min"))
    row |= {"folded_cases": sum(v > 0 for v in folded)} if folded else {}
    row |= {"jacobian_min": min(smallest)} if smallest else {}
    known = [case["flags"] for case in method.cases.values() if "flags" in case]
    row |= {"flagged_cases": sum(bool(words) for words in known)} if known else {}
    row["empty_warped"] = describe(method.cases, "dsc")["empty_warped"]
    for metric in COMPARED if method is not first else ():
        found = compare(method.cases, first.cases, metric)
        row |= {f"{metric}_{part}": found[part] for part in ("difference", "low", "high", "p", "pairs")}
    return row


def number(value: float, digits: int, sign: str = "") -> str:
    """A figure to read, with a true minus, ∞, and a dash for NaN; `sign` stands before what is above 0."""
    if math.isnan(value):
        return "–"
    text = "∞" if math.isinf(value) else f"{abs(value):.{digits}f}"
    zero = text == f"{0:.{digits}f}"
    return text if zero else f"{'−' if value < 0 else sign}{text}"


def spread(row: Mapping[str, Any], metric: str, digits: int) -> str:
    """The HTML of a median and its quartiles."""
    middle, low, high = (number(row.get(f"{metric}_{part}", math.nan), digits) for part in ("median", "q1", "q3"))
    return middle if middle == "–" else f"{middle}<br><small>[{low}, {high}]</small>"


def difference(row: Mapping[str, Any], metric: str, digits: int) -> str:
    """The HTML of a comparison, bold where it is significant."""
    if f"{metric}_p" not in row:
        return "reference"
    p, pairs = row[f"{metric}_p"], row[f"{metric}_pairs"]
    if not pairs:
        return "–<br><small>no pairs</small>"
    centre, low, high = (number(row[f"{metric}_{part}"], digits, "+") for part in ("difference", "low", "high"))
    chance = "p &lt; 0.001" if p < 0.001 else f"p = {number(p, 3)}"
    text = f"{centre} [{low}, {high}]<br><small>{chance}, {pairs} pairs</small>"
    return f"<b>{text}</b>" if p < LEVEL else text


def headline(rows: Mapping[str, Mapping[str, Any]], best: str | None, rival: str | None) -> str:
    """What the page says first: the best trained variant, the best without training."""
    sentences = []
    for name, what in ((best, "trained"), (rival, "not trained")):
        parts = []
        for metric, words, unit, digits in (("tre_mm", "TRE", " mm", 1), ("dsc", "gland DSC", "", 2)):
            known = rows.get(name, {})
            middle, low, high = (number(known.get(f"{metric}_{p}", math.nan), digits) for p in ("median", "q1", "q3"))
            parts.append(f"{words} {middle} [{low}, {high}]{unit}".replace(" ", "\N{NO-BREAK SPACE}"))
        if name:
            sentences.append(f"Best median TRE, {what}: {name}, with {' and '.join(parts)}.")
    return " ".join(sentences) + " Median [quartiles] over held-out cases."


def html_table(rows: Sequence[Mapping[str, Any]], first: str) -> str:
    """Rows of `summary` as a table in a box that scrolls by itself; a column that no row has is left out."""
    heads = ["method", "cases (with TRE)"]
    columns = [[f"{row['cases']} ({row.get('tre_mm_cases', 0)})" for row in rows]]
    for metric, (name, digits) in SPREAD.items():
        if any(f"{metric}_median" in row for row in rows):
            heads.append(name)
            columns.append([spread(row, metric, digits) for row in rows])
            if metric in COMPARED:
                heads.append(f"{name}, difference from {first}")
                columns.append([difference(row, metric, digits) for row in rows])
    for metric, (name, digits) in COUNTS.items():
        if any(metric in row for row in rows):
            heads.append(name)
            columns.append([number(row.get(metric, math.nan), digits) for row in rows])
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for row, *cells in zip(rows, *columns, strict=True):
        body += f'<tr><th scope="row">{escape(row["variant"])}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="box" tabindex="0">{table}</div>'
