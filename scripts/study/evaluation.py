"""The table of one evaluation: a row for each case and for each of its labels (Hu et al. 2018, §3.3)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ignite.engine import Engine, Events

from scripts.data.datalist import TRUTH
from scripts.data.files import write_csv
from scripts.registration import qc
from scripts.registration.metrics import (
    forward_distances,
    hausdorff95,
    jacobian_statistics,
    score_case,
    true_error,
    warped_away,
)
from scripts.registration.transforms import to_original_grid

WORDS = ("case", "patient", "flags")  # columns of cases.csv that hold no number


def _before(scores: dict[str, float]) -> dict[str, float]:
    """Scores under the names they have before registration: dsc_before, tre_before_mm, …"""
    return {f"{k.removesuffix('_mm')}_before{'_mm' if k.endswith('_mm') else ''}": v for k, v in scores.items()}


class EvaluationTable:
    """Ignite handler that scores each registered case, before (initial transform only) and after, on the original grid.

    Channel 0 is the gland, the others are landmarks. Medians over the cases go to `engine.state.metrics`: those of
    `score_case` and `hd95_mm` (see `hausdorff95`), each also with `_before`, and of `jacobian_statistics`; `seconds`
    (network, field and warp); for phantoms `true_error_before_mm`, `true_error_mm` (see `true_error`); and the number
    `empty_warped`. Cases go to `rows`, with the words of `scripts.registration.qc.flags`.

    Args:
        output_dir: where to write `cases.csv` and `landmarks.csv`; None writes nothing.
        limits: of the flags; None leaves them out.
        strengths: shares of the field that is predicted (at its `strength`) whose scores are written too, to
            `strengths.csv`, a row for each and each label.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        limits: Mapping[str, Any] | None = None,
        strengths: Sequence[float] = (),
    ) -> None:
        self.output_dir, self.limits, self.strengths = output_dir, limits, strengths
        self.rows: list[dict] = []
        self.landmark_rows: list[dict] = []
        self.strength_rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._summarise)

    def _reset(self) -> None:
        self.rows, self.landmark_rows, self.strength_rows = [], [], []

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _add(self, engine: Engine) -> None:
        seconds = (time.perf_counter() - self._started) / len(engine.state.output)
        items = zip(engine.state.batch, engine.state.output, qc.doubts(engine), strict=True)
        for batch, output, doubts in items:
            item = {**batch, **output}
            fixed = item["original_fixed_label"]
            spacing = fixed.affine[:3, :3].norm(dim=0)
            initial_only = to_original_grid(item, torch.zeros_like(output["pred"]))
            case_before, labels_before = score_case(initial_only["moving_label"], fixed.as_tensor(), spacing)
            case_after, labels_after = score_case(item["warped_moving_label"], fixed.as_tensor(), spacing)
            gland = fixed.as_tensor()[0]
            case_before["hd95_mm"] = hausdorff95(initial_only["moving_label"][0], gland, spacing)
            case_after["hd95_mm"] = hausdorff95(item["warped_moving_label"][0], gland, spacing)
            if TRUTH in item:
                truth = item[TRUTH].as_tensor()
                case_before["true_error_mm"] = true_error(initial_only["displacement"], truth, gland)
                case_after["true_error_mm"] = true_error(item["displacement"], truth, gland)
            name = {"case": item["case"], "patient": item["patient"]}
            empty = [warped_away(label) for label in labels_after]
            forward = (
                forward_distances(one["displacement"], fixed, item["original_moving_label"])
                for one in (initial_only, item)
            )
            for m, (first, end, *ways) in enumerate(zip(labels_before, labels_after, *forward, strict=True)):
                others = dict(zip(("forward_before_mm", "forward_mm"), ways, strict=True))
                row = name | {"label": m} | _before(first) | end | {"empty_warped": empty[m]} | others
                self.landmark_rows.append(row)
            for strength in self.strengths:
                warped = to_original_grid(item, strength * output["pred"])["moving_label"]
                for m, scores in enumerate(score_case(warped, fixed.as_tensor(), spacing)[1]):
                    self.strength_rows.append(name | {"strength": strength, "label": m} | scores)
            checked = {}
            if self.limits is not None:
                record = qc.quality(item, initial_only, qc.deformation(item), doubts)
                checked |= {"spread_mm": record["spread_mm"]} if record["spread_mm"] is not None else {}
                checked["flags"] = "; ".join(qc.flags(record, self.limits))
            self.rows.append(
                name
                | _before(case_before)
                | case_after
                | jacobian_statistics(item["displacement"], fixed.affine, gland)
                | {"empty_warped": sum(empty), "seconds": seconds}
                | checked
            )

    def _summarise(self, engine: Engine) -> None:
        for name in [k for k in self.rows[0] if k not in WORDS] if self.rows else []:
            values = [row[name] for row in self.rows if not math.isnan(row[name])]
            if values:
                engine.state.metrics[name] = sum(values) if name == "empty_warped" else median(values)
        if self.output_dir is not None:
            written = {"cases.csv": self.rows, "landmarks.csv": self.landmark_rows}
            written |= {"strengths.csv": self.strength_rows} if self.strengths else {}
            for name, rows in written.items():
                write_csv(Path(self.output_dir) / name, rows)
