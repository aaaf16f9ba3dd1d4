"""Cross-validation by patient of the Baseline and its variants (Hu et al. 2018, §3.3): a process per variant and fold.

Ray only says where and when; what a run is and leaves: `scripts.study.fold`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.bundle.settings import check_settings
from scripts.bundle.workflow import absolute, import_monai
from scripts.data.checks import InputError
from scripts.data.datalist import check_output, datalist
from scripts.data.root import CONFIGS, ROOT
from scripts.study.fold import RUNNING, run_fold
from scripts.study.plan import Run, deal, merged, name_of, overlays_of, runs_of, write_plan
from scripts.study.tables import collect
from scripts.study.watch import STOPPED, watch

OWN = ("dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "fold", "fold_count", "resume", "split", "weights_name")
PATHS = ("initial_weights", "segmentation_path", "cohort_dir")
OPTIONS = ("dataset_dir", "output_dir", "folds", "variants", "fold_seed", "address", "cores_per_fold", "only", "base")
TABLES = ("cases.csv", "landmarks.csv", "patients.csv", "statistics.csv", "folds.json")


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
        from scripts.study.fold import run_fold
        from scripts.study.plan import Run

        return run_fold(Run(*values), share)

    return {run.key: fold.remote(tuple(run)).future() for run in runs}


def here(runs: Sequence[Run], at_once: int = 1, cores: int | None = None) -> dict[tuple[str, int], str]:
    """Run in processes of this machine, without Ray, so many at once; SIGTERM lets each save its place.

    Args:
        cores: of each; None leaves the environment's.

    Returns:
        (variant, fold) -> why it failed or was stopped, as `watch` says it.
    """
    with ThreadPoolExecutor(at_once) as pool:

        def end() -> None:  # none begins, and those that run save their places
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING.copy():
                process.terminate()

        def stop(*_: Any) -> None:
            end()
            sys.exit(128 + signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return watch(runs, {run.key: pool.submit(run_fold, run, cores) for run in runs})
        except KeyboardInterrupt:
            end()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


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
            see `scripts.data.datalist.check_output`.
    """
    below = [] if base is None else overlays_of(base)
    overlays = {name_of(v): [*below, *overlays_of(v)] for v in variants}
    if len(overlays) < len(variants):
        raise InputError(f"--variants {','.join(variants)}: two of one name")
    settings = {k: absolute(v) if k in PATHS and v else v for k, v in (settings or {}).items()}
    for name in (k.split("#")[0] for k in settings):
        if name in OWN:
            raise InputError(f"--{name}: is set for each fold")
    import_monai()
    files = list(dict.fromkeys([CONFIGS / "train.json", *sum(overlays.values(), [])]))
    check_settings(settings, [str(file) for file in files], "crossval", OPTIONS)
    for variant in variants:
        for name, own in merged(overlays_of(variant)).items():
            if name in settings and settings[name] != own:
                print(f"{variant} sets {name} to {own} itself; --{name} {settings[name]} overrides it", flush=True)
    output = Path(output_dir).absolute()
    plan = {
        "fold_seed": fold_seed,
        "base": merged(below),
        "settings": settings,
        "folds": deal(dataset_dir, fold_count, fold_seed, settings.get("patient_pattern")),
    }
    runs = runs_of(overlays, plan, str(absolute(dataset_dir)), output)
    chosen = runs
    if only is not None:
        chosen = [run for name in only for run in runs if f"{run.variant}:{run.fold}" == name]
        if len(chosen) < len(only):
            raise InputError(f"--only {','.join(only)}: give VARIANT:FOLD, folds from 0 to {fold_count - 1}")
    inputs = [dataset_dir, *files, *(settings.get(name) for name in PATHS)]
    check_output(output_dir, datalist(dataset_dir, "train"), inputs, TABLES, case_folders=False)
    output.mkdir(parents=True, exist_ok=True)
    write_plan(output / "folds.json", plan)
    todo = [run for run in chosen if not run.done]
    if not todo:
        failures = {}
    elif only is not None:
        failures = here(todo, 1, cores)
    else:
        failures = watch(todo, on_ray(todo, address, cores))
    if only is None:
        print(f"\n{collect(runs, output)}\n\nTables: {output}/cases.csv, landmarks.csv, patients.csv, statistics.csv")
    stopped = sum(why.startswith(STOPPED) for why in failures.values())
    if stopped == len(failures) > 0:
        sys.exit(128 + signal.SIGTERM)
    return len(failures) - stopped
