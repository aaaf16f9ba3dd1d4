"""Instance optimisation: the field of a pair is fitted to the glands found in it, and to nothing else."""

import numpy as np
import pytest
import torch

from scripts.data.checks import InputError
from scripts.network.fields import identity_grid, jacobian_determinant, warp
from scripts.network.networks import NoField, SummedDDFNet
from scripts.registration.metrics import dice
from scripts.registration.refine import RefinedInferer, free_form, spline_matrix

SIZE = (32, 28, 36)


def ball(centre, radii, size=SIZE):
    apart = (identity_grid(size, torch.float32, "cpu") - torch.tensor(centre).view(3, 1, 1, 1)) / torch.tensor(
        radii
    ).view(3, 1, 1, 1)
    return torch.sigmoid(4 * (1 - apart.norm(dim=0)) * min(radii))[None, None]


@pytest.fixture(scope="module")
def pair():
    moving, fixed = ball((17.0, 13.0, 17.0), (8.0, 7.0, 10.0)), ball((15.0, 14.0, 18.0), (10.0, 6.0, 10.0))
    return torch.cat([torch.rand(1, 2, *SIZE), moving, fixed], dim=1)


@pytest.mark.parametrize(("size", "apart"), [(32, 5.0), (17, 4.0), (5, 8.0)])
def test_splines_reproduce_every_straight_line(size, apart):
    matrix = spline_matrix(size, apart)
    pieces = matrix.shape[1] - 3
    assert (size - 1) / pieces <= apart
    assert torch.allclose(matrix.sum(1), torch.ones(size), atol=1e-6)
    line = torch.arange(-1.0, pieces + 2) * (size - 1) / pieces
    assert torch.allclose(matrix @ line, torch.arange(float(size)), atol=1e-4)


def test_a_free_form_deformation_follows_its_control_points_along_each_axis():
    matrices = [spline_matrix(n, 5.0) for n in SIZE]
    control = torch.zeros(1, 3, *(m.shape[1] for m in matrices))
    control[0, 1, 2, 3, 4] = 1
    field = free_form(control, matrices)
    expected = np.einsum("i,j,k->ijk", *(m[:, n].numpy() for m, n in zip(matrices, (2, 3, 4), strict=True)))
    assert torch.allclose(field[0, 1], torch.from_numpy(expected), atol=1e-6)
    assert not field[0, [0, 2]].any()


def test_the_glands_come_to_lie_on_each_other_the_closer_the_less_smooth_and_nothing_folds(pair):
    moving, fixed = pair[:, 2:3], pair[:, 3:4]
    overlaps = [dice(moving >= 0.5, fixed >= 0.5).item()]
    for smooth in ({}, {"alpha": 0.5}):
        with torch.inference_mode():  # as evaluators run it
            ddf = RefinedInferer("float32", **smooth)(pair, NoField().eval())
        overlaps.append(dice(warp(moving, ddf) >= 0.5, fixed >= 0.5).item())
        assert jacobian_determinant(ddf).min() > 0.2
    before, default, free = overlaps
    assert before < 0.8 and before + 0.05 < default < free and free > 0.93


@pytest.mark.filterwarnings("error")
def test_a_user_is_warned_of_nothing_that_she_cannot_mend(pair):
    RefinedInferer("float32", steps=2)(pair, NoField().eval())


@pytest.mark.parametrize("sharper", [1, 0.3, 0.1])  # an outline found with more or less doubt is still where it is
def test_equal_glands_are_left_where_they_are(sharper):
    gland = ball((15.0, 14.0, 18.0), (10.0, 6.0, 10.0))
    doubted = torch.sigmoid(sharper * torch.logit(gland, 1e-6))
    ddf = RefinedInferer("float32")(torch.cat([torch.rand(1, 2, *SIZE), doubted, gland], dim=1), NoField().eval())
    assert ddf.norm(dim=1).max() < 0.2 and jacobian_determinant(ddf).min() > 0.94


def test_it_starts_from_the_network_s_field(pair):
    network = NoField().eval()
    network.forward = lambda image: torch.zeros(1, 3, *SIZE).index_fill(1, torch.tensor(0), 2.0)
    moved = RefinedInferer("float32")(pair, network)
    empty = torch.cat([pair[:, :2], torch.zeros(1, 2, *SIZE)], dim=1)
    still = RefinedInferer("float32")(empty, network)
    assert torch.equal(still, network(pair)) and not torch.allclose(moved, still, atol=0.1)


def test_each_pair_of_a_batch_is_fitted_alone(pair):
    both = torch.cat([pair, pair.flip(2)])
    inferer = RefinedInferer("float32", steps=5)
    together = inferer(both, NoField().eval())
    assert torch.allclose(together[1:], inferer(both[1:], NoField().eval()), atol=1e-6)


def test_the_images_do_not_matter_and_training_and_no_steps_leave_the_field_alone(pair):
    other = pair.clone()
    other[:, :2] = torch.rand_like(other[:, :2])
    network = NoField().eval()
    assert torch.equal(*(RefinedInferer("float32", steps=3)(p, network) for p in (pair, other)))
    assert not RefinedInferer("float32", steps=0)(pair, network).any()
    assert not RefinedInferer("float32")(pair, NoField().train()).any()


def test_an_input_without_glands_is_refused():
    with pytest.raises(InputError, match="initial_transform learned"):
        RefinedInferer()(torch.rand(1, 2, 16, 16, 16), SummedDDFNet(2).eval())
