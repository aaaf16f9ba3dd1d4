"""µ-RegPro, the challenge of MICCAI 2023: Zenodo 7870104, unpacked."""

from __future__ import annotations

from pathlib import Path

from scripts.cohorts.pairs import cases_by_patient, pairs_in
from scripts.cohorts.writing import Found
from scripts.data.axes import checked_axes

ABOUT = [
    "µ-RegPro, MR-TRUS registration challenge of MICCAI 2023, https://zenodo.org/records/7870104",
    "Licence: CC BY-NC-SA 4.0, not for commercial use, https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "Cite: MR to Ultrasound Registration for Prostate Challenge, Zenodo 2023, doi 10.5281/zenodo.7870104; and",
    "Hu et al., Medical Image Analysis 2018, doi 10.1016/j.media.2018.07.002.",
    "Images, voxel sizes and axes are those of the headers.",
]


def find(source: Path, moving_axes: str | None = None, fixed_axes: str | None = None) -> Found:
    """The pairs of the archive, a number for each patient.

    Args:
        moving_axes, fixed_axes: where the voxel axes run to, if the headers do not tell the truth.

    Raises:
        InputError: it holds no pairs.
    """
    told = {
        "moving_axes": checked_axes("--moving_axes", moving_axes),
        "fixed_axes": checked_axes("--fixed_axes", fixed_axes),
    }
    cases, left_out = cases_by_patient(pairs_in(source), told)
    return Found(cases, left_out, ABOUT)
