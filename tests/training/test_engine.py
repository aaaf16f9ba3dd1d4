"""The learning rate over a run, and the weights at its end."""

import math

import pytest
import torch
from ignite.engine import Engine

from scripts.network.segmentation import GlandNetwork
from scripts.training.engine import LearningRate, SaveWeights


def test_the_learning_rate_falls_along_half_a_cosine_wherever_the_run_starts():
    seen = []
    for begun in (0, 2):  # of 4 epochs
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        trainer = Engine(lambda engine, batch, o=optimizer: seen.append(o.param_groups[0]["lr"]))
        LearningRate(optimizer).attach(trainer)
        trainer.load_state_dict({"epoch_length": 5, "max_epochs": 4, "iteration": 5 * begun})
        trainer.run([0] * 5, max_epochs=4)
    expected = [0.25 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert seen == pytest.approx(expected + expected[10:])


@pytest.mark.parametrize("decay", [False, True])
def test_the_learning_rate_rises_in_equal_parts_and_then_is_as_without_a_warm_up(decay):
    seen = {}
    for warm_up in (0, 4):
        optimizer, rates = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5), seen.setdefault(warm_up, [])
        trainer = Engine(lambda engine, batch, o=optimizer, r=rates: r.append(o.param_groups[0]["lr"]))
        LearningRate(optimizer, warm_up, decay).attach(trainer)
        trainer.run([0] * 5, max_epochs=2)
    shares = [0.25, 0.5, 0.75] + 7 * [1]
    assert seen[4] == pytest.approx([share * rate for share, rate in zip(shares, seen[0], strict=True)], rel=1e-12)
    assert decay or seen[0] == 10 * [0.5]


def test_averaged_weights_are_the_mean_of_the_last_steps_also_after_a_resume(tmp_path):
    def run(path, epochs, state=None):
        network = torch.nn.BatchNorm1d(1)
        trainer = Engine(lambda engine, batch: network.weight.data.fill_(engine.state.iteration))
        saves = SaveWeights(str(path), network, average=20)
        saves.attach(trainer)
        if state is not None:
            saves.load_state_dict(state[0])
            trainer.load_state_dict(state[1])
        trainer.run([0] * 50, max_epochs=epochs)
        return saves.state_dict(), {"epoch_length": 50, "max_epochs": 4, "iteration": 50 * epochs}

    run(tmp_path / "whole.pt", 4)
    run(tmp_path / "parts.pt", 4, run(tmp_path / "first.pt", 2))
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["weight"].item() == pytest.approx(200 - 19, abs=0.5)  # the mean of 1, 2, … with weights that fall
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert SaveWeights("nowhere", torch.nn.Linear(1, 1), average=5, saves=False).state_dict() == {}


def test_weights_are_stored_once_where_a_network_shares_them(tmp_path):
    network, path = GlandNetwork(), tmp_path / "segmentation.pt"
    trainer = Engine(lambda engine, batch: None)
    SaveWeights(str(path), network).attach(trainer)
    trainer.run([0], max_epochs=1)
    stored = torch.load(path, weights_only=True)
    assert all(torch.equal(stored[name], value) for name, value in network.state_dict().items())
    assert path.stat().st_size < 4.1 * sum(p.numel() for p in network.parameters()) + 1e5
