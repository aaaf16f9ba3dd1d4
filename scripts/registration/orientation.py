"""Which way round a volume is stored: the eight ways that a network can tell apart, and what each says of the axes.

Headers do not always tell the truth. Patients are nearly symmetric from left to right, so what can be seen is which of
the first two axes runs from left to right, whether the other runs to the front, and whether the third runs to the head:
eight ways. Of a cube in the order nearest to RAS, way 0 is what the header says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nibabel.orientations import aff2axcodes
from torch import Tensor

from scripts.data.axes import DIRECTIONS, OPPOSITE
from scripts.network.segmentation import ORIENTATIONS

CLEAR = 2.0  # a header is believed unless another way is likelier by this, in logarithms
SURE = 4.0  # of a cube seen once or twice: that much likelier than any other way, and the others are not looked at
WAYS = tuple((swapped, back, down) for swapped in (0, 1) for back in (0, 1) for down in (0, 1))


def _flipped(cubes: Tensor, back: int, down: int) -> Tensor:
    dims = [dim for dim, over in ((-2, back), (-1, down)) if over]
    return cubes.flip(dims) if dims else cubes


def turned(cubes: Tensor, way: int) -> Tensor:
    """Cubes (..., X, Y, Z) of which the last three dimensions run right, to the front and to the head, stored `way`."""
    swapped, *over = WAYS[way]
    cubes = _flipped(cubes, *over)
    return cubes.transpose(-3, -2) if swapped else cubes


def upright(cubes: Tensor, way: int) -> Tensor:
    """The inverse of `turned`."""
    swapped, *over = WAYS[way]
    return _flipped(cubes.transpose(-3, -2) if swapped else cubes, *over)


def upright_axes(axes: Tensor, way: int) -> Tensor:
    """Directions of the axes of an `upright` cube as columns (3, 3), from those of the cube as it is stored."""
    swapped, back, down = WAYS[way]
    axes = axes[:, [1, 0, 2]] if swapped else axes
    return axes * torch.tensor([1, -1 if back else 1, -1 if down else 1]).to(axes)


def after(way: int, turn: int) -> int:
    """How a cube that is stored `way` is stored once it was made `upright` from `turn`, but for left and right."""
    (swapped, back, down), (exchanged, back_too, down_too) = WAYS[way], WAYS[turn]
    back = back if swapped != exchanged else back ^ back_too
    return WAYS.index((swapped ^ exchanged, back, down ^ down_too))


def votes(logits: Tensor, turns: Sequence[int] = range(8)) -> Tensor:
    """The logarithm of the probability of each way, (8,), by what a network says of a cube upright from some ways.

    Args:
        logits: shape (turns, 8).
        turns: the ways that it was made upright from.
    """
    said = logits.double().log_softmax(-1)
    mean = [
        torch.stack([of[after(way, turn)] for of, turn in zip(said, turns, strict=True)]).mean() for way in range(8)
    ]
    return torch.stack(mean).log_softmax(0)


def is_sure(said: Tensor) -> bool:
    """Whether one way is likelier by `SURE` than any other, of `votes` (8,)."""
    first, second = said.topk(2).values
    return bool(first - second >= SURE)


def believed(said: Tensor) -> int:
    """The way that a volume is stored, from `votes` (8,): what the header says, unless another is clearly likelier."""
    other = int(said[1:].argmax()) + 1
    return other if said[other] - said[0] > CLEAR else 0


def codes(affine: np.ndarray, way: int) -> str:
    """The directions of the three voxel axes of a volume, for example "LPS", if it is stored `way`.

    Which of left and right is not seen: it is what keeps the handedness of the header.

    Args:
        affine: voxel -> world RAS mm of the header, shape (4, 4).
    """
    swapped, back, down = WAYS[way]
    front, head = "AP"[back], "SI"[down]
    handed = np.sign(np.linalg.det(np.asarray(affine, float)[:3, :3]))
    for side in "RL":
        true = dict(zip("RAS", (front, side, head) if swapped else (side, front, head), strict=True))
        found = [true[c] if c in true else OPPOSITE[true[OPPOSITE[c]]] for c in aff2axcodes(affine)]
        if np.sign(np.linalg.det(np.array([DIRECTIONS[c] for c in found]))) == handed:
            break
    return "".join(found)


def way_of(affine: np.ndarray, axes: str) -> int:
    """The way whose `codes` these are."""
    return next(way for way in range(ORIENTATIONS) if codes(affine, way) == axes)
