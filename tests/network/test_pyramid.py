"""The warping pyramid compares features where the field so far leads, and learns."""

import pytest
import torch
from torch.nn import functional as F

from scripts.network.fields import warp
from scripts.network.pyramid import WarpingPyramid, local_correlation


def test_the_correlation_is_one_at_the_offset_by_which_the_moving_features_lie_off():
    fixed = torch.randn(2, 6, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    moving = torch.roll(fixed, (1, -1, 0), dims=(2, 3, 4))
    found = local_correlation(moving, fixed, 1)
    assert found.shape == (2, 27, 9, 8, 7)
    inside = found[:, :, 1:-1, 1:-1, 1:-1]
    assert (inside.argmax(1) == 9 * 2 + 3 * 0 + 1).all()  # x + 1, y - 1, z
    assert torch.allclose(inside.amax(1), torch.ones(()), atol=1e-5) and inside.abs().max() < 1 + 1e-5


@pytest.mark.parametrize(("channels", "size"), [(2, (16, 32, 24)), (4, (32, 16, 16))])
def test_the_field_starts_at_zero_and_every_weight_but_those_it_hides_learns(channels, size):
    torch.manual_seed(0)
    network = WarpingPyramid(4, channels)
    ddf = network(torch.rand(2, channels, *size))
    assert ddf.shape == (2, 3, *size) and not ddf.any()
    for _, last in network.estimate:
        torch.nn.init.normal_(last.conv.weight, std=0.01)
    network(torch.rand(2, channels, *size)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.slow
def test_it_learns_the_translations_of_a_few_pairs_of_opposite_contrast():
    torch.manual_seed(0)
    network = WarpingPyramid(4, 2, levels=3)
    fixed = F.interpolate(torch.randn(3, 1, 5, 5, 5), size=(12, 12, 12), mode="trilinear")
    shift = torch.tensor([[1.5, 0, -1], [-1, 1, 0.5], [0.5, -2, 1]]).view(3, 3, 1, 1, 1)
    moving = -warp(fixed, -shift.expand(3, 3, 12, 12, 12), padding_mode="border")
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    errors = []
    for _ in range(50):
        ddf = network(torch.cat([moving, fixed], dim=1))[..., 3:-3, 3:-3, 3:-3]
        loss = (ddf - shift).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.3 * errors[0]
