"""Directions of voxel axes as the user declares them, for images whose header does not tell the truth.

Three letters say where the first, the second and the third voxel axis run to: R or L, A or P, S or I. They are the
codes that NIfTI tools print of a header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.data.checks import InputError

OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def checked_axes(option: str, axes: Any) -> str | None:
    """The letters in capitals; None stays None.

    Raises:
        InputError: no three letters of three pairs.
    """
    if axes is None:
        return None
    letters = str(axes).upper()
    if sorted(min(c, OPPOSITE.get(c, "?")) for c in letters) != ["A", "I", "L"]:
        raise InputError(
            f"{option} {axes}: expected where the three voxel axes run to, one letter of R/L, A/P and S/I each,"
            " for example LPS"
        )
    return letters


def declared(affine: np.ndarray, shape: Sequence[int], axes: str | None) -> np.ndarray:
    """An affine (4, 4), float64, RAS mm, whose voxel axes run as declared; voxel size and the volume's centre stay.

    Args:
        affine: of the header.
        shape: voxels along the three axes.
        axes: see above; None for those of the header.
    """
    affine = np.asarray(affine, float)
    if axes is None:
        return affine
    made = affine.copy()
    made[:3, :3] = np.array([DIRECTIONS[c] for c in axes]).T * np.linalg.norm(affine[:3, :3], axis=0)
    made[:3, 3] += (affine - made)[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return made
