"""Names that users may still have in scripts: they work until version 0.6, with one line that names the new one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from scripts.data.checks import InputError

SETTINGS = {  # of the verbs and configs: old -> new
    "start": "initial_transform",
    "start_path": "segmentation_path",
    "start_kind": "initial_transform_kind",
    "wrong_way": "misoriented_share",
}
FIGURES = {  # of the QC record and its limits: old -> new
    "start": "initial_transform",
    "start_stretch_min": "initial_stretch_min",
    "start_stretch_max": "initial_stretch_max",
    "start_weights": "segmentation_weights",
    "start_weights_sha256": "segmentation_weights_sha256",
    "moving_wrong_way": "moving_orientation",
    "fixed_wrong_way": "fixed_orientation",
    "wrong_way": "orientation",
}


def say(old: str, new: str) -> None:
    """Name the new name of an old one on stderr."""
    print(f"renamed: {old} is now {new}; the old name works until version 0.6", file=sys.stderr)


def current(names: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """A mapping with its old keys replaced by today's, each of them said.

    Raises:
        InputError: both names of one thing are given.
    """
    found = dict(names)
    for old, new in renamed.items():
        if old in found:
            if new in found:
                raise InputError(f"{old} is now {new}, which is given too; leave {old} out")
            say(old, new)
            found[new] = found.pop(old)
    return found


def former(record: Mapping[str, Any]) -> dict[str, Any]:
    """A QC record, with its limits, under the names that it had in version 0.4."""
    old = {new: name for name, new in FIGURES.items()}
    renamed = {old.get(name, name): value for name, value in record.items()}
    return renamed | {"limits": {old.get(name, name): value for name, value in record["limits"].items()}}


def say_settings(given: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """What a config does with its old settings, which its new ones read: each that is given is said.

    Args:
        given: the values of the old settings, None where one is not given.
        used: the values of the new settings, likewise under the old names.

    Raises:
        InputError: the new setting has another value, for example that of an overlay.
    """
    for old, value in given.items():
        if value is not None and used[old] != value:
            raise InputError(f"{old} is now {SETTINGS[old]}; pass --{SETTINGS[old]} {value}")
        if value is not None:
            say(f"--{old}", f"--{SETTINGS[old]}")
