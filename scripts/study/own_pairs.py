"""Both stages learned from one's own pairs, with a held-out estimate: a gland network and a second stage for each fold.

Each network learns from all folds but one and is tested on that one, so that every pair is held out once, from both
stages; the networks of all folds together are what registers new pairs. What is done and where it goes on after an
interruption: `scripts.study.fold`.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml

from scripts.bundle.workflow import absolute, import_monai
from scripts.data.checks import InputError
from scripts.data.datalist import check_output, datalist
from scripts.data.files import written_whole
from scripts.data.gate import check_dataset
from scripts.data.root import CONFIGS
from scripts.study.crossval import TABLES, here
from scripts.study.plan import WEIGHTS, Run, deal, merged, runs_of, write_plan
from scripts.study.tables import collect, landmark_distances

STAGES = {"segmentation": ["segmentation.yaml", "own_pairs.yaml"], "second_stage": ["second_stage.yaml"]}
SCORED = CONFIGS / "second_stage_weights.yaml"
STRENGTHS = [step / 20 for step in range(21)]  # of the field, from which one is chosen
EPOCH = 100  # steps between checkpoints
RESULT = "weights.yaml"


def learn(
    dataset_dir: str,
    output_dir: str,
    fold_count: int = 4,
    data: Mapping[str, Any] | None = None,
    iterations: Mapping[str, int] | None = None,
    cores: int | None = None,
) -> int:
    """Train and test both stages on every fold, print the estimate and write the overlay that registers with them.

    Args:
        data: settings that say how the data set is read, for both stages; see `scripts.__main__.learn`.
        iterations: steps of a stage, by its name, other than its config says.
        cores: to use; None for all.

    Returns:
        How many trainings failed.

    Raises:
        InputError: the data set is refused; folds or settings unlike those of an earlier start.
    """
    import_monai()
    data = {k: v for k, v in (data or {}).items() if v is not None}
    series = {k: data.get(k) for k in ("moving_spacing", "fixed_spacing", "moving_series", "fixed_series")}
    if check_dataset(dataset_dir, data.get("label_values"), True, data.get("patient_pattern"), None, **series):
        raise InputError(f"{dataset_dir}: see above; mend these pairs or take them out")
    output = Path(output_dir).absolute()
    check_output(output_dir, datalist(dataset_dir, "train"), [dataset_dir], [*TABLES, RESULT], case_folders=False)
    output.mkdir(parents=True, exist_ok=True)
    plan = {"fold_seed": 0, "base": {}, "settings": data | {"iterations": dict(iterations or {})}}
    plan["folds"] = deal(dataset_dir, fold_count, 0, data.get("patient_pattern"))
    write_plan(output / "folds.json", plan)
    patients, pairs = (sum(map(count, plan["folds"])) for count in (len, lambda fold: sum(map(len, fold.values()))))
    available = cores or len(os.sched_getaffinity(0))
    at_once = 1 if torch.cuda.is_available() else min(fold_count, available)
    print(f"{pairs} pairs of {patients} patients, {fold_count} folds, {at_once} at a time", flush=True)
    glands: list[Run] = []
    for number, (stage, configs) in enumerate(STAGES.items(), 1):
        settings = dict(data)
        if stage in (iterations or {}):
            settings |= {"iterations": iterations[stage], "epoch_length": min(EPOCH, iterations[stage])}
        if glands:
            settings["segmentation_path"] = str(output / "runs" / "segmentation" / "fold{fold}" / WEIGHTS)
        overlays = {stage: [CONFIGS / name for name in configs]}
        runs = runs_of(overlays, plan | {"settings": settings}, str(absolute(dataset_dir)), output)
        if not glands:
            runs = [run._replace(evaluate=[]) for run in runs]  # the second stage's evaluation says what it is worth
        print(f"\nStage {number} of {len(STAGES)}: {stage}", flush=True)
        todo = [run for run in runs if not run.done]
        failures = here(todo, at_once, available // at_once) if todo else {}
        if failures:
            return len(failures)
        glands = glands or runs
    collect(runs, output)
    print(f"\n{conclude(output, glands, runs)}")
    return 0


def conclude(output: Path, glands: Sequence[Run], fields: Sequence[Run]) -> str:
    """Choose the strength of the field, write OUT/weights.yaml, and say what held-out pairs say of it."""
    cases, landmarks = (list(csv.DictReader((output / f"{name}.csv").open())) for name in ("cases", "landmarks"))
    scored = merged([SCORED])
    strength = best_strength(landmarks, scored["strength"])
    weights = {
        "segmentation_path": [str(Path(run.folder) / WEIGHTS) for run in glands],
        "ckpt_path": [str(Path(run.folder) / WEIGHTS) for run in fields],
        "strength": strength,
    }
    with written_whole(output / RESULT) as file:
        file.write(
            "# Beside configs/inference.json or evaluate.json: both stages' weights, learned from one's own pairs.\n"
        )
        file.write(yaml.safe_dump(scored | weights, sort_keys=False))

    def of_cases(column: str) -> list[float]:
        return [float(row[column]) for row in cases if row[column] not in ("", "nan")]

    lines = [f"{'held out, one network each':<36} initial transform  registered"]
    for name, before, after in (
        ("gland DSC, median", of_cases("dsc_before"), of_cases("dsc")),
        ("TRE with gland, median mm", of_cases("tre_with_gland_before_mm"), of_cases("tre_with_gland_mm")),
        ("landmarks, pooled median mm", *(_known(landmarks, c) for c in ("distance_before_mm", "distance_mm"))),
    ):
        digits = 3 if "DSC" in name else 2
        lines.append(
            f"{name:<36} {median(before):>17.{digits}f} {median(after):>11.{digits}f}" if before and after else name
        )
    lines += [
        f"Scored at strength {scored['strength']:g}; the strength with the least mean TRE, now set, is {strength:g}.",
        f"Register with all {len(fields)} networks of each stage:",
        "  python -m scripts register --moving mr.nii.gz --fixed trus.nii.gz --output_dir out \\",
        f"    --overlay {output / RESULT}",
        "Research use only. Not for clinical decisions.",
    ]
    return "\n".join(lines)


def _known(landmarks: Sequence[Mapping[str, str]], column: str) -> list[float]:
    found = landmark_distances([dict(row) | {"distance_mm": row[column]} for row in landmarks])
    return [d for d in found if not math.isnan(d)]


def best_strength(landmarks: Sequence[Mapping[str, str]], used: float) -> float:
    """The share of a field with the least mean TRE, the gland's centroid with the landmarks.

    Args:
        landmarks: rows of landmarks.csv.
        used: the strength at which they were scored.
    """

    def mean_tre(strength: float) -> float:
        squares: dict[str, list[float]] = {}
        for row in landmarks:
            off, moved, towards = (float(row[name] or "nan") for name in ("off_mm", "moved_mm", "towards_mm"))
            share = strength / used
            left = off**2 - 2 * share * moved * towards + (share * moved) ** 2
            if not math.isnan(left):
                squares.setdefault(row["case"], []).append(max(0, left))
        return fmean(math.sqrt(fmean(own)) for own in squares.values())

    return min(STRENGTHS, key=mean_tre)
