"""Files that are there as a whole or not at all, whenever the process or the machine stops, and whoever else writes."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scripts.checks import InputError


@contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write that takes the name `path` when the block ends well; several writers may race for it.

    Args:
        path: its folder is made if it does not exist.
        mode: "w", text in UTF-8 with line ends as they are written, or "wb".

    Raises:
        InputError: it cannot be written: a full disk, a folder that is read-only or that is a file.
    """
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open(mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()
        if os.name == "posix":  # the new name, too, is on the disk only when its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); mend that and run again") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that want the same out of a folder meanwhile, where the file system can (not on Windows)."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network drive without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV file, a column for every key in the order they come, empty where a row lacks it."""
    with written_whole(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
