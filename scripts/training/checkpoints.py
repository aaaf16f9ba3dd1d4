"""A training that can be stopped at any moment and goes on as if it had not been."""

from __future__ import annotations

import io
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from ignite.distributed import all_reduce
from ignite.engine import Engine, Events

from scripts.data.checks import INTERRUPTED, InputError
from scripts.data.files import read_sealed, write_sealed
from scripts.training.failures import too_large

STOPPED = 143  # exit code of a run that SIGTERM stopped and that has saved its place: 128 + 15, as shells say it


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; the file is read once.

    Raises:
        ValueError: it is damaged: the SHA-256 in its last 32 bytes is not that of the bytes before.
        UnpicklingError: it holds more than plain values and tensors.
    """
    data = read_sealed(path)  # torch itself opens a file with flipped bits
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class Checkpoints:
    """Write the state of a run after each epoch and when the process is told to stop, and go on from there.

    `checkpoint_epoch=N.pt` holds epoch N, or as much of it as was done when SIGTERM came; the newest files are kept.
    MONAI's `CheckpointSaver` writes in place, and neither it nor torch notices a damaged file.

    Args:
        folder: of the checkpoints.
        state: name -> object with a `state_dict`; one is the trainer. torch's random numbers are saved beside them.
        resume: whether to go on from the newest checkpoint that is whole; a damaged one is passed over with a warning.
        saves: whether this process writes them; of several that train together one does, and all stop at one step.
        keep: how many files.
    """

    def __init__(
        self, folder: str, state: Mapping[str, Any], resume: bool = False, saves: bool = True, keep: int = 2
    ) -> None:
        self.folder = Path(folder)
        self.state = dict(state)
        self.resume = resume
        self.saves = saves
        self.keep = keep
        self.told = False  # to stop

    def run(self, trainer: Engine) -> None:
        """Train; at SIGTERM finish the step, save and exit with code 143 (`STOPPED`).

        During a validation SIGTERM takes effect after it.

        Raises:
            InputError: no checkpoint to resume from, or none that is whole; checkpoints of an earlier run that is not
                to be resumed; a checkpoint that cannot be written; a step for which the GPU's memory is too small.
        """
        self.attach(trainer)
        main = threading.current_thread() is threading.main_thread()  # no other can be told
        before = signal.signal(signal.SIGTERM, self._tell) if main else None
        try:
            trainer.run()
        except torch.OutOfMemoryError as error:
            raise too_large(trainer, error) from None
        except KeyboardInterrupt:
            place = f"at step {trainer.state.iteration}; --resume True goes on from the last checkpoint"
            print(f"\n{INTERRUPTED} {place if self.found() else 'before the first checkpoint'}", file=sys.stderr)
            sys.exit(130)
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        if self.told and trainer.should_terminate:
            print(f"stopped by SIGTERM after step {trainer.state.iteration}; --resume True goes on", file=sys.stderr)
            sys.exit(STOPPED)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)

    def found(self) -> list[Path]:
        """The files, the newest last."""
        return sorted(self.folder.glob("checkpoint_epoch=*.pt"), key=lambda path: int(path.stem.split("=")[1]))

    def _tell(self, *_: Any) -> None:
        self.told = True

    def _start(self, engine: Engine) -> None:
        found = self.found()
        if found and not self.resume:
            raise InputError(
                f"{found[-1]}: is of an earlier run; --resume True goes on from it, or choose another --output_dir"
            )
        if self.saves:
            for left in self.folder.glob(".checkpoint_epoch=*.partial"):  # by a process that was killed as it wrote
                left.unlink()
        if not self.resume:
            return
        if not found:
            raise InputError(f"{self.folder}: no checkpoint to resume from; train without --resume first")
        for path in reversed(found):
            try:
                saved = read(path)
            except PermissionError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            except (OSError, ValueError, UnpicklingError) as error:
                warnings.warn(f"{path}: damaged, trying the one before ({error})", stacklevel=2)
            else:
                self._load(path, saved, engine)
                return
        raise InputError(f"{self.folder}: none of {len(found)} checkpoints can be read; remove them to train anew")

    def _load(self, path: Path, saved: Mapping[str, Any], engine: Engine) -> None:
        epochs, length = engine.state.max_epochs, engine.state.epoch_length
        try:
            for name, thing in self.state.items():
                thing.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            torch.cuda.set_rng_state_all(saved["cuda_random"][: torch.cuda.device_count()])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: does not fit this training; resume with the settings it began with") from error
        if (engine.state.epoch_length, min(engine.state.epoch, epochs)) != (length, engine.state.epoch):
            raise InputError(
                f"{path}: is of epoch {engine.state.epoch} of {engine.state.epoch_length} steps, this training has"
                f" {epochs} of {length}; resume with the --epoch_length it began with and no fewer --iterations"
            )
        engine.state.max_epochs = epochs  # which may be more than when it was saved
        engine.logger.info(f"Resumed from {path} at step {engine.state.iteration}")

    def _stop(self) -> bool:
        """Whether any of the processes that train together was told to stop."""
        self.told = bool(all_reduce(int(self.told)))
        return self.told

    def _after_step(self, engine: Engine) -> None:
        if self._stop() and engine.state.iteration % engine.state.epoch_length:
            self._save(engine)
            engine.terminate(skip_completed=True)

    def _after_epoch(self, engine: Engine) -> None:
        self._save(engine)
        if self._stop() and engine.state.epoch < engine.state.max_epochs:
            engine.terminate(skip_completed=True)

    def _save(self, engine: Engine) -> None:
        if not self.saves:
            return
        path = self.folder / f"checkpoint_epoch={engine.state.epoch}.pt"
        content = {name: thing.state_dict() for name, thing in self.state.items()}
        content |= {"random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all()}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_sealed(path, buffer.getbuffer())
        for path in self.found()[: -self.keep]:
            path.unlink()
