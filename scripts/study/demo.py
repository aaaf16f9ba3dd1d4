"""The demonstration: phantoms registered, with the weights of this bundle or after a short training of its own."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import median

from scripts.bundle.workflow import register, run_config
from scripts.data.checks import InputError
from scripts.data.kept import refuse_overlap
from scripts.data.root import ROOT
from scripts.study.evaluation import WORDS

MARKER = ".demonstration"  # only a folder that holds it is ever replaced
COLUMNS = ("case", "gland DSC", "TRE in mm", "true error in mm", "folded voxels in %", "seconds")
KINDS = (("", "image"), ("_labels", "label"))  # arguments of `register` and keys of a pair
PHANTOMS, SEED = 6, 2026  # patients that no training draws


def new_folder(folder: Path) -> None:
    """Make an empty folder for a demonstration, in place of an earlier one.

    Raises:
        InputError: `folder` holds something that is not an earlier demonstration.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise InputError(f"{folder}: is not empty and not an earlier demonstration; choose another --output_dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("Made by `python -m scripts demo`, which may replace this folder.\n")


def register_phantoms(folder: Path, pairs: str | None) -> None:
    """Register phantoms, and the first of real pairs where they are given, with the weights of this bundle."""
    from scripts.data.datalist import KEYS, datalist
    from scripts.phantoms.phantom import write_cohort

    found = [] if pairs is None else datalist(pairs, "test")
    if pairs is not None and not found:
        raise InputError(f"{pairs}: no pairs to test")
    refuse_overlap([pair[key] for pair in found for key in KEYS if key in pair], [folder])
    new_folder(folder)
    write_cohort(folder / "cohort", patients=PHANTOMS, seed=SEED, split=(0, 0, 1))
    show(folder, None, dataset_dir=str(folder / "cohort"))
    if pairs is not None:
        pair = found[0]
        files = {f"{side}{kind}": pair[f"{side}_{key}"] for side in ("moving", "fixed") for kind, key in KINDS}
        register(output_dir=str(folder / "real"), **files)
        record = json.loads((folder / "real" / "qc.json").read_text(encoding="utf-8"))
        score = (
            f"gland DSC {record['gland_dsc_before']:.2f} by the initial transform, {record['gland_dsc']:.2f} registered"
        )
        print(f"\nReal pair {pair['case']}: {score}; look at {folder / 'real' / 'overview.png'}.")
        print("If the weights were trained on it (docs/README.md says on which), this says nothing about new pairs.")


def train_on_phantoms(folder: Path, iterations: int | None) -> None:
    """Train the learned initial transform on phantoms, from nothing, then register held-out ones by it."""
    from scripts.phantoms.phantom import write_cohort

    new_folder(folder)
    configs = ROOT / "configs"
    cohort, train = folder / "cohort", folder / "train"
    write_cohort(cohort, patients=40, seed=0, split=(0.8, 0.05, 0.15))
    settings = {} if iterations is None else {"iterations": iterations, "epoch_length": min(50, iterations)}
    overlays = (configs / "segmentation.yaml", configs / "demo.yaml")
    run_config("train.json", *overlays, dataset_dir=str(cohort), output_dir=str(train), **settings)
    draw_training(train, folder / "loss.png")
    show(
        folder,
        configs / "initial_transform_only.yaml",
        dataset_dir=str(cohort),
        segmentation_path=str(train / "segmentation.pt"),
    )
    print(f"The course of the training: {folder / 'loss.png'}")


def show(folder: Path, overlay: Path | None, dataset_dir: str, **settings) -> None:
    """Evaluate and register the test pairs of a cohort; write and print the table, keep the middle case's picture."""
    registered = folder / "registered"
    settings |= {"dataset_dir": dataset_dir, "output_dir": str(registered)}
    run_config("evaluate.json", overlay, **settings)
    run_config("inference.json", overlay, **settings)
    centre = {
        "initial_transform": "centre",
        "spacing": "none",
        "output_dir": str(folder / "centre"),
        "dataset_dir": dataset_dir,
    }
    run_config("evaluate.json", ROOT / "configs" / "initial_transform_only.yaml", **centre)
    before = {row["case"]: row for row in read_cases(folder / "centre")}
    rows = [row | {k: v for k, v in before[row["case"]].items() if "_before" in k} for row in read_cases(registered)]
    middle = sorted(rows, key=lambda row: row["true_error_mm"])[len(rows) // 2]
    shutil.copy(registered / middle["case"] / "overview.png", folder / "overview.png")
    table = format_table(rows)
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\nHeld-out phantoms, volume centres aligned → registered\n\n{table}\n")
    print(f"Look at {folder / 'overview.png'} (the case of median true error); warped images and fields are in")
    print(f"{registered}. Research use only.")


def read_cases(folder: Path) -> list[dict]:
    """The cases.csv of an evaluation, numbers as numbers."""
    with (folder / "cases.csv").open(encoding="utf-8") as file:
        return [{k: v if k in WORDS else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def format_table(rows: list[dict]) -> str:
    """Cases as lines, the median last, columns aligned."""

    def line(name: str, row: dict) -> tuple[str, ...]:
        return (
            name,
            f"{row['dsc_before']:.2f} → {row['dsc']:.2f}",
            f"{row['tre_before_mm']:.1f} → {row['tre_mm']:.1f}",
            f"{row['true_error_before_mm']:.1f} → {row['true_error_mm']:.1f}",
            f"{row['folded_percent']:.2f}",
            f"{row['seconds']:.2f}",
        )

    middle = {k: median(row[k] for row in rows) for k in rows[0] if k not in WORDS}
    lines = [COLUMNS, *(line(row["case"], row) for row in rows), line("median", middle)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)


def draw_training(run: Path, path: Path) -> None:
    """Draw the loss curve of a run from its TensorBoard events, with the validation medians where there are any."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from scripts.registration.figures import loss_curve

    series: dict[str, list] = {}
    for events in sorted(run.glob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        for tag in accumulator.Tags()["scalars"]:
            series.setdefault(tag, []).extend(accumulator.Scalars(tag))
    losses = next(points for tag, points in series.items() if tag.startswith("train_loss"))
    per_epoch = max(p.step for p in losses) / max([p.step for p in series.get("dsc", [])] or [1])
    validation = {
        title: ([p.step * per_epoch for p in series[tag]], [p.value for p in series[tag]])
        for tag, title in (("dsc", "gland DSC, median"), ("tre_mm", "TRE in mm, median"))
        if tag in series
    }
    loss_curve(path, [p.step for p in losses], [p.value for p in losses], validation or None)
