"""What a registration is doing, for who waits longer than two seconds for it."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.transforms import Transform
from tqdm import tqdm

STEPS = ("reading", "segmenting the glands", "aligning", "deforming", "writing")  # of one pair
PATIENCE = 2.0  # seconds


class Progress:
    """Ignite handler with a bar on stderr over the steps of all pairs, with the time left; it appears after 2 s.

    Where other threads read (num_workers), a pair begins with "deforming".

    Args:
        pairs: how many there are.
    """

    def __init__(self, pairs: int) -> None:
        self.bar = tqdm(total=pairs * len(STEPS), delay=PATIENCE, leave=False, bar_format="{desc} |{bar}| {elapsed}")
        self.bar.set_description_str(STEPS[0], refresh=False)
        # tqdm draws when something is done, this bar when something takes long
        self.timer = threading.Timer(PATIENCE, self._appear)
        self.timer.daemon = True
        self.timer.start()
        self.done = 0  # pairs
        self.thread = threading.get_ident()  # which deforms and writes

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: self.show("deforming"))
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda: self.show("writing"))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._next)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self.close)

    def show(self, step: str) -> None:
        """Say that a step of the present pair begins."""
        if threading.get_ident() == self.thread:
            self.bar.set_description_str(step, refresh=False)
            self.bar.update(self.done * len(STEPS) + STEPS.index(step) - self.bar.n)

    def _next(self) -> None:
        self.done += 1

    def _appear(self) -> None:
        self.bar.last_print_t = self.bar._time()  # else tqdm takes it for never shown, and leaves it on the screen
        self.bar.refresh()

    def close(self, *raised: Any) -> None:
        self.timer.cancel()
        self.timer.join()  # where it draws just now
        self.bar.close()
        if raised and isinstance(raised[-1], BaseException):
            raise raised[-1]


class Step(Transform):
    """A transform that changes nothing: it says which step of `Progress` begins."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        self.progress.show(self.name)
        return data
