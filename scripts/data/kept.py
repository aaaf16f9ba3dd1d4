"""What a run reads stays as it is: an output that would replace, remove or join an input is refused beforehand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from scripts.data.checks import InputError

LINKS = 40  # of a chain; Linux follows no more


def links(path: str | Path) -> list[Path]:
    """A path, and where it is a link what it leads to, one after the other."""
    chain = [Path(path)]
    while len(chain) <= LINKS and chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    return chain


def refuse_overlap(reads: Iterable[str | Path], writes: Iterable[str | Path], option: str = "--output_dir") -> None:
    """Refuse a run that would replace or remove something that it reads, or add to a folder that it reads.

    Files are compared by what they are, not by what they are called: links, hard ones too, and folders that have
    several names are seen through. Every link on the way to an input is an input itself.

    Args:
        reads: files, and folders with all that lies in them; what does not exist is compared by its name.
        writes: files and folders that would be written, replaced or removed with all that lies in them.
        option: the one that names the output, for the message.

    Raises:
        InputError: see above; the message names both.
    """
    files: dict[object, Path] = {}
    folders: dict[object, Path] = {}
    above: dict[object, Path] = {}  # folders that hold an input, which must not go
    for path in dict.fromkeys(map(Path, reads)):
        for entry in links(path):
            files |= dict.fromkeys(_marks(entry), path)
            above |= dict.fromkeys(_marks_above(entry), path)
        if path.is_dir():
            folders |= dict.fromkeys(_marks(path), path)
            for inside in path.iterdir():
                files |= dict.fromkeys(_marks(inside), inside)
        elif not path.exists():
            folders |= dict.fromkeys(_marks(path), path)
    for target in map(Path, writes):
        own = _marks(target)
        found = next((files[mark] for mark in own if mark in files), None)
        if found is None and target.is_dir():
            found = next((above[mark] for mark in own if mark in above), None)
        if found is not None:
            raise InputError(f"{target}: would replace the input {found}; choose another {option}")
        around = next((folders[mark] for mark in _marks_above(target) if mark in folders), None)
        if around is not None:
            raise InputError(f"{target}: lies in the input {around}; choose another {option}")


def _marks(path: Path) -> list[object]:
    """What tells a file or folder from others: its place without links on the way, and its number on its device."""
    found: list[object] = [os.path.join(os.path.realpath(path.parent), path.name)]
    with suppress(OSError):
        there = os.stat(path)
        found.append((there.st_dev, there.st_ino))
    return found


def _marks_above(path: Path) -> Iterator[object]:
    """The marks of the folders that a path lies in."""
    for folder in Path(os.path.join(os.path.realpath(path.parent), path.name)).parents:
        yield from _marks(folder)
