"""Two soft glands are likelier one the better they agree where both are sure; doubt and chance say nothing."""

import pytest
import torch

from scripts.registration.likelihood import LEAST, SHARE, SameGlandLoss, evidence


def test_evidence_is_bounded_monotone_and_keeps_one_half():
    probability = torch.linspace(0, 1, 101)
    found = evidence(probability)
    assert LEAST <= found.min() and found.max() <= 1 - LEAST and (found[2:-1] > found[1:-2]).all()
    assert found[50] == pytest.approx(0.5) and torch.allclose(found + found.flip(0), torch.ones(101), atol=1e-5)


@pytest.mark.parametrize("other", [0.1, 0.5, 0.9])
def test_an_observer_who_knows_no_more_than_the_share_of_gland_changes_nothing(other):
    ignorant = torch.full((1, 1, 4, 4, 4), SHARE)
    assert SameGlandLoss()(ignorant, torch.full_like(ignorant, other)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_of_two_observers_of_one_point_summed_over_what_it_may_be():
    generator = torch.Generator().manual_seed(0)
    p, q = (0.02 + 0.96 * torch.rand(1, 1, 5, 6, 7, generator=generator).double() for _ in range(2))
    ratio = 0
    for gland, seen in ((True, SHARE), (False, 1 - SHARE)):  # what both saw, each against what it sees anyway
        of_p, of_q = (v if gland else 1 - v for v in (p, q))
        ratio = ratio + seen * (of_p / seen) * (of_q / seen)
    assert SameGlandLoss()(p, q).item() == pytest.approx(-ratio.log().mean().item(), rel=1e-12)


def test_a_shift_costs_more_the_surer_both_are():
    x = torch.arange(40.0).view(1, 1, 40, 1, 1)
    costs = []
    for softness in (1, 4, 16):
        here, there = (evidence(torch.sigmoid((10 - (x - c).abs()) / softness)) for c in (19, 22))
        costs.append((SameGlandLoss()(there, here) - SameGlandLoss()(here, here)).item())
    assert costs[0] > 2 * costs[1] > 4 * costs[2] > 0
