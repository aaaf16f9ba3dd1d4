"""LPS, in which ITK and DICOM count millimetres, and RAS, in which this bundle and NIfTI do."""

from __future__ import annotations

import numpy as np
import torch

FLIP = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)  # LPS <-> RAS


def itk_grid(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Origin (3,), spacing (3,) in mm and direction cosines (3, 3), in LPS as ITK has them, of a RAS affine."""
    lps = FLIP.numpy()[:, None] * np.asarray(affine, dtype=float)[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    return lps[:, 3], spacing, lps[:, :3] / spacing
