"""What a training loses when its process, its disk, its files or its numbers fail: nothing, and not in silence.

The faults themselves are those of benchmarks/faults.py, fewer of each.
"""

import math
import os
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from torch import nn

from benchmarks import faults
from scripts.data.checks import InputError, refusal
from scripts.training.checkpoints import STOPPED, Checkpoints, read
from scripts.training.failures import SkipNonFinite, part

LEFT_OUT = pytest.mark.filterwarnings("ignore:step .* is left out")


@pytest.mark.skipif(os.name != "posix", reason="signals, mounts, modes")
@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        (faults.killed_while_saving, 4),
        (faults.damaged, 40),
        (faults.full_disk, 3),
        (faults.read_only, 2),
        (faults.dead_reader, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_lost_by(fault, tries):
    with tempfile.TemporaryDirectory() as name:  # another user may enter it, unlike pytest's
        Path(name).chmod(0o755)
        assert fault(Path(name), tries) == []


# ---- a small training of MONAI's own trainer


class Batches:
    """Six steps an epoch; the place in the draws is the state of a generator of its own."""

    def __init__(self, bad=()):
        self.draws = torch.Generator().manual_seed(0)
        self.bad = set(bad)
        self.made = 0

    def __len__(self):
        return 6

    def state_dict(self):
        return {"draws": self.draws.get_state(), "made": self.made}

    def load_state_dict(self, state):
        self.draws.set_state(state["draws"])
        self.made = state["made"]

    def __iter__(self):
        for _ in range(6):
            self.made += 1
            image = torch.rand(2, 1, 6, 5, 4, generator=self.draws)
            label = image.flip(2) * (math.nan if self.made in self.bad else 1)
            yield {"image": image, "label": label, "case": [f"p{self.made}", f"q{self.made}"]}


def training(folder, epochs=3, resume=False, bad=(), most=10, loss=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.Dropout3d(), nn.Conv3d(3, 1, 1))
    optimizer, batches = torch.optim.Adam(network.parameters(), 0.1), Batches(bad)
    trainer = SupervisedTrainer(
        "cpu",
        epochs,
        batches,
        network,
        optimizer,
        loss or nn.MSELoss(),
        train_handlers=SkipNonFinite(network, optimizer, most),
    )
    state = {"network": network, "optimizer": optimizer, "draws": batches, "trainer": trainer}
    return trainer, network, Checkpoints(str(folder), state, resume)


def stop_at(trainer, *steps):
    """SIGTERM in the middle of a step."""

    @trainer.on(Events.ITERATION_STARTED)
    def _(engine):
        if engine.state.iteration in steps:
            os.kill(os.getpid(), signal.SIGTERM)


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("step", [1, 5, 6, 7, 17])
def test_sigterm_saves_after_the_step_and_the_resumed_run_is_the_uninterrupted_one(step, tmp_path, capsys):
    trainer, whole, checkpoints = training(tmp_path / "whole")
    checkpoints.run(trainer)
    handler = signal.getsignal(signal.SIGTERM)
    trainer, network, checkpoints = training(tmp_path / "stopped")
    stop_at(trainer, step)
    with pytest.raises(SystemExit) as end:
        checkpoints.run(trainer)
    assert end.value.code == STOPPED == 143 and trainer.state.iteration == step
    assert f"stopped by SIGTERM after step {step}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not same(whole.state_dict(), network.state_dict())
    torch.rand(100)  # another process has drawn others
    trainer, network, checkpoints = training(tmp_path / "stopped", resume=True)
    checkpoints.run(trainer)
    assert trainer.state.iteration == 18 and same(whole.state_dict(), network.state_dict())


def test_sigterm_in_the_last_step_does_not_keep_a_run_from_its_end(tmp_path):
    trainer, _, checkpoints = training(tmp_path)
    stop_at(trainer, 18)
    ended = []
    trainer.add_event_handler(Events.COMPLETED, lambda: ended.append(True))
    checkpoints.run(trainer)
    assert ended


def test_a_run_killed_between_its_last_checkpoint_and_its_end_only_ends(tmp_path):
    trainer, network, checkpoints = training(tmp_path)
    checkpoints.run(trainer)
    again, resumed, checkpoints = training(tmp_path, resume=True)
    ended = []
    again.add_event_handler(Events.COMPLETED, lambda: ended.append(True))
    checkpoints.run(again)
    assert ended and same(network.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("resume", "settings", "message"),
    [
        (False, {}, "checkpoint_epoch=3.pt: is of an earlier run; --resume True goes on from it"),
        (True, {"epochs": 2}, "is of epoch 3 of 6 steps, this training has 2 of 6"),
    ],
)
def test_a_run_neither_mixes_with_an_earlier_one_nor_goes_on_beyond_its_end(tmp_path, resume, settings, message):
    trainer, _, checkpoints = training(tmp_path)
    checkpoints.run(trainer)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    trainer, _, checkpoints = training(tmp_path, resume=resume, **settings)
    with pytest.raises(InputError, match=message):
        checkpoints.run(trainer)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trainer, _, checkpoints = training(tmp_path)
    checkpoints.run(trainer)
    trainer, network, checkpoints = training(tmp_path, resume=True)
    checkpoints.state["network"] = network[:2]
    with pytest.raises(InputError, match="checkpoint_epoch=3.pt: does not fit this training"):
        checkpoints.run(trainer)


def test_two_checkpoints_are_kept_also_after_a_resume_and_half_a_file_is_not(tmp_path):
    for epochs in (3, 5):
        trainer, _, checkpoints = training(tmp_path, epochs, resume=epochs > 3)
        (tmp_path / ".checkpoint_epoch=4.pt.elsewhere.1.partial").touch()
        checkpoints.run(trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_epoch=4.pt", "checkpoint_epoch=5.pt"]
    assert torch.load(tmp_path / "checkpoint_epoch=5.pt", weights_only=True)["trainer"]["iteration"] == 30


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path):
    for content, message in ((None, "no checkpoint to resume from"), (b"", "none of 1 checkpoints can be read")):
        if content is not None:
            (tmp_path / "checkpoint_epoch=1.pt").write_bytes(content)
        trainer, _, checkpoints = training(tmp_path, resume=True)
        with warnings.catch_warnings(), pytest.raises(InputError, match=message):
            warnings.simplefilter("ignore")
            checkpoints.run(trainer)


# ---- numbers that are none


@LEFT_OUT
def test_a_step_that_is_not_finite_leaves_weights_statistics_and_optimiser_and_is_counted(tmp_path):
    trainer, network, checkpoints = training(tmp_path, bad=(1, 4, 5))
    seen = {}
    for event, when in ((Events.ITERATION_STARTED, 0), (Events.ITERATION_COMPLETED, 1)):

        @trainer.on(event)
        def _(engine, when=when):
            copy = {k: v.clone() for k, v in network.state_dict().items()}
            moments = [v.clone() for one in engine.optimizer.state.values() for v in one.values()]
            seen[engine.state.iteration, when] = copy, moments

    checkpoints.run(trainer)
    for step in range(1, 19):
        (before, moments), (after, moved) = seen[step, 0], seen[step, 1]
        assert same(before, after) == (step in (1, 4, 5))
        assert step not in (1, 4, 5) or all(map(torch.equal, moments, moved)) and len(moments) == len(moved)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert (trainer.state.skipped, trainer.state.skipped_in_a_row) == (3, 0)
    assert read(tmp_path / "checkpoint_epoch=3.pt")["trainer"]["skipped"] == 3


def test_each_such_step_is_said_and_too_many_in_a_row_end_the_run_with_the_names_of_the_cases(tmp_path):
    trainer, _, checkpoints = training(tmp_path, bad=(2, 4, 5, 6), most=2)
    with pytest.warns(UserWarning) as told, pytest.raises(InputError) as error:
        checkpoints.run(trainer)
    assert [str(w.message).split(":")[0] for w in told] == [f"step {k} is left out" for k in (2, 4, 5)]
    assert "3 so far; p5, q5" in str(told[-1].message)
    assert str(error.value).startswith("3 steps in a row were not finite, the last, 6, with loss nan")
    assert "p6, q6" in str(error.value) and "\n" not in str(error.value)


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is(tmp_path):
    trainer, network, checkpoints = training(tmp_path, loss=lambda a, b: (a - a).sqrt().mean())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="loss 0, largest gradient"),
        pytest.raises(InputError, match="11 steps in a row"),
    ):
        checkpoints.run(trainer)
    assert same(before, network.state_dict())


@LEFT_OUT
def test_a_resumed_run_counts_on(tmp_path):
    trainer, _, checkpoints = training(tmp_path, bad=range(3, 9), most=5)
    stop_at(trainer, 5)
    with pytest.raises(SystemExit):
        checkpoints.run(trainer)
    trainer, _, checkpoints = training(tmp_path, bad=range(3, 9), most=5, resume=True)
    with pytest.raises(InputError, match="6 steps in a row were not finite, the last, 8"):
        checkpoints.run(trainer)


# ---- too little memory: what a GPU raises, raised by a network on the CPU


class Large(nn.Module):
    """Has room for some voxels only."""

    def __init__(self, room):
        super().__init__()
        self.room, self.weight = room, nn.Parameter(torch.ones(1))

    def forward(self, image):
        if image.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")
        return self.weight * image


@pytest.mark.parametrize(
    ("room", "found"),
    [
        (8 * 512, "--batch_size 8 with 8x8x8 voxels; tried: such a step alone does fit"),
        (3 * 512, "--batch_size 8 with 8x8x8 voxels; tried: --batch_size 2 fits"),
        (300, "--batch_size 1 fits with voxels 1.59 times as wide"),
        (10, "not even an eighth of one pair fits"),
    ],
)
def test_a_step_beyond_the_gpu_s_memory_says_what_fits(room, found, tmp_path):
    network = Large(room)
    if room == 8 * 512:  # once there was less

        def once(module, inputs):
            handle.remove()
            raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = network.register_forward_pre_hook(once)
    batch = {"image": torch.rand(8, 1, 8, 8, 8), "label": torch.rand(8, 1, 8, 8, 8), "case": list("abcdefgh")}
    optimizer = torch.optim.Adam(network.parameters())
    trainer = SupervisedTrainer("cpu", 1, [batch], network, optimizer, nn.MSELoss())
    with pytest.raises(InputError) as error:
        Checkpoints(str(tmp_path), {"trainer": trainer}).run(trainer)
    assert found in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_batch_is_its_first_pairs_on_a_part_of_their_grids():
    batch = {"image": torch.rand(4, 2, 8, 9, 10), "spacing": torch.ones(4, 3), "case": list("abcd")}
    half = part(batch, 2, 0.5)
    assert half["image"].shape == (2, 2, 4, 5, 5) and half["spacing"].shape == (2, 3) and half["case"] == ["a", "b"]


def test_memory_that_runs_out_elsewhere_is_one_line():
    try:
        try:
            Large(1)(torch.ones(2))
        except torch.OutOfMemoryError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        assert str(refusal(error)).startswith("CUDA out of memory. Tried to allocate 2.00 GiB. --cohort_device cpu")


# ---- the bundle


def bundle(overlay, cohort, folder, **settings):
    settings = QUICK | {"dataset_dir": str(cohort), "output_dir": str(folder)} | settings
    files = [str(ROOT / "configs" / name) for name in ("train.json", *overlay)]
    workflow = ConfigWorkflow(files, logging_file=False, **settings)
    workflow.initialize()
    return workflow


SEGMENTATION = pytest.param(("segmentation.yaml",), id="segmentation", marks=pytest.mark.slow)
OVERLAYS = pytest.mark.parametrize("overlay", [(), ("segmentation.yaml",)], ids=["train", "segmentation"])


@pytest.mark.parametrize("overlay", [pytest.param((), id="train"), SEGMENTATION])
def test_the_bundle_s_training_goes_on_in_the_middle_of_an_epoch_bit_for_bit(overlay, cohort, tmp_path):
    more = {"iterations": 4, "val_interval": 9, "learning_rate_decay": True, "learning_rate": 1e-3}
    more |= {"phantom_share": 0.5, "phantom_pool": 2}
    whole = bundle(overlay, cohort, tmp_path / "whole", **more)
    stop_at(whole.trainer)  # never: built first, as the other, it draws the same weights
    whole.run()
    stopped = bundle(overlay, cohort, tmp_path / "stopped", **more)
    stop_at(stopped.trainer, 3)
    with pytest.raises(SystemExit, match="143"):
        stopped.run()
    (weights,) = {path.name for path in (tmp_path / "whole").glob("[!c]*.pt")}
    assert not (tmp_path / "stopped" / weights).exists()
    bundle(overlay, cohort, tmp_path / "stopped", resume=True, **more).run()
    a, b = (torch.load(tmp_path / name / weights, weights_only=True) for name in ("whole", "stopped"))
    assert same(a, b)


@OVERLAYS
@LEFT_OUT
def test_the_bundle_s_training_names_the_cases_of_steps_that_are_not_finite(overlay, cohort, tmp_path):
    workflow = bundle(overlay, cohort, tmp_path, iterations=3, epoch_length=3, learning_rate=1e37, max_skipped_steps=1)
    with pytest.raises((InputError, RuntimeError)) as error:
        workflow.run()
    said = str(refusal(error.value))
    assert said.startswith("2 steps in a row were not finite, the last, 3, with loss")
    assert any(
        name in said for name in (path.name.split(".")[0] for path in (cohort / "train" / "fixed_images").iterdir())
    )
    assert not list(tmp_path.glob("*.pt"))


def test_the_bundle_s_training_that_pushes_its_labels_off_the_grid_writes_no_weights(cohort, tmp_path):
    settings = {"iterations": 8, "epoch_length": 8, "learning_rate": 1.0, "max_steps_without_labels": 3}
    workflow = bundle((), cohort, tmp_path, **settings)
    with pytest.raises((InputError, RuntimeError)) as error:
        workflow.run()
    said = str(refusal(error.value))
    assert said.startswith("step 4: the field has pushed the labels off the grid and for 3 steps")
    assert not list(tmp_path.glob("*.pt"))
