"""In which precision the network runs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from scripts.data.checks import InputError


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
    anew. bfloat16 has float32's range, so training needs no loss scaling; it is float32 where the hardware has none.

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
            if self.precision == "bfloat16" and not computes_bfloat16(inputs.device):
                warnings.warn("this processor does not compute bfloat16; this run trains in float32", stacklevel=3)
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
