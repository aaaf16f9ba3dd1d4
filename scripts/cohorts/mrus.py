"""The example data of the paper's authors: github.com/YipengHu/example-data, branch mrus; and label-reg's sample of it.

Headers do not tell the truth. The first axis runs to the rectum, the second to the right, the third to the head, in
both images. Voxels of the 108 pairs are of 1.5 mm; those of label-reg's sample, which say 0.4 mm, of about 1.56.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.cohorts.pairs import cases_by_patient, pairs_in
from scripts.cohorts.writing import Found, LeftOut
from scripts.data.checks import InputError
from scripts.data.volumes import load_volume

AXES = "PRS"
TRUE_SIZE = {1.5: 1.5, 0.4: 1.56}  # voxel size that a header says, mm -> the true one
ABOUT = [
    "Example MR-TRUS pairs of the authors of Hu et al., Medical Image Analysis 2018, doi 10.1016/j.media.2018.07.002,",
    "from github.com/YipengHu/example-data (branch mrus), or label-reg's sample of them.",
    "Licence: none is stated there. Ask its authors before you share it or anything learned from it.",
    f"Voxel axes are set to {AXES} and the voxel size to 1.5 mm (label-reg's sample: 1.56), about the true ones; the",
    "images were blurred and shrunk by their authors. The worlds of an MR and a TRUS share no origin.",
]


def find(source: Path) -> Found:
    """The pairs of a download.

    Raises:
        InputError: it holds no pairs; it is another data set.
    """
    pairs, sizes, left_out = [], set(), []
    for pair in pairs_in(source):
        try:
            stated = {_stated(pair[key]) for key in ("moving_image", "fixed_image")}
        except InputError as error:
            left_out.append(LeftOut(pair["case"], str(error)))
            continue
        sizes |= stated
        pairs.append(pair)
    if len(sizes) != 1 or not sizes <= set(TRUE_SIZE):
        raise InputError(
            f"{source}: headers say voxels of {sorted(sizes)} mm; those of this cohort all say 1.5, or 0.4"
        )
    size = TRUE_SIZE[sizes.pop()]
    told = {"moving_spacing": size, "fixed_spacing": size, "moving_axes": AXES, "fixed_axes": AXES}
    cases, more = cases_by_patient(pairs, told)
    return Found(cases, left_out + more, ABOUT)


def _stated(path: str) -> float:
    """The voxel size that a header says, mm, one for all axes; NaN if they differ."""
    size = np.linalg.norm(load_volume(path).affine.numpy()[:3, :3], axis=0)
    return round(float(size[0]), 3) if np.allclose(size, size[0], rtol=1e-3) else float("nan")
