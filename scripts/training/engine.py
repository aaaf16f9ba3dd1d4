"""The few lines that join batch, network and loss in MONAI's Ignite engines."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scripts.data.files import written_whole


def prepare_batch(
    batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """A batch -> network input and the targets of `scripts.network.losses`, on the device; `spacing` stays.

    Args:
        batch: `image` (B, 2, X, Y, Z), and for training `moving_label`, `fixed_label`, `spacing`, and where landmarks
            are points `moving_points`, `fixed_points`.

    Returns:
        The image and a dictionary of the targets; None without labels.
    """
    image = batch["image"].to(device, non_blocking=non_blocking)
    if not {"moving_label", "fixed_label", "spacing"} <= set(batch):
        return image, None
    keys = [f"{side}_{kind}" for kind in ("label", "points") for side in ("moving", "fixed")]
    targets = {k: batch[k].to(device, non_blocking=non_blocking) for k in keys if k in batch}
    return image, targets | {"spacing": batch["spacing"]}  # read on the CPU, where it makes the filters


def prepare_gland_batch(
    batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of `scripts.training.gland_cubes.GlandLoader` -> cubes and the targets of `GlandLoss`, on the device."""
    targets = {key: batch[key].to(device, non_blocking=non_blocking) for key in ("label", "orientation")}
    return batch["image"].to(device, non_blocking=non_blocking), targets


class TrainingProgress:
    """One progress bar over all iterations of a run, with the current loss and the time left.

    The loss is read once a second: to read it waits for the device.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar, self.read = tqdm(total=total, desc="Training", unit="step", mininterval=1), 0.0

    def _step(self, engine: Engine) -> None:
        last = engine.state.iteration == self.bar.total
        if last or time.monotonic() - self.read > self.bar.mininterval:
            self.bar.set_postfix(loss=f"{engine.state.output['loss'].item():.3f}", refresh=False)
            self.read = time.monotonic()
        self.bar.update(engine.state.iteration - self.bar.n)  # a resumed run starts further on


class LossCurve:
    """Write the loss of each step for TensorBoard, several steps at a time: to read one waits for the device.

    Args:
        log_dir: the folder of the events.
        every: so many steps are read together; fewer at the end of an epoch.
    """

    def __init__(self, log_dir: str, every: int = 50) -> None:
        self.log_dir, self.every = log_dir, every
        self.losses: list[tuple[int, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._close)

    def _open(self) -> None:
        self.writer = SummaryWriter(self.log_dir)

    def _add(self, engine: Engine) -> None:
        self.losses.append((engine.state.iteration, engine.state.output["loss"].detach()))
        if len(self.losses) >= self.every:
            self._write()

    def _write(self) -> None:
        if self.losses:
            steps, losses = zip(*self.losses, strict=True)
            for step, loss in zip(steps, torch.stack(losses).tolist(), strict=True):
                self.writer.add_scalar("train_loss", loss, step)
            self.losses = []

    def _close(self) -> None:
        self._write()
        self.writer.close()


class LearningRate:
    """Let the learning rate rise over the first steps of a run and fall along half a cosine over all, resumed or not.

    Adam's first steps have the learning rate's size whatever the gradient's. The summands of a network begin at zero
    and their inputs are positive, so these steps move the whole field one way: at 1e-3 and 8 channels by a third of
    the grid.

    Args:
        optimizer: its groups keep their initial rates as the highest.
        warm_up: steps over which the rate rises in equal parts to the highest; 0 begins with it.
        decay: whether it falls to zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warm_up: int = 0, decay: bool = True) -> None:
        self.optimizer = optimizer
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.warm_up = warm_up
        self.decay = decay

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)

    def _set(self, engine: Engine) -> None:
        step, steps = engine.state.iteration, engine.state.max_epochs * engine.state.epoch_length
        share = min(1, step / max(1, self.warm_up))
        if self.decay:
            share *= (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * share


class SaveWeights:
    """Write the network's weights, plain tensors, when a run has completed: the last, or the mean over the last steps.

    MONAI's `CheckpointSaver` also writes its final file when a run has failed; a half-trained network must not become
    the one that registers.

    Args:
        path: the weights file; replaced as a whole.
        network: the trained network.
        average: weights count less by 1/e for so many steps that they lie back (exponential moving average): from few
            pairs each step is noisy, and the mean generalises better than the last; 0 for the last.
        saves: whether this process writes; of several that train together one does.
    """

    def __init__(self, path: str, network: nn.Module, average: int = 0, saves: bool = True) -> None:
        self.path = Path(path)
        self.network = network
        self.saves = saves
        self.average = average
        self.mean: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        if self.average:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        if self.saves:
            engine.add_event_handler(Events.COMPLETED, self._save)

    def state_dict(self) -> dict[str, Tensor]:
        return self.mean

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        device = next(self.network.parameters()).device
        self.mean = {name: value.to(device) for name, value in state.items()}

    @torch.no_grad()
    def _add(self, engine: Engine) -> None:
        now, step = self.network.state_dict(), engine.state.iteration
        if not self.mean:
            self.mean = {name: value.clone() for name, value in now.items()}
        share = max(1 / self.average, 9 / (9 + step))  # the first steps count for less, however few there are
        for name, value in now.items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, share)
            else:
                self.mean[name].copy_(value)

    def _save(self) -> None:
        state = self.mean or self.network.state_dict()
        once = {v.data_ptr(): v.cpu().contiguous() for v in state.values()}  # what a network shares is stored once
        with written_whole(self.path, "wb") as file:
            torch.save({k: once[v.data_ptr()] for k, v in state.items()}, file)
