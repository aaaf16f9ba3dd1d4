"""Does a variant differ from the baseline? Wilcoxon signed-rank test, Hodges-Lehmann interval (Hu et al. 2018, §4.2).

Two results, each the rows of a `cases.csv`, are paired by case. What is compared is TRE in mm and gland DSC.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import wilcoxon

from scripts.data.checks import InputError

LEVEL = 0.05  # of the test; the interval's is 1 - LEVEL
METRICS = ("tre_mm", "dsc")


class SignedRank(NamedTuple):
    """A paired comparison: `p` of no difference, and the location of the differences with its interval (low, high)."""

    p: float
    difference: float
    low: float
    high: float


def walsh_averages(differences: np.ndarray) -> np.ndarray:
    """The n(n+1)/2 averages of two differences, each with itself too, in ascending order: (n,) -> (n(n+1)/2,)."""
    i, j = np.triu_indices(len(differences))
    return np.sort((differences[i] + differences[j]) / 2)


def signed_rank_distribution(n: int) -> np.ndarray:
    """P(V = v) for v = 0 … n(n+1)/2, V the sum of the ranks 1 … n that a fair coin picked: shape (n(n+1)/2 + 1,)."""
    chance = np.zeros(n * (n + 1) // 2 + 1)
    chance[0] = 1
    for rank in range(1, n + 1):
        picked = np.zeros_like(chance)
        picked[rank:] = chance[:-rank]
        chance = (chance + picked) / 2
    return chance


def signed_rank(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> SignedRank:
    """Two-sided Wilcoxon signed-rank test of a - b, and the Hodges-Lehmann estimate with its interval.

    The estimate is the median of the Walsh averages; the interval lies between the k-th smallest and the k-th largest,
    k the largest with P(V < k) ≤ level / 2. That is exact for any n, and errs on the safe side where differences are
    tied. Differences of 0 leave the test (Wilcoxon's own treatment), not the estimate. The p value is exact up to
    50 pairs (13 with ties or zeros), beyond that normal with continuity correction.

    Args:
        a, b: paired values, one or more, none NaN.
        level: of the interval's misses; below 6 pairs 0.05 cannot be reached and the interval is infinite.
    """
    differences = np.asarray(a, float) - np.asarray(b, float)
    averages = walsh_averages(differences)
    k = int(np.searchsorted(np.cumsum(signed_rank_distribution(len(differences))), level / 2, side="right"))
    low, high = (averages[k - 1], averages[-k]) if k else (-np.inf, np.inf)
    p = wilcoxon(differences, correction=True).pvalue if differences.any() else 1.0
    return SignedRank(float(p), float(np.median(averages)), float(low), float(high))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile of the values that are not NaN; NaN where there are none."""
    known = [v for v in values if not np.isnan(v)]
    return tuple(map(float, np.percentile(known, [50, 25, 75]))) if known else (np.nan,) * 3


def read_cases(path: str | Path) -> dict[str, dict[str, str]]:
    """The rows of a `cases.csv` by case.

    Raises:
        InputError: no such file, no cases, a case twice, a column missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found; an evaluation writes it")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [c for c in ("case", *METRICS, "empty_warped") if not rows or c not in rows[0]]
    if missing:
        raise InputError(f"{path}: {'no cases' if not rows else f'no column {missing[0]}'}; expected a cases.csv")
    by_case = {row["case"]: row for row in rows}
    if len(by_case) < len(rows):
        raise InputError(f"{path}: a case is in more than one row; compare one result at a time")
    return by_case


def describe(cases: Mapping[str, Mapping[str, str]], metric: str) -> dict:
    """How one result did: the cases that have a value, its median and quartiles, how many labels were warped away."""
    values = [float(row[metric] or "nan") for row in cases.values()]
    median, first, third = quartiles(values)
    return {
        "metric": metric,
        "cases": sum(not np.isnan(v) for v in values),
        "median": median,
        "q1": first,
        "q3": third,
        "empty_warped": sum(int(float(row["empty_warped"])) for row in cases.values()),
    }


def compare(variant: Mapping[str, Mapping[str, str]], baseline: Mapping[str, Mapping[str, str]], metric: str) -> dict:
    """The test of variant - baseline, paired by case, as a row.

    A case without a value in either result, such as a TRE where every landmark was warped away or none was labelled,
    is left out of the test as a pair, in both; `left_out` names these cases.

    Args:
        variant, baseline: see `read_cases`.
        metric: column, one of `METRICS`.

    Raises:
        InputError: the two have not the same cases.
    """
    alone = sorted(set(variant) ^ set(baseline))
    if alone:
        raise InputError(f"case {alone[0]} is in one of two results only; {len(alone)} such cases: nothing to pair")
    pairs = {case: [float(r[case][metric] or "nan") for r in (variant, baseline)] for case in sorted(variant)}
    left_out = [case for case, pair in pairs.items() if np.isnan(pair).any()]
    kept = [pair for case, pair in pairs.items() if case not in left_out]
    found = signed_rank(*zip(*kept, strict=True)) if kept else SignedRank(*[np.nan] * 4)
    return {
        "pairs": len(kept),
        **found._asdict(),
        "significant": found.p < LEVEL,
        "pairs_left_out": len(left_out),
        "left_out": " ".join(left_out),
    }
