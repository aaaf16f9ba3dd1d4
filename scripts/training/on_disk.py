"""A cohort on disk: what a loader keeps of each pair is a file, made once; of a batch only what it needs is read.

    DIR/SETTINGS/ITEM.bin    the tensors' bytes | what is kept, JSON | its length, 8 bytes | SHA-256 of all that

SETTINGS is a hash of all that says what is kept: code, transforms, files of weights. ITEM is one of the item's names,
options and files, these by size and time. So a file is right as long as its name is asked for, and is never changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import monai
import numpy as np
import torch
from monai.data import Dataset
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.data.datalist import KEYS, SINGLE
from scripts.data.files import alone_in, read_sealed, write_sealed
from scripts.data.gate import read
from scripts.data.root import ROOT

Item = dict[str, Any]
SMALL = 4096  # bytes; smaller tensors stay in memory
ELSEWHERE = (".mhd", ".nhdr", ".hdr", ".img", ".hdr.gz", ".img.gz")  # the other half is another file
LENGTH = 8  # bytes of a length


class InFile(NamedTuple):
    """A tensor in a file: read when it is needed, whole or some of its first axis."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def part(self, first: int, last: int) -> InFile:
        """What `tensor[first:last]` is of a tensor."""
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._replace(offset=self.offset + first * step, shape=(last - first, *self.shape[1:]))

    def read(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, size, offset=self.offset)
        if len(data) < size:
            raise InputError(f"{self.path}: was cut short while it was in use; run again, it is made anew")
        return torch.from_numpy(data).view(self.dtype).view(self.shape)


def on_device(kept: Tensor | InFile, device: torch.device) -> Tensor:
    """A tensor that a loader has kept, on a device; on its way to a GPU through memory for which neither waits."""
    tensor = kept.read() if isinstance(kept, InFile) else kept
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def kept(dataset: Dataset, keep: Callable[[Mapping[str, Any]], Item], num_workers: int, what: str) -> Iterator[Item]:
    """What `keep` keeps of each item of a data set, in its order, which `num_workers` processes read.

    Raises:
        InputError: an item is refused.
    """
    for item in tqdm(read(dataset, num_workers), desc=what, unit="pair", disable=len(dataset) < 2):
        if isinstance(item, InputError):
            raise item
        yield keep(item)


def stored(
    folder: str | Path, dataset: Dataset, keep: Callable[[Mapping[str, Any]], Item], settings: Any, num_workers: int
) -> list[Item]:
    """What `keep` keeps of each item, large tensors as `InFile`s; only items without a whole file are read.

    Processes that want the same at a time wait for each other, and none makes what another has made.

    Args:
        folder: of the files; made where it is not.
        dataset: MONAI's, of paths and a transform.
        keep: makes of an item a dictionary of numbers, text, lists, dictionaries and tensors.
        settings: of `keep`.
        num_workers: processes that read.

    Raises:
        InputError: an item is refused; a file cannot be written; a transform that cannot be told from another.
    """
    if not len(dataset):
        return []
    _folder.cache_clear()
    place = Path(folder).absolute() / _settings_key((settings, dataset.transform))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place}: cannot be written: {error.strerror}") from error
    paths = [place / f"{_item_key(item)}.bin" for item in dataset.data]
    with alone_in(place):
        found = {path: _load(path) for path in tqdm(dict.fromkeys(paths), "Checking the cohort on disk", unit="file")}
        missing = [index for index, path in enumerate(paths) if found[path] is None]
        made = kept(Subset(dataset, missing), keep, num_workers, "Storing") if missing else ()
        for index, item in zip(missing, made, strict=True):
            write_sealed(paths[index], _packed(item))
            found[paths[index]] = _load(paths[index])
    return [found[path] for path in paths]


def _packed(item: Item) -> bytes:
    file = io.BytesIO()

    def place(tensor: Tensor) -> dict[str, Any]:
        file.write(bytes(-file.tell() % 64))
        at = {"offset": file.tell(), "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        file.write(tensor.cpu().contiguous().numpy().tobytes())
        return at

    text = json.dumps(item, default=place).encode()
    return file.getvalue() + text + len(text).to_bytes(LENGTH, "little")


def _load(path: Path) -> Item | None:
    """What a file holds; None where it is not there or not whole."""
    try:
        data = read_sealed(path)
    except (FileNotFoundError, ValueError):
        return None
    end = len(data) - LENGTH
    length = int.from_bytes(data[end:], "little")

    def tensor(known: dict[str, Any]) -> Any:
        if known.keys() != {"offset", "dtype", "shape"}:
            return known
        there = InFile(path, known["offset"], getattr(torch, known["dtype"]), tuple(known["shape"]))
        size = math.prod(there.shape) * there.dtype.itemsize
        if size > SMALL:
            return there
        few = np.frombuffer(bytearray(data[there.offset : there.offset + size]), np.uint8)
        return torch.from_numpy(few).view(there.dtype).view(there.shape)

    return json.loads(bytes(data[end - length : end]), object_hook=tensor)


class _Values(pickle.Pickler):
    """Settings as bytes: of a network its layers, of a file its size and time, of all else what it holds."""

    def persistent_id(self, value: Any) -> str | None:
        if isinstance(value, nn.Module):
            return str(value)  # its weights are files
        if isinstance(value, np.random.RandomState):
            return "random"  # every Compose has one, from the clock
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, str) and os.path.isfile(value):
            return f"{value} {_states(value)}"
        return None


def _settings_key(settings: Any) -> str:
    file = io.BytesIO()
    values = _Values(file)
    values.fast = True  # whether two equal texts are one object makes no difference
    try:
        values.dump(settings)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"--cohort_device disk: a transform of this training cannot be told from another ({error}); use cpu"
        ) from error
    code = hashlib.sha256(f"{torch.__version__} {monai.__version__}".encode())
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        code.update(path.read_bytes())
    return hashlib.sha256(code.digest() + file.getvalue()).hexdigest()[:20]


def _item_key(item: Mapping[str, Any]) -> str:
    files = {key: _states(item[key]) for key in (*KEYS, *SINGLE) if key in item}
    return hashlib.sha256(repr((sorted(item.items()), files)).encode("utf-8", "surrogateescape")).hexdigest()[:20]


@cache
def _folder(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a folder."""
    return sorted((str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in path.iterdir() if one.is_file())


def _states(path: str) -> list[tuple[str, int, int]]:
    """Size and time of a file, or of all those of a folder, or beside a file that is not the whole of an image."""
    whole = Path(path)
    if whole.is_dir() or path.lower().endswith(ELSEWHERE):
        return _folder(whole if whole.is_dir() else whole.parent)
    there = whole.stat()
    return [(path, there.st_size, there.st_mtime_ns)]
