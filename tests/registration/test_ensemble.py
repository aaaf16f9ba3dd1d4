"""The mean field of several networks: the same seen in the mirror, shorter where they disagree, and it says so."""

import pytest
import torch
from torch import nn

from scripts.network.networks import SummedDDFNet
from scripts.registration.ensemble import FieldEnsemble


class Shift(nn.Module):
    """The same displacement everywhere, whatever the images."""

    def __init__(self, x=0.0, y=0.0):
        super().__init__()
        self.by = nn.Parameter(torch.tensor([x, y, 0.0]))

    def forward(self, image):
        return self.by.view(1, 3, 1, 1, 1).expand(len(image), 3, *image.shape[2:])


def ensemble(folder, networks, **settings):
    paths = [str(folder / f"{k}.pt") for k in range(len(networks))]
    for path, network in zip(paths, networks, strict=True):
        torch.save(network.state_dict(), path)
    return FieldEnsemble(networks[0], paths, **settings)


def test_a_mirrored_pair_has_the_mirrored_field(tmp_path):
    torch.manual_seed(0)
    network = SummedDDFNet(2).eval()
    for summand in network.summands:
        nn.init.normal_(summand.conv.weight, std=0.1)
    together = ensemble(tmp_path, [network]).eval()
    image = torch.rand(2, 2, 16, 32, 16)
    with torch.no_grad():
        field, mirrored = together(image), together(image.flip(2)).flip(2)
    mirrored[:, 0] = -mirrored[:, 0]
    assert field.abs().max() > 0.1 and torch.allclose(field, mirrored, atol=1e-5)


def test_the_mean_of_fields_at_a_share_of_its_strength_and_how_far_they_are_from_it(tmp_path):
    together = ensemble(tmp_path, [Shift(y=1.0), Shift(y=3.0)], strength=0.5)
    with torch.no_grad():
        field = together(torch.rand(2, 2, 8, 8, 8))
    assert torch.allclose(field[:, 1], torch.tensor(1.0)) and not field[:, [0, 2]].any()
    assert together.spread == pytest.approx([0.5, 0.5])
    with torch.no_grad():  # to the left in the pair and in its mirror image: one of them is wrong
        field = ensemble(tmp_path, [Shift(x=2.0)])(torch.rand(1, 2, 8, 8, 8))
    assert not field.any()


def test_the_spread_is_that_over_the_gland(tmp_path):
    class Beside(Shift):
        def forward(self, image):
            field = super().forward(image).clone()
            field[..., :4] = 0
            return field

    together = ensemble(tmp_path, [Beside(y=0.0), Beside(y=4.0)])
    image = torch.zeros(2, 4, 8, 8, 8)
    image[0, 3, ..., :4] = 1
    image[1, 3, ..., 4:] = 1
    with torch.no_grad():
        together(image)
    assert together.spread == pytest.approx([0, 2])
    assert together.apart[0, ..., :4].max() == 0 and together.apart[0, ..., 4:].min() == pytest.approx(2)
