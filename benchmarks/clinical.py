"""One registration at clinical size, this commit against an older one in turn: time, memory, and what it leaves.

python benchmarks/clinical.py --moving DICOM_FOLDER --fixed TRUS.mha [--batch DIR] [--against cefef8e] [--rounds 3]

Pairs: the two files given; a phantom's TRUS of 256³ voxels of 0.5 mm; one of 81 × 118 × 88. Each is `register` as a
process of its own, from its start to its end. A batch is `inference.json` on a data set, likewise. The two sides have
other networks, so they find other transforms: that ours is the one it writes is what
`tests/registration/test_transforms.py` and `test_register.py` compare.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.measure import ROOT, machine, older, table  # noqa: E402
from scripts.phantoms.phantom import simulate_pair, write_pair  # noqa: E402

PHANTOMS = {  # name -> grids, see `simulate_pair`
    "TRUS of 256³, 0.5 mm": {"fixed_shape": (256,) * 3, "fixed_spacing": 0.5},
    "TRUS of 81 × 118 × 88, 0.8 mm": {"fixed_shape": (81, 118, 88), "fixed_spacing": 0.8},
}


def simulated(folder: Path, number: int, grids: dict) -> tuple[str, str]:
    """The two images of a phantom."""
    write_pair(folder, f"case{number}", simulate_pair(np.random.default_rng([3, number]), **grids))
    return tuple(str(folder / f"{side}_images" / f"case{number}.nii.gz") for side in ("moving", "fixed"))


def run(code: Path, words: Sequence[str], output: Path) -> dict[str, float]:
    """A command in the tree `code`: seconds, processor seconds, peak memory in GB, and its files in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *words, "--output_dir", str(output)],
        cwd=code,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        sys.exit(f"{code}: {said.decode()[-2000:]}")
    return {
        "seconds": time.perf_counter() - began,
        "processor": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss / 1e6,
        "files": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moving", help="an MR, for example a DICOM series")
    parser.add_argument("--fixed", help="a TRUS volume")
    parser.add_argument("--batch", help="a data set that is not split")
    parser.add_argument("--against", default="cefef8e", help="the older commit (default cefef8e)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    with older(arguments.against) as old:
        folder = old.parent
        pairs = {"the files given": (arguments.moving, arguments.fixed)} if arguments.moving else {}
        # in a process of their own: Linux counts this one's memory at the start of each that it starts
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            made = other.map(simulated, [folder] * len(PHANTOMS), range(len(PHANTOMS)), PHANTOMS.values())
            pairs |= dict(zip(PHANTOMS, made, strict=True))
        commands = {
            title: ("scripts", "register", "--moving", os.path.abspath(moving), "--fixed", os.path.abspath(fixed))
            for title, (moving, fixed) in pairs.items()
        }
        if arguments.batch:
            words = ("monai.bundle", "run", "--config_file", "configs/inference.json", "--dataset_dir")
            commands["a batch"] = (*words, os.path.abspath(arguments.batch))
        for title, words in tqdm(commands.items(), unit="command"):
            found = {side: [] for side in (arguments.against, "this commit")}
            for turn in range(arguments.rounds):
                for side, code in zip(found, (old, ROOT), strict=True):
                    found[side].append(run(code, words, folder / f"out_{side}_{turn}_{title}"))
            middle = {s: {k: median(one[k] for one in runs) for k in runs[0]} for s, runs in found.items()}
            for side, values in middle.items():
                share = values["seconds"] / middle[arguments.against]["seconds"]
                figures = {k: f"{v:.3g}" for k, v in values.items()} | {"share of the time": f"{share:.2f}"}
                rows.append({"of": title, "side": side} | figures)
    print(f"{machine()}\n\n{table(rows)}\n\nseconds and processor in s, memory (peak) in GB, files in MB")


if __name__ == "__main__":
    main()
