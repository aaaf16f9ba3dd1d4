"""The demonstration: phantoms, a short training, held-out pairs registered, a table and pictures."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from statistics import median

from scripts.__main__ import ROOT, run_config
from scripts.checks import InputError

MARKER = ".demonstration"  # only a folder that holds it is ever replaced
COLUMNS = ("case", "gland DSC", "TRE in mm", "folded voxels in %", "seconds")


def run_demo(folder: Path, iterations: int | None) -> None:
    """Run the demonstration in `folder`; see the `demo` verb.

    Raises:
        InputError: `folder` holds something that is not an earlier demonstration.
    """
    from scripts.phantom import write_cohort

    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise InputError(f"{folder}: is not empty and not an earlier demonstration; choose another --output_dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("Made by `python -m scripts demo`, which may replace this folder.\n")
    overlay = ROOT / "configs" / "demo.yaml"
    cohort, train, registered = folder / "cohort", folder / "train", folder / "registered"
    write_cohort(cohort, patients=40, seed=0, split=(0.8, 0.05, 0.15))
    settings = {} if iterations is None else {"iterations": iterations, "epoch_length": min(100, iterations)}
    shared = {"dataset_dir": str(cohort)}
    run_config("train.json", overlay, **shared, output_dir=str(train), ckpt_dir=str(train), **settings)
    draw_training(train, folder / "loss.png")
    shared |= {"ckpt_path": str(train / "model.pt")}
    run_config("evaluate.json", overlay, **shared, output_dir=str(registered))
    run_config("inference.json", overlay, **shared, output_dir=str(registered))
    with (registered / "cases.csv").open(encoding="utf-8") as file:
        rows = [
            {k: v if k in ("case", "patient") else float(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]
    middle = sorted(rows, key=lambda row: row["tre_mm"])[len(rows) // 2]
    shutil.copy(registered / middle["case"] / "overview.png", folder / "overview.png")
    table = format_table(rows)
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\nHeld-out phantoms, before (volume centres aligned) → after\n\n{table}\n")
    print(f"Look at {folder / 'overview.png'} (the case of median TRE) and {folder / 'loss.png'};")
    print(f"warped images and fields are in {registered}. Research use only.")


def format_table(rows: list[dict]) -> str:
    """Cases as lines, the median last, columns aligned."""

    def line(name: str, row: dict) -> tuple[str, ...]:
        return (
            name,
            f"{row['dsc_before']:.2f} → {row['dsc']:.2f}",
            f"{row['tre_before_mm']:.1f} → {row['tre_mm']:.1f}",
            f"{row['folded_percent']:.2f}",
            f"{row['seconds']:.2f}",
        )

    middle = {k: median(row[k] for row in rows) for k in rows[0] if k not in ("case", "patient")}
    lines = [COLUMNS, *(line(row["case"], row) for row in rows), line("median", middle)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)


def draw_training(run: Path, path: Path) -> None:
    """Draw the loss curve of a run from its TensorBoard events, with the validation medians where there are any."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from scripts.figures import loss_curve

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
