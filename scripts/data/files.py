"""Files that are there as a whole or not at all, whenever the process or the machine stops, and whoever else writes."""

from __future__ import annotations

import ast
import csv
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scripts.data.checks import InputError
from scripts.data.kept import links

FORMATS = (  # how the names of files end that tell a reader what they are
    *(".nii.gz", ".nii", ".hdr", ".img", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".dicom", ".ima", ".npy", ".png"),
    *(".h5", ".tfm", ".txt", ".mat", ".csv", ".tsv", ".fcsv", ".json", ".yaml", ".stl", ".obj", ".ply", ".vtp"),
)


def readable(path: str | Path) -> str:
    """The name by which a reader knows what a file is: its own, or, of a link without a suffix, what it leads to.

    Links are otherwise not followed: what lies beside the link belongs to it, and what it leads to may have no suffix.
    """
    named = (str(entry) for entry in links(path) if entry.name.lower().endswith(FORMATS))
    return str(path) if Path(path).is_dir() else next(named, str(path))


def listed(value: str | Sequence[str]) -> list[str]:
    """What a text with commas, or one that is a Python list, lists; a comma in the name of what is there parts nothing.

    Example:
        ``listed("a.nii.gz,b.nii.gz")``
    """
    if not isinstance(value, str):
        return [str(one).strip() for one in value]
    if value.startswith("[") and not os.path.exists(value):
        with suppress(ValueError, SyntaxError, TypeError):
            return listed(ast.literal_eval(value))
    parts, found = value.split(","), []
    while parts:
        joined = {",".join(parts[:n]): n for n in range(len(parts), 0, -1)}
        there = (name for text in joined for name in ((text, joined[text]), (text.strip(), joined[text])))
        name, count = next(((text, n) for text, n in there if os.path.exists(text)), (parts[0].strip(), 1))
        found.append(name)
        parts = parts[count:]
    return found


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


def write_sealed(path: Path, data: bytes | memoryview) -> None:
    """Write a file, see `written_whole`, that ends in the SHA-256 of its bytes."""
    with written_whole(path, "wb") as file:
        file.write(data)
        file.write(hashlib.sha256(data).digest())


def read_sealed(path: Path) -> memoryview:
    """What `write_sealed` wrote, without its end.

    Raises:
        ValueError: it is damaged.
    """
    data = memoryview(path.read_bytes())
    seal = hashlib.sha256().digest_size
    if hashlib.sha256(data[:-seal]).digest() != data[-seal:]:
        raise ValueError("its SHA-256 does not fit")
    return data[:-seal]


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


def write_csv(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as a CSV file, a column for every key in the order they come, empty where a row lacks it.

    Args:
        columns: that come first, also where no row has them.
    """
    with written_whole(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*columns, *(key for row in rows for key in row)])))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def written_together(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write in, whose content moves to `folder`, in the order it was written, when the block ends well.

    Of several processes that write into one folder, the last one's files are there, and none of the others'.

    Args:
        stale: names that go if they are not written anew, being of an earlier result.

    Raises:
        InputError: `folder` cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        written = sorted(partial.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with alone_in(folder):
            for name in {*stale, *(path.name for path in written if path.is_dir())}:
                _remove_slices(folder / name)
            for path in written:
                try:
                    path.replace(folder / path.name)
                except OSError as error:
                    raise InputError(f"{folder / path.name}: cannot be written: {error.strerror}") from error
            for name in set(stale) - {path.name for path in written}:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_slices(folder: Path) -> None:
    """Remove the folder of a DICOM series that an earlier result left; one that holds other files stays: refused."""
    if not folder.is_dir():
        return
    held = list(folder.iterdir())
    if any(path.suffix != ".dcm" for path in held):
        raise InputError(f"{folder}: holds other files than an earlier result's; move it away")
    for path in held:
        path.unlink()
    folder.rmdir()
