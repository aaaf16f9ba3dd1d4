"""Weights files: refused unless they are plain tensors that fit, and the ones whose hash is known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from scripts.data.checks import InputError, check_hash


def check_weights(path: str, network) -> str:
    """Refuse weights that are missing, not those of a known hash, not plain tensors or unfit for `network`.

    The hash is compared before the file is opened as weights, see `check_hash`. Returns `path`.

    Raises:
        InputError: see above.
    """
    import torch  # likewise

    if not Path(path).is_file():
        raise InputError(
            f"{path}: no weights there; train first (configs/train.json writes them), or pass --ckpt_path FILE"
        )
    check_hash(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {k: tuple(v.shape) for k, v in found.items()}
    except Exception as error:  # whatever a damaged or hostile file raises is one refusal
        raise InputError(f"{path}: not a readable weights file of plain tensors") from error
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    if shapes != wanted:
        name = next(k for k in [*wanted, *shapes] if shapes.get(k) != wanted.get(k))
        raise InputError(
            f"{path}: does not fit the network: {name} is {shapes.get(name, 'absent')} in the file,"
            f" {wanted.get(name, 'absent')} in the network; pass the settings it was trained with"
        )
    return path


def load_weights(path: str | None, network: nn.Module) -> None:
    """Put the weights of a file into a network, to fine-tune them; None leaves it as it is.

    Raises:
        InputError: see `scripts.data.weights.check_weights`.
    """
    if path is not None:
        network.load_state_dict(torch.load(check_weights(path, network), map_location="cpu", weights_only=True))
