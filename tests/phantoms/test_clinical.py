"""The clinical mode: what clinics have is there, the labels are exact, and the two older modes are as they were."""

import hashlib
from functools import cache

import numpy as np
import pytest
import torch

from scripts.phantoms.clinical import draw_grids
from scripts.phantoms.pelvis import FILLINGS, ClinicalAnatomy
from scripts.phantoms.phantom import simulate_pair, write_cohort
from scripts.training import cohort

SMALL = {"fixed_shape": (40, 34, 16), "fixed_spacing": (2.4, 2.4, 4), "moving_shape": (48, 48, 20)}


@pytest.fixture(scope="module")
def pairs():
    """Pairs of a field of view of 200 mm."""
    return [simulate(np.random.default_rng([1, k])) for k in range(6)]


@pytest.fixture(scope="module")
def large():
    """Pairs whose MR is wider than the body."""
    return [simulate(np.random.default_rng([5, k]), moving_spacing=(8, 8, 4)) for k in range(6)]


def simulate(random, moving_spacing=(4, 4, 4)):
    return simulate_pair(random, **SMALL, moving_spacing=moving_spacing, mode="clinical")


@cache
def anatomy(k):
    return ClinicalAnatomy(np.random.default_rng([2, k]))


def anatomies(filling, count):
    """The first of the sixty with this filling."""
    return [anatomy(k) for k in range(60) if anatomy(k).filling == filling][:count]


def lattice(step=2.0):
    """Points of the gland's surroundings, mm."""
    x, y, z = (torch.arange(-r, r + 1, step) for r in (60, 60, 70))
    return x[:, None, None], y[:, None], z


def relative(pair):
    """The voxels of the MR, relative to the gland's centre."""
    points = world(pair.moving_affine, pair.moving_image.shape)
    return [p - c for p, c in zip(points, pair.true_map.moving_centre, strict=True)]


def world(affine, shape):
    points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    return torch.from_numpy(points).float().unbind(-1)


@pytest.mark.parametrize(
    "mode, digest",
    [
        ("realistic", ("f8e1aabeddeaeeee", 8800, 590111)),
        ("randomised", ("bfbbcecf759f42d0", 9881, 914403)),
    ],
)
def test_the_older_modes_give_what_they_gave_before_the_clinical_one(mode, digest):
    counts = [0, 0]
    found = hashlib.sha256()
    for k in range(3):
        pair = simulate_pair(np.random.default_rng([9, k]), (20, 18, 16), 3.4, (18, 20, 16), (4, 4, 4.5), mode)
        for image in pair[:2]:
            # steps of four grey levels, since the last digits differ from one processor to another
            counts[0] += int((image / 4).round().sum())
        for label in pair[2:4]:
            counts[1] += int(label.sum())
        found.update(repr((pair.label_names, np.round(pair.probe.position, 3).tolist())).encode())
    assert (found.hexdigest()[:16], counts[1]) == digest[:2]
    assert counts[0] == pytest.approx(digest[2], rel=1e-4)


def test_the_labels_are_the_anatomy_itself_in_either_scan(pairs):
    for pair in pairs:
        moving = world(pair.moving_affine, pair.moving_image.shape)
        fixed = world(pair.fixed_affine, pair.fixed_image.shape)
        mapped = pair.true_map(*fixed)
        shown = torch.stack(mapped, -1) - torch.stack(fixed, -1)
        torch.testing.assert_close(pair.true_displacement, shown, rtol=0, atol=1e-3)
        for points, label in ((moving, pair.moving_label), (mapped, pair.fixed_label)):
            depths = pair.anatomy.depths(*(p - c for p, c in zip(points, pair.true_map.moving_centre, strict=True)))
            for name, channel in zip(pair.label_names, label.unbind(-1), strict=True):
                sure = depths[name].abs() > 1e-2  # mm: float32 far from the origin
                assert torch.equal((depths[name] > 0)[sure], (channel > 0)[sure])


def test_the_same_seed_gives_the_same_pair(pairs):
    again = simulate(np.random.default_rng([1, 3]))
    for one, two in zip(again[:4], pairs[3][:4], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(pairs[3].moving_image, pairs[4].moving_image)


def test_images_are_finite_grey_levels_and_no_label_is_empty(pairs):
    for pair in pairs:
        for image, label in ((pair.moving_image, pair.moving_label), (pair.fixed_image, pair.fixed_label)):
            assert image.isfinite().all() and image.min() >= 0 and image.max() <= 255 and image.std() > 5
            assert label.flatten(0, 2).any(0).all() and (label <= label[..., :1]).all()


def test_every_filling_of_the_rectum_occurs_about_as_often_as_it_says():
    found = [anatomy(k).filling for k in range(60)]
    for filling, share in FILLINGS.items():
        assert abs(found.count(filling) / 60 - share) < 0.15 and filling in found


@pytest.mark.parametrize("filling", ["coil", "gas", "stool", "gel"])
def test_what_fills_the_rectum_is_as_wide_as_in_clinics_and_never_in_the_gland(filling):
    for one in anatomies(filling, 2):
        depths = one.core(*lattice(1.5))
        held = depths[filling] > 0
        assert held.any() and not (held & (depths["gland"] > 0)).any()
        assert not ((depths["rectum"] > 0) & (depths["gland"] > 0)).any()
        wide = 1.5 * held.flatten(1, 2).any(1).sum().item()
        assert 10 < wide < 56 and (filling != "coil" or 22 < wide < 48)  # mm


def test_a_coil_pushes_its_rectum_into_the_glands_back():
    def notch(one):
        """How far the rectum reaches forward of the egg that the gland would be alone, mm."""
        y = torch.arange(-60, 0, 0.5)
        zero = torch.zeros_like(y)
        egg, gland = one._egg(zero, y, zero)[0], one.gland(zero, y, zero)[0]
        return 0.5 * ((egg > 0).sum() - (gland > 0).sum()).item()

    coils, empty = anatomies("coil", 15), anatomies("collapsed", 15)
    assert np.mean([notch(a) for a in coils]) > np.mean([notch(a) for a in empty]) + 2


def test_a_coil_is_bright_beside_it_and_the_rest_is_dark(pairs):
    coils = [pair for pair in pairs if pair.anatomy.filling == "coil"]
    assert coils
    for pair in coils:
        away = -pair.anatomy.coil(*relative(pair))
        near, far = (away > 2) & (away < 6), away > 45
        assert pair.moving_image[near].mean() > 2 * pair.moving_image[far].mean()


def test_the_air_outside_the_body_is_dark(large):
    for pair in large[:3]:
        air = pair.anatomy.around(*relative(pair))["air"]
        assert (air > 15).float().mean() > 0.1
        assert pair.moving_image[air > 15].mean() < min(20, 0.8 * pair.moving_image[air < -15].mean())


def test_glands_taper_towards_a_long_apex():
    x, y, z = lattice()
    ratio = []
    for k in range(12):
        area = (anatomy(k).gland(x, y, z)[0] > 0).flatten(0, 1).sum(0)
        inside = z[area > 0]
        low, high = inside[0].item(), inside[-1].item()
        sixth = (high - low) / 6
        ratio.append((area[(z > low) & (z < low + sixth)].float().mean() / area.max()).item())
    assert np.median(ratio) < 0.5


def test_grids_are_those_of_clinics():
    grids = [draw_grids(np.random.default_rng([3, k])) for k in range(200)]
    fields = np.array([np.multiply(g["moving_shape"], g["moving_spacing"]) for g in grids])
    assert fields[:, 0].min() > 95 and 300 < fields[:, 0].max() < 405
    assert all(15 <= g["moving_shape"][2] <= 40 and 2.5 <= g["moving_spacing"][2] <= 4 for g in grids)
    assert all(1 <= g["fixed_spacing"][2] <= 3 and 0.2 <= g["fixed_spacing"][0] <= 0.9 for g in grids)


def test_the_gland_lies_far_off_the_middle_of_a_large_picture(large):
    off = []
    for pair in large:
        middle = pair.moving_affine[:3] @ [*(np.array(pair.moving_image.shape) - 1) / 2, 1]
        off.append(np.abs(pair.true_map.moving_centre - middle)[:2].max())
    assert 18 < max(off) <= 40.1


def test_an_anatomy_of_another_mode_is_refused(pairs):
    with pytest.raises(ValueError, match="ClinicalAnatomy"):
        anatomy = simulate_pair(np.random.default_rng(0), mode="realistic").anatomy
        simulate_pair(np.random.default_rng(0), mode="clinical", anatomy=anatomy)


def test_mixtures_keep_to_their_modes(pairs, monkeypatch):
    drawn = []

    def record(random, fixed_shape, fixed_spacing, moving_shape, moving_spacing, mode, device):
        drawn.append((mode, np.ndim(moving_spacing)))
        return pairs[0]

    monkeypatch.setattr(cohort, "simulate_pair", record)
    for mode, found in (
        ("mixed", {("realistic", 0), ("randomised", 0)}),
        ("all", {("realistic", 0), ("randomised", 0), ("clinical", 1)}),
        ("clinical", {("clinical", 1)}),
    ):
        drawn.clear()
        for k in range(12):
            cohort.SimulatedPairs(mode, seed=1)[k]
        assert set(drawn) == found


def test_a_cohort_of_the_clinical_mode_is_written(tmp_path):
    write_cohort(
        tmp_path / "new", 1, split=(1, 0, 0), pairs_per_patient=2, mode="clinical", moving_spacing=(4, 4, 4), **SMALL
    )
    assert list((tmp_path / "new" / "train" / "moving_images").iterdir())


def test_grid_lines_and_points_in_full_show_the_same_bones():
    lines = [
        torch.linspace(-130, 130, 14)[:, None, None],
        torch.linspace(-90, 90, 13)[:, None],
        torch.linspace(-50, 50, 9),
    ]
    found, full = (anatomy(0).around(*points)["bone"] for points in (lines, torch.broadcast_tensors(*lines)))
    assert torch.equal(found > -4, full > -4) and (found > 0).any()  # mm; farther away nobody asks how far
    torch.testing.assert_close(found[found > -4], full[full > -4], rtol=0, atol=1e-3)
