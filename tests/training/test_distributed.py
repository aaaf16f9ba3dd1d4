"""Two processes on a CPU train as one process with the whole batch does, typed as users of several GPUs type it."""

import json

import pytest
import torch
from conftest import QUICK, ROOT, flags, logged, run
from monai.bundle import ConfigWorkflow
from torch import distributed, nn

from scripts.data.checks import InputError
from scripts.training.distributed import JointBatchNorm3d, join, with_joint_norms

CONFIGS = [str(ROOT / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
RATE = 1e-3
SETTINGS = QUICK | {"learning_rate": RATE}


@pytest.mark.slow  # two interpreters that import PyTorch anew
@pytest.mark.parametrize("interrupted", [False, True])
def test_two_processes_train_as_one_does_and_resume(interrupted, cohort, tmp_path):
    """Losses agree to 1e-5, weights after four steps to a fifth of a step of Adam: it makes a step of the learning rate
    of any gradient, also of those that are all rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SETTINGS | {"dataset_dir": str(cohort), "iterations": 4, "val_interval": 2}
    alone = ConfigWorkflow(CONFIGS[0], logging_file=False, output_dir=str(one), **settings)
    alone.initialize()
    alone.run()
    for more in ({"iterations": 2}, {"resume": True}) if interrupted else ({},):
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
        values = flags({"config_file": CONFIGS, "output_dir": two} | settings | more)
        result = run(*command, *values, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-4000:]
    expected, shown = (logged(folder)["train_loss"] for folder in (one, two))
    assert set(expected) == {1, 2, 3, 4} and shown == pytest.approx(expected, rel=1e-5)
    weights, found = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, two))
    assert weights.keys() == found.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=RATE / 5, msg=name)
    # the first process alone wrote: the files of a single one, and as many event files a run
    names = [sorted(p.name for p in folder.iterdir() if "events" not in p.name) for folder in (one, two)]
    assert names[0] == names[1]
    assert len(list(two.glob("events*"))) == (1 + interrupted) * len(list(one.glob("events*")))


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_joint_batch_normalisation_is_batch_normalisation(group):
    torch.manual_seed(0)
    x, weight = (torch.randn(3, 4, 5, 6, 7, dtype=torch.float64) for _ in range(2))
    plain = nn.BatchNorm3d(4, eps=1e-3).double()
    nn.init.uniform_(plain.weight, 0.5, 2)
    nn.init.normal_(plain.bias)
    joint = nn.Sequential(nn.BatchNorm3d(4, eps=1e-3)).double()
    joint[0].load_state_dict(plain.state_dict())
    joint = with_joint_norms(joint)[0]
    assert type(joint) is JointBatchNorm3d
    found = []
    for norm in (plain, joint):
        y = (2 * x + 3).requires_grad_()
        out = norm(y)
        (out * weight).square().sum().backward()
        found.append((out, y.grad, norm.weight.grad, norm.bias.grad, *norm.buffers(), norm.eval()(y)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_torchrun_it_says_how_to_start():
    with pytest.raises(InputError, match="torchrun --nproc_per_node=N"):
        join()


def test_every_setting_of_the_overlay_is_one_of_training():
    train, overlay = (json.loads(open(path).read()) for path in CONFIGS)
    for key in set(overlay) - {"finalize", "train#joint_loss", "validate#dataset#cache_num"}:
        node = train
        for part in key.split("#"):
            assert part in node, key
            node = node[part]
