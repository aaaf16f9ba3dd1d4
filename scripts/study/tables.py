"""The tables of a cross-validation: its cases, landmarks and patients, and the tests between its variants."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data.files import write_csv
from scripts.registration.metrics import target_registration_error
from scripts.study.plan import Run
from scripts.study.statistics import METRICS, compare, describe, read_cases

MORE = ("tre_with_gland_mm", "hd95_mm", "true_error_mm")  # of the cases' columns, where they are there


def collect(runs: Sequence[Run], output: Path) -> str:
    """Write OUT/cases.csv, landmarks.csv, patients.csv, statistics.csv of the variants all of whose folds are done.

    Every variant is compared with the first.

    Returns:
        The statistics as a table to read.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    tables: dict[str, list[dict]] = {"cases": [], "landmarks": [], "patients": [], "statistics": []}
    results: dict[str, dict] = {}
    for variant in variants:
        own = [run for run in runs if run.variant == variant]
        if not all(run.done for run in own):
            continue
        results[variant] = {}
        for run in own:
            found, name = Path(run.folder) / "evaluation", {"variant": variant, "fold": run.fold}
            cases = read_cases(found / "cases.csv")
            results[variant] |= cases
            tables["cases"] += [name | case for case in cases.values()]
            with (found / "landmarks.csv").open(newline="", encoding="utf-8") as file:
                tables["landmarks"] += [name | landmark for landmark in csv.DictReader(file)]
        tables["patients"] += patients(variant, [row for row in tables["landmarks"] if row["variant"] == variant])
    lines = []
    for variant, cases in results.items():
        for metric in [m for m in (*METRICS, *MORE) if m in next(iter(cases.values()))]:
            line = {"variant": variant} | describe(cases, metric)
            if variant != variants[0] and variants[0] in results:
                line |= {"against": variants[0]} | compare(cases, results[variants[0]], metric)
            tables["statistics"].append(line)
            lines.append(sentence(line))
    for name, rows in tables.items():
        write_csv(output / f"{name}.csv", rows)
    return "\n".join(lines)


def by_patient(labels: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Rows of landmarks.csv of each patient."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in labels:
        found.setdefault(row["patient"], []).append(row)
    return found


def landmark_distances(labels: Sequence[Mapping[str, str]]) -> list[float]:
    """Distances in mm of rows of landmarks.csv, NaN where there is none; the gland, label 0, is left out."""
    return [float(row["distance_mm"] or "nan") for row in labels if int(row["label"]) > 0]


def patients(variant: str, landmarks: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A row for each patient: TRE over the landmarks of all of the patient's cases, the gland left out (§3.3)."""
    rows = []
    for patient, own in by_patient(landmarks).items():
        found = landmark_distances(own)
        known = {"variant": variant, "patient": patient, "cases": len({row["case"] for row in own})}
        known |= {"landmarks": sum(not math.isnan(d) for d in found), "tre_mm": target_registration_error(found)}
        rows.append(known | {"empty_warped": sum(row["empty_warped"] == "True" for row in own)})
    return rows


def sentence(line: Mapping[str, Any]) -> str:
    """A row of statistics.csv as a line to read."""
    text = f"{line['variant']:<16} {line['metric']:<6} median {line['median']:.3g} [{line['q1']:.3g}, {line['q3']:.3g}]"
    text += f" of {line['cases']} cases" + (f", {line['empty_warped']} labels warped away" * (line["empty_warped"] > 0))
    if "against" in line:
        text += f"; {line['difference']:+.3g} [{line['low']:.3g}, {line['high']:.3g}] from {line['against']}"
        text += f", p = {line['p']:.3g}, {line['pairs']} pairs"
        text += f", left out: {line['left_out']}" if line["left_out"] else ""
    return text
