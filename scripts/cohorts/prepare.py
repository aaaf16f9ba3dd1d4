"""`python -m scripts prepare`: a source as it is downloaded, written as a data set, and checked as training does."""

from __future__ import annotations

import shlex
from pathlib import Path

from scripts.cohorts import folder, mrus, regpro, tcia
from scripts.cohorts.writing import CASES, LEFT_OUT, write
from scripts.data.checks import InputError
from scripts.data.gate import check_dataset, processes

FIND = {"tcia": tcia.find, "mrus": mrus.find, "regpro": regpro.find, "folder": folder.find}
OPTIONS = {
    "tcia": ("targets", "last_mr"),
    "mrus": (),
    "regpro": ("moving_axes", "fixed_axes"),
    "folder": ("mapping", "label_values", "moving_axes", "fixed_axes"),
}


def prepare(
    name: str, source: str, output_dir: str, limit: int | None = None, num_workers: int | None = None, **options
) -> int:
    """Write a cohort as a data set of pairs, check it, and say how to train on it; see the `prepare` verb.

    Returns:
        The number of written pairs that the check refuses.

    Raises:
        InputError: no such cohort or source; an option of another cohort; nothing in it that could be written.
    """
    if name not in FIND:
        raise InputError(f"{name}: no such cohort; expected {', '.join(FIND)}")
    given = {option: value for option, value in options.items() if value is not None}
    wrong = next((option for option in given if option not in OPTIONS[name]), None)
    if wrong:
        raise InputError(f"--{wrong} has no meaning for {name}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: expected 1 or more")
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: no such folder; unpack an archive first")
    workers = processes(num_workers)
    more = {"num_workers": workers} if name == "tcia" else {}
    found = FIND[name](root, **given, **more)
    words = ["python -m scripts prepare", name] + [f"--{option} {shlex.quote(str(v))}" for option, v in given.items()]
    done = write(found, root, Path(output_dir), " ".join(words), limit, workers)
    if not done:
        raise InputError(f"{output_dir}: no pair could be written; {LEFT_OUT} in it says why")
    refused = check_dataset(output_dir, patient_pattern=found.patient_pattern, num_workers=num_workers)
    pattern = f" --patient_pattern {shlex.quote(found.patient_pattern)}" if found.patient_pattern else ""
    print(f"{done} pairs, listed in {CASES}; {LEFT_OUT} says what was left out and why. Look at some before you train:")
    print(
        f"  python -m scripts segment {_quoted(output_dir, 'fixed_images')} --output glands"
        f" --labels {_quoted(output_dir, 'fixed_labels')} --modality us"
    )
    print(f"  python -m scripts learn {shlex.quote(output_dir)} --output_dir learned{pattern}")
    return refused


def _quoted(output_dir: str, part: str) -> str:
    return shlex.quote(str(Path(output_dir) / part))
