"""Steps of a training that go wrong: what is not finite is left out, what does not fit is tried smaller, and a training
whose labels are gone ends."""

from __future__ import annotations

import math
import traceback
import warnings
from typing import Any

import torch
from ignite.distributed import all_reduce, get_world_size
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from scripts.data.checks import InputError
from scripts.network.fields import warp
from scripts.network.losses import reached


class SkipNonFinite:
    """Leave out a step whose loss or gradient is not finite, with a warning; stop the run after several in a row.

    Weights, normalisation statistics and optimiser stay as they were. `engine.state.skipped` and `skipped_in_a_row`
    count these steps, also across a resume.

    Args:
        network, optimizer: of the trainer.
        most: steps in a row that may be left out; one more raises `InputError` with the cases of its batch.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, most: int = 10) -> None:
        self.network = network
        self.optimizer = optimizer
        self.most = most

    def attach(self, engine: Engine) -> None:
        for name in ("skipped", "skipped_in_a_row"):
            setattr(engine.state, name, 0)
            engine.state_dict_user_keys.append(name)
        engine.add_event_handler(Events.ITERATION_STARTED, self._remember)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check)

    def _remember(self) -> None:
        self.statistics = [buffer.clone() for buffer in self.network.buffers()]

    @torch.no_grad()
    def _check(self, engine: Engine) -> None:
        state, loss = engine.state, engine.state.output["loss"]
        largest = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None], math.inf)
        if math.isfinite(all_reduce(float(loss + largest))):  # processes that train together leave out the same steps
            state.skipped_in_a_row = 0
            return
        self.optimizer.zero_grad(set_to_none=True)  # an optimiser leaves alone what has no gradient
        for buffer, before in zip(self.network.buffers(), self.statistics, strict=True):
            buffer.copy_(before)
        state.skipped += 1
        state.skipped_in_a_row += 1
        what = f"loss {loss:.3g}, largest gradient {largest:.3g}"
        cases = ", ".join(dict.fromkeys(state.batch.get("case", [])))
        if state.skipped_in_a_row > self.most:
            raise InputError(
                f"{state.skipped_in_a_row} steps in a row were not finite, the last, {state.iteration}, with {what} on"
                f" {cases}; look at these cases, or lower --learning_rate"
            )
        warnings.warn(f"step {state.iteration} is left out: {what}; {state.skipped} so far; {cases}", stacklevel=2)


class EndWithoutLabels:
    """End a run in which the field has pushed the labels off the grid and they do not come back: it learns nothing.

    A step has lost its labels where the field reaches less than half of most of them (`losses.reached`).
    `engine.state.steps_without_labels` counts such steps, less those since that had their labels, not below 0, also
    across a resume.

    Args:
        most: this many end the run with an `InputError`, or, in a run of less than twice as many steps, half of them.
    """

    def __init__(self, most: int = 100) -> None:
        self.most = most

    def attach(self, engine: Engine) -> None:
        engine.state.steps_without_labels = 0
        engine.state_dict_user_keys.append("steps_without_labels")
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check)

    @torch.no_grad()
    def _check(self, engine: Engine) -> None:
        state, targets = engine.state, engine.state.output["label"]
        lost = reached(warp(targets["moving_label"], state.output["pred"].float()), targets) < 0.5
        share = all_reduce(float(lost.float().mean())) / get_world_size()
        state.steps_without_labels = max(0, state.steps_without_labels + (1 if share > 0.5 else -1))
        if state.steps_without_labels >= min(self.most, state.max_epochs * state.epoch_length / 2):
            raise InputError(
                f"step {state.iteration}: the field has pushed the labels off the grid and for"
                f" {state.steps_without_labels} steps they did not come back; nothing is learned and no weights are"
                " written; train anew with a lower --learning_rate or a longer --warm_up (steps)"
            )


def too_large(trainer: Engine, error: torch.OutOfMemoryError) -> InputError:
    """What to say after a step of a MONAI trainer for which the GPU's memory was too small: the size that fits.

    It is tried, not estimated: all pairs once more, half of them, a quarter …, then one pair with half of its voxels, a
    quarter, an eighth. The network is not to be used afterwards.
    """
    traceback.clear_frames(error.__traceback__)  # they hold what the step had computed
    batch, trainer.state.output = trainer.state.batch, None
    if not isinstance(batch, dict):  # it was made, or decollated
        return InputError(f"the GPU's memory is too small; --cohort_device cpu leaves it to the network ({error})")
    pairs, _, *grid = batch["image"].shape
    trials = [(pairs >> k, 1.0) for k in range(pairs.bit_length())] + [(1, 2 ** (-k / 3)) for k in (1, 2, 3)]
    count, edge = next((trial for trial in trials if _fits(trainer, part(batch, *trial))), (0, 1.0))
    found = f"--batch_size {count} fits" if count else "not even an eighth of one pair fits"
    if edge < 1:
        found = f"--batch_size 1 fits with voxels {1 / edge:.2f} times as wide (--spacing)"
    elif count == pairs:
        found = "such a step alone does fit, so a validation or another process takes the rest"
    if any(getattr(module, "checkpointing", None) is False for module in trainer.network.modules()):
        found += "; --network_def#checkpointing True needs less"
    size = f"--batch_size {pairs} with {'x'.join(map(str, grid))} voxels"
    return InputError(f"the GPU's memory is too small for a step of {size}; tried: {found}")


def part(batch: dict[str, Any], pairs: int, edge: float = 1.0) -> dict[str, Any]:
    """The first pairs of a batch, each of its grids (B, C, X, Y, Z) cut to a share of its edges."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 5:
            return value[(slice(pairs), slice(None), *(slice(math.ceil(n * edge)) for n in value.shape[2:]))]
        return value[:pairs]

    return {key: cut(value) for key, value in batch.items()}


def _fits(trainer: Engine, batch: dict[str, Any]) -> bool:
    """Whether a step of a batch runs through."""
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    try:
        image, targets = trainer.prepare_batch(batch, trainer.state.device)
        trainer.loss_function(trainer.inferer(image, trainer.network), targets).mean().backward()
        trainer.optimizer.step()  # whose first allocates its moments
    except torch.OutOfMemoryError:
        return False
    return True
