"""The gland found in images held out: Dice by fold, whether flags are where the Dice is low, and which way round.

    python benchmarks/segmentation.py --dataset_dir mr,pairs --axes None,PRS --folds 5 --output_dir runs/glands \\
        --initial_weights models/start_phantoms.pt --iterations 1000 --phantom_share 0.25

trains configs/segmentation.yaml once per fold and seed, what follows being its settings ("{fold}" and "{seed}" in them
become the numbers), and finds the glands of the fold's other images. Run again it goes on: what is trained stays, an
interrupted training is resumed. `--weights A,B` instead of folds: the images of the data sets, by weights that have not
seen them. `--ways` stores each image in all eight ways first; `--pushed` changes each as benchmarks/confidence.py does,
so that glands are missed. Writes cases.csv, one row an image and way or change, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.confidence import KINDS  # noqa: E402
from scripts.data.axes import declared  # noqa: E402
from scripts.data.checks import InputError  # noqa: E402
from scripts.data.datalist import single_images  # noqa: E402
from scripts.data.files import listed, write_csv  # noqa: E402
from scripts.data.pairs import LoadSingled  # noqa: E402
from scripts.network.segmentation import GlandNetwork  # noqa: E402
from scripts.registration import metrics, qc  # noqa: E402
from scripts.registration.orientation import codes  # noqa: E402
from scripts.registration.segmentation import SegmentGlandsd, on_image  # noqa: E402

LOW, HIGH = 0.6, 0.8  # Dice of a gland that must be flagged, and of one that should not be


def trained(arguments: argparse.Namespace, settings: list[str], fold: int, seed: int) -> Path:
    """The weights of one fold, trained or resumed if they are not there."""
    folder = Path(arguments.output_dir) / f"fold{fold}_seed{seed}"
    weights = folder / "segmentation.pt"
    if not weights.exists():
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file"]
        command += [str(["configs/train.json", "configs/segmentation.yaml"]), "--output_dir", str(folder.absolute())]
        axes = str(arguments.axes) if arguments.axes else "None"
        command += ["--dataset_dir", str([str(Path(p).absolute()) for p in arguments.dataset_dir]), "--axes", axes]
        command += ["--fold", str(fold), "--fold_count", str(arguments.folds), "--seed", str(seed)]
        resume = any(folder.glob("checkpoint_epoch=*.pt"))
        own = [word.replace("{fold}", str(fold)).replace("{seed}", str(seed)) for word in settings]
        subprocess.run([*command, "--resume", str(resume), *own], cwd=ROOT, check=True)
    return weights


def held_out(arguments: argparse.Namespace, settings: list[str]) -> Iterator[tuple[list[Path], list[dict], int, int]]:
    """Weights, the images that they have not seen, fold and seed."""
    options = {"axes": arguments.axes}
    if arguments.weights:
        yield [Path(p) for p in arguments.weights], single_images(arguments.dataset_dir, "test", **options), 0, 0
        return
    for seed in range(arguments.seeds):
        for fold in range(arguments.folds):
            options |= {"fold": fold, "fold_count": arguments.folds}
            yield (
                [trained(arguments, settings, fold, seed)],
                single_images(arguments.dataset_dir, "test", **options),
                fold,
                seed,
            )


def found(segment: SegmentGlandsd, item: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Dice, flags and the way round that the networks see of one image as `LoadSingled` leaves it."""
    try:
        seen = segment(item)
    except InputError:
        return {"dice": 0.0, "flags": "no prostate found", "orientation": float("nan"), "axes": ""}
    mask, label = on_image(seen["gland"], item["image"])[0] > 0.5, item["label"].as_tensor()[0] > 0.5
    record = qc.plain(seen["confidence"])
    figures = {k: v if isinstance(v, str) else round(v, 4) for k, v in record.items()}
    flags = "; ".join(qc.flags(record, limits, sides=("",)))
    return {"dice": metrics.dice(mask[None, None], label[None, None]).item(), "flags": flags} | figures


def rows(arguments: argparse.Namespace, settings: list[str]) -> Iterator[dict[str, Any]]:
    limits = json.loads((ROOT / "configs/inference.json").read_text(encoding="utf-8"))["limits"]
    load = LoadSingled()
    for weights, items, fold, seed in held_out(arguments, settings):
        segment = SegmentGlandsd(GlandNetwork(), [str(path) for path in weights], arguments.device)
        for item in tqdm(items, desc=f"fold {fold}, seed {seed}", unit="image"):
            d = load(item)
            true = d["image"].affine.numpy()
            row = {"group": Path(item["group"]).name, "case": item["case"], "fold": fold, "seed": seed}
            for way in range(8) if arguments.ways else (0,):
                axes = codes(true, way)  # stored so under a header that says what it says now
                lying = torch.from_numpy(declared(true, d["image"].shape[1:], axes))
                shown = d | {k: MetaTensor(d[k].as_tensor(), affine=lying) for k in ("image", "label")}
                result = found(segment, shown, limits)
                yield row | {"shown": way} | result | {"right_way": result["axes"] == codes(true, 0)}
            for kind in KINDS if arguments.pushed else ():
                pushed = KINDS[kind](d["image"][0].numpy(), np.random.default_rng(0))[None].astype(np.float32)
                shown = d | {"image": MetaTensor(torch.from_numpy(pushed.copy()), affine=d["image"].affine)}
                result = found(segment, shown, limits)
                yield row | {"group": "pushed", "shown": kind, "right_way": None} | result


def interval(values: list[float], seed: int = 0) -> str:
    """Median with its bootstrap interval of 95 %, mean and least."""
    draws = np.random.default_rng(seed).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return f"{np.median(values):.3f} [{low:.3f}, {high:.3f}]  {np.mean(values):.3f}  {min(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, type=listed, help="data sets, separated by commas")
    parser.add_argument("--axes", type=lambda t: [None if a == "None" else a for a in t.split(",")], help="of each")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weights", type=listed, help="files, instead of folds")
    parser.add_argument("--ways", action="store_true", help="store each image in all eight ways")
    parser.add_argument("--pushed", action="store_true", help="also with each image changed so that glands are missed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, settings = parser.parse_known_args()
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = list(rows(arguments, settings))
    write_csv(folder / "cases.csv", table)
    print("group, images: Dice median [95 %], mean, least; flagged of those below and above; right way round")
    for group in dict.fromkeys(row["group"] for row in table):
        own = [row for row in table if row["group"] == group]
        low, high = ([r for r in own if test(r["dice"])] for test in (lambda d: d < LOW, lambda d: d > HIGH))
        flagged = [f"{sum(bool(r['flags']) for r in part)} of {len(part)}" for part in (low, high)]
        right = f"; {sum(r['right_way'] for r in own)} of {len(own)}" if group != "pushed" else ""
        print(f"{group}, {len(own)}: {interval([r['dice'] for r in own])}; {', '.join(flagged)}{right}")


if __name__ == "__main__":
    main()
