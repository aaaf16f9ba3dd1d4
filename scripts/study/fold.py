"""One variant on one fold, in processes of its own.

A run, one variant on one fold, is `python -m monai.bundle run` twice: train.json on the other folds, evaluate.json on
the held-out one. Every state is a file of the run's folder, OUT/runs/VARIANT/foldK:

    lock           held by whoever trains here, and by the training process itself
    log.txt        what the processes printed
    checkpoint_…   from which a training that was killed goes on
    model.pt       the training is complete
    evaluation/    cases.csv and landmarks.csv of the held-out patients
    done.json      written last: nothing of this run is done again
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.data.files import written_whole
from scripts.data.root import ROOT
from scripts.study.plan import DONE, WEIGHTS, Run, commit
from scripts.study.statistics import read_cases
from scripts.study.watch import STOPPED, last_lines

RUNNING: set[subprocess.Popen] = set()  # what this process has started


def run_fold(run: Run, threads: int | None = None) -> str | None:
    """Train one variant on one fold and evaluate it; what is done already is not done again.

    Args:
        threads: OMP_NUM_THREADS of the processes; None leaves the environment's.

    Returns:
        None, or why it failed, with the last lines of its log, or "stopped: …" where SIGTERM ended it.
    """
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (folder / "lock").open("w") as lock, run.log.open("ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that an earlier, killed runner left behind

        def finishes(what: str, arguments: list[str]) -> str | None:
            log.write(f"\n$ python {shlex.join(arguments)}\n".encode())
            log.flush()
            command, streams = [sys.executable, *arguments], {"stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, **streams, pass_fds=[lock.fileno()], preexec_fn=die_with_parent
            )
            RUNNING.add(process)
            code = process.wait()
            RUNNING.discard(process)
            if code in (-signal.SIGTERM, 128 + signal.SIGTERM):  # the latter where a training has saved its place
                return f"{STOPPED}: {what} got SIGTERM; the same command goes on from there"
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"{what} {how}; the last lines of {run.log}:\n{last_lines(run.log)}" if code else None

        if run.done:
            return None
        if run.train and not (folder / WEIGHTS).exists():
            resume = any(folder.glob("checkpoint_epoch=*.pt"))
            failed = finishes("training", run.train + ["--resume=True"] * resume)
            if failed:
                return failed
        found = run.cases
        if run.evaluate:
            failed = finishes("evaluation", run.evaluate)
            if failed:
                return failed
            found = sorted(read_cases(folder / "evaluation" / "cases.csv"))
        if found != run.cases:
            return f"evaluated {len(found)} cases that are not the {len(run.cases)} of folds.json"
        with written_whole(folder / DONE) as file:
            known = {"variant": run.variant, "fold": run.fold, "cases": found, "trained": bool(run.train)}
            file.write(json.dumps(known | {"commit": commit(), "ended": time.strftime("%Y-%m-%d %H:%M")}) + "\n")
    return None


def die_with_parent() -> None:
    """In a new process: ask Linux to stop it when what started it dies, so that nothing trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG; a training saves its place
