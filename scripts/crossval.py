"""Cross-validation by patient of the Baseline and its variants (Hu et al. 2018, §3.3): a process per variant and fold.

A run, one variant on one fold, is `python -m monai.bundle run` twice: train.json on the other folds, evaluate.json on
the held-out one. Ray only says where and when; every state is a file of the run's folder, OUT/runs/VARIANT/foldK:

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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.__main__ import ROOT, absolute
from scripts.checks import InputError
from scripts.data import check_output, datalist
from scripts.files import written_whole
from scripts.plan import CONFIGS, DONE, WEIGHTS, Run, commit, deal, merged, name_of, overlays_of, runs_of, write_plan
from scripts.statistics import read_cases
from scripts.tables import collect
from scripts.watch import STOPPED, last_lines, watch

OWN = ("dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "fold", "fold_count", "resume", "split", "weights_name")
PATHS = ("initial_weights", "start_path")
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


def on_ray(runs: Sequence[Run], address: str | None, cores: int | None) -> dict[Run, Future]:
    """Hand every run to Ray, one GPU to each where Ray sees any, else a share of the cores.

    A cluster's machines need this bundle, the data and the output at the same paths.

    Raises:
        InputError: no Ray, no cluster at `address`, more cores than there are.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a hospital's machines is sent anywhere
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "crossval needs Ray: pip install -r requirements-crossval.txt; a single fold runs without it,"
            f" --only {runs[0].variant}:{runs[0].fold}"
        ) from error
    own = {} if address else {"include_dashboard": False, "object_store_memory": 2**27}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except ConnectionError as error:
        raise InputError(f"{address}: no Ray cluster there; start one with `ray start --head`") from error
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    share = cores or max(1, cpus // gpus if gpus else min(4, cpus))
    if share > cpus:
        raise InputError(f"--cores_per_fold {share}: Ray has {cpus} cores")
    at_once = min(len(runs), cpus // share, gpus or cpus)
    print(f"{len(runs)} runs, {at_once} at a time, {share} cores{' and a GPU' if gpus else ''} each", flush=True)
    root = str(ROOT)

    @ray.remote(num_cpus=share, num_gpus=1 if gpus else 0)
    def fold(values: tuple) -> str | None:
        sys.path.insert(0, root)  # a cluster's worker does not start in the bundle's folder
        from scripts.crossval import Run, run_fold

        return run_fold(Run(*values), share)

    return {run.key: fold.remote(tuple(run)).future() for run in runs}


def cross_validate(
    dataset_dir: str,
    output_dir: str,
    fold_count: int,
    variants: Sequence[str],
    fold_seed: int = 0,
    address: str | None = None,
    cores: int | None = None,
    only: Sequence[str] | None = None,
    base: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Run what is not done yet, here (`only`) or on Ray, then write and print the tables.

    Args:
        only: runs as VARIANT:FOLD, one after the other in this process's place, without Ray and without tables.
        base: an overlay of every variant, below its own.
        settings: of train.json; "{fold}" in a text becomes the fold's number.

    Returns:
        How many runs failed; those that SIGTERM stopped have not.

    Raises:
        SystemExit: with code 143 where none failed, but some were stopped.
        InputError: an unknown variant or setting, folds or settings unlike those of an earlier start, no Ray;
            see `scripts.data.check_output`.
    """
    below = [] if base is None else overlays_of(base)
    overlays = {name_of(v): [*below, *overlays_of(v)] for v in variants}
    if len(overlays) < len(variants):
        raise InputError(f"--variants {','.join(variants)}: two of one name")
    settings = {k: absolute(v) if k in PATHS and v else v for k, v in (settings or {}).items()}
    known = merged([CONFIGS / "train.json", *sum(overlays.values(), [])])
    for name in (k.split("#")[0] for k in settings):
        if name in OWN or name not in known:
            why = "is set for each fold" if name in OWN else "is no setting of configs/train.json"
            raise InputError(f"--{name}: {why}")
    for variant in variants:
        for name, own in merged(overlays_of(variant)).items():
            if name in settings and settings[name] != own:
                print(f"{variant} sets {name} to {own} itself; --{name} {settings[name]} overrides it", flush=True)
    output = Path(output_dir).resolve()
    plan = {
        "fold_seed": fold_seed,
        "base": merged(below),
        "settings": settings,
        "folds": deal(dataset_dir, fold_count, fold_seed, settings.get("patient_pattern")),
    }
    runs = runs_of(overlays, plan, str(Path(dataset_dir).resolve()), output)
    chosen = runs
    if only is not None:
        chosen = [run for name in only for run in runs if f"{run.variant}:{run.fold}" == name]
        if len(chosen) < len(only):
            raise InputError(f"--only {','.join(only)}: give VARIANT:FOLD, folds from 0 to {fold_count - 1}")
    check_output(output_dir, datalist(dataset_dir, "train"))
    output.mkdir(parents=True, exist_ok=True)
    write_plan(output / "folds.json", plan)
    todo = [run for run in chosen if not run.done]
    if not todo:
        failures = {}
    elif only is not None:
        with ThreadPoolExecutor(1) as one:

            def stop(*_: Any) -> None:  # and leave when the training has saved its place
                one.shutdown(wait=False, cancel_futures=True)
                for process in RUNNING.copy():
                    process.terminate()
                sys.exit(128 + signal.SIGTERM)

            before = signal.signal(signal.SIGTERM, stop)
            failures = watch(todo, {run.key: one.submit(run_fold, run, cores) for run in todo})
            signal.signal(signal.SIGTERM, before)
    else:
        failures = watch(todo, on_ray(todo, address, cores))
    if only is None:
        print(f"\n{collect(runs, output)}\n\nTables: {output}/cases.csv, landmarks.csv, patients.csv, statistics.csv")
    stopped = sum(why.startswith(STOPPED) for why in failures.values())
    if stopped == len(failures) > 0:
        sys.exit(128 + signal.SIGTERM)
    return len(failures) - stopped
