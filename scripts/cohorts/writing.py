"""What all sources share: cases loaded in parallel and written as a data set of pairs, and what was left out and why.

DIR/moving_images/CASE.nii.gz   MR               DIR/cases.csv      each case: patient, labels, what was mended
DIR/fixed_images/CASE.nii.gz    TRUS             DIR/left_out.csv   what is not there, and the reason
DIR/moving_labels/CASE.nii.gz   structures, the gland first, one a channel (X, Y, Z, M)
DIR/fixed_labels/CASE.nii.gz    likewise         DIR/SOURCE.txt     licence, citation, how it was made
"""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scripts.data.checks import InputError, Repaired, check_case_name, one_line
from scripts.data.datalist import FOLDERS, KEYS
from scripts.data.files import write_csv, written_together, written_whole
from scripts.data.gate import leave_interrupts
from scripts.data.kept import refuse_overlap
from scripts.data.volumes import save_volume

PATIENT = "([^_]+)_"  # the patient of a case, see `named`
CASES, LEFT_OUT, SOURCE = "cases.csv", "left_out.csv", "SOURCE.txt"
GLAND_ML = (5.0, 500.0)  # no prostate is smaller or larger: a label that is, is another structure or has another unit
PLACES = dict(zip(KEYS, FOLDERS[0], strict=True))


class Side(NamedTuple):
    """One image of a pair with its labels.

    Attributes:
        image: shape (X, Y, Z).
        labels: in {0, 1}, shape (M, X, Y, Z), the gland first.
        affine: voxel -> RAS mm, shape (4, 4).
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


class Case(NamedTuple):
    """A pair that can be written.

    Attributes:
        name: of its four files.
        load: gives the moving and the fixed side, and columns of cases.csv; raises `InputError` if it cannot be used.
            Another process calls it.
        patient: as cases.csv has it.
    """

    name: str
    load: Callable[[], tuple[Side, Side, dict[str, str]]]
    patient: str


class LeftOut(NamedTuple):
    """What of a source is no case: a patient, a pair or a file, and why."""

    case: str
    reason: str


class Found(NamedTuple):
    """What a source holds.

    Attributes:
        about: lines for SOURCE.txt: what it is, its licence, whom to cite, what to know.
        patient_pattern: `PATIENT`; None if nothing says who is whose.
    """

    cases: list[Case]
    left_out: list[LeftOut]
    about: list[str]
    patient_pattern: str | None = PATIENT


def named(patient: str, case: str) -> str:
    """The name of a patient's case, PATIENT_CASE: the patient is what comes before the first underscore."""
    return f"{patient.replace('_', '-')}_{case}"


def write(found: Found, source: Path, output_dir: Path, made_by: str, limit: int | None, num_workers: int) -> int:
    """Write the cases that are not there yet, and the tables after each of them, so that a run may end at any time.

    Args:
        made_by: the command, for SOURCE.txt; a folder that another one made is refused.
        limit: how many cases, the first by name; None for all.
        num_workers: processes that load and write.

    Returns:
        How many are there now, earlier ones included.

    Raises:
        InputError: a folder that holds something else, lies in the source or cannot be written; two cases of one name.
    """
    text = "\n".join([*found.about, f"Made from {source.resolve()} by: {made_by}", ""])
    cases = sorted(found.cases, key=lambda case: case.name)
    counts = Counter(check_case_name(case.name) for case in cases)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{source}: more than one pair would be called {twice}")
    _claim(source, output_dir, text)
    print(text)
    done = _done(output_dir)
    waiting = [case for case in cases[:limit] if case.name not in done]
    written, left_out = list(done.values()), list(found.left_out)
    _write_tables(output_dir, written, left_out)
    outcomes = DataLoader(
        _Writing(waiting, output_dir),
        batch_size=None,
        num_workers=min(num_workers, len(waiting)),
        worker_init_fn=leave_interrupts,
    )
    progress = tqdm(outcomes, desc="Preparing", unit="pair", total=len(waiting))
    for case, (row, reason) in zip(waiting, progress, strict=True):
        if reason is None:
            written.append(row)
        else:
            left_out.append(LeftOut(case.name, reason))
        _write_tables(output_dir, written, left_out)
    return len(written)


def _claim(source: Path, output_dir: Path, text: str) -> None:
    """Take a new or empty folder, or one that the same command began to fill."""
    refuse_overlap([source], [output_dir, *(output_dir / name for name in PLACES.values())])
    told = output_dir / SOURCE
    if told.is_file():
        if told.read_text(encoding="utf-8") != text:
            raise InputError(f"{output_dir}: was made otherwise, see its {SOURCE}; choose another --output_dir")
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise InputError(f"{output_dir}: is not empty; choose a new --output_dir")
    else:
        with written_whole(told) as file:
            file.write(text)


def _done(output_dir: Path) -> dict[str, dict[str, str]]:
    """Case -> its row of cases.csv, of the cases whose four files are there."""
    table = output_dir / CASES
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    return {case: row for case, row in rows.items() if all(path.is_file() for path in _files(output_dir, case))}


def _files(output_dir: Path, case: str) -> list[Path]:
    return [output_dir / place / f"{case}.nii.gz" for place in PLACES.values()]


def _write_tables(output_dir: Path, written: Sequence[Mapping[str, str]], left_out: Sequence[LeftOut]) -> None:
    rows = sorted(written, key=lambda row: row["case"])
    write_csv(output_dir / CASES, [dict(row) for row in rows], ("case", "patient"))
    write_csv(output_dir / LEFT_OUT, [one._asdict() for one in sorted(left_out)], LeftOut._fields)


class _Writing(Dataset):
    """Writes a case when it is asked for; gives its row of cases.csv, or why there is none."""

    def __init__(self, cases: Sequence[Case], output_dir: Path) -> None:
        self.cases, self.output_dir = cases, output_dir

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[dict[str, str], str | None]:
        case = self.cases[index]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                moving, fixed, columns = case.load()
                volumes = {f"{name}_gland_ml": _gland_ml(name, side) for name, side in _sides(moving, fixed)}
            except InputError as error:
                return {}, one_line(error)
        _save(self.output_dir, case.name, moving, fixed)
        mended = "; ".join(str(one.message) for one in said if one.category is Repaired)
        row = {"case": case.name, "patient": case.patient, "labels": str(len(moving.labels))}
        return row | volumes | columns | {"mended": mended}, None


def _sides(moving: Side, fixed: Side) -> list[tuple[str, Side]]:
    return [("moving", moving), ("fixed", fixed)]


def _gland_ml(name: str, side: Side) -> str:
    """The volume of the first label, mL.

    Raises:
        InputError: no prostate has it.
    """
    volume = side.labels[0].sum(dtype=np.float64) * abs(np.linalg.det(side.affine[:3, :3])) / 1000
    if not GLAND_ML[0] <= volume <= GLAND_ML[1]:
        raise InputError(
            f"the first label of the {name} image has {volume:.3g} mL, a prostate {GLAND_ML[0]:g} to {GLAND_ML[1]:g};"
            " is it the gland, and is the voxel size true?"
        )
    return f"{volume:.1f}"


def _save(output_dir: Path, name: str, moving: Side, fixed: Side) -> None:
    """The four files, each there as a whole or not at all."""
    with ExitStack() as stack:
        for kind, side in _sides(moving, fixed):
            for what, volume in (("image", side.image), ("label", np.moveaxis(side.labels, 0, -1).astype(np.uint8))):
                folder = stack.enter_context(written_together(output_dir / PLACES[f"{kind}_{what}"]))
                save_volume(folder / f"{name}.nii.gz", volume, side.affine, smallest_type(volume))


def smallest_type(values: np.ndarray) -> np.dtype:
    """The type of the fewest bytes that holds whole numbers as they are; float32 for others."""
    low, high = float(values.min()), float(values.max())
    if max(abs(low), high) >= 2**24 or not (values == np.round(values)).all():
        return np.dtype(np.float32)
    return np.result_type(np.min_scalar_type(int(low)), np.min_scalar_type(int(high)))
