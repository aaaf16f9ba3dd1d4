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

import csv
import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.__main__ import ROOT, absolute
from scripts.checks import InputError
from scripts.data import datalist, folds
from scripts.files import written_whole
from scripts.metrics import write_csv
from scripts.statistics import METRICS, compare, describe, read_cases

CONFIGS = ROOT / "configs"
WEIGHTS, LOG, DONE = "model.pt", "log.txt", "done.json"
OWN = ("dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "fold", "fold_count", "resume", "split", "weights_name")
PATHS = ("initial_weights", "start_path")
BAR = re.compile(r"Training:[^\r\n]*? (\d+)/(\d+) \[[\d:]+<([\d:?]+),[^\r\n]*?loss=([^\]\r\n]+)\]")


class Run(NamedTuple):
    """One variant on one fold: its folder, the arguments of its two processes, and the cases that are held out."""

    variant: str
    fold: int
    folder: str
    train: list[str]
    evaluate: list[str]
    cases: list[str]

    @property
    def key(self) -> tuple[str, int]:
        return self.variant, self.fold

    @property
    def log(self) -> Path:
        return Path(self.folder) / LOG

    @property
    def done(self) -> bool:
        return (Path(self.folder) / DONE).exists()


# ---- what is to be run


def overlay_of(variant: str) -> Path | None:
    """The overlay of a variant: none of "baseline", configs/variant_NAME.yaml of a name, or the file itself."""
    if variant == "baseline":
        return None
    named = CONFIGS / f"variant_{variant}.yaml"
    path = Path(variant).resolve() if variant.endswith((".yaml", ".json")) else named
    if not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("variant_") for p in CONFIGS.glob("variant_*.yaml")))
        raise InputError(f"{variant}: no such variant; known are baseline, {known}, and any overlay file")
    return path


def deal(dataset_dir: str, fold_count: int, fold_seed: int, pattern: str | None) -> list[dict[str, list[str]]]:
    """The held-out patients of each fold, each with the names of its cases."""
    split = {"fold": 0, "fold_count": fold_count, "fold_seed": fold_seed, "patient_pattern": pattern}
    pairs = datalist(dataset_dir, "train", **split) + datalist(dataset_dir, "test", **split)
    cases: dict[str, list[str]] = {}
    for pair in pairs:
        cases.setdefault(pair["patient"], []).append(pair["case"])
    return [{patient: sorted(cases[patient]) for patient in fold} for fold in folds(list(cases), fold_count, fold_seed)]


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write the folds and settings before anything starts; refuse a restart for which they are others."""
    if not path.exists():
        with written_whole(path) as file:
            file.write(json.dumps(plan, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    patients = [{p for fold in there["folds"] for p in fold} for there in (before, plan)]
    changed = sorted(patients[0] ^ patients[1])
    if changed:
        raise InputError(
            f"{path}: made of other patients than the data set has now ({len(changed)} differ, for example"
            f" {changed[0]}); restore them or choose another --output_dir"
        )
    for name in plan:
        if before.get(name) != json.loads(json.dumps(plan[name])):
            raise InputError(f"{path}: made with other {name} than now; repeat them or choose another --output_dir")


def bundle_run(files: Iterable[Path | None], settings: Mapping[str, Any]) -> list[str]:
    """Arguments of `python` for a plain run; values are written as Python reads them, so none changes its type."""
    names = [str(file) for file in files if file is not None]
    return ["-m", "monai.bundle", "run", "--config_file", str(names), *(f"--{k}={v!r}" for k, v in settings.items())]


def in_fold(value: Any, fold: int) -> Any:
    """A setting with the fold's number for {fold} in a text, or in each of several."""
    if isinstance(value, list | tuple):
        return [in_fold(one, fold) for one in value]
    return value.replace("{fold}", str(fold)) if isinstance(value, str) else value


def runs_of(variants: Mapping[str, Path | None], plan: dict[str, Any], dataset: str, output: Path) -> list[Run]:
    """Every variant on every fold; the evaluation gets those settings that evaluate.json has too."""
    shared = set(json.loads((CONFIGS / "evaluate.json").read_text(encoding="utf-8")))
    runs = []
    for variant, overlay in variants.items():
        for fold, patients in enumerate(plan["folds"]):
            folder = output / "runs" / variant / f"fold{fold}"
            place = {"dataset_dir": dataset, "fold": fold, "fold_count": len(plan["folds"])}
            place |= {"fold_seed": plan["fold_seed"]}
            given = {k: in_fold(v, fold) for k, v in plan["settings"].items()}
            training = place | {"output_dir": str(folder), "ckpt_dir": str(folder), "weights_name": WEIGHTS} | given
            scoring = place | {"output_dir": str(folder / "evaluation"), "ckpt_path": str(folder / WEIGHTS)}
            scoring |= {k: v for k, v in given.items() if k.split("#")[0] in shared}
            train = bundle_run([CONFIGS / "train.json", overlay], training)
            evaluate = bundle_run([CONFIGS / "evaluate.json", CONFIGS / "baseline.yaml", overlay], scoring)
            runs.append(Run(variant, fold, str(folder), train, evaluate, sorted(sum(patients.values(), []))))
    return runs


# ---- one run


def run_fold(run: Run, threads: int | None = None) -> str | None:
    """Train one variant on one fold and evaluate it; what is done already is not done again.

    Args:
        threads: OMP_NUM_THREADS of the processes; None leaves the environment's.

    Returns:
        None, or why it failed, with the last lines of its log.
    """
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (folder / "lock").open("w") as lock, run.log.open("ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that an earlier, killed runner left behind

        def finishes(arguments: list[str]) -> str | None:
            log.write(f"\n$ python {shlex.join(arguments)}\n".encode())
            log.flush()
            command, streams = [sys.executable, *arguments], {"stdout": log, "stderr": subprocess.STDOUT}
            code = subprocess.run(
                command, cwd=ROOT, env=environment, **streams, pass_fds=[lock.fileno()], preexec_fn=die_with_parent
            ).returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"{how}; the last lines of {run.log}:\n{last_lines(run.log)}" if code else None

        if run.done:
            return None
        if not (folder / WEIGHTS).exists():
            resume = any(folder.glob("checkpoint_epoch=*.pt"))
            failed = finishes(run.train + ["--resume=True"] * resume)
            if failed:
                return f"training {failed}"
        failed = finishes(run.evaluate)
        if failed:
            return f"evaluation {failed}"
        found = sorted(read_cases(folder / "evaluation" / "cases.csv"))
        if found != run.cases:
            return f"evaluated {len(found)} cases that are not the {len(run.cases)} of folds.json"
        with written_whole(folder / DONE) as file:
            file.write(json.dumps({"variant": run.variant, "fold": run.fold, "cases": found}) + "\n")
    return None


def die_with_parent() -> None:
    """In a new process: ask Linux to kill it when what started it dies, so that nothing trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


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


# ---- where and when


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


def watch(runs: Sequence[Run], futures: Mapping[tuple[str, int], Future], interval: float = 1.0) -> dict:
    """Show the runs until all have ended: a live table in a terminal, else a line for each change.

    Returns:
        (variant, fold) -> why it failed.
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
                news.append(row(*key, "failed" if failure else "done") + (f"\n  {failure}" if failure else ""))
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
            lines = [HEADER, *lines, f"{len(ended)} of {len(runs)} ended, {len(failures)} failed, {waiting} waiting"]
            print("\n".join(lines))
            drawn = len(lines)
        sys.stdout.flush()
    return failures


def progress(run: Run, start: int) -> tuple[str, int, int, str, str]:
    """State, step, steps, loss and time left of a run, read from the bar in its log from byte `start` on."""
    text = tail(run.log, start)
    if not text:
        return "waiting", 0, 0, "", ""
    if (Path(run.folder) / WEIGHTS).exists():
        return "evaluating", 0, 0, "", ""
    bars = BAR.findall(text)
    step, total, left, loss = bars[-1] if bars else (0, 0, "", "")
    return "training" if bars else "starting", int(step), int(total), loss, left


def row(variant: str, fold: int | str, state: str, step: str = "", loss: str = "", left: str = "") -> str:
    return f"{variant:<16} {fold:>4}  {state:<10} {step:>15} {loss:>8} {left:>9}".rstrip()


HEADER = row("variant", "fold", "state", "step", "loss", "time left")


# ---- what came of it


def collect(runs: Sequence[Run], output: Path) -> str:
    """Write OUT/cases.csv, landmarks.csv and statistics.csv of the variants all of whose folds are done.

    Every variant is compared with the first.

    Returns:
        The statistics as a table to read.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    tables: dict[str, list[dict]] = {"cases": [], "landmarks": [], "statistics": []}
    results: dict[str, dict] = {}
    for variant in variants:
        own = [run for run in runs if run.variant == variant]
        if not all(run.done for run in own):
            continue
        results[variant] = {}
        for run in own:
            found, name = Path(run.folder) / "evaluation", {"variant": variant, "fold": run.fold}
            cases = read_cases(found / "cases.csv")
            results[variant] |= cases
            tables["cases"] += [name | case for case in cases.values()]
            with (found / "landmarks.csv").open(newline="", encoding="utf-8") as file:
                tables["landmarks"] += [name | landmark for landmark in csv.DictReader(file)]
    lines = []
    for variant, cases in results.items():
        for metric in METRICS:
            line = {"variant": variant} | describe(cases, metric)
            if variant != variants[0] and variants[0] in results:
                line |= {"against": variants[0]} | compare(cases, results[variants[0]], metric)
            tables["statistics"].append(line)
            lines.append(sentence(line))
    for name, rows in tables.items():
        write_csv(output / f"{name}.csv", rows)
    return "\n".join(lines)


def sentence(line: Mapping[str, Any]) -> str:
    """A row of statistics.csv as a line to read."""
    text = f"{line['variant']:<16} {line['metric']:<6} median {line['median']:.3g} [{line['q1']:.3g}, {line['q3']:.3g}]"
    text += f" of {line['cases']} cases" + (f", {line['empty_warped']} labels warped away" * (line["empty_warped"] > 0))
    if "against" in line:
        text += f"; {line['difference']:+.3g} [{line['low']:.3g}, {line['high']:.3g}] from {line['against']}"
        text += f", p = {line['p']:.3g}, {line['pairs']} pairs"
        text += f", left out: {line['left_out']}" if line["left_out"] else ""
    return text


def cross_validate(
    dataset_dir: str,
    output_dir: str,
    fold_count: int,
    variants: Sequence[str],
    fold_seed: int = 0,
    address: str | None = None,
    cores: int | None = None,
    only: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Run what is not done yet, here (`only`) or on Ray, then write and print the tables.

    Args:
        only: runs as VARIANT:FOLD, one after the other in this process's place, without Ray and without tables.
        settings: of train.json; "{fold}" in a text becomes the fold's number.

    Returns:
        How many runs failed.

    Raises:
        InputError: an unknown variant or setting, folds or settings unlike those of an earlier start, no Ray.
    """
    overlays = {Path(v).stem.removeprefix("variant_"): overlay_of(v) for v in variants}
    if len(overlays) < len(variants):
        raise InputError(f"--variants {','.join(variants)}: two of one name")
    settings = {k: absolute(v) if k in PATHS and v else v for k, v in (settings or {}).items()}
    files = [CONFIGS / "train.json", *filter(None, overlays.values())]
    known = set().union(*(yaml.safe_load(file.read_text(encoding="utf-8")) for file in files))
    for name in (k.split("#")[0] for k in settings):
        if name in OWN or name not in known:
            why = "is set for each fold" if name in OWN else "is no setting of configs/train.json"
            raise InputError(f"--{name}: {why}")
    output = Path(output_dir).resolve()
    plan = {
        "fold_seed": fold_seed,
        "settings": settings,
        "folds": deal(dataset_dir, fold_count, fold_seed, settings.get("patient_pattern")),
    }
    runs = runs_of(overlays, plan, str(Path(dataset_dir).resolve()), output)
    chosen = runs
    if only is not None:
        chosen = [run for name in only for run in runs if f"{run.variant}:{run.fold}" == name]
        if len(chosen) < len(only):
            raise InputError(f"--only {','.join(only)}: give VARIANT:FOLD, folds from 0 to {fold_count - 1}")
    output.mkdir(parents=True, exist_ok=True)
    write_plan(output / "folds.json", plan)
    todo = [run for run in chosen if not run.done]
    if not todo:
        failures = {}
    elif only is not None:
        with ThreadPoolExecutor(1) as one:
            failures = watch(todo, {run.key: one.submit(run_fold, run, cores) for run in todo})
    else:
        failures = watch(todo, on_ray(todo, address, cores))
    if only is None:
        print(f"\n{collect(runs, output)}\n\nTables: {output}/cases.csv, landmarks.csv, statistics.csv")
    return len(failures)
