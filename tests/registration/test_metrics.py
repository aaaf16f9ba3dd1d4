"""The errors are in millimetres and mean what §3.3 says."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.network import fields
from scripts.registration import metrics


def box(*ranges, size=(20, 18, 16)):
    label = torch.zeros(1, 1, *size)
    label[(0, 0, *(slice(a, b) for a, b in ranges))] = 1
    return label


def ball(x, y, z, radius=4, size=(20, 18, 16)):
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    return torch.from_numpy((((grid.T - (x, y, z)) ** 2).sum(-1).T <= radius**2).astype(np.float32))[None, None]


@pytest.mark.parametrize("shift", [(3, 0, 0), (0, -3, 0), (0, 0, 3)])
def test_a_ball_moved_3_voxels_at_08_mm_is_24_mm_away(shift):
    moved = ball(*np.add((9, 8, 7), shift))
    assert metrics.centroid_distance(ball(9, 8, 7), moved, (0.8, 0.8, 0.8)).item() == pytest.approx(2.4)


def test_each_axis_counts_with_its_own_voxel_size_and_each_pair_of_a_batch_alone():
    a = torch.cat([ball(9, 8, 7)] * 3)
    b = torch.cat([ball(11, 8, 7), ball(9, 9, 7), ball(11, 9, 8)])
    distance = metrics.centroid_distance(a, b, (0.5, 2, 3))
    torch.testing.assert_close(distance, torch.tensor([1, 2, math.sqrt(1 + 4 + 9)], dtype=torch.float64))


def test_the_centroid_is_that_of_the_label_binarised_at_one_half():
    soft = box((4, 6), (5, 6), (5, 6)) * 0.5
    soft[0, 0, 15, 15, 15] = 0.49  # below one half: does not count
    soft[0, 0, 5, 5, 5] = 1.0  # counts once, not twice
    torch.testing.assert_close(metrics.centroid(soft, (2, 1, 1)), torch.tensor([[9.0, 5, 5]], dtype=torch.float64))


def test_the_distance_is_symmetric_and_zero_for_equal_labels():
    a, b = ball(9, 8, 7), ball(7, 9, 8)
    assert metrics.centroid_distance(a, a, (1, 1, 1)) == 0
    assert metrics.centroid_distance(a, b, (1, 1, 1)) == metrics.centroid_distance(b, a, (1, 1, 1))


def test_labels_on_different_grids_are_refused():
    with pytest.raises(ValueError, match="not on one grid"):
        metrics.centroid_distance(torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 5), (1, 1, 1))


def test_the_tre_is_the_root_mean_square_and_not_the_mean():
    assert metrics.target_registration_error([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))
    assert metrics.target_registration_error([2.4]) == pytest.approx(2.4)


def test_an_unknown_distance_is_left_out_of_the_tre():
    assert metrics.target_registration_error([3.0, math.nan, 4.0]) == pytest.approx(math.sqrt(12.5))
    assert math.isnan(metrics.target_registration_error([math.nan]))
    assert math.isnan(metrics.target_registration_error([]))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (((2, 6), (2, 6), (2, 6)), 1),
        (((4, 8), (2, 6), (2, 6)), 0.5),
        (((6, 10), (2, 6), (2, 6)), 0),
        (((2, 4), (2, 6), (2, 6)), 2 * 32 / 96),
        (((4, 8), (4, 8), (4, 8)), 1 / 8),
    ],
)
def test_boxes_have_the_dice_of_their_overlap(other, expected):
    a, b = box((2, 6), (2, 6), (2, 6)), box(*other)
    assert metrics.dice(a, b).item() == metrics.dice(b, a).item() == pytest.approx(expected)


def test_dice_binarises_at_one_half_and_is_nan_where_both_labels_are_empty():
    a = box((2, 6), (2, 6), (2, 6))
    assert metrics.dice(0.5 * a, a) == 1
    assert metrics.dice(0.49 * a, a) == 0
    assert metrics.dice(torch.cat([0 * a, a]), torch.cat([0 * a, a])).isnan().tolist() == [True, False]


def test_an_empty_warped_label_has_dice_zero_and_no_distance_and_an_absent_label_has_neither():
    full = box((2, 6), (2, 6), (2, 6))[0]
    empty = torch.zeros_like(full)
    fixed = torch.cat([full, full, empty, empty])
    warped = torch.cat([full, empty, full, empty])
    rows = metrics.evaluate_labels(warped, fixed, (0.8, 0.8, 0.8))
    assert rows[0] == {"dsc": 1, "distance_mm": 0}
    assert rows[1]["dsc"] == 0 and math.isnan(rows[1]["distance_mm"])
    assert all(math.isnan(v) for row in rows[2:] for v in row.values())
    # so the empty warped labels of a case can be counted: a DSC, but no distance
    assert sum(not math.isnan(r["dsc"]) and math.isnan(r["distance_mm"]) for r in rows) == 1


def test_folding_is_a_percentage_of_the_inner_voxels():
    displacement = torch.zeros(3, 12, 6, 6, dtype=torch.float64)
    affine = torch.diag(torch.tensor([0.8, 0.8, 0.8, 1.0], dtype=torch.float64))
    still = {"folded_percent": 0, "jacobian_min": 1, "jacobian_mean": 1, "jacobian_sd_log": 0}
    assert metrics.jacobian_statistics(displacement, affine) == pytest.approx(still)
    displacement[0, 6:] = -1.6 * 1.01  # neighbours 5 and 6 change places: central differences at both fold
    found = metrics.jacobian_statistics(displacement, affine)
    assert found["folded_percent"] == pytest.approx(100 * 2 / 10)
    assert found["jacobian_min"] == pytest.approx(-0.01) and found["jacobian_mean"] == pytest.approx(0.798)


def test_the_hausdorff_distance_of_a_moved_box_is_the_move_in_mm():
    a, b = box((2, 6), (2, 6), (2, 6))[0, 0], box((4, 8), (2, 6), (2, 6))[0, 0]
    assert metrics.hausdorff95(a, a, (0.5, 1, 1)) == 0
    assert metrics.hausdorff95(a, b, (0.5, 1, 1)) == pytest.approx(1.0)  # two voxels of 0.5 mm
    assert math.isnan(metrics.hausdorff95(a, torch.zeros_like(a), (1, 1, 1)))


def test_the_true_error_is_the_median_distance_in_the_gland_alone():
    gland = box((4, 9), (5, 10), (5, 10))[0, 0]
    truth = torch.randn(3, *gland.shape)
    found = truth + 100.0
    found[:, gland >= 0.5] = truth[:, gland >= 0.5] + torch.tensor([[2.0], [-1.0], [2.0]])
    assert metrics.true_error(found, truth, gland) == pytest.approx(3.0, abs=1e-5)


def test_folding_is_counted_inside_a_label_when_one_is_given():
    displacement = torch.zeros(3, 20, 18, 16)
    displacement[0, 12:] = -2 * torch.arange(8.0).view(8, 1, 1)  # x runs backwards from 12 on
    affine = torch.eye(4)
    for inside, folded in (((3, 8), 0), ((14, 17), 100)):
        found = metrics.jacobian_statistics(displacement, affine, box(inside, (3, 9), (3, 9))[0, 0])
        assert found["folded_gland_percent"] == folded and found["folded_percent"] > 20


def test_the_distance_from_where_a_field_takes_a_centroid_in_any_two_worlds():
    fixed, moving = np.eye(4), np.diag([2.0, 1, 1.5, 1])
    fixed[:3, 3], moving[:3, 3] = (5, -3, 2), (1, 1, -2)
    labels = [torch.zeros(2, 12, 12, 12) for _ in range(2)]
    for label in labels:
        label[0, 4:8, 4:8, 4:8] = 1
    labels[0][1, 2, 3, 4] = 1  # and not in the moving image
    x, y = (torch.from_numpy(affine[:3, :3] @ np.full(3, 5.5) + affine[:3, 3]) for affine in (fixed, moving))
    start, way = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])
    maps = [MetaTensor(label, affine=affine) for label, affine in zip(labels, (fixed, moving), strict=True)]
    for share in (0, 0.5, 1):
        u = (start + share * way).view(3, 1, 1, 1).expand(3, 12, 12, 12)
        found, absent = metrics.forward_distances(u, *maps)
        assert found == pytest.approx((x + start + share * way - y).norm().item(), rel=1e-6) and math.isnan(absent)


def test_a_field_that_takes_all_points_to_their_mean_is_small_forward_and_large_as_a_warped_label():
    label = torch.zeros(2, 40, 40, 40)
    label[0, 16:19, 18:22, 18:22], label[1, 20:23, 18:22, 18:22] = 1, 1
    here, there = (MetaTensor(one, affine=torch.eye(4)) for one in (label, label.flip(0)))  # 4 apart, and exchanged
    grid = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 3, indexing="ij"))
    u = 0.8 * (torch.tensor([19.0, 19.5, 19.5]).view(3, 1, 1, 1) - grid)
    warped = fields.warp(there.as_tensor()[None], u[None])[0]
    backward = [row["distance_mm"] for row in metrics.evaluate_labels(warped, label, (1, 1, 1))]
    assert max(metrics.forward_distances(u, here, there)) < 4 < 10 < min(backward)
