"""A file that is there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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
