"""In which precision the network runs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scripts.data.checks import InputError


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units: CUDA from Ampere on, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(has.get("amx_bf16") or has.get("avx512_bf16"))


class _Shallow(TorchFunctionMode):
    """Notes whether a 3D convolution saw fewer planes than its kernel has."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv3d:
            self.seen |= args[0].shape[2] < args[1].shape[2]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def has_shallow_maps(network: nn.Module, inputs: Tensor) -> bool:
    """Whether a convolution of `network` sees fewer planes (the first axis in space) than its kernel has.

    On a CPU its weights' gradient in bfloat16 then has a part that is never computed, whatever was in memory (oneDNN,
    torch 2.13): NaN now and then, or wrong in silence.
    """
    training = [module for module in network.modules() if module.training]
    network.eval()  # counts no statistics
    try:
        with _Shallow() as shallow:
            network(inputs[:1])
    finally:
        for module in training:
            module.training = True
    return shallow.seen


class PrecisionInferer(SimpleInferer):
    """Run the network, and only the network, in bfloat16 where that is asked for and safe; the DDF is float32.

    Before bfloat16 is used for prediction, it is checked on the first input against float32 (on a CPU on its middle 48³
    voxels): a DDF that is more than `tolerance` away means a warning and float32 from then on. New weights are checked
    anew. bfloat16 has float32's range, so training needs no loss scaling. It is float32, with a warning, where the
    hardware has no bfloat16, and on a CPU where `has_shallow_maps`.

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
        self._trained: torch.Size | None = None  # the size of input that may be trained on in bfloat16

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
            return self.precision == "bfloat16" and self._trains(inputs, network)
        if self.precision == "auto" and not computes_bfloat16(inputs.device):
            return False
        # tensors made in inference mode count no versions
        weights = (id(network), sum(0 if p.is_inference() else p._version for p in network.parameters()))
        if self._checked[0] != weights:
            self._checked = (weights, self._agrees(inputs, network))
        return self._checked[1]

    def _trains(self, inputs: Tensor, network: nn.Module) -> bool:
        """Whether training may be in bfloat16; where not, it is said, and this run is in float32."""
        if inputs.shape[2:] == self._trained:
            return True
        why = None
        if not computes_bfloat16(inputs.device):
            why = "this processor does not compute bfloat16"
        elif inputs.device.type == "cpu" and has_shallow_maps(network, inputs):
            why = "a feature map has fewer planes than its kernel, and a CPU's bfloat16 gradients of those are wrong"
        if why:
            warnings.warn(f"{why}; this run trains in float32", stacklevel=4)
            self.precision = "float32"
        self._trained = inputs.shape[2:]
        return not why

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
