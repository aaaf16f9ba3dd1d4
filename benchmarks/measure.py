"""What every benchmark shares: time sides in turn, peak memory, the machine, and results.json with its table.

Seconds are this machine's; ratios are what is compared. Both sides of a ratio run in one process, on the same tensors,
in turn, and only after a check that they compute the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def options(doc: str) -> argparse.ArgumentParser:
    """The command line of a part that runs on a CPU or a GPU."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    parser.add_argument("--device", type=torch.device, default="cpu", help=f"here: {', '.join(there)}")
    return parser


@contextmanager
def older(commit: str) -> Iterator[Path]:
    """The tree of an older commit, in a folder that goes away; what else lies beside it goes with it."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "old"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def clock(function: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, the device's work included."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def race(
    sides: Mapping[str, Callable[[], Any]], device: torch.device | str = "cpu", budget: float = 15, most: int = 9
) -> dict[str, dict[str, Any]]:
    """Time all sides in turn, after one warm-up each; in its turn a quick side runs for half a second.

    Args:
        sides: name -> function.
        device: where they work.
        budget: no new round is started after this many seconds, on a GPU after an eighth of them; a side whose warm-up
            took that long is not run again, its warm-up is its time.
        most: turns at most.

    Returns:
        name -> `seconds` (median), `fastest`, `slowest`, `rounds`, the calls timed.
    """
    budget = budget / 8 if torch.device(device).type == "cuda" else budget
    times = {name: [clock(function, device)] for name, function in sides.items()}
    quick = [name for name, t in times.items() if t[0] < budget]
    for name in quick:
        times[name].clear()
    started = time.perf_counter()
    for round_ in range(most):
        if round_ and time.perf_counter() - started > budget:
            break
        for name in quick:
            spent = 0.0
            while spent == 0 or (spent < 0.5 and len(times[name]) < 10 * most):
                times[name].append(clock(sides[name], device))
                spent += times[name][-1]
    return {
        name: {"seconds": statistics.median(t), "fastest": min(t), "slowest": max(t), "rounds": len(t)}
        for name, t in times.items()
    }


def compared(
    what: Mapping[str, Any], timed: Mapping[str, Mapping[str, Any]], ours: str = "ours"
) -> list[dict[str, Any]]:
    """One row per other side of a race: what was run, our median seconds, theirs with its spread, and the ratio."""
    return [
        {**what, "ours": timed[ours]["seconds"], "against": name, "seconds": side["seconds"]}
        | {"fastest": side["fastest"], "slowest": side["slowest"], "rounds": side["rounds"]}
        | {"times faster": side["seconds"] / timed[ours]["seconds"]}
        for name, side in timed.items()
        if name != ours
    ]


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes a call holds at its peak beyond what was held before it; on the CPU what PyTorch's allocator gave out."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check_same(what: str, ours: Tensor, other: Tensor, tolerance: float, relative: bool = True) -> float:
    """Print how far two results are apart and stop the benchmark if that is beyond the tolerance.

    Returns:
        The largest absolute difference, over the largest absolute value of `other` if `relative`.
    """
    difference = (ours.double().cpu() - other.double().cpu()).abs().max()
    apart = (difference / other.double().abs().max().cpu().clamp_min(1e-30)).item() if relative else difference.item()
    print(f"  same {what}: apart by {apart:.1e}, tolerance {tolerance:.0e}")
    if not apart <= tolerance:
        sys.exit(f"{what}: the two sides do not compute the same")
    return apart


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> float:
    """Floating-point operations a second in a large square matrix product."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / race({"product": lambda: a @ b}, device, budget=5)["product"]["fastest"]


def machine() -> dict[str, Any]:
    """Processor, threads, GPU, versions and commit."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def record(
    part: str, rows: list[dict[str, Any]], more: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a part's rows, and more, into results.json, and its table into docs/benchmarks.md, between its markers.

    Those of a GPU lie beside those of the CPU, under a name of their own.
    """
    part = part if torch.device(device).type == "cpu" else f"{part} on a GPU"
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[part] = {"machine": machine(), "rows": rows, **(more or {})}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    made = results[part]["machine"]
    where = f"{made['processor']}, {made['threads']} threads, {made['vector_unit']}, GPU: {made['gpu'] or 'none'}"
    text = f"{table(rows)}\n\n{where}, torch {made['torch']}, commit {made['commit']}."
    print(text)
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if start not in page:
        page += f"\n{start}\n{end}\n"
    head, _, rest = page.partition(start)
    PAGE.write_text(f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the columns are all their keys."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows])


def shown(value: Any) -> str:
    """A cell: three significant digits, nothing for what was not measured."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)
