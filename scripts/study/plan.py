"""What a cross-validation is to do: overlays of its variants, folds by patient, and the commands of every run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.data.checks import InputError
from scripts.data.datalist import datalist, folds
from scripts.data.files import written_whole
from scripts.data.root import CONFIGS, ROOT

WEIGHTS, LOG, DONE = "model.pt", "log.txt", "done.json"


class Run(NamedTuple):
    """One variant on one fold: its folder, the arguments of its two processes, and the cases that are held out."""

    variant: str
    fold: int
    folder: str
    train: list[str]  # empty where nothing is learned
    evaluate: list[str]
    cases: list[str]

    @property
    def key(self) -> tuple[str, int]:
        return self.variant, self.fold

    @property
    def log(self) -> Path:
        return Path(self.folder) / LOG

    @property
    def done(self) -> bool:
        return (Path(self.folder) / DONE).exists()


def parts_of(variant: str) -> list[str]:
    """What + joins in a variant; one in the path of a file that is there joins nothing."""
    parts, found = variant.split("+"), []
    while parts:
        files = (n for n in range(len(parts), 1, -1) if Path("+".join(parts[:n])).is_file())
        count = next(files, 1)
        found.append("+".join(parts[:count]))
        parts = parts[count:]
    return found


def overlays_of(variant: str) -> list[Path]:
    """The overlays of a variant, in order: those of each of its parts, which + joins.

    A part is "baseline", which has none; NAME of configs/variant_NAME.yaml or of configs/NAME.yaml; or a file.
    """
    found = []
    for part in parts_of(variant):
        if part == "baseline":
            continue
        named = [CONFIGS / f"variant_{part}.yaml", CONFIGS / f"{part}.yaml"]
        places = [Path(part).absolute()] if part.endswith((".yaml", ".json")) else named
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            known = ", ".join(sorted(p.stem.removeprefix("variant_") for p in CONFIGS.glob("variant_*.yaml")))
            raise InputError(f"{part}: no such variant; known are baseline, {known}, and any overlay file")
        found.append(path)
    return found


def name_of(variant: str) -> str:
    """What a variant's folder and rows are called: its parts, of files the name, joined by +."""
    return "+".join(Path(part).stem.removeprefix("variant_") for part in parts_of(variant))


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """The settings of several overlays, later ones first."""
    settings = {}
    for file in files:
        settings |= yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return settings


def deal(dataset_dir: str, fold_count: int, fold_seed: int, pattern: str | None) -> list[dict[str, list[str]]]:
    """The held-out patients of each fold, each with the names of its cases."""
    split = {"fold": 0, "fold_count": fold_count, "fold_seed": fold_seed, "patient_pattern": pattern}
    pairs = datalist(dataset_dir, "train", **split) + datalist(dataset_dir, "test", **split)
    cases: dict[str, list[str]] = {}
    for pair in pairs:
        cases.setdefault(pair["patient"], []).append(pair["case"])
    return [{patient: sorted(cases[patient]) for patient in fold} for fold in folds(list(cases), fold_count, fold_seed)]


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write the folds and settings before anything starts; refuse a restart for which they are others."""
    if not path.exists():
        with written_whole(path) as file:
            file.write(json.dumps(plan, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    patients = [{p for fold in there["folds"] for p in fold} for there in (before, plan)]
    changed = sorted(patients[0] ^ patients[1])
    if changed:
        raise InputError(
            f"{path}: made of other patients than the data set has now ({len(changed)} differ, for example"
            f" {changed[0]}); restore them or choose another --output_dir"
        )
    for name in plan:
        if before.get(name) != json.loads(json.dumps(plan[name])):
            raise InputError(f"{path}: made with other {name} than now; repeat them or choose another --output_dir")


def bundle_run(files: Iterable[Path], settings: Mapping[str, Any]) -> list[str]:
    """Arguments of `python` for a plain run; values are written as Python reads them, so none changes its type."""
    names = [str(file) for file in files]
    return ["-m", "monai.bundle", "run", "--config_file", str(names), *(f"--{k}={v!r}" for k, v in settings.items())]


def in_fold(value: Any, fold: int) -> Any:
    """A setting with the fold's number for {fold} in a text, or in each of several."""
    if isinstance(value, list | tuple):
        return [in_fold(one, fold) for one in value]
    return value.replace("{fold}", str(fold)) if isinstance(value, str) else value


def scored_by(overlay: Path) -> Path:
    """The overlay that takes the place of this one where weights are scored; itself where none is named."""
    named = merged([overlay]).get("evaluated_by")
    return CONFIGS / named if named else overlay


def runs_of(variants: Mapping[str, list[Path]], plan: dict[str, Any], dataset: str, output: Path) -> list[Run]:
    """Every variant on every fold.

    Two keys of an overlay are read here alone: `iterations: 0` says that nothing is learned, and `evaluated_by` names
    the overlay of evaluate.json, in configs/, that takes its place where the weights are scored. The evaluation gets
    those settings that evaluate.json has too.
    """
    shared = set(json.loads((CONFIGS / "evaluate.json").read_text(encoding="utf-8")))
    runs = []
    for variant, overlays in variants.items():
        declared = merged(overlays)
        scored_with = [scored_by(overlay) for overlay in overlays]
        if scored_with == overlays:
            scored_with = [CONFIGS / "baseline.yaml", *overlays]
        for fold, patients in enumerate(plan["folds"]):
            folder = output / "runs" / variant / f"fold{fold}"
            place = {"dataset_dir": dataset, "fold": fold, "fold_count": len(plan["folds"])}
            place["fold_seed"] = plan["fold_seed"]
            given = {k: in_fold(v, fold) for k, v in plan["settings"].items()}
            training = place | {"output_dir": str(folder), "ckpt_dir": str(folder), "weights_name": WEIGHTS}
            training |= {"cohort_dir": str(output / "cohort")} | given  # folds share what they keep of a pair
            scoring = place | {"output_dir": str(folder / "evaluation"), "ckpt_path": str(folder / WEIGHTS)}
            scoring |= {k: v for k, v in given.items() if k.split("#")[0] in shared}
            learns = declared.get("iterations") != 0
            train = bundle_run([CONFIGS / "train.json", *overlays], training) if learns else []
            evaluate = bundle_run([CONFIGS / "evaluate.json", *scored_with], scoring)
            runs.append(Run(variant, fold, str(folder), train, evaluate, sorted(sum(patients.values(), []))))
    return runs


def commit() -> str:
    """The commit this bundle is at, with a + where files differ from it; empty where there is no repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if not done.returncode else ""

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:  # no git
        return ""
