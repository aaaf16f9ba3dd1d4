"""The network may run in bfloat16 only where the hardware has it and the field stays where float32 puts it."""

import io
import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT

from scripts.data.checks import InputError
from scripts.network.networks import SummedDDFNet
from scripts.registration import precision
from scripts.registration.precision import PrecisionInferer


def network(size=0.01):
    """A small network in eval mode whose field is `size` times some voxels."""
    torch.manual_seed(0)
    net = SummedDDFNet(initial_channels=4).eval()
    for summand in net.summands:
        torch.nn.init.normal_(summand.conv.weight, std=size)
    return net


def pair(*size):
    return torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hardware(monkeypatch):
    """Pretend the hardware computes bfloat16."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)


@pytest.mark.parametrize("size", [(16, 32, 16), (15, 29, 13)])
@torch.no_grad()
def test_bfloat16_gives_the_field_of_float32_within_the_tolerance(size, hardware):
    net, x = network(), pair(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast, plain = PrecisionInferer("auto"), PrecisionInferer("float32")
        ddf, expected = fast(x, net), plain(x, net)
    assert (fast.used, plain.used) == ("bfloat16", "float32")
    assert ddf.dtype == expected.dtype == torch.float32
    assert expected.abs().max() > 0.2
    assert 0 < (ddf - expected).abs().max() <= 0.05
    assert torch.equal(expected, net(x))


@torch.no_grad()
def test_a_field_that_bfloat16_moves_too_far_is_computed_in_float32_and_said_so(hardware):
    net, x = network(size=20), pair(16, 32, 16)
    inferer = PrecisionInferer("auto")
    with pytest.warns(UserWarning, match=r"bfloat16 moves the DDF by .* voxel, more than 0.05"):
        ddf = inferer(x, net)
    assert inferer.used == "float32" and torch.equal(ddf, net(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        inferer(x, net)


@torch.no_grad()
def test_new_weights_are_checked_anew(hardware):
    net, x = network(), pair(16, 16, 16)
    inferer = PrecisionInferer("auto")
    inferer(x, net)
    assert inferer.used == "bfloat16"
    net.load_state_dict(network(size=20).state_dict())
    with pytest.warns(UserWarning, match="bfloat16 moves the DDF"):
        inferer(x, net)
    assert inferer.used == "float32"


@torch.no_grad()
def test_a_field_that_is_not_a_number_is_no_agreement(hardware):
    net, x = network(), pair(16, 16, 16)
    net.summands[0].conv.bias.fill_(torch.nan)
    with pytest.warns(UserWarning, match="bfloat16 moves the DDF by nan voxel"):
        PrecisionInferer("auto")(x, net)


@torch.no_grad()
def test_auto_is_float32_without_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    net, x = network(), pair(16, 16, 16)
    assert torch.equal(PrecisionInferer("auto")(x, net), net(x))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert precision.computes_bfloat16(torch.device("cpu"))


def test_training_is_in_float32_unless_asked(hardware):
    net, x = network().train(), pair(48, 48, 48)
    for asked, used in (("auto", "float32"), ("bfloat16", "bfloat16")):
        inferer = PrecisionInferer(asked)
        inferer(x, net).sum().backward()
        assert inferer.used == used
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_training_on_maps_of_fewer_planes_than_the_kernel_is_in_float32_on_a_cpu(hardware):
    net, inferer = network().train(), PrecisionInferer("bfloat16")
    net.down[0].eval()  # as who fine-tunes leaves some of it
    counted = [norm.num_batches_tracked.item() for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm3d)]
    with pytest.warns(UserWarning, match=r"fewer planes than its kernel.*; this run trains in float32"):
        inferer(pair(16, 32, 16), net).sum().backward()
    assert inferer.used == "float32" and net.training and not net.down[0].training
    modes = [norm.training for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm3d)]
    after = [norm.num_batches_tracked.item() for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm3d)]
    assert after == [n + training for n, training in zip(counted, modes, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        inferer(pair(16, 32, 16), net)


GRADIENTS = """
import sys, torch
from scripts.network.networks import SummedDDFNet
from scripts.network.segmentation import GlandNetwork
from scripts.registration.precision import PrecisionInferer
torch.manual_seed(0)
found = []
for network, size in (
    (SummedDDFNet(initial_channels=4), (2, 16, 32, 16)),
    (SummedDDFNet(initial_channels=4), (2, 48, 32, 32)),
    (GlandNetwork(), (1, 32, 32, 32)),
    (GlandNetwork(), (1, 48, 48, 48)),
):
    for module in network.modules():  # the summands begin at zero
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=0.05)
    PrecisionInferer("bfloat16")(torch.randn(2, *size), network.train()).square().mean().backward()
    found.append([p.grad for p in network.parameters() if p.grad is not None])
torch.save(found, sys.stdout.buffer)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is told to fill new memory")
def test_no_gradient_depends_on_what_was_in_memory():
    def gradients(fill):
        environment = dict(os.environ, MALLOC_PERTURB_=str(fill), MALLOC_MMAP_MAX_="0", OMP_NUM_THREADS="1")
        command = [sys.executable, "-W", "ignore", "-c", GRADIENTS]
        return subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout

    zero, large = (torch.load(io.BytesIO(gradients(fill))) for fill in (255, 128))  # new bytes are its complement
    for a, b in zip(zero, large, strict=True):
        assert all(torch.equal(of_zero, of_large) for of_zero, of_large in zip(a, b, strict=True))


def test_training_in_bfloat16_without_the_hardware_says_that_it_is_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    inferer = PrecisionInferer("bfloat16")
    with pytest.warns(UserWarning, match="does not compute bfloat16; this run trains in float32"):
        inferer(pair(16, 32, 16), network().train())
    assert inferer.used == "float32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="precision is 'half'"):
        PrecisionInferer("half")


@torch.inference_mode()
def test_a_network_made_in_inference_mode_is_checked_too(hardware):
    net, x = network(), pair(16, 16, 16)
    inferer = PrecisionInferer("auto")
    inferer(x, net)
    assert inferer.used == "bfloat16"
