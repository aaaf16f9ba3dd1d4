"""Medians over the cases of one or several evaluations, with 95 % bootstrap intervals, as a table for docs/results.md.

python benchmarks/summary.py eval/fold*/cases.csv

A column that a case lacks (no landmarks, no true displacement) is summarised over the cases that have it.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from scipy.stats import bootstrap  # noqa: E402

from benchmarks.measure import table  # noqa: E402

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


class Summary(NamedTuple):
    """Of some cases; `low` and `high` are the 95 % bootstrap interval of the median, NaN where all values are equal."""

    median: float
    low: float
    high: float
    q1: float
    q3: float
    worst: float
    cases: int


def summarise(values: Sequence[float], higher_is_better: bool) -> Summary:
    """The summary of the values that are not NaN; `cases` of them. NaN throughout where there are none."""
    known = np.array([v for v in values if not math.isnan(v)])
    if not len(known):
        return Summary(*[math.nan] * 6, cases=0)
    low = high = math.nan
    if np.ptp(known) > 0:
        found = bootstrap((known,), np.median, axis=0, method="percentile", rng=np.random.default_rng(0))
        low, high = found.confidence_interval
    q1, middle, q3 = np.percentile(known, [25, 50, 75])
    return Summary(middle, low, high, q1, q3, known.min() if higher_is_better else known.max(), len(known))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    rows = []
    for path in map(Path, sys.argv[1:]):
        with path.open(encoding="utf-8") as file:
            rows += csv.DictReader(file)
    lines = []
    for column in COLUMNS:
        values = [float(row[column]) for row in rows if row.get(column) not in (None, "")]
        s = summarise(values, higher_is_better=column.startswith("dsc"))
        if s.cases:
            spread = {"95 % interval": f"{s.low:.3g} to {s.high:.3g}", "quartiles": f"{s.q1:.3g} to {s.q3:.3g}"}
            lines.append({"": column, "median": s.median, **spread, "worst": s.worst, "cases": s.cases})
    print(f"{len(rows)} cases\n\n{table(lines)}")


if __name__ == "__main__":
    main()
