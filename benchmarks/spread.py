"""What the spread of an ensemble's fields says of the true errors: a plot, and their rank correlation.

    python benchmarks/spread.py --out docs/spread.png "three networks=eval/cases.csv" "one=other/cases.csv"

cases.csv is of `configs/evaluate.json`, over pairs that the networks have not seen; one panel each.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from scripts.study.statistics import read_cases  # noqa: E402

SPREAD, ERROR = "spread_mm", "tre_with_gland_mm"


def read(path: str) -> np.ndarray:
    """Spread and TRE with the gland of each case, mm, (cases, 2); those that lack either are left out."""
    rows = [[float(row.get(name) or "nan") for name in (SPREAD, ERROR)] for row in read_cases(path).values()]
    return np.array([row for row in rows if not any(map(math.isnan, row))])


def ranked(found: np.ndarray, draws: int = 2000) -> tuple[float, float, float, float]:
    """Spearman's correlation, its 95 % bootstrap interval over the cases, and p."""
    said = spearmanr(*found.T)
    rng = np.random.default_rng(0)
    again = [spearmanr(*found[rng.integers(len(found), size=len(found))].T).statistic for _ in range(draws)]
    return said.statistic, *np.nanpercentile(again, (2.5, 97.5)), said.pvalue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help='"name=cases.csv"')
    parser.add_argument("--out", required=True, help="the picture, .png")
    arguments = parser.parse_args()
    figure, panels = plt.subplots(1, len(arguments.cases), figsize=(4.4 * len(arguments.cases), 4), squeeze=False)
    for panel, (name, path) in zip(panels[0], (text.split("=", 1) for text in arguments.cases), strict=True):
        found = read(path)
        rho, low, high, p = ranked(found)
        print(f"{name}: Spearman {rho:.2f} [{low:.2f}, {high:.2f}], p = {p:.2g}, {len(found)} pairs")
        panel.scatter(*found.T, s=22, color="#1f6f8b", alpha=0.75, linewidths=0)
        panel.set(title=f"{name}\nSpearman {rho:.2f} [{low:.2f}, {high:.2f}]", xlabel="spread of the fields, mm")
        panel.set(ylabel="TRE with the gland, mm", xlim=(0, None), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
