"""Medians over the cases of one or several evaluations, with 95 % bootstrap intervals, as a table for docs/results.md.

python benchmarks/summary.py eval/fold*/cases.csv

A column that a case lacks (no landmarks, no true displacement) is summarised over the cases that have it.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

COLUMNS = (
    "dsc_before",
    "dsc",
    "tre_before_mm",
    "tre_mm",
    "tre_with_gland_before_mm",
    "tre_with_gland_mm",
    "true_error_before_mm",
    "true_error_mm",
    "folded_percent",
    "folded_gland_percent",
    "empty_warped",
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    rows = []
    for path in map(Path, sys.argv[1:]):
        with path.open(encoding="utf-8") as file:
            rows += csv.DictReader(file)
    print(f"{len(rows)} cases\n\n| | median | 95 % interval | quartiles | worst | cases |")
    print("| --- | --- | --- | --- | --- | --- |")
    for column in COLUMNS:
        values = np.array([float(row[column]) for row in rows if row.get(column) not in (None, "")])
        values = values[~np.isnan(values)]
        if not len(values):
            continue
        low = high = math.nan
        if np.ptp(values) > 0:
            found = bootstrap((values,), np.median, axis=0, method="percentile", rng=np.random.default_rng(0))
            low, high = found.confidence_interval
        q1, middle, q3 = np.percentile(values, [25, 50, 75])
        worst = values.min() if column.startswith("dsc") else values.max()
        numbers = f"{middle:.3g} | {low:.3g} to {high:.3g} | {q1:.3g} to {q3:.3g} | {worst:.3g}"
        print(f"| {column} | {numbers} | {len(values)} |")


if __name__ == "__main__":
    main()
