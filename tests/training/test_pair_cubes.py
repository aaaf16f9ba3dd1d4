"""Batches of the second stage: what it learns from is what it will see, and points lie where their labels lie."""

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor

from scripts.data.checks import InputError
from scripts.network.fields import identity_grid
from scripts.network.losses import BendingEnergy, LandmarkDrivenLoss, MultiscaleDiceLoss
from scripts.registration.transforms import GRID, OntoFixedGridd
from scripts.training.cohort import SimulatedPairs
from scripts.training.pair_cubes import PairCubeLoader


@pytest.fixture(scope="module")
def pairs():
    simulated = SimulatedPairs("realistic", 3)
    return [simulated[k] for k in range(2)]


def batches(pairs, count=1, size=4, **settings):
    return list(PairCubeLoader(Dataset(pairs), size, count, "cpu", side=GRID, **settings))


def centroids(label):
    """Of maps (B, 1, X, Y, Z): (B, 3), voxels."""
    grid = identity_grid(label.shape[2:], torch.float32, "cpu")
    return (label * grid).sum((2, 3, 4)) / label.sum((2, 3, 4))


def test_without_changes_a_batch_is_what_a_registration_from_the_labelled_centroids_sees(pairs):
    found = [pair | {f"{side}_gland": pair[f"{side}_label"][:1] for side in ("moving", "fixed")} for pair in pairs]
    (batch,) = batches(found, augmentation=0, start_error=0)
    for b, case in enumerate(batch["case"]):
        seen = OntoFixedGridd("gland", "centroids")(next(p for p in found if p["case"] == case))
        assert batch["image"].shape[1] == len(seen["image"]) == 4
        assert ((batch["image"][b, 2:] > 0.5) != (seen["image"][2:] > 0.5)).float().mean() < 0.01
        for m in range(2):
            image, wanted = batch["image"][b, m], seen["image"][m]
            image, wanted = ((x - x.mean()) / x.std() for x in (image, wanted))
            assert (image - wanted).abs().mean() < 0.02
        for side in ("moving", "fixed"):
            overlap = (batch[f"{side}_label"][b] > 0.5) & (seen[f"{side}_label"][:1] > 0.5)
            sizes = (batch[f"{side}_label"][b] > 0.5).sum() + (seen[f"{side}_label"][:1] > 0.5).sum()
            assert 2 * overlap.sum() / sizes > 0.97
        assert (batch["moving_points"][b, 0] - batch["fixed_points"][b, 0]).norm() < 0.01


def test_the_first_point_is_the_centroid_of_the_gland_however_both_images_move(pairs):
    for batch in batches(pairs, count=3, seed=4):
        for side in ("moving", "fixed"):
            label = batch[f"{side}_label"]
            whole = label[:, :, [0, -1]].sum((1, 2, 3, 4)) + label[..., [0, -1]].sum((1, 2, 3, 4)) == 0
            off = (centroids(label) - batch[f"{side}_points"][:, 0]).norm(dim=1)
            assert whole.any() and (off[whole] < 0.1).all()


def test_a_point_of_a_small_label_stays_in_it_under_a_random_warp():
    grid = identity_grid([40] * 3, torch.float32, "cpu")
    gland = ((grid - 19.5).square().sum(0) < 10**2)[None].float()
    ball = ((grid - torch.tensor([23.0, 17, 21]).view(3, 1, 1, 1)).square().sum(0) < 1.5**2)[None].float()
    pair = {"case": "a"}
    for side, label in (("moving", ball), ("fixed", gland)):  # the moving gland is small: a point of it is its place
        pair[f"{side}_image"] = MetaTensor(torch.rand(1, 40, 40, 40), affine=torch.eye(4))
        pair[f"{side}_label"] = MetaTensor(label, affine=torch.eye(4))
    unmoved, moved = (batches([pair], 4, warp=w, seed=2)[0] for w in (0.0, 2.0))
    assert (unmoved["moving_points"] - moved["moving_points"]).abs().max() > 1
    for batch in (unmoved, moved):
        assert (centroids(batch["moving_label"]) - batch["moving_points"][:, 0]).norm(dim=1).max() < 0.4


def test_a_loader_goes_on_where_another_stopped(pairs):
    simulated = SimulatedPairs("realistic", 5)
    settings = {"simulated": simulated, "share": 0.5, "pool": 2, "warp": 1.0}
    loader = PairCubeLoader(Dataset(pairs), 2, 5, "cpu", **settings)
    first = iter(loader)
    for _ in range(5):
        next(first)
    state, wanted = loader.state_dict(), next(iter(loader))
    other = PairCubeLoader(Dataset(pairs), 2, 5, "cpu", **settings)
    other.load_state_dict(state)
    found = next(iter(other))
    assert found["case"] == wanted["case"] and torch.equal(found["image"], wanted["image"])
    assert torch.equal(found["moving_points"].nan_to_num(), wanted["moving_points"].nan_to_num())


def test_pairs_of_other_numbers_of_labels_share_a_batch_and_a_pair_without_a_gland_is_refused(pairs):
    one = dict(pairs[0]) | {f"{s}_label": pairs[0][f"{s}_label"][:1] for s in ("moving", "fixed")} | {"case": "one"}
    (batch,) = batches([one, pairs[1]], size=8)
    known = batch["moving_points"].isfinite().all(-1).sum(1)
    assert {known[b].item() for b in range(8) if batch["case"][b] == "one"} == {1} and known.max() > 1
    empty = dict(one) | {"moving_label": torch.zeros_like(one["moving_label"])}
    with pytest.raises(InputError, match="label 0, the gland, is empty"):
        batches([empty])
    with pytest.raises(InputError, match="3 processes cannot share"):
        batches(pairs, world_size=3)


def test_the_loss_pulls_a_point_that_overlaps_with_nothing_and_leaves_out_those_that_are_not_there(pairs):
    (batch,) = batches(pairs)
    size = batch["image"].shape
    loss = LandmarkDrivenLoss(MultiscaleDiceLoss([0, 4]), BendingEnergy(), points=1.0)
    for k in range(4):
        batch["moving_points"][k] = batch["fixed_points"][k] + torch.tensor([3.0, 0, 0])
    batch["fixed_points"][:, 1:] = np.nan
    batch["fixed_points"][:, 0] = 15.5
    batch["moving_points"][:, 0] = torch.tensor([18.5, 15.5, 15.5])
    ddf = torch.zeros(size[0], 3, *size[2:], requires_grad=True)
    value = loss(ddf, batch)
    alone = LandmarkDrivenLoss(loss.similarity, loss.regulariser, points=0.0)(ddf, batch)
    mm = 3 * batch["spacing"][0, 0]
    assert (value - alone).item() == pytest.approx((mm - 2).item(), rel=1e-5)  # beyond 4 mm: linear
    (gradient,) = torch.autograd.grad(value - alone, ddf)
    assert gradient[:, 0].sum() < 0 and gradient[:, 1:].abs().sum() < 1e-4 * gradient[:, 0].abs().sum()
    there = torch.zeros_like(ddf)
    there[:, 0] = 3
    reached = loss(there, batch) - LandmarkDrivenLoss(loss.similarity, loss.regulariser, points=0.0)(there, batch)
    assert abs(reached) < 1e-4


def test_the_loss_of_points_is_that_of_the_exchanged_pair_under_the_inverse_field():
    generator = torch.Generator().manual_seed(0)
    label, middle = torch.ones(1, 1, 32, 32, 32), torch.full((3, 1, 1, 1), 15.5)
    fixed, moving = (15.5 + 5 * torch.randn(1, 6, 3, generator=generator) for _ in range(2))
    fixed, moving = fixed.clamp(6, 25), moving.clamp(6, 25)
    points, spacing = LandmarkDrivenLoss(MultiscaleDiceLoss([0]), BendingEnergy(), 0, points=1.0), torch.ones(1, 3)

    def of(scale, one, other):
        ddf = ((scale - 1) * (identity_grid([32] * 3, torch.float32, "cpu") - middle))[None]
        targets = {"moving_label": label, "fixed_label": label, "spacing": spacing.double()}
        return points(ddf, targets | {"fixed_points": one, "moving_points": other})

    without = {scale: of(scale, fixed * torch.nan, moving) for scale in (0.7, 1 / 0.7)}
    there, back = (of(0.7, fixed, moving) - without[0.7], of(1 / 0.7, moving, fixed) - without[1 / 0.7])
    assert there > 1 and there.item() == pytest.approx(back.item(), rel=0.03)
