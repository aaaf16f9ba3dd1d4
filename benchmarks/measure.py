"""What every benchmark shares: time sides in turn, peak memory, the machine, and results.json with its table.

Seconds are this machine's; ratios are what is compared. Both sides of a ratio run in one process, on the same tensors,
in turn, and only after a check that they compute the same.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def devices() -> list[torch.device]:
    """The CPU, and the GPU where there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


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
    sides: Mapping[str, Callable[[], Any]], device: torch.device | str = "cpu", budget: float = 60, most: int = 9
) -> dict[str, dict[str, Any]]:
    """Time all sides in turn, after one warm-up each.

    Args:
        sides: name -> function.
        device: where they work.
        budget: no new round is started after this many seconds; there is always one.
        most: rounds at most.

    Returns:
        name -> `seconds` (median), `fastest`, `slowest`, `rounds`.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        clock(function, device)
    started = time.perf_counter()
    while not all(times.values()) or (time.perf_counter() - started < budget and len(min(times.values())) < most):
        for name, function in sides.items():
            times[name].append(clock(function, device))
        if len(next(iter(times.values()))) >= most:
            break
    return {
        name: {"seconds": sorted(t)[len(t) // 2], "fastest": min(t), "slowest": max(t), "rounds": len(t)}
        for name, t in times.items()
    }


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


def record(part: str, rows: list[dict[str, Any]]) -> None:
    """Put a part's rows into results.json and its table into docs/benchmarks.md, between its two markers."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = {"machine": machine(), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
    made = results[part]["machine"]
    where = f"{made['processor']}, {made['threads']} threads, {made['vector_unit']}, GPU: {made['gpu'] or 'none'}"
    lines += ["", f"{where}, torch {made['torch']}, commit {made['commit']}."]
    table = "\n".join(lines)
    print(table)
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    page = PAGE.read_text() if PAGE.exists() else ""
    if start not in page:
        page += f"\n{start}\n{end}\n"
    head, _, rest = page.partition(start)
    PAGE.write_text(f"{head}{start}\n{table}\n{end}{rest.partition(end)[2]}")


def shown(value: Any) -> str:
    """A cell: three significant digits, nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}" if isinstance(
        value, float
    ) else str(value)
