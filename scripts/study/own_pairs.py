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
from scripts.registration.metrics import target_registration_error
from scripts.study.crossval import TABLES, here
from scripts.study.plan import WEIGHTS, Run, deal, merged, runs_of, write_plan
from scripts.study.tables import collect, landmark_distances

STAGES = {"segmentation": ["segmentation.yaml", "own_pairs.yaml"], "second_stage": ["second_stage.yaml"]}
SCORED = CONFIGS / "second_stage_weights.yaml"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the field, from which the one with the least mean TRE is chosen
EPOCH = 100  # steps between checkpoints
RESULT = "weights.yaml"


def learn(
    dataset_dir: str,
    output_dir: str,
    fold_count: int = 4,
    data: Mapping[str, Any] | None = None,
    iterations: Mapping[str, int] | None = None,
    cores: int | None = None,
    cohort_device: str | None = None,
) -> int:
    """Train and test both stages on every fold, print the estimate and write the overlay that registers with them.

    Args:
        data: settings that say how the data set is read, for both stages; see `scripts.__main__.learn`.
        iterations: steps of a stage, by its name, other than its config says.
        cores: to use; None for all.
        cohort_device: where the trainings keep the pairs, see configs/train.json; networks are the same.

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
        settings = data | ({"cohort_device": cohort_device} if cohort_device else {})
        if stage in (iterations or {}):
            settings |= {"iterations": iterations[stage], "epoch_length": min(EPOCH, iterations[stage])}
        if glands:
            settings["segmentation_path"] = str(output / "runs" / "segmentation" / "fold{fold}" / WEIGHTS)
        overlays = {stage: [CONFIGS / name for name in configs]}
        runs = runs_of(overlays, plan | {"settings": settings}, str(absolute(dataset_dir)), output)
        # the second stage's evaluation says what both are worth, at all strengths of the field
        scored = [f"--strength={max(STRENGTHS)}", f"--strengths={list(STRENGTHS)}"]
        runs = [run._replace(evaluate=[*run.evaluate, *scored] if glands else []) for run in runs]
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
    rows = []
    for run in fields:
        with (Path(run.folder) / "evaluation" / "strengths.csv").open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    by_strength = {s: [row for row in rows if float(row["strength"]) == s] for s in STRENGTHS}
    strength = min(STRENGTHS, key=lambda s: fmean(errors(by_strength[s])))
    weights = {
        "segmentation_path": [str(Path(run.folder) / WEIGHTS) for run in glands],
        "ckpt_path": [str(Path(run.folder) / WEIGHTS) for run in fields],
        "strength": strength,
    }
    with written_whole(output / RESULT) as file:
        file.write("# Beside configs/inference.json or evaluate.json: both stages, learned from one's own pairs.\n")
        file.write(yaml.safe_dump(merged([SCORED]) | weights, sort_keys=False))
    lines = [f"{'held out, one network each':<32}{'DSC, median':>13}{'TRE, mean mm':>15}{'landmarks, median mm':>23}"]
    names = dict.fromkeys([0.0, strength, 1.0], "") | {1.0: "the whole field"}
    names |= {strength: f"registered, strength {strength:g}"} | {0.0: "initial transform alone"}
    for share, name in names.items():
        scored = by_strength[share]
        dsc = median(float(row["dsc"]) for row in scored if row["label"] == "0")
        distances = [d for d in landmark_distances(scored) if not math.isnan(d)]
        landmarks = f"{median(distances):.2f}" if distances else "none"
        lines.append(f"{name:<32}{dsc:>13.3f}{fmean(errors(scored)):>15.2f}{landmarks:>23}")
    if not strength:
        lines.append("The second stage gains nothing on held-out pairs, and is off in weights.yaml (strength 0).")
    lines += [
        f"Register with all {len(fields)} networks of each stage:",
        "  python -m scripts register --moving mr.nii.gz --fixed trus.nii.gz --output_dir out \\",
        f"    --overlay {output / RESULT}",
        "Research use only. Not for clinical decisions.",
    ]
    return "\n".join(lines)


def errors(rows: Sequence[Mapping[str, str]]) -> list[float]:
    """TRE of each case in mm, the gland's centroid with the landmarks; rows as those of landmarks.csv."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(float(row["distance_mm"] or "nan"))
    found = [target_registration_error(distances) for distances in cases.values()]
    return [tre for tre in found if not math.isnan(tre)]
