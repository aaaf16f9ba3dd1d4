"""Training batches: the two-stage draw is unbiased, and start, augmentation and grid are one interpolation."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, pad_list_data_collate
from scipy.ndimage import map_coordinates
from scipy.stats import chisquare

from scripts.data.checks import InputError
from scripts.registration.transforms import OntoFixedGridd, PlanFixedGridd
from scripts.training import cohort
from scripts.training.cohort import CohortLoader, corner_affine
from scripts.training.gland_cubes import GlandLoader

# ---- the two-stage draw


def labelled(case, count, absent=()):
    """A planned pair of `count` labels; label m is the voxel (m, 0, 0) in both images, an absent one in one of them."""
    label = torch.zeros(count, 6, 2, 2)
    label[range(count), range(count), 0, 0] = 1
    moving, fixed = label.clone(), label.clone()
    for i, m in enumerate(absent):
        (moving, fixed)[i % 2][m] = 0.4  # below one half: nothing is left of it
    volumes = {"moving_label": moving, "fixed_label": fixed}
    volumes |= {key: torch.rand(1, 6, 2, 2) for key in ("moving_image", "fixed_image")}
    return PlanFixedGridd("none")({k: MetaTensor(v, affine=torch.eye(4)) for k, v in volumes.items()} | {"case": case})


def drawn(pairs, batches, seed):
    """(case, label) of each draw."""
    found = []
    for batch in CohortLoader(pairs, 4, batches, "cpu", augmentation=0, seed=seed):
        assert batch["moving_label"].shape == batch["fixed_label"].shape == (4, 1, 6, 2, 2)
        assert torch.equal(batch["moving_label"], batch["fixed_label"])
        labels = batch["fixed_label"][:, 0, :, 0, 0].argmax(1).tolist()
        found += zip(batch["case"], labels, strict=True)
    return found


def p_value(found, counts, probability):
    """Of the null hypothesis that label m of a case is drawn with `probability(case, m)`."""
    cells = [(case, m) for case, count in counts.items() for m in range(count)]
    expected = [len(found) * probability(*cell) for cell in cells]
    return chisquare([found.count(cell) for cell in cells], expected).pvalue


def test_every_pair_is_equally_likely_and_then_every_label_of_it_whatever_their_number():
    counts = {"one": 1, "five": 5, "three": 3}
    found = drawn([labelled(case, count) for case, count in counts.items()], batches=400, seed=0)
    assert len(found) == 1600
    assert p_value(found, counts, lambda case, m: 1 / 3 / counts[case]) > 0.01
    assert p_value(found, counts, lambda case, m: 1 / 9) < 1e-50  # a draw over all labels would favour "five"


def test_a_label_that_is_empty_in_either_image_is_never_drawn_and_the_others_stay_equally_likely():
    pairs = [labelled("some", 6, absent=(1, 4)), labelled("first", 3, absent=(0,))]
    found = drawn(pairs, batches=250, seed=1)
    assert {c for c in found} == {("some", m) for m in (0, 2, 3, 5)} | {("first", m) for m in (1, 2)}
    draws = [m for case, m in found if case == "some"]
    assert chisquare([draws.count(m) for m in (0, 2, 3, 5)]).pvalue > 0.01


def test_the_draw_can_be_seeded():
    pairs = [labelled("five", 5), labelled("six", 6)]
    assert drawn(pairs, 20, seed=3) == drawn(pairs, 20, seed=3)
    assert drawn(pairs, 20, seed=3) != drawn(pairs, 20, seed=4)


def test_a_loader_that_is_given_its_place_back_draws_what_the_first_would_have_drawn(tmp_path):
    def loader():
        return CohortLoader(pairs, 2, 5, "cpu", simulated=simulated, share=0.5, pool=3)

    pairs = [labelled("five", 5), labelled("six", 6)]
    simulated = [labelled(f"phantom {k}", 4) for k in range(20)]
    first, again = loader(), loader()
    list(first), list(first)
    torch.save(first.state_dict(), tmp_path / "place.pt")
    again.load_state_dict(torch.load(tmp_path / "place.pt", weights_only=True))
    for _ in range(4):
        for a, b in zip(first, again, strict=True):
            assert a["case"] == b["case"] and torch.equal(a["image"], b["image"])


@pytest.mark.parametrize("kind", ["pairs", "glands"])
def test_processes_draw_one_batch_together_and_agree_on_the_place_in_the_draws(kind):
    def loader(rank=0, world_size=1):
        if kind == "pairs":  # of unequal sizes: every share is padded as the batch is
            pairs = [PlanFixedGridd(1.1)(oblique(f"{k}", k, size)) for k, size in enumerate([(9, 8, 10), (11, 13, 9)])]
            return CohortLoader(pairs, 4, 3, "cpu", seed=1, rank=rank, world_size=world_size)
        return GlandLoader(
            [oblique(f"{k}", k) for k in range(3)], 4, 3, "cpu", seed=1, rank=rank, world_size=world_size
        )

    whole, shares = loader(), [loader(rank, 2) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for key, value in batch.items():
            together = [part[key] for part in parts]
            assert torch.equal(torch.cat(together), value) if torch.is_tensor(value) else sum(together, []) == value
    assert str(whole.state_dict()) == str(shares[0].state_dict()) == str(shares[1].state_dict())
    with pytest.raises(InputError, match="batch_size 4: 3 processes cannot share it"):
        loader(0, 3)


def test_no_pair_and_a_pair_without_any_common_label_are_refused():
    with pytest.raises(InputError, match="pair 7: no label is present in both images"):
        CohortLoader([labelled("pair 7", 2, absent=(0, 1))], 1, 1, "cpu")
    with pytest.raises(InputError, match="no pair to train on"):
        CohortLoader([], 1, 1, "cpu")


def test_labels_are_kept_as_bytes():
    loader = CohortLoader([labelled("five", 5)], 1, 1, "cpu")
    assert {loader.pool.pairs[0][side]["label"].dtype for side in ("moving", "fixed")} == {torch.uint8}


# ---- one map, one interpolation


def oblique(case, seed, fixed_size=(11, 13, 9), labels=2):
    """A pair of random volumes on oblique, anisotropic, flipped grids; nearly every voxel is in some label."""
    rng = np.random.default_rng(seed)
    data = {"case": case}
    for side, size, mm in (("moving", (14, 9, 10), (0.9, 1.1, 1.6)), ("fixed", fixed_size, (1.2, 1.0, 1.4))):
        turn, _ = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn * mm * (1, -1, 1), rng.normal(size=3, scale=30)
        affine = torch.from_numpy(affine)
        data[f"{side}_image"] = MetaTensor(torch.from_numpy(rng.normal(size=(1, *size))).float(), affine=affine)
        data[f"{side}_label"] = MetaTensor(torch.from_numpy(rng.random((labels, *size)) > 0.3).float(), affine=affine)
    return data


def test_without_augmentation_a_batch_is_the_collated_pairs_on_their_fixed_grids():
    data = [oblique("small", 0, (9, 8, 10), labels=1), oblique("large", 1, (11, 13, 9), labels=1)]
    loader = CohortLoader([PlanFixedGridd(1.1)(d) for d in data], 6, 1, "cpu", augmentation=0, seed=1)
    batch = next(iter(loader))
    assert set(batch["case"]) == {"small", "large"}
    plain = {d["case"]: OntoFixedGridd(1.1)(d) for d in data}
    expected = pad_list_data_collate([plain[case] for case in batch["case"]])
    for key in ("image", "moving_label", "fixed_label", "spacing"):
        torch.testing.assert_close(batch[key], torch.as_tensor(expected[key]), rtol=1e-5, atol=1e-5)


def test_the_augmented_pair_is_read_once_through_the_composed_map():
    pair = PlanFixedGridd(1.1)(oblique("pair", 2))
    batch = next(iter(CohortLoader([pair], 1, 1, "cpu", augmentation=0.1, seed=9)))
    rng = np.random.default_rng(9)
    rng.integers(1, size=1)
    m = rng.choice([0, 1])
    size = np.array(pair["grid_size"])
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij")).reshape(3, -1)
    for channel, side in enumerate(("moving", "fixed")):
        affine = corner_affine(rng.random((4, 3)), 0.1)
        normalised = (2 * voxels + 1) / size[:, None] - 1
        moved = ((affine[:, :3] @ normalised + affine[:, 3:] + 1) * size[:, None] - 1) / 2
        points = pair["grid_affine"].numpy() @ np.vstack([moved, np.ones(moved.shape[1])])
        if side == "moving":
            points = pair["initial_transform"].numpy() @ points
        inverse = np.linalg.inv(pair[f"{side}_image"].affine.numpy())
        points = (inverse @ points)[:3]
        image, label = pair[f"{side}_image"][0].numpy(), pair[f"{side}_label"][m].numpy()
        inside = ((points >= -0.5) & (points <= np.array(image.shape)[:, None] - 0.5)).all(0)
        assert inside.mean() > 0.3 and inside.all() == (side == "fixed")  # the affine moves inward
        expected = map_coordinates(image.astype(float), points, order=1, mode="nearest").reshape(size)
        np.testing.assert_allclose(batch["image"][0, channel].numpy(), expected, atol=2e-5)
        expected = (map_coordinates(label.astype(float), points, order=1, mode="nearest") * inside).reshape(size)
        np.testing.assert_allclose(batch[f"{side}_label"][0, 0].numpy(), expected, atol=2e-5)


def test_images_keep_their_border_and_labels_are_zero_beyond_it(monkeypatch):
    data = {f"{side}_{kind}": torch.ones(1, 12, 10, 8) for side in ("moving", "fixed") for kind in ("image", "label")}
    pair = PlanFixedGridd("none")({k: MetaTensor(v, affine=torch.eye(4)) for k, v in data.items()} | {"case": "ones"})
    monkeypatch.setattr(cohort, "corner_affine", lambda *_: np.c_[np.eye(3), [0.5, 0, 0]])  # 3 of 12 voxels
    batch = next(iter(CohortLoader([pair], 1, 1, "cpu")))
    torch.testing.assert_close(batch["image"], torch.ones(1, 2, 12, 10, 8))
    for key in ("moving_label", "fixed_label"):
        torch.testing.assert_close(batch[key][:, :, :9], torch.ones(1, 1, 9, 10, 8))
        assert not batch[key][:, :, 9:].any()


def test_the_moving_and_the_fixed_side_move_independently_and_anew_each_time():
    size = (14, 10, 18)
    ramp = sum(torch.arange(float(n)).view([-1 if i == k else 1 for k in range(3)]) for i, n in enumerate(size))[None]
    data = {"moving_image": ramp, "fixed_image": ramp, "moving_label": ramp > 0, "fixed_label": ramp > 0}
    pair = PlanFixedGridd("none")(
        {k: MetaTensor(v.float(), affine=torch.eye(4)) for k, v in data.items()} | {"case": "r"}
    )
    shifts = [b["image"][0, :, 7, 5, 9].tolist() for b in CohortLoader([pair], 1, 100, "cpu", augmentation=0.1)]
    moving, fixed = np.array(shifts).T
    assert len(np.unique(moving)) == len(np.unique(fixed)) == 100
    assert abs(np.corrcoef(moving, fixed)[0, 1]) < 0.3


def test_augmentation_can_be_seeded_and_leaves_the_cohort_alone():
    pair = PlanFixedGridd(1.1)(oblique("pair", 3))
    before = {k: pair[k].clone() for k in ("moving_image", "fixed_image", "moving_label", "fixed_label")}
    a, b, c = (next(iter(CohortLoader([pair], 1, 1, "cpu", augmentation=0.1, seed=seed))) for seed in (0, 0, 1))
    for key in ("image", "moving_label", "fixed_label"):
        assert torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key])
    assert all(torch.equal(pair[key], value) for key, value in before.items())


# ---- label-reg's affine


def test_the_corner_affine_stays_in_its_ranges_and_reaches_them():
    rng = np.random.default_rng(0)
    affines = np.array([corner_affine(rng.random((4, 3)), 0.1) for _ in range(4000)])
    eye = np.eye(3, dtype=bool)
    for values, low, high in (
        (affines[:, :, :3][:, eye], 0.9, 1),
        (affines[:, :, :3][:, ~eye], -0.05, 0.05),
        (affines[:, :, 3], -0.1, 0.1),
    ):
        assert values.min() >= low - 1e-12 and values.max() <= high + 1e-12
        assert values.min() < low + 0.15 * (high - low) and values.max() > high - 0.15 * (high - low)


def test_the_corner_affine_is_the_identity_at_strength_zero_and_takes_the_corners_where_they_move():
    uniform = np.random.default_rng(0).random((4, 3))
    np.testing.assert_allclose(corner_affine(uniform, 0), np.eye(3, 4), atol=1e-12)
    affine = corner_affine(uniform, 0.1)
    corners = np.array([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    inward = affine @ np.c_[corners, np.ones(4)].T
    np.testing.assert_allclose(inward.T, corners - corners * 0.1 * uniform, atol=1e-12)
