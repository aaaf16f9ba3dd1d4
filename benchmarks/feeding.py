"""What making a batch costs: operations, reads that wait for the device, processor time; here and in an older commit.

python benchmarks/feeding.py [--against f99a59f]

Batches of eight phantoms: cubes as the gland network (`GlandLoader`) and the second stage (`PairCubeLoader`) see them,
grids of 2.4 mm as the paper's networks do (`CohortLoader`). On a GPU each operation is a kernel or more to be launched
by Python, and each read of a number or of text waits until the device has come so far: what they cost there is counted
here, without one. (The reads that are left are of the CPU's own inversion of matrices.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (4, 32)
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # what a host reads of a device's tensor


def counts(batches: int = 12) -> list[dict]:
    """Of the code on the path: one row for each loader and batch size."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from scripts.registration.transforms import PlanFixedGridd
    from scripts.training.cohort import CohortLoader, SimulatedPairs
    from scripts.training.gland_cubes import GlandLoader
    from scripts.training.pair_cubes import PairCubeLoader

    torch.set_num_threads(1)
    pairs, rows = SimulatedPairs("realistic", seed=1), []
    made = [pairs[k] for k in range(8)]
    planned = [PlanFixedGridd(2.4)(pair) for pair in made]
    loaders = (GlandLoader, made, {"misoriented_share": 0.3}), (PairCubeLoader, made, {}), (CohortLoader, planned, {})
    for loader, made, named in loaders:
        for size in SIZES:
            batch = iter(
                loader([], size, 2 * batches, "cpu", simulated=made, share=1.0, pool=8, renewal=10**6, **named)
            )
            next(batch)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(batches):
                    next(batch)
            began = time.process_time()
            for _ in range(batches - 1):
                next(batch)
            cpu = (time.process_time() - began) / (batches - 1)
            called = {event.key: event.count for event in seen.key_averages() if event.key.startswith("aten::")}
            waits = sum(called.get(name, 0) for name in WAITS) / batches
            rows.append({
                "batches of": f"`{loader.__name__}`",
                "cubes": size,
                "operations": round(sum(called.values()) / batches),
                "waits": round(waits, 1),
                "processor, ms": round(1000 * cpu, 1),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="f99a59f", help="the older commit (default f99a59f)")
    parser.add_argument("--code", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.code:
        sys.path[0] = arguments.code
        print(json.dumps(counts()))
        return
    sys.path[0] = str(ROOT)
    from benchmarks.measure import machine, older, table

    rows = []
    with older(arguments.against) as old:
        for commit, code in ((f"`{arguments.against}`", old), ("this", ROOT)):
            command = [sys.executable, __file__, "--code", str(code)]
            said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=code).stdout
            rows += [{"commit": commit} | row for row in json.loads(said.splitlines()[-1])]
    print(f"{machine()}\n\n{table(sorted(rows, key=lambda row: (row['batches of'], row['cubes'])))}")


if __name__ == "__main__":
    main()
