"""The network may run in bfloat16 only where the hardware has it and the field stays where float32 puts it."""

import warnings

import pytest
import torch

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
    net, x = network().train(), pair(16, 32, 16)
    for asked, used in (("auto", "float32"), ("bfloat16", "bfloat16")):
        inferer = PrecisionInferer(asked)
        inferer(x, net).sum().backward()
        assert inferer.used == used
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


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
