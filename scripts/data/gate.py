"""Pairs through the input gate: a batch that goes on after a refusal, and a whole data set checked before training."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from monai.data import list_data_collate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scripts.data.checks import InputError, Repaired, refusal
from scripts.data.datalist import SPLITS, datalist
from scripts.data.pairs import LoadPaird


class Gated(Dataset):
    """A data set in which an item that is refused is its `InputError`, which a loader hands over as it is."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            found = refusal(error)
            if found is None:
                raise
            return InputError(str(found))  # without what it was raised from, which no other process can read


def processes(num_workers: int | None) -> int:
    """How many processes read: the number that is given, or one per core, 8 at most."""
    return min(8, os.cpu_count() or 1) if num_workers is None else num_workers


def read(dataset: Dataset, num_workers: int = 0) -> DataLoader:
    """The items of a data set in their order, read by `num_workers` processes, see `Gated`."""
    return DataLoader(Gated(dataset), batch_size=None, num_workers=num_workers, worker_init_fn=leave_interrupts)


def read_ahead(dataset: Dataset, num_workers: int | None = None) -> Iterator[Any]:
    """The items of a data set in their order, see `Gated`; threads read those to come while one is in use.

    Threads, as what takes long is in PyTorch, which lets others run; and unlike forked processes they may use a GPU,
    and may begin where PyTorch has computed before, as in a notebook. Each has one core; who uses the items, the rest.

    Args:
        num_workers: threads; None for as many as PyTorch uses, 4 at most: writing a pair takes a third of reading it.
            0, or a single item: read where it is used.
    """
    items, threads = Gated(dataset), torch.get_num_threads()
    count = min(4, threads) if num_workers is None else num_workers
    if count < 1 or len(items) < 2:
        yield from map(items.__getitem__, range(len(items)))
        return
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(max(1, threads - count))
    turn = sys.getswitchinterval()  # which a thread waits before each operation while a picture is drawn beside it
    sys.setswitchinterval(min(turn, 0.001))
    try:
        to_come = (pool.submit(items.__getitem__, index) for index in range(len(items)))
        ahead = deque(islice(to_come, count))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(islice(to_come, 1))
            yield item
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(turn)
        pool.shutdown(wait=False, cancel_futures=True)


def leave_interrupts(worker: int) -> None:
    """In a process that reads: leave Ctrl-C to the one that started it, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PairLoader:
    """Batches of one pair each, in the order of the data set.

    Args:
        dataset: MONAI's, of pairs with a `case`.
        num_workers: see `read_ahead`.
        keep_going: whether a pair that is refused is passed over, aloud.

    Raises:
        InputError: while iterating. A pair is refused; to keep going, when all others are done, with their number and
            the cases that were refused.
    """

    def __init__(self, dataset: Dataset, num_workers: int | None = None, keep_going: bool = False) -> None:
        self.dataset, self.num_workers, self.keep_going = dataset, num_workers, keep_going

    def __iter__(self) -> Iterator[dict[str, Any]]:
        refused = []
        for index, item in enumerate(read_ahead(self.dataset, self.num_workers)):
            if not isinstance(item, InputError):
                yield list_data_collate([item])
            elif self.keep_going and len(self.dataset) > 1:
                refused.append(self.dataset.data[index]["case"])
                print(f"refused: {refused[-1]}: {item}", file=sys.stderr)
            else:
                raise item
        if refused:
            count = len(self.dataset)
            raise InputError(
                f"{len(refused)} of {count} pairs refused, the other {count - len(refused)} are done;"
                f" refused, for the reasons above: {', '.join(refused)}"
            )


class Findings(Dataset):
    """What the gate says of each pair: the refusal, None without one, and the repairs.

    Args:
        pairs: of a datalist.
        label_values, options: see `scripts.data.pairs.LoadPaird`.
    """

    def __init__(self, pairs: Sequence[dict[str, str]], label_values: Sequence[int] | None = None, **options) -> None:
        self.pairs, self.load = pairs, LoadPaird(label_values, **options)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str | None, list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                self.load(self.pairs[index])
                refused = None
            except InputError as error:
                refused = str(error)
        return refused, [str(one.message) for one in said if one.category is Repaired]


def check_dataset(
    dataset_dir: str,
    label_values: Sequence[int] | None = None,
    labels: bool = True,
    patient_pattern: str | None = None,
    num_workers: int | None = None,
    **options,
) -> int:
    """Load every pair of a data set as training does and print what the gate says; see the `check` verb.

    Args:
        num_workers: processes that read; None for as many as there are cores, 8 at most.
        options: of `scripts.data.pairs.LoadPaird`.

    Returns:
        The number of pairs that are refused.

    Raises:
        InputError: a refusal of the data set as a whole, see `scripts.data.datalist.datalist`.
    """
    found = {}  # a data set that is not split has the same pairs in train and test
    for split in SPLITS:
        for pair in datalist(dataset_dir, split, labels, patient_pattern=patient_pattern):
            found.setdefault((pair["moving_image"], pair["fixed_image"]), (split, pair))
    splits, pairs = zip(*found.values(), strict=True)
    workers = min(processes(None), len(pairs)) if num_workers is None else num_workers
    gated = Findings(pairs, label_values, **options)
    findings = DataLoader(gated, batch_size=None, num_workers=workers, worker_init_fn=leave_interrupts)
    rows, refused, repaired = [], 0, 0
    for split, pair, (why, repairs) in zip(splits, pairs, tqdm(findings, desc="Checking", unit="pair"), strict=True):
        refused += why is not None
        repaired += why is None and bool(repairs)
        for kind, text in [("refused", why)] * (why is not None) + [("repaired", repair) for repair in repairs]:
            rows.append((kind, split, pair["case"], text))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
    fit = len(pairs) - refused
    print(f"{dataset_dir}: {len(pairs)} pairs, {refused} refused, {fit} fit for use ({repaired} of them repaired)")
    return refused
