"""The few lines that join batch, network and loss in MONAI's Ignite engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from tqdm import tqdm

from scripts.data.files import written_whole


def prepare_batch(
    batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """A batch -> network input and the targets of `losses.LabelDrivenLoss`, on the device; `spacing` stays.

    Args:
        batch: `image` (B, 2, X, Y, Z), and for training `moving_label`, `fixed_label`, `spacing`.

    Returns:
        The image and a dictionary of the three targets; None without labels.
    """
    image = batch["image"].to(device, non_blocking=non_blocking)
    if not {"moving_label", "fixed_label", "spacing"} <= set(batch):
        return image, None
    targets = {k: batch[k].to(device, non_blocking=non_blocking) for k in ("moving_label", "fixed_label")}
    return image, targets | {"spacing": batch["spacing"]}  # read on the CPU, where it makes the filters


class TrainingProgress:
    """One progress bar over all iterations of a run, with the current loss and the time left."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(total=total, desc="Training", unit="step", mininterval=1)

    def _step(self, engine: Engine) -> None:
        self.bar.set_postfix(loss=f"{engine.state.output[0]['loss']:.3f}", refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)  # a resumed run starts further on


class CosineDecay:
    """Let the learning rate fall to zero along half a cosine over all iterations of a run, resumed or not.

    Args:
        optimizer: its groups keep their initial rates as the highest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.highest = [group["lr"] for group in optimizer.param_groups]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)

    def _set(self, engine: Engine) -> None:
        done = (engine.state.iteration - 1) / (engine.state.max_epochs * engine.state.epoch_length)
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * (1 + math.cos(math.pi * done)) / 2


class SaveWeights:
    """Write the network's weights, plain tensors, when a run has completed.

    MONAI's `CheckpointSaver` also writes its final file when a run has failed; a half-trained network must not become
    the one that registers.

    Args:
        path: the weights file; replaced as a whole.
        network: the trained network.
    """

    def __init__(self, path: str, network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self) -> None:
        with written_whole(self.path, "wb") as file:
            torch.save({k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}, file)
