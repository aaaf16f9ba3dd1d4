"""What a registration is doing: shown when it takes long, and gone from the line when it ends, also by a refusal."""

import time
from weakref import WeakSet

import pytest
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from tqdm import tqdm

from scripts.data.checks import InputError
from scripts.registration import progress


def shown(text):
    """What is left of a terminal's line after its carriage returns."""
    line = []
    for part in text.split("\r"):
        line[: len(part)] = part
    return "".join(line).rstrip()


def run(at, monkeypatch):
    """A run of one step that takes half a second and then is refused; the bar appears after `at` seconds."""
    monkeypatch.setattr(progress, "PATIENCE", at)
    monkeypatch.setattr(tqdm, "_instances", WeakSet())  # bars that other tests left are above it

    def step(engine, batch):
        time.sleep(0.5)
        raise InputError("refused")

    engine, bar = Engine(step), progress.Progress(1)
    engine.register_events(*IterationEvents)
    bar.attach(engine)
    with pytest.raises(InputError):
        engine.run([0])


@pytest.mark.parametrize("at", [0.1, 0.3])
def test_a_bar_that_appeared_while_one_step_took_long_leaves_no_trace_before_a_refusal(at, monkeypatch, capsys):
    run(at, monkeypatch)
    said = capsys.readouterr().err
    assert "deforming" in said and shown(said) == ""


def test_a_short_run_shows_nothing(monkeypatch, capsys):
    run(60, monkeypatch)
    assert capsys.readouterr().err == ""
