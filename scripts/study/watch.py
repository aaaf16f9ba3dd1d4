"""The table of a cross-validation's progress, read from the logs of its runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from scripts.study.plan import WEIGHTS, Run

STOPPED = "stopped"
BAR = re.compile(r"Training:[^\r\n]*? (\d+)/(\d+) \[[\d:]+<([\d:?]+),[^\r\n]*?loss=([^\]\r\n]+)\]")


def watch(runs: Sequence[Run], futures: Mapping[tuple[str, int], Future], interval: float = 1.0) -> dict:
    """Show the runs until all have ended: a live table in a terminal, else a line for each change.

    Returns:
        (variant, fold) -> why it failed, or, beginning with "stopped", that it was told to stop.
    """
    live, failures, shown, drawn = sys.stdout.isatty(), {}, {}, 0
    known = {run.key: run.log.stat().st_size for run in runs if run.log.exists()}
    ended: set[tuple[str, int]] = set()
    while len(ended) < len(runs):
        wait([f for key, f in futures.items() if key not in ended], interval, "FIRST_COMPLETED")
        lines, news = [], []
        for run in runs:
            key = run.key
            if key in ended:
                continue
            if futures[key].done():
                ended.add(key)
                error = futures[key].exception()
                failure = f"{type(error).__name__}: {error}" if error else futures[key].result()
                if failure:
                    failures[key] = failure
                how = "done" if not failure else STOPPED if failure.startswith(STOPPED) else "failed"
                news.append(row(*key, how) + (f"\n  {failure}" if failure else ""))
                continue
            state, step, total, loss, left = progress(run, known.get(key, 0))
            if state != "waiting":
                lines.append(row(*key, state, f"{step}/{total}" if total else "", loss, left))
                change = (state, 10 * step // total if total else 0)
                if not live and shown.get(key) != change:
                    news.append(lines[-1])
                shown[key] = change
        if live and drawn:
            print(f"\x1b[{drawn}A\x1b[J", end="")
        for text in news:
            print(text)
        if live:
            waiting = len(runs) - len(ended) - len(lines)
            bad = len(failures)
            lines = [HEADER, *lines, f"{len(ended)} of {len(runs)} ended, {bad} failed or stopped, {waiting} waiting"]
            print("\n".join(lines))
            drawn = len(lines)
        sys.stdout.flush()
    return failures


def progress(run: Run, start: int) -> tuple[str, int, int, str, str]:
    """State, step, steps, loss and time left of a run, read from the bar in its log from byte `start` on."""
    text = tail(run.log, start)
    if not text:
        return "waiting", 0, 0, "", ""
    if not run.train or (Path(run.folder) / WEIGHTS).exists():
        return "evaluating", 0, 0, "", ""
    bars = BAR.findall(text)
    step, total, left, loss = bars[-1] if bars else (0, 0, "", "")
    return "training" if bars else "starting", int(step), int(total), loss, left


def row(variant: str, fold: int | str, state: str, step: str = "", loss: str = "", left: str = "") -> str:
    return f"{variant:<16} {fold:>4}  {state:<10} {step:>15} {loss:>8} {left:>9}".rstrip()


HEADER = row("variant", "fold", "state", "step", "loss", "time left")


def tail(path: Path, start: int = 0, size: int = 8192) -> str:
    """The last `size` bytes of a file, none before `start`; empty where there is no file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def last_lines(path: Path, count: int = 6) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail(path)) if line.strip()]
    return "\n".join(f"    {line[:300]}" for line in lines[-count:])
