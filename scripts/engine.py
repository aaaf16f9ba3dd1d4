"""The few lines that join batch, network and loss in MONAI's Ignite engines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from tqdm import tqdm

from scripts.checks import InputError, check_weights
from scripts.files import written_whole


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


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units: CUDA from Ampere on, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(has.get("amx_bf16") or has.get("avx512_bf16"))


class PrecisionInferer(SimpleInferer):
    """Run the network, and only the network, in bfloat16 where that is asked for and safe; the DDF is float32.

    Before bfloat16 is used for prediction, it is checked on the first input against float32 (on a CPU on its middle 48³
    voxels): a DDF that is more than `tolerance` away means a warning and float32 from then on. New weights are checked
    anew. bfloat16 has float32's range, so training needs no loss scaling.

    Args:
        precision: "float32"; "bfloat16"; "auto": float32 in training, and in prediction bfloat16 where the hardware has
            it, see `computes_bfloat16`.
        tolerance: of the check, in voxels.

    Attributes:
        used: the precision of the last call, "float32" or "bfloat16".

    Raises:
        InputError: another precision.
    """

    def __init__(self, precision: str = "auto", tolerance: float = 0.05) -> None:
        super().__init__()
        if precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f'precision is {precision!r}; it must be "auto", "float32" or "bfloat16"')
        self.precision = precision
        self.tolerance = tolerance
        self.used = "float32"
        self._checked: tuple[Any, bool] = (None, False)  # the weights it was for, and what came out

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        half = self._half(inputs, network)
        self.used = "bfloat16" if half else "float32"
        return self._run(inputs, network, half)

    @staticmethod
    def _run(inputs: Tensor, network: nn.Module, half: bool) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=half):
            return network(inputs).float()

    def _half(self, inputs: Tensor, network: nn.Module) -> bool:
        if self.precision == "float32" or next(network.parameters(), None) is None:  # nothing is computed
            return False
        if network.training:
            if self.precision == "bfloat16" and inputs.device.type != "cuda":
                # bfloat16 trainings on a CPU went NaN where float32 did not; the cause is not isolated
                warnings.warn("training in bfloat16 runs on CUDA only; this run uses float32", stacklevel=3)
                self.precision = "float32"
            return self.precision == "bfloat16"
        if self.precision == "auto" and not computes_bfloat16(inputs.device):
            return False
        # tensors made in inference mode count no versions
        weights = (id(network), sum(0 if p.is_inference() else p._version for p in network.parameters()))
        if self._checked[0] != weights:
            self._checked = (weights, self._agrees(inputs, network))
        return self._checked[1]

    @torch.inference_mode()
    def _agrees(self, inputs: Tensor, network: nn.Module) -> bool:
        part = inputs[:1]
        if inputs.device.type == "cpu":
            part = part[(..., *(slice(max(0, n // 2 - 24), n // 2 + 24) for n in part.shape[2:]))]
        apart = (self._run(part, network, True) - self._run(part, network, False)).abs().max().item()
        if not apart <= self.tolerance:
            message = f"bfloat16 moves the DDF by {apart:.3g} voxel, more than {self.tolerance}; this run uses float32"
            warnings.warn(message, stacklevel=4)
        return apart <= self.tolerance


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


def load_weights(path: str | None, network: nn.Module) -> None:
    """Put the weights of a file into a network, to fine-tune them; None leaves it as it is.

    Raises:
        InputError: see `scripts.checks.check_weights`.
    """
    if path is not None:
        network.load_state_dict(torch.load(check_weights(path, network), map_location="cpu", weights_only=True))
