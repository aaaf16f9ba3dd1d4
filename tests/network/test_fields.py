"""Displacement fields keep their conventions: voxels of the grid, order x, y, z, pull-back, RAS millimetres."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from scripts.network import fields

OBLIQUE = [(10, 20, 30, 0.9, 1.3, 2.1, (5, -7, 11)), (-35, 15, 80, 1.7, 0.6, 1.1, (-20, 30, 4))]


def rotation(*degrees):
    a, b, c = np.deg2rad(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


def matrix(linear, offset=(0, 0, 0)):
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = linear, offset
    return torch.from_numpy(m)


def oblique(a, b, c, sx, sy, sz, origin):
    return matrix(rotation(a, b, c) * (sx, sy, sz), origin)


def world(affine, size):
    """World points of the voxel centres, shape (3, X, Y, Z)."""
    voxels = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in size], indexing="ij"))
    return np.einsum("ij,jxyz->ixyz", affine[:3, :3].numpy(), voxels) + affine[:3, 3].numpy().reshape(3, 1, 1, 1)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_equals_the_warp_of_monai(mode, padding_mode):
    image, ddf = random(2, 3, 9, 7, 8).float(), random(2, 3, 9, 7, 8, seed=1, scale=2.5).float()
    expected = Warp(mode=mode, padding_mode=padding_mode)(image, ddf)
    torch.testing.assert_close(fields.warp(image, ddf, mode, padding_mode), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "outside"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_no_displacement_is_the_identity(mode, padding_mode):
    image = random(1, 2, 9, 1, 8)
    warped = fields.warp(image, torch.zeros(1, 3, 9, 1, 8, dtype=torch.float64), mode, padding_mode)
    torch.testing.assert_close(warped, image, rtol=1e-12, atol=1e-12)


def test_composed_fields_are_one_after_the_other_at_random_points():
    first, second = random(2, 3, 9, 7, 8, scale=2.0), random(2, 3, 9, 7, 8, seed=1, scale=2.0)
    found, generator = fields.compose(first, second).numpy(), np.random.default_rng(0)
    for b in range(2):
        for p in generator.integers(0, (9, 7, 8), size=(50, 3)):
            step = second[b, :, *p].numpy()
            at = [map_coordinates(c, (p + step)[:, None], order=1, mode="nearest")[0] for c in first[b].numpy()]
            np.testing.assert_allclose(found[b, :, *p], step + at, rtol=0, atol=1e-10)


def test_composing_with_no_displacement_changes_nothing_and_constants_add():
    field, none = random(1, 3, 6, 7, 5), torch.zeros(1, 3, 6, 7, 5, dtype=torch.float64)
    for composed in (fields.compose(field, none), fields.compose(none, field)):
        torch.testing.assert_close(composed, field, rtol=1e-12, atol=1e-12)
    shifts = [random(1, 3, 1, 1, 1, seed=s, scale=4).expand_as(none) for s in (0, 1)]
    torch.testing.assert_close(fields.compose(*shifts), sum(shifts), rtol=1e-12, atol=1e-12)


def test_warping_by_the_composed_field_is_warping_twice():
    x = torch.from_numpy(world(matrix(np.eye(3)), (12, 13, 11)))[None]
    image = (x * torch.tensor([1.0, -2, 0.5]).view(3, 1, 1, 1)).sum(1, keepdim=True)  # linear: interpolates exactly
    first, second = 0.3 * torch.sin(x.flip(1) / 3), 0.4 * torch.cos(x / 2)
    found = fields.warp(image, fields.compose(first, second))
    twice = fields.warp(fields.warp(image, first), second)
    inside = (..., slice(2, -2), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(found[inside], twice[inside], rtol=0, atol=1e-10)
    other = fields.warp(image, fields.compose(second, first))
    assert (other - twice)[inside].abs().max() > 0.05


def test_an_affine_field_is_the_affine_map_of_voxel_coordinates_on_an_anisotropic_grid():
    size = np.array([9, 14, 5])
    generator = np.random.default_rng(0)
    affine = np.eye(3, 4) + generator.normal(size=(2, 3, 4), scale=0.2)
    found = fields.affine_field(torch.from_numpy(affine), size.tolist()).numpy()
    for b in range(2):
        for p in np.ndindex(*size):
            q = (2 * np.array(p) + 1) / size - 1
            moved = affine[b, :, :3] @ q + affine[b, :, 3]
            np.testing.assert_allclose(p + found[b, :, *p], ((moved + 1) * size - 1) / 2, rtol=0, atol=1e-12)


def test_affine_fields_mirror_turn_and_shift_an_image():
    image = random(1, 1, 7, 7, 4)

    def warped(linear, shift=(0, 0, 0)):
        affine = torch.tensor(np.c_[np.array(linear, dtype=float), shift])[None]
        return fields.warp(image, fields.affine_field(affine, [7, 7, 4]), padding_mode="border")

    close = {"rtol": 0, "atol": 1e-12}
    assert not fields.affine_field(torch.eye(3, 4)[None], [7, 7, 4]).any()
    torch.testing.assert_close(warped(np.diag([1, 1, -1])), image.flip(4), **close)
    turned = image.flip(3).transpose(2, 3)  # at (x, y) the value of (y, −x)
    torch.testing.assert_close(warped([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]), turned, **close)
    shifted = warped(np.eye(3), (0, 0, 2 / 4))  # a quarter of the four voxels along z
    torch.testing.assert_close(shifted[..., :-1], image[..., 1:], **close)


def test_a_ddf_pulls_along_x_y_z_in_voxels():
    image, shift = random(1, 1, 9, 8, 7), (2, -1, 3)
    ddf = torch.tensor(shift, dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, 9, 8, 7)
    warped = fields.warp(image, ddf)[0, 0]
    torch.testing.assert_close(warped[2, 4, 1], image[0, 0, 4, 3, 4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(warped[:7, 1:, :4], image[0, 0, 2:, :-1, 3:], rtol=1e-12, atol=1e-12)
    assert warped[:, 0].abs().max() < 1e-12  # pulled from outside


def test_an_image_and_a_ddf_of_different_grids_are_refused():
    for shape in ((1, 3, 9, 8, 6), (2, 3, 9, 8, 7), (1, 2, 9, 8, 7)):
        with pytest.raises(ValueError, match="not on one grid"):
            fields.warp(torch.zeros(1, 1, 9, 8, 7), torch.zeros(shape))


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "outside"])
@pytest.mark.parametrize("batch", [1, 2])
def test_sampling_in_runs_on_all_cores_is_sampling_in_one_in_value_and_gradient(batch, padding_mode):
    image = random(batch, 2, 8, 7, 9).transpose(2, 4)  # not contiguous, an odd number of points
    points = 4 + 4 * random(batch, 3, 5, 3, 7, seed=1)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        a, p = image.clone().requires_grad_(), points.clone().requires_grad_()
        values = fields.sample(a, p, padding_mode=padding_mode)
        values.square().sum().backward()
        results.append((values.detach(), a.grad, p.grad))
    torch.set_num_threads(threads)
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_mode", ["border", "outside"])
def test_resampling_by_an_affine_is_sampling_at_the_points_it_gives(padding_mode):
    image = random(1, 2, 9, 7, 8)
    to_image = matrix(rotation(20, -10, 40) * (1.1, 0.7, 0.9), (1.5, 0.3, 2))
    points = torch.from_numpy(world(to_image, (6, 11, 5)))[None]
    expected = fields.sample(image, points, padding_mode=padding_mode)
    assert (expected == 0).any() == (padding_mode == "outside")
    resampled = fields.resample(image, to_image, (6, 11, 5), padding_mode=padding_mode)
    torch.testing.assert_close(resampled, expected, rtol=1e-10, atol=1e-10)


def test_the_three_paddings_differ_only_where_they_say():
    image = torch.ones(1, 1, 4, 4, 4)
    points = torch.tensor([-2.0, -0.75, -0.25, 0, 3, 3.25, 3.75, 5]).view(1, 1, 8, 1, 1)
    points = torch.cat([points, torch.ones(1, 2, 8, 1, 1)], 1)
    values = {p: fields.sample(image, points, padding_mode=p).flatten() for p in ("zeros", "border", "outside")}
    torch.testing.assert_close(values["border"], torch.ones(8))
    torch.testing.assert_close(values["zeros"], torch.tensor([0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0]))
    torch.testing.assert_close(values["outside"], torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize("linear", [np.eye(3), rotation(20, -15, 30) * 1.1])
def test_padding_outside_is_the_default_value_of_simpleitk(linear):
    size, out = (7, 6, 5), (16, 15, 14)
    image, offset = random(1, 1, *size), (-4.3, -3.7, -4.1)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation(offset)
    source = sitk.GetImageFromArray(image[0, 0].numpy().transpose(2, 1, 0))
    expected = sitk.Resample(source, out, transform, sitk.sitkLinear, (0, 0, 0), (1, 1, 1), np.eye(3).ravel().tolist())
    expected = sitk.GetArrayFromImage(expected).transpose(2, 1, 0)
    points = torch.from_numpy(world(matrix(linear, offset), out))[None]
    found = fields.sample(image, points, padding_mode="outside")[0, 0].numpy()
    assert (expected == 0).any() and (expected != 0).any()
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    "linear", [np.diag([1.2, 0.9, 1.1]), rotation(10, 20, 30), np.array([[1, 0.3, 0], [0, 1, 0.2], [0.1, 0, 1.5]])]
)
def test_the_jacobian_of_an_affine_field_is_its_determinant(linear):
    ddf = torch.from_numpy(np.einsum("ij,jxyz->ixyz", linear - np.eye(3), world(matrix(np.eye(3)), (6, 7, 5))))[None]
    jacobian = fields.jacobian_determinant(ddf)
    assert jacobian.shape == (1, 4, 5, 3)
    torch.testing.assert_close(jacobian, torch.full_like(jacobian, np.linalg.det(linear)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("grid", OBLIQUE)
def test_the_jacobian_of_millimetres_does_not_depend_on_the_grid(grid):
    affine, linear = oblique(*grid), np.array([[1, 0.3, 0], [-0.2, 1.1, 0.2], [0.1, 0, 1.5]])
    displacement = np.einsum("ij,jxyz->ixyz", linear - np.eye(3), world(affine, (6, 7, 5)))
    jacobian = fields.jacobian_determinant(torch.from_numpy(displacement)[None], affine)
    torch.testing.assert_close(jacobian, torch.full_like(jacobian, np.linalg.det(linear)), rtol=1e-9, atol=0)


def test_the_jacobian_is_one_without_displacement_and_negative_where_a_field_folds():
    ddf = torch.zeros(1, 3, 12, 6, 6, dtype=torch.float64)
    assert (fields.jacobian_determinant(ddf) == 1).all()
    x = torch.arange(12, dtype=torch.float64).view(1, 12, 1, 1)
    ddf[:, 0] = torch.where(x < 6, 0, -3 * (x - 6).clip(0, 3))  # x + u(x) runs backwards between 6 and 9
    jacobian = fields.jacobian_determinant(ddf)[0, :, 2, 2]
    assert (jacobian[:4] == 1).all() and (jacobian[6:8] == -2).all() and (jacobian[9:] == 1).all()


@pytest.mark.parametrize("grid", OBLIQUE)
@pytest.mark.parametrize("start", [matrix(np.eye(3), (3, -4, 5)), matrix(rotation(5, 10, -20), (30, 10, -60))])
def test_without_a_ddf_the_world_displacement_is_the_start_alignment(grid, start):
    affine, size = oblique(*grid), (6, 5, 7)
    working = oblique(*OBLIQUE[0])
    found = fields.world_displacement(torch.zeros(1, 3, 9, 9, 9), working, start, affine, size)
    x = world(affine, size)
    expected = np.einsum("ij,jxyz->ixyz", start[:3, :3].numpy(), x) + start[:3, 3].numpy().reshape(3, 1, 1, 1) - x
    assert found.shape == (1, 3, *size) and found.dtype == torch.float64
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("grid", OBLIQUE)
def test_the_start_is_applied_after_the_ddf(grid):
    working, affine, size = oblique(*OBLIQUE[0]), oblique(*grid), (6, 5, 7)
    start = matrix(rotation(15, -25, 40), (30, 10, -60))
    voxels = np.array([1.5, -2, 0.7])
    ddf = torch.from_numpy(voxels).view(1, 3, 1, 1, 1).expand(1, 3, 9, 8, 7)
    found = fields.world_displacement(ddf, working, start, affine, size)[0].numpy()
    x = world(affine, size)
    moved = x + (working[:3, :3].numpy() @ voxels).reshape(3, 1, 1, 1)
    expected = np.einsum("ij,jxyz->ixyz", start[:3, :3].numpy(), moved) + start[:3, 3].numpy().reshape(3, 1, 1, 1) - x
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_ddf_is_interpolated_between_two_oblique_anisotropic_grids():
    working, size = oblique(*OBLIQUE[0]), (20, 18, 16)
    inner = matrix(
        rotation(3, -5, 8) * (0.7, 1.2, 0.9), (5.1, 4.3, 6.2)
    )  # a grid inside the working one, in its voxels
    affine, start = working @ inner, matrix(rotation(15, -25, 40), (30, 10, -60))
    linear, offset = np.array([[0.1, 0.03, 0], [-0.2, 0.05, 0.02], [0.01, 0, -0.1]]), np.array([1.0, -2, 0.5])
    u = np.einsum("ij,jxyz->ixyz", linear, world(matrix(np.eye(3)), size)) + offset.reshape(3, 1, 1, 1)
    found = fields.world_displacement(torch.from_numpy(u)[None], working, start, affine, (8, 7, 6))[0].numpy()
    for voxel in ((0, 0, 0), (3, 5, 2), (7, 6, 5)):
        p = (inner.numpy() @ [*voxel, 1])[:3]
        x = (affine.numpy() @ [*voxel, 1])[:3]
        moved = working.numpy() @ [*(p + linear @ p + offset), 1]  # the working voxel, displaced, in the world
        np.testing.assert_allclose(found[(slice(None), *voxel)], (start.numpy() @ moved)[:3] - x, atol=1e-9)


@pytest.mark.parametrize("grid", OBLIQUE)
def test_pull_reads_the_moving_world_at_the_displaced_points(grid):
    moving_affine, affine, size = oblique(*OBLIQUE[0]), oblique(*grid), (5, 6, 4)
    slope = np.array([0.3, -0.7, 1.1])
    moving = torch.from_numpy(np.einsum("i,ixyz->xyz", slope, world(moving_affine, (12, 11, 10))) + 2)[None, None]
    x = world(affine, size)
    centre = (moving_affine.numpy() @ [5.5, 5, 4.5, 1])[:3] - x.mean((1, 2, 3))
    displacement = centre.reshape(3, 1, 1, 1) + 0.4 * np.random.default_rng(0).normal(size=x.shape)
    found = fields.pull(moving, moving_affine, torch.from_numpy(displacement)[None], affine)[0, 0].numpy()
    y = x + displacement
    voxels = np.einsum("ij,jxyz->ixyz", np.linalg.inv(moving_affine.numpy()), np.concatenate([y, np.ones((1, *size))]))[
        :3
    ]
    last = np.array([11, 10, 9]).reshape(3, 1, 1, 1)
    inside, outside = ((voxels >= 0) & (voxels <= last)).all(0), ((voxels < -0.5) | (voxels > last + 0.5)).any(0)
    assert inside.sum() > 20
    np.testing.assert_allclose(found[inside], (np.einsum("i,ixyz->xyz", slope, y) + 2)[inside], atol=1e-9)
    assert not found[outside].any()


def test_pull_of_a_ddf_and_a_start_is_the_warp_of_the_aligned_moving_volume():
    affine, start, size = oblique(*OBLIQUE[1]), matrix(rotation(15, -25, 40), (30, 10, -60)), (9, 8, 7)
    moving, ddf = random(1, 2, *size), random(1, 3, *size, seed=1)
    u = fields.world_displacement(ddf, affine, start, affine, size)
    # the moving grid is the fixed one carried over by the start: the two start out voxel on voxel
    found = fields.pull(moving, start @ affine, u, affine)
    torch.testing.assert_close(found, fields.warp(moving, ddf, padding_mode="outside"), rtol=1e-9, atol=1e-9)
