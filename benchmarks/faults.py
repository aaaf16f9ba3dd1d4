"""Faults, repeated: what is lost of a training when its process, its disk or its files fail.

Each function below brings a fault about `tries` times and returns what was lost, a line for each loss. Survived means:
the fault was said in one line or by a warning, nothing that had been saved was lost, and what went on from it went on
right. `make faults` writes the table into docs/reliability.md. Linux; as root the full disk is a small tmpfs.
"""

import argparse
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python benchmarks/faults.py`

from scripts.data.checks import InputError, refusal  # noqa: E402
from scripts.phantoms.phantom import write_cohort  # noqa: E402
from scripts.training.checkpoints import STOPPED, Checkpoints, read  # noqa: E402
from scripts.training.on_disk import kept  # noqa: E402

PAGE, MARKS = ROOT / "docs" / "reliability.md", ("<!-- faults -->\n", "<!-- /faults -->\n")
QUICK = {"initial_channels": 4, "spacing": 4.0, "batch_size": 2, "val_interval": 100}
TRAINING = QUICK | {"epoch_length": 6, "learning_rate": 1e-3, "learning_rate_decay": True}
TRAINING |= {"phantom_share": 0.5, "phantom_pool": 2}  # their place, too, has to be found again
NOBODY = 65534


def counting(folder: Path, resume: bool, size: int = 2**18) -> tuple[Engine, nn.Module]:
    """A run whose state shows whether it is whole and of which epoch: `size` numbers, all of them the epoch's."""
    numbers = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(numbers.weight)
    engine = Engine(lambda engine, batch: numbers.weight.data.add_(1))
    engine.state.max_epochs, engine.state.epoch_length = 10**6, 1
    Checkpoints(str(folder), {"numbers": numbers, "trainer": engine}, resume).attach(engine)
    return engine, numbers


def run_on(folder: Path, epochs: int, resume: bool = True, **size: int) -> int:
    """Some epochs more of `counting`; returns the epoch it went on from."""
    engine, numbers = counting(folder, resume, **size)
    began: list[int] = []

    @engine.on(Events.STARTED)
    def _() -> None:
        (epoch,) = {engine.state.epoch, *numbers.weight.unique().int().tolist()}  # whole, or an error
        began.append(epoch)

    @engine.on(Events.EPOCH_COMPLETED)
    def _() -> None:
        if engine.state.epoch == began[0] + epochs:
            engine.terminate()

    engine.run([0], max_epochs=10**6)
    return began[0]


def newest(folder: Path) -> int:
    """The epoch of the newest checkpoint of `counting`; ValueError where it is damaged or not of one epoch."""
    saved = read(Checkpoints(str(folder), {}).found()[-1])
    (epoch,) = {saved["trainer"]["iteration"], *saved["numbers"]["weight"].unique().int().tolist()}
    return epoch


# ---- checkpoints


def save_on_and_on(folder: str, resume: bool, saved: Any) -> None:
    """In a process of its own: save as fast as possible and tell each epoch that is saved."""
    engine, _ = counting(Path(folder), resume)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: saved.send(engine.state.epoch))
    engine.run([0], max_epochs=10**6)


def killed_while_saving(folder: Path, tries: int) -> list[str]:
    """SIGKILL at a random moment of saving"""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.faults"])
    lost, halves = [], 0
    for k in range(tries):
        here, there = processes.Pipe(duplex=False)
        process = processes.Process(target=save_on_and_on, args=(str(folder), k > 0, there))
        process.start()
        there.close()
        told = here.recv()  # the first is saved
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                told = here.recv()
        halves += any(folder.glob(".*.partial"))
        try:
            if newest(folder) < told:
                lost.append(f"kill {k}: epoch {told} was saved, {newest(folder)} is the newest")
        except ValueError as error:
            lost.append(f"kill {k}: {error}")
    print(f"{halves} of {tries} kills left half a file, which the next start removed")
    return lost


def damaged(folder: Path, tries: int) -> list[str]:
    """checkpoint truncated, or a bit of it flipped"""
    run_on(folder, 2, resume=False, size=2**10)
    path = folder / "checkpoint_epoch=2.pt"
    whole = path.read_bytes()
    lost, opened = [], 0
    for k in range(tries):
        place = k * len(whole) // tries  # every region of the file
        broken = bytearray(whole if k % 4 else whole[:place])
        if k % 4:
            broken[place] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        with suppress(Exception):
            torch.load(path, weights_only=True)
            opened += 1
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            began = run_on(folder, 1, size=2**10)
        if began != 1 or "checkpoint_epoch=2.pt: damaged, trying the one before" not in str(told[0].message):
            lost.append(f"byte {place} of {len(whole)}")
    print(f"torch.load alone opens {opened} of {tries} damaged checkpoints")
    return lost


# ---- disks


@contextmanager
def disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A function that limits the bytes a folder can hold: it is a tmpfs as root, else no file may be larger."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
        try:
            yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@contextmanager
def as_user(folder: Path) -> Iterator[None]:
    """root may write anywhere: be nobody, whose folder this is, for a while."""
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def cannot_be_written(folder: Path, why: str) -> list[str]:
    """What was lost of a run that has saved before and now cannot: it has to say why and to leave what there is."""
    before = newest(folder)
    try:
        run_on(folder, 3)
    except InputError as error:
        if f"cannot be written ({why})" not in str(error):
            return [f"said {error}"]
    else:
        return ["not said"]
    if any(folder.glob(".*")):
        return ["half a file is left"]
    return [] if newest(folder) >= before else ["an older one is left"]


def full_disk(folder: Path, tries: int) -> list[str]:
    """disk full while saving"""
    lost = []
    with disk(folder) as limit:
        for k in range(tries):
            limit(2**24)
            left = newest(folder) if k else 0
            if run_on(folder, 1, resume=k > 0) != left:
                lost.append(f"did not go on from {left}")
            used = [file.stat().st_size for file in folder.iterdir()]
            room = int(used[0] * random.uniform(0.05, 0.95))
            limit(sum(used) + room if os.geteuid() == 0 else room)
            lost += cannot_be_written(folder, "No space left on device" if os.geteuid() == 0 else "File too large")
    return lost


def read_only(folder: Path, tries: int) -> list[str]:
    """folder that turned read-only"""
    lost = []
    with as_user(folder):
        for k in range(tries):
            if run_on(folder, 1, resume=k > 0) != k:  # nothing was written but here
                lost.append("did not go on")
            folder.chmod(0o555)
            lost += cannot_be_written(folder, "Permission denied")
            folder.chmod(0o755)
    return lost


# ---- processes


class Dying(Dataset):
    """Pairs of which one ends the process that reads it: by a signal, as where memory runs out, or by an exit code."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        if index == 5:
            os.kill(os.getpid(), -self.how) if self.how < 0 else os._exit(self.how)
        return {"case": str(index)}


CAUSES = {-signal.SIGKILL: "Killed", -signal.SIGSEGV: "Segmentation fault", 3: "exit code 3"}


def dead_reader(folder: Path, tries: int) -> list[str]:
    """loader worker killed"""
    lost = []
    for k in range(tries):
        how, cause = list(CAUSES.items())[k % len(CAUSES)]
        try:
            list(kept(Dying(how), dict, 2, "Reading"))
            lost.append(f"{cause}: not noticed")
        except Exception as error:
            if cause not in str(refusal(error)):
                lost.append(f"{cause}: said {error}")
    return lost


def cohort(folder: Path, patients: int) -> Path:
    size = {"fixed_shape": (22, 30, 22), "fixed_spacing": 3.0, "moving_shape": (26, 26, 20)}
    return write_cohort(folder, patients, seed=3, split=(1, 0, 0), moving_spacing=(2.8, 2.8, 3.6), **size)


def start(log: Path, *arguments: str) -> subprocess.Popen:
    """`python -m …` in the bundle's folder."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def interrupted(folder: Path, tries: int) -> list[str]:
    """training told to stop (SIGTERM) or killed, in turn"""
    data, lost, log = cohort(folder / "cohort", 3), [], folder / "log.txt"

    def train(name: str, **more: Any) -> subprocess.Popen:
        """Returned when it begins to train."""
        settings = TRAINING | {"iterations": 6 * tries, "dataset_dir": data, "output_dir": folder / name} | more
        log.touch()
        before = log.stat().st_size
        process = start(log, "monai.bundle", "run", "--config_file", "configs/train.json", *flags(settings))
        while process.poll() is None and b"Training:" not in log.read_bytes()[before:]:
            time.sleep(0.05)
        return process

    process, began = train("plain"), time.monotonic()
    if process.wait():
        return [f"an undisturbed training ended with an error, see {log}"]
    seconds = time.monotonic() - began
    for k in range(tries):
        told = (signal.SIGTERM, signal.SIGKILL)[k % 2]
        process = train("disturbed", resume=k > 0)
        time.sleep(random.uniform(0, 1.5 * seconds / tries))
        process.send_signal(told)
        code = process.wait()
        if code != (STOPPED if told == signal.SIGTERM else -told):
            lost.append(f"{told.name} {k}: exit code {code}, see {log}")
    if train("disturbed", resume=True).wait():
        return [*lost, f"did not go on, see {log}"]
    a, b = (torch.load(folder / name / "model.pt", weights_only=True) for name in ("plain", "disturbed"))
    return lost if all(torch.equal(a[k], b[k]) for k in a) else [*lost, "the weights are others than undisturbed"]


def training_in(folder: Path) -> list[int]:
    """Process ids of what trains or evaluates in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "monai.bundle" in words and any(str(folder) in word for word in words):
                found.append(int(entry.name))
    return found


def killed_fold(folder: Path, tries: int) -> list[str]:
    """fold of a cross-validation on Ray killed, or told to stop, in turn"""
    data, lost, log = cohort(folder / "cohort", 4), [], folder / "log.txt"
    for k in range(tries):
        output = folder / f"cv{k}"
        first, other = (output / "runs" / "baseline" / f"fold{fold}" for fold in (0, 1))
        settings = QUICK | {"iterations": 4, "epoch_length": 1, "folds": 2, "cores_per_fold": 1}
        command = ["scripts", "crossval", *flags(settings | {"dataset_dir": data, "output_dir": output})]
        runner = start(log, *command)
        while runner.poll() is None and not (first / "checkpoint_epoch=1.pt").exists():
            time.sleep(0.01)
        told, code = ((signal.SIGKILL, 1), (signal.SIGTERM, STOPPED))[k % 2]
        os.kill(training_in(first)[0], told)
        if runner.wait() != code:
            lost.append(f"{told.name}: exit code {runner.returncode}, not {code}, see {log}")
        if (first / "done.json").exists() or not (other / "done.json").exists():
            lost.append(f"{told.name}: not this fold alone was stopped, see {log}")
        before = (other / "done.json").stat().st_mtime_ns
        if start(log, *command).wait() or (other / "done.json").stat().st_mtime_ns != before:
            lost.append(f"{told.name}: not this fold alone was done again, see {log}")
        if "--resume=True" not in (first / "log.txt").read_text():
            lost.append(f"{told.name}: the fold began anew")
        if len((output / "cases.csv").read_text().splitlines()) != 1 + 4:
            lost.append(f"{told.name}: cases are missing in the table")
    return lost


TRIES = {
    killed_while_saving: 100,
    damaged: 1000,
    full_disk: 20,
    read_only: 5,
    dead_reader: 6,
    interrupted: 8,
    killed_fold: 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one of the functions; the page is not written then")
    only = parser.parse_args().only
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # the faults are wanted
    rows, failed = ["| fault | tried | survived | lost |", "| --- | --- | --- | --- |"], False
    for fault, tries in TRIES.items():
        if only not in (None, fault.__name__):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)
            lost = fault(folder, tries)
            failed |= bool(lost)
            print(
                *lost, f"{fault.__doc__}: {tries} tried, {len(lost)} lost, {time.monotonic() - began:.0f} s", sep="\n"
            )
            if lost and (folder / "log.txt").exists():
                print((folder / "log.txt").read_text()[-4000:])
        rows.append(f"| {fault.__doc__} | {tries} | {tries - len(lost)} | {len(lost)} |")
    table = "\n".join(rows) + "\n"
    print(f"\n{table}")
    if only is None:
        before, after = (PAGE.read_text(encoding="utf-8").split(mark) for mark in MARKS)
        PAGE.write_text(before[0] + MARKS[0] + table + MARKS[1] + after[1], encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
