"""The few lines that join batch, network and loss in MONAI's Ignite engines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from tqdm import tqdm

from scripts.checks import InputError


def prepare_batch(
    batch: Mapping[str, Any], device: torch.device | str, non_blocking: bool = False
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """A batch -> network input and the targets of `scripts.losses.LabelDrivenLoss`, on the device; `spacing` stays.

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


class MixedPrecisionInferer(SimpleInferer):
    """Run the network, and only the network, in bfloat16 on CUDA; warp and losses see a float32 DDF.

    bfloat16 has float32's range, so no loss scaling is needed.

    Args:
        amp: False is plain float32.
    """

    def __init__(self, amp: bool = False) -> None:
        super().__init__()
        self.amp = amp in (True, "true", "True")  # the command line may hand over a string

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        amp = self.amp and inputs.device.type == "cuda"
        if self.amp and not amp:
            # bfloat16 trainings on a CPU went NaN where float32 did not; the cause is not isolated
            warnings.warn("amp runs on CUDA only; this run uses float32", stacklevel=2)
            self.amp = False
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            return super().__call__(inputs, network, *args, **kwargs).float()


class TrainingProgress:
    """One progress bar over all iterations of a run, with the current loss and the time left."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(total=total, desc="Training", unit="step", mininterval=1)

    def _step(self, engine: Engine) -> None:
        self.bar.set_postfix(loss=f"{engine.state.output[0]['loss']:.3f}", refresh=False)
        self.bar.update(engine.state.iteration - self.bar.n)  # a resumed run starts further on


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        torch.save({k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}, partial)
        partial.replace(self.path)


class ResumeLatest:
    """Load the newest checkpoint of a run before it starts: network, optimiser and the trainer's place.

    Args:
        folder: where `CheckpointSaver` wrote.
        load_dict: name -> object, the same as was saved.

    Raises:
        InputError: no checkpoint in `folder`.
    """

    def __init__(self, folder: str, load_dict: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.load_dict = dict(load_dict)

    def attach(self, engine: Engine) -> None:
        found = sorted(self.folder.glob("checkpoint_epoch=*.pt"), key=lambda p: int(p.stem.split("=")[1]))
        if not found:
            raise InputError(f"{self.folder}: no checkpoint to resume from; train without --resume first")
        CheckpointLoader(str(found[-1]), self.load_dict).attach(engine)
