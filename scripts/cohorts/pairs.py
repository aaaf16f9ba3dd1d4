"""Sources whose pairs are image files already: how they are found and loaded, and whose they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scripts.cohorts.writing import Case, LeftOut, Side, named
from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.datalist import FOLDERS, SPLITS, datalist
from scripts.data.pairs import LoadPaird, load_image

ONE_PATIENT, TWO_PATIENTS = 0.99, 0.95  # correlation of two MR: at least, at most; measured 0.997 and 0.906


def pairs_in(source: Path) -> list[dict[str, str]]:
    """The pairs of a folder with the four sub-folders, split or not, or of its one sub-folder that is such; by name.

    Raises:
        InputError: none, or several such folders; see `scripts.data.datalist.datalist`, for two pairs of one name.
    """
    inner = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    places = [source] if _has_pairs(source) else [path for path in inner if _has_pairs(path)]
    if len(places) != 1:
        names = ", or ".join(", ".join(names) for names in FOLDERS)
        raise InputError(f"{source}: expected one folder, unpacked, with the sub-folders {names}; found {len(places)}")
    found: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        found |= {pair["case"]: pair for pair in datalist(str(places[0]), split)}
    return [found[case] for case in sorted(found)]


def _has_pairs(folder: Path) -> bool:
    there = [folder, *(folder / split for split in SPLITS)]
    return any((place / names[0]).is_dir() for place in there for names in FOLDERS)


def load_pair(pair: Mapping[str, str], columns: Mapping[str, str], **told) -> tuple[Side, Side, dict[str, str]]:
    """A pair through the input gate; `told` as of `scripts.data.pairs.LoadPaird`."""
    item = LoadPaird(**told)(pair)
    sides = [
        Side(item[f"{side}_image"][0].numpy(), item[f"{side}_label"].numpy(), item[f"{side}_image"].affine.numpy())
        for side in ("moving", "fixed")
    ]
    return sides[0], sides[1], dict(columns)


def cases_by_patient(pairs: Sequence[dict[str, str]], told: Mapping) -> tuple[list[Case], list[LeftOut]]:
    """Cases of pairs whose patients are known by their MR, which a patient's pairs share but for noise.

    A name that begins with patientNNN_ keeps it, if the MR do not contradict it; others get a number.

    Args:
        told: how to load them, see `load_pair`.
    """
    images, left_out = {}, []
    for pair in pairs:
        try:
            image = load_image(pair["moving_image"], side="moving").numpy()[0].ravel()
            images[pair["case"]] = (image - image.mean()) / (image.std() * np.sqrt(image.size))
        except InputError as error:
            left_out.append(LeftOut(pair["case"], checks.one_line(error)))
    patients, doubts = patients_by_image(images)
    left_out += [LeftOut(case, reason) for case, reason in doubts.items()]
    cases, numbers = [], {}
    for pair in pairs:
        case = pair["case"]
        if case not in patients:
            continue
        own = re.match(r"(patient\d+)_", case)
        others = {other for other in images if patients.get(other) == patients[case]} - {case}
        odd = sorted(other for other in others if own and not other.startswith(own[0]))
        if odd:
            left_out.append(LeftOut(case, f"has the MR of {odd[0]}, whose name says another patient"))
            continue
        patient = own[1] if own else numbers.setdefault(patients[case], f"patient{len(numbers):03d}")
        name = case if own else named(patient, case)
        cases.append(Case(name, partial(load_pair, pair, {}, **told), patient))
    return cases, left_out


def patients_by_image(images: Mapping[str, np.ndarray]) -> tuple[dict[str, int], dict[str, str]]:
    """Case -> a number of its patient; and the cases whose images are too alike for two patients, not enough for one.

    Args:
        images: case -> voxels of its MR, of mean 0 and length 1. Those of other sizes are of other patients.
    """
    patients: dict[str, int] = {}
    doubts: dict[str, str] = {}
    seen: list[tuple[str, np.ndarray]] = []
    for case, image in images.items():
        alike = {other: float(image @ its) for other, its in seen if its.shape == image.shape}
        seen.append((case, image))
        best = max(alike, key=alike.__getitem__, default=None)
        if best is not None and TWO_PATIENTS < alike[best] < ONE_PATIENT:
            doubts[case] = f"its MR has a correlation of {alike[best]:.3f} with that of {best}: one patient, or two?"
            continue
        same = best is not None and alike[best] >= ONE_PATIENT and best in patients
        patients[case] = patients[best] if same else len(seen)
    return patients, doubts
