"""Five hundred registrations in one process: is memory flat, are files closed, do equal inputs give equal bits? Then a
batch of a hundred pairs of which ten are bad: ninety results and ten named refusals?

python benchmarks/load.py [--count 500]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm  # noqa: E402

from scripts.bundle.workflow import register, run_config  # noqa: E402
from scripts.data.checks import refusal  # noqa: E402
from scripts.phantoms.phantom import write_cohort  # noqa: E402


def resident() -> float:
    """MB of memory this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def handles() -> int:
    """Files this process has open (Linux)."""
    return len(os.listdir("/proc/self/fd"))


def batch(pairs: list[list[str]], folder: Path, count: int = 100, bad: int = 10) -> bool:
    """Register a folder of pairs, every tenth of which has a TRUS file that is cut short."""
    for number in range(count):
        for side, source in zip(("moving", "fixed"), pairs[number % 2], strict=True):
            place = folder / f"{side}_images" / f"case{number:03d}.nii.gz"
            place.parent.mkdir(parents=True, exist_ok=True)
            data = Path(source).read_bytes()
            place.write_bytes(data[: len(data) // 2] if side == "fixed" and number % (count // bad) == 3 else data)
    said = ""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run_config("inference.json", dataset_dir=str(folder), output_dir=str(folder / "results"))
        except Exception as error:
            said = str(refusal(error) or "")
    done = len(list((folder / "results").glob("*/qc.json")))
    named = sum(f"case{number:03d}" in said for number in range(count))
    refused = sum(line.startswith("refused: ") for line in errors.getvalue().splitlines())
    print(f"batch of {count} pairs, {bad} bad: {done} results, {refused} refusals, {named} named at the end")
    return done == count - bad and refused == named == bad


def main(count: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"fixed_shape": (44, 60, 44), "fixed_spacing": 1.5, "moving_shape": (52, 52, 36)}
        with contextlib.redirect_stderr(io.StringIO()):
            cohort = write_cohort(
                f"{folder}/cohort", 2, seed=7, split=(0, 0, 1), moving_spacing=(1.4, 1.4, 2.0), **shapes
            )
        pairs = [
            [str(cohort / "test" / f"{side}_images" / path.name) for side in ("moving", "fixed")]
            for path in sorted((cohort / "test" / "fixed_images").iterdir())
        ]
        memory, opened, hashes = [], [], [Counter() for _ in pairs]
        for turn in tqdm(range(count), desc="register", unit="pair"):
            with contextlib.redirect_stdout(io.StringIO()):
                register(*pairs[turn % 2], f"{folder}/out")
            gc.collect()
            field = Path(folder, "out", "ddf.nii.gz").read_bytes()
            hashes[turn % 2][hashlib.sha256(field).hexdigest()] += 1
            memory.append(resident())
            opened.append(handles())
        whole = batch(pairs, Path(folder, "batch"))
    part = max(1, count // 10)
    first, last = median(memory[:part]), median(memory[-part:])
    print(
        f"memory, median of the first {part} and the last {part}: {first:.0f} and {last:.0f} MB ({last - first:+.0f})"
    )
    print(f"open files after the first and the last: {opened[0]} and {opened[-1]}")
    print(f"different fields for equal inputs: {sum(len(found) - 1 for found in hashes)}")
    return (
        whole and last - first < 0.02 * first and opened[-1] == opened[0] and all(len(found) == 1 for found in hashes)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    sys.exit(0 if main(parser.parse_args().count) else 1)
