"""A cohort on disk against the same in memory: memory, and how long a step waits for its batch.

python benchmarks/streaming.py [--pairs 1150] [--folder FOLDER]

20 phantoms as segmentation.yaml simulates them, each kept many times under names of its own: 1,150 pairs in 1,150 files
or in as much memory. Batches of 4 cubes. "cold": the operating system has forgotten all files before the batch. Times
are of one core; each side is a process of its own, one after the other. To read the images, which both sides must at
their first start, is not in it. Linux.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from monai.data import Dataset  # noqa: E402

from benchmarks.measure import machine, table  # noqa: E402
from scripts.network.losses import BendingEnergy, LandmarkDrivenLoss, MultiscaleDiceLoss  # noqa: E402
from scripts.network.segmentation import GlandLoss, GlandNetwork  # noqa: E402
from scripts.network.wrapped import SecondStageNet  # noqa: E402
from scripts.training.cohort import SimulatedPairs  # noqa: E402
from scripts.training.engine import prepare_batch, prepare_gland_batch  # noqa: E402
from scripts.training.gland_cubes import GlandLoader  # noqa: E402
from scripts.training.pair_cubes import PairCubeLoader  # noqa: E402

PHANTOMS, BATCHES, STEPS = 20, 12, 3


@cache
def phantom(number: int) -> dict[str, Any]:
    """Its labelled glands count as found."""
    pair = SimulatedPairs("all", seed=1)[number]
    return pair | {f"{side}_gland": pair[f"{side}_label"][:1] for side in ("moving", "fixed")}


def as_pair(item: dict[str, Any]) -> dict[str, Any]:
    return phantom(item["phantom"]) | item


class Repeated:
    """Keeps each phantom once, and of each pair a copy of that: the cohort is simulated, not the work of reading it."""

    def _keep(self, data, device):
        known = self.__dict__.setdefault("known", {})
        if data["phantom"] not in known:
            known[data["phantom"]] = super()._keep(data, device)
        return copy.deepcopy(known[data["phantom"]]) | {"case": data["case"]}


class Glands(Repeated, GlandLoader):
    pass


class Pairs(Repeated, PairCubeLoader):
    pass


def loader(kind: type, pairs: int, folder: Path | None) -> Any:
    items = [{"case": f"pair{k}", "phantom": k % PHANTOMS} for k in range(pairs)]
    found = kind(Dataset(items, as_pair), 4, 10**6, "cpu", folder=folder)
    found.known.clear() if hasattr(found, "known") else None
    return found


def memory(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def bytes_read() -> int:
    """From the disk, by this process."""
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


def forget(folder: Path) -> None:
    for path in folder.rglob("*.bin"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def taken(stream: Any, cold: Path | None = None) -> dict[str, float | str]:
    """One batch: processor and wall ms, MB read from the disk, and a hash of it."""
    if cold:
        forget(cold)
    began, wall, read = time.process_time(), time.perf_counter(), bytes_read()
    batch = next(stream)
    ms = 1000 * (time.process_time() - began), 1000 * (time.perf_counter() - wall)
    return {"processor": ms[0], "wall": ms[1], "read": (bytes_read() - read) / 1e6} | {
        "hash": hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
    }


def in_memory(kind: type, pairs: int, folder: Path) -> dict[str, Any]:
    before, began = memory("VmRSS"), time.process_time()
    stream = iter(loader(kind, pairs, None))
    start = time.process_time() - began
    batches = [taken(stream) for _ in range(2 * BATCHES)]
    return {"start": start, "memory": memory("VmHWM") - before, "batches": batches}


def first_start(kind: type, pairs: int, folder: Path) -> dict[str, Any]:
    before, began = memory("VmRSS"), time.process_time()
    loader(kind, pairs, folder)
    return {"start": time.process_time() - began, "memory": memory("VmHWM") - before}


def next_start(kind: type, pairs: int, folder: Path) -> dict[str, Any]:
    forget(folder)
    before, began = memory("VmRSS"), time.process_time()
    stream = iter(loader(kind, pairs, folder))
    start = time.process_time() - began
    batches = [taken(stream, folder if number >= BATCHES else None) for number in range(2 * BATCHES)]
    return {"start": start, "memory": memory("VmHWM") - before, "batches": batches}


def steps(kind: type, pairs: int, folder: Path) -> list[float]:
    """Processor ms of steps beyond the batch: network, loss, backward, Adam."""
    stream = iter(loader(kind, PHANTOMS, None))
    if kind is Glands:
        network, loss, prepare = GlandNetwork(), GlandLoss(), prepare_gland_batch
    else:
        loss = LandmarkDrivenLoss(MultiscaleDiceLoss([0, 2, 4, 8]), BendingEnergy(), 0.33, points=0.13)
        network, prepare = SecondStageNet(8, images=False), prepare_batch
    adam, found = torch.optim.Adam(network.parameters()), []
    for _ in range(STEPS + 1):
        image, targets = prepare(next(stream), "cpu")
        began = time.process_time()
        adam.zero_grad()
        loss(network(image), targets).backward()
        adam.step()
        found.append(1000 * (time.process_time() - began))
    return found[1:]


def apart(function: Callable, *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1150)
    parser.add_argument("--folder", help="where the files lie meanwhile; some 5 GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for number in range(PHANTOMS):
        phantom(number)  # here, so that no process below counts them
    rows = []
    for kind in (Glands, Pairs):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            given = (kind, arguments.pairs, Path(name))
            step = statistics.median(apart(steps, *given))
            memory_side, first, later = (apart(one, *given) for one in (in_memory, first_start, next_start))
            size = sum(path.stat().st_size for path in Path(name).rglob("*.bin")) / 1e6
        batches = {"cpu": memory_side["batches"], "disk": later["batches"][:BATCHES]}
        batches |= {"disk, cold": later["batches"][BATCHES:]}
        if [one["hash"] for one in memory_side["batches"]] != [one["hash"] for one in later["batches"]]:
            sys.exit("the batches of the two sides differ")
        for side, found in batches.items():
            ms = statistics.fmean(one["processor"] for one in found)
            rows.append({
                "batches of": f"`{kind.__mro__[2].__name__}`",
                "cohort_device": side,
                "memory, MB": round((memory_side if side == "cpu" else later)["memory"]),
                "a batch, processor ms": round(ms),
                "a batch, ms": round(statistics.median(one["wall"] for one in found)),
                "read, MB": round(statistics.fmean(one["read"] for one in found), 1),
                "the rest of a step, processor ms": round(step),
                "waiting": f"{ms / (ms + step):.1%}",
            })  # fmt: skip
        storing = first["start"] - memory_side["start"]
        print(f"{kind.__name__}: {size:.0f} MB on disk; processor: storing {storing:.0f} s, a later start", end=" ")
        print(f"{later['start']:.1f} s; memory of the first start {first['memory']:.0f} MB", flush=True)
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
