"""A rotational sweep becomes the volume it was taken of: geometry, accuracy, readers and refusals."""

import csv
import itertools
import locale
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import run
from PIL import Image

from scripts.data.checks import InputError
from scripts.network import fields
from scripts.phantoms.sweep import acquire, convert, read_frames, reconstruct

PIXEL, OFFSET, SHAPE = (0.5, 0.6), 8.0, (90, 60)  # radii 8 to 52.5 mm, 35.4 mm along the axis
FAN = (-70.0, 70.0)
BALLS = np.array([[0.0, 30.0, 18.0], [-18.0, 24.0, 12.0], [20.0, 36.0, 24.0], [-24.0, 38.0, 20.0]])  # mm
RADIUS = 4.0


def fan(count):
    return torch.linspace(*FAN, count, dtype=torch.float64)


def jittered(count, seed=0):
    """Rising angles whose steps differ by up to a factor of 7."""
    steps = np.random.default_rng(seed).uniform(0.25, 1.75, count - 1)
    return torch.from_numpy(FAN[0] + (FAN[1] - FAN[0]) * np.append(0, steps.cumsum()) / steps.sum())


def pixels(angles, shape=SHAPE):
    """Polar and Cartesian coordinates of every pixel: angle in degrees, r, x, y, z in mm, each (F, D, Z)."""
    r = OFFSET + PIXEL[0] * torch.arange(shape[0], dtype=torch.float64)
    z = PIXEL[1] * torch.arange(shape[1], dtype=torch.float64)
    angle, r, z = torch.meshgrid(torch.as_tensor(angles, dtype=torch.float64), r, z, indexing="ij")
    return angle, r, r * torch.deg2rad(angle).sin(), r * torch.deg2rad(angle).cos(), z


def voxels(swept):
    """World coordinates of every voxel, (3, X, Y, Z), mm."""
    grid = fields.identity_grid(swept.volume.shape, torch.float64, "cpu")
    return fields.transform_points(swept.affine, grid[None])[0]


def body(spacing=0.7):
    """Balls of radius 4 mm and smooth texture of wavelengths from 9 mm, grey levels about 0 to 1, with its affine."""
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-56.0, -2.0, -4.0])
    points = fields.transform_points(affine, fields.identity_grid((160, 86, 64), torch.float64, "cpu")[None])[0]
    rng = np.random.default_rng(1)
    image = torch.full(points.shape[1:], 0.4, dtype=torch.float64)
    for _ in range(8):
        direction = rng.normal(size=3)
        vector = torch.from_numpy(2 * np.pi * direction / np.linalg.norm(direction) / rng.uniform(9, 18))
        image += 0.04 * torch.cos(torch.einsum("i,i...->...", vector, points) + rng.uniform(0, 6))
    for ball in BALLS:
        distance = (points - torch.from_numpy(ball).view(3, 1, 1, 1)).norm(dim=0)
        image += 0.5 * torch.sigmoid((RADIUS - distance) / 0.4)
    return image.float(), affine


def test_a_bright_pixel_lands_where_its_angle_depth_and_column_say():
    angles = torch.arange(-60.0, 61, 2)
    for degrees, row, column in ((30, 40, 10), (-40, 70, 50), (0, 5, 30)):
        frames = torch.zeros(len(angles), *SHAPE)
        frames[(angles == degrees).nonzero().item(), row, column] = 1
        swept = reconstruct(frames, angles, PIXEL, OFFSET, 0.3)
        found = (swept.volume * voxels(swept)).sum((1, 2, 3)) / swept.volume.sum()
        radius = OFFSET + row * PIXEL[0]
        # patient's right is +x, anterior +y, superior +z
        wanted = [radius * math.sin(math.radians(degrees)), radius * math.cos(math.radians(degrees)), column * PIXEL[1]]
        assert found.tolist() == pytest.approx(wanted, abs=0.1)


def test_the_axis_point_moves_the_world_and_nothing_else():
    frames = torch.rand(57, *SHAPE)
    here = reconstruct(frames, fan(57), PIXEL, OFFSET, 1.5)
    there = reconstruct(frames, fan(57), PIXEL, OFFSET, 1.5, axis_point=(10, -20, 30))
    assert torch.equal(here.volume, there.volume)
    assert (there.affine - here.affine)[:3, 3].tolist() == [10, -20, 30]


@pytest.mark.parametrize("spacing", [0.8, (1.0, 0.7, 1.3)])
def test_the_grid_is_ras_of_the_asked_spacing_and_the_smallest_that_holds_the_sweep(spacing):
    swept = reconstruct(torch.rand(57, *SHAPE), fan(57), PIXEL, OFFSET, spacing)
    expected = np.broadcast_to(spacing, 3)
    assert torch.equal(swept.affine[:3, :3], torch.diag(torch.as_tensor(expected.copy(), dtype=torch.float64)))
    assert nib.aff2axcodes(swept.affine.numpy()) == ("R", "A", "S")
    radius = OFFSET + PIXEL[0] * (SHAPE[0] - 1)
    low, high = voxels(swept).amin((1, 2, 3)), voxels(swept).amax((1, 2, 3))
    width = radius * math.sin(math.radians(70))
    bounds = [(-width, width), (OFFSET * math.cos(math.radians(70)), radius), (0, PIXEL[1] * (SHAPE[1] - 1))]
    for (first, last), a, b, step in zip(bounds, low, high, expected, strict=True):
        assert first - 1e-4 <= a < first + step and last - step < b <= last + 1e-4


def test_the_mask_is_the_swept_sector_and_outside_it_the_volume_is_zero():
    swept = reconstruct(torch.ones(57, *SHAPE), fan(57), PIXEL, OFFSET, 0.8)
    x, y, _ = voxels(swept)
    r, angle = torch.hypot(x, y), torch.rad2deg(torch.atan2(x, y))
    on_face = 1e-6  # rounding must not drop the voxels that lie on a face
    sector = (r >= OFFSET - on_face) & (r <= OFFSET + PIXEL[0] * (SHAPE[0] - 1) + on_face)
    sector &= angle.abs() <= 70 + on_face
    assert torch.equal(swept.inside, sector)
    assert torch.allclose(swept.volume, sector.float(), atol=1e-6)


@pytest.mark.parametrize("angles", [fan(57), jittered(57)], ids=["uniform", "non-uniform"])
def test_what_is_linear_in_angle_radius_and_height_is_reproduced_exactly(angles):
    angle, r, _, _, z = pixels(angles)
    swept = reconstruct(0.3 * angle - 0.7 * r + 1.1 * z, angles, PIXEL, OFFSET, 0.9)
    x, y, z = voxels(swept)
    wanted = 0.3 * torch.rad2deg(torch.atan2(x, y)) - 0.7 * torch.hypot(x, y) + 1.1 * z
    assert (swept.volume - wanted)[swept.inside].abs().max() < 1e-9


@pytest.mark.parametrize("angles", [fan(57), fan(112), jittered(84)], ids=["57", "112", "non-uniform"])
def test_a_linear_function_of_position_errs_by_no_more_than_the_sagitta_of_the_arc(angles):
    _, r, x, y, z = pixels(angles)
    swept = reconstruct(0.6 * x - 0.8 * y + 0.5 * z, angles, PIXEL, OFFSET, 0.9)
    x, y, z = voxels(swept)
    error = (swept.volume - (0.6 * x - 0.8 * y + 0.5 * z))[swept.inside].abs().max()
    # linear interpolation over an arc of step h errs by r h² / 8 at most
    assert error <= r.max() * torch.deg2rad(angles.diff().max()) ** 2 / 8 + 1e-9


def test_more_frames_reconstruct_the_body_better():
    image, affine = body()
    shift = torch.tensor([3.0, -1.0, 2.0])  # the axis is not at the world's origin
    affine[:3, 3] += shift
    rows = []
    for count in (57, 84, 112):
        frames = acquire(image, affine, fan(count), PIXEL, SHAPE, shift.tolist(), OFFSET)
        swept = reconstruct(frames, fan(count), PIXEL, OFFSET, 1.0, axis_point=shift.tolist())
        points = voxels(swept)
        truth = fields.sample(image[None, None].double(), fields.transform_points(affine.inverse(), points[None]))[0, 0]
        error = (swept.volume - truth)[swept.inside].square().mean().sqrt() / (image.max() - image.min())
        distances = []
        for ball in torch.from_numpy(BALLS) + shift:
            near = (points - ball.view(3, 1, 1, 1)).norm(dim=0) < 1.5 * RADIUS
            weights = [(v.double() * near).clamp_min(0) for v in (swept.volume, truth)]
            a, b = ((w * points).sum((1, 2, 3)) / w.sum() for w in weights)
            distances.append((a - b).norm())
        rows.append((100 * error.item(), max(distances).item()))
        print(f"{count} frames over 140°: error {rows[-1][0]:.2f} % of range, ball centroid {rows[-1][1]:.3f} mm")
    errors, centroids = zip(*rows, strict=True)
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[0] < 0.6 and errors[-1] < 0.25  # per cent of the range
    assert max(centroids) < 0.05  # mm


def test_a_volume_of_one_value_is_acquired_inside_it_and_zero_outside():
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([-10.0, 0.0, 0.0])
    frames = acquire(torch.ones(21, 30, 25), affine, [-90.0, 0.0], (1.0, 1.0), (40, 30), (0, 0, 0), 0.0)
    for frame, depth in zip(frames, (10, 29), strict=True):  # voxels end half a step beyond their centres
        assert torch.equal(frame, torch.nn.functional.pad(torch.ones(depth + 1, 25), (0, 5, 0, 39 - depth)))


def test_a_sweep_in_the_other_direction_gives_the_same_volume():
    frames, angles = torch.rand(84, *SHAPE), jittered(84)
    a, b = (reconstruct(frames.flip(f), angles.flip(f), PIXEL, OFFSET, 1.2) for f in ([], [0]))
    assert torch.equal(a.volume, b.volume) and torch.equal(a.inside, b.inside)


def test_a_mirrored_sweep_gives_the_mirrored_volume():
    frames, angles = torch.rand(84, *SHAPE), jittered(84)
    a = reconstruct(frames, angles, PIXEL, OFFSET, 1.2)
    b = reconstruct(frames.flip(0), -angles.flip(0), PIXEL, OFFSET, 1.2)
    assert torch.allclose(a.volume, b.volume.flip(0), atol=1e-5)


@pytest.mark.parametrize("start", [-180.0, 0.0, 100.0])
def test_a_full_turn_closes(start):
    angles = start + torch.linspace(0, 360, 181, dtype=torch.float64)
    _, _, x, y, _ = pixels(angles)
    swept = reconstruct(x + 2 * y, angles, PIXEL, OFFSET, 1.0)
    x, y, _ = voxels(swept)
    r = torch.hypot(x, y)
    assert torch.equal(swept.inside, (r >= OFFSET - 1e-6) & (r <= OFFSET + PIXEL[0] * (SHAPE[0] - 1) + 1e-6))
    assert (swept.volume - (x + 2 * y))[swept.inside].abs().max() < 0.02


def test_a_wide_gap_is_left_outside_and_a_narrow_one_is_bridged():
    angles = torch.arange(-30.0, 31, 2)
    kept = torch.ones(len(angles), dtype=bool)
    kept[20:24] = False  # 10°, 12°, 14°, 16°
    kept[5] = False  # -20°
    swept = reconstruct(torch.ones(int(kept.sum()), *SHAPE), angles[kept], PIXEL, OFFSET, 0.5)
    x, y, _ = voxels(swept)
    angle = torch.rad2deg(torch.atan2(x, y))
    ring = (torch.hypot(x, y) >= OFFSET) & (torch.hypot(x, y) <= 52.5) & (angle.abs() <= 30)
    assert not swept.inside[ring & (angle > 8) & (angle < 18)].any()
    assert swept.inside[ring & ((angle < 8) | (angle > 18))].all()
    bridged = reconstruct(torch.ones(int(kept.sum()), *SHAPE), angles[kept], PIXEL, OFFSET, 0.5, max_gap=10)
    assert bridged.inside[ring].all()


# --- files ---


@pytest.fixture
def recorded(tmp_path):
    """Twelve frames of 20 × 30 grey levels and their angles in angles.csv."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 20, 30)).astype(np.uint8)
    angles = [-22.5 + 4.1 * i for i in range(12)]
    write_angles(tmp_path / "angles.csv", angles)
    return tmp_path, frames, angles


def write_angles(path, angles, frames=None, header=None):
    rows = [[a] for a in angles] if frames is None else list(zip(frames, angles, strict=True))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header or (["angle_deg"] if frames is None else ["frame", "angle_deg"]), *rows])
    return path


def write_dicom(path, frames, pixel=(0.3, 0.2)):
    """One multi-frame file; pixel is (row, column) in mm."""
    image = sitk.GetImageFromArray(frames, isVector=frames.ndim == 4)
    image.SetSpacing((pixel[1], pixel[0], 1.0))
    before = locale.setlocale(locale.LC_ALL)
    try:
        sitk.WriteImage(image, str(path))
    finally:
        locale.setlocale(locale.LC_ALL, before)  # GDCM leaves the process in the C locale
    return path


def write_pngs(folder, frames, name="frame{}.png"):
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def assert_read(sweep, frames, angles, spacing):
    assert np.array_equal(sweep.frames.numpy(), frames)
    assert sweep.angles.tolist() == pytest.approx(angles)
    assert sweep.pixel_spacing == (spacing if spacing is None else pytest.approx(spacing))


def test_a_dicom_multi_frame_file_reads_with_its_pixel_spacing(recorded):
    folder, frames, angles = recorded
    assert_read(read_frames(write_dicom(folder / "a.dcm", frames)), frames, angles, (0.3, 0.2))
    (folder / "a.dcm").rename(folder / "IM000001")  # scanners give no suffix
    assert_read(read_frames(folder / "IM000001"), frames, angles, (0.3, 0.2))


def test_a_dicom_file_without_pixel_spacing_has_none(recorded):
    folder, frames, angles = recorded
    assert_read(read_frames(write_dicom(folder / "a.dcm", frames, (1.0, 1.0))), frames, angles, None)


def test_colour_frames_become_the_common_value_or_the_luminance(recorded):
    folder, frames, angles = recorded
    same = np.stack([frames] * 3, axis=-1)
    assert_read(read_frames(write_dicom(folder / "same.dcm", same)), frames, angles, (0.3, 0.2))
    mixed = same // np.array([1, 2, 4], dtype=np.uint8)
    grey = read_frames(write_dicom(folder / "mixed.dcm", mixed)).frames.numpy()
    assert np.allclose(grey, mixed @ np.array([0.299, 0.587, 0.114]), atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_an_image_stack_reads_as_the_dicom_file_does(recorded, suffix):
    folder, frames, angles = recorded
    image = sitk.GetImageFromArray(frames)
    image.SetSpacing((0.2, 0.3, 1.0))
    sitk.WriteImage(image, str(folder / f"stack{suffix}"))
    assert_read(read_frames(folder / f"stack{suffix}"), frames, angles, (0.3, 0.2))


def test_a_nifti_stack_is_indexed_column_row_frame(recorded):
    folder, frames, angles = recorded
    nib.save(nib.Nifti1Image(frames.transpose(2, 1, 0), np.diag([0.2, 0.3, 1, 1])), folder / "stack.nii")
    assert_read(read_frames(folder / "stack.nii"), frames, angles, (0.3, 0.2))


def test_a_numpy_stack_is_indexed_frame_row_column(recorded):
    folder, frames, angles = recorded
    np.save(folder / "grey.npy", frames)
    np.save(folder / "colour.npy", np.stack([frames] * 3, axis=-1))
    for name in ("grey", "colour"):
        assert_read(read_frames(folder / f"{name}.npy"), frames, angles, None)


def test_png_frames_are_taken_in_natural_order(recorded):
    folder, frames, angles = recorded
    assert_read(read_frames(write_pngs(folder / "png", frames), folder / "angles.csv"), frames, angles, None)


def test_png_frames_of_sixteen_bits_or_a_palette_keep_their_grey_levels(recorded):
    folder, frames, angles = recorded
    deep = frames.astype(np.uint16) * 200
    assert_read(read_frames(write_pngs(folder / "deep", deep), folder / "angles.csv"), deep, angles, None)
    write_pngs(folder / "palette", frames)
    for path in (folder / "palette").iterdir():
        Image.open(path).convert("P").save(path)
    assert_read(read_frames(folder / "palette", folder / "angles.csv"), frames, angles, None)


@pytest.mark.parametrize("called", ["{}", "frame{}", "frame{}.png"])
def test_the_frame_column_puts_rows_in_order(recorded, called):
    folder, frames, angles = recorded
    write_pngs(folder / "png", frames)
    rows = np.random.default_rng(1).permutation(12)
    write_angles(folder / "png" / "angles.csv", [angles[i] for i in rows], [called.format(i) for i in rows])
    assert_read(read_frames(folder / "png"), frames, angles, None)


def test_frames_may_be_numbered_from_one_and_the_table_come_from_a_spreadsheet(recorded):
    folder, frames, angles = recorded
    write_pngs(folder / "png", frames)
    path = write_angles(folder / "angles.csv", angles, range(1, 13))
    path.write_text("\ufeff" + path.read_text().replace(",", ", ") + "\n,\n", encoding="utf-8")
    assert_read(read_frames(folder / "png", path), frames, angles, None)


def test_frames_with_the_probe_below_or_superior_on_the_left_are_turned(recorded):
    folder, frames, _ = recorded
    np.save(folder / "a.npy", frames)
    assert np.array_equal(read_frames(folder / "a.npy", probe="bottom").frames.numpy(), frames[:, ::-1])
    assert np.array_equal(read_frames(folder / "a.npy", superior="left").frames.numpy(), frames[:, :, ::-1])
    with pytest.raises(InputError, match='superior "right" or "left"'):
        read_frames(folder / "a.npy", superior="up")


def test_the_verb_writes_the_volume_and_its_mask(recorded):
    folder, frames, angles = recorded
    write_dicom(folder / "a.dcm", frames)
    result = run(
        *("scripts", "sweep", "--frames", str(folder / "a.dcm"), "--angles", str(folder / "angles.csv")),
        *("--axis_offset", "5", "--output", str(folder / "new" / "trus.nii.gz"), "--spacing", "[0.5,0.5,0.4]"),
    )
    assert result.returncode == 0, result.stderr
    assert "Research use only" in result.stdout and "12 frames" in result.stdout
    volume, inside = (nib.load(folder / "new" / name) for name in ("trus.nii.gz", "trus_inside.nii.gz"))
    swept = reconstruct(torch.from_numpy(frames).float(), angles, (0.3, 0.2), 5, (0.5, 0.5, 0.4))
    assert np.allclose(volume.get_fdata(), swept.volume) and volume.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(inside.dataobj), swept.inside) and inside.get_data_dtype() == np.uint8
    assert np.allclose(volume.affine, swept.affine) and np.allclose(inside.affine, swept.affine)
    assert sorted(p.name for p in (folder / "new").iterdir()) == ["trus.nii.gz", "trus_inside.nii.gz"]


def test_the_verb_refuses_in_one_line(recorded):
    folder, frames, _ = recorded
    np.save(folder / "a.npy", frames)
    output = folder / "trus.nii.gz"
    result = run("scripts", "sweep", "--frames", str(folder / "a.npy"), "--axis_offset", "5", "--output", str(output))
    assert result.returncode == 1 and not output.exists()
    assert result.stderr.startswith("error: ") and "--pixel_spacing" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- refusals ---


@pytest.mark.parametrize(
    ("angles", "message"),
    [
        ([0, 2, 1, 3], "rise or fall"),
        ([0, 2, 2, 3], "frame 2 has 2, the next 2"),
        ([350, 355, 0, 5], "count on past 360"),
        ([0, 2, 4], "3 angles for 4 frames"),
        ([0, 2, math.nan, 6], "frame 3 of 4 is nan"),
        ([0, 2, 4, math.inf], "frame 4 of 4 is inf"),
        ([0, 120, 240, 361], "span 361"),
        ([0, 6, 12, 18], "largest gap"),
    ],
)
def test_angles_that_are_no_sweep_are_refused(angles, message):
    with pytest.raises(InputError, match=message):
        reconstruct(torch.rand(4, 9, 9), angles, PIXEL, OFFSET, 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixel_spacing": (0, 0.2)}, "pixel_spacing .* positive"),
        ({"pixel_spacing": (0.2, -0.2)}, "pixel_spacing .* positive"),
        ({"pixel_spacing": (0.2, math.nan)}, "pixel_spacing .* positive"),
        ({"pixel_spacing": (0.2, 0.2, 0.2)}, "expected 2 numbers"),
        ({"pixel_spacing": "small"}, "expected 2 numbers"),
        ({"spacing": 0}, "spacing .* positive"),
        ({"spacing": (1, 1, -1)}, "spacing .* positive"),
        ({"spacing": 500.0}, "choose another"),
        ({"spacing": 0.001}, "choose another"),
        ({"axis_offset": -1}, "axis_offset"),
        ({"axis_offset": math.nan}, "axis_offset"),
        ({"axis_offset": "5 mm"}, "axis_offset"),
        ({"max_gap": "wide"}, "max_gap"),
        ({"frames": torch.rand(1, 9, 9)}, "2 frames or more"),
        ({"frames": torch.rand(4, 9)}, "2 frames or more"),
        ({"frames": torch.rand(4, 1, 9)}, "2 rows and 2 columns"),
        ({"frames": torch.full((4, 9, 9), math.nan)}, "324 pixels are NaN"),
    ],
)
def test_geometry_that_is_no_sweep_is_refused(changed, message):
    good = {"frames": torch.rand(4, 9, 9), "angles": [0, 2, 4, 6], "pixel_spacing": PIXEL, "axis_offset": OFFSET}
    reconstruct(**good, spacing=1.0)
    with pytest.raises(InputError, match=message):
        reconstruct(**(good | {"spacing": 1.0} | changed))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("angle\n0\n", "no column angle_deg in the header .angle."),
        ("", "no column angle_deg"),
        ("0\n1\n2\n", "no column angle_deg"),
        ("angle_deg\n0\n2\n", "2 angles for 12 frames"),
        ("angle_deg\n" + "0\n" * 11 + "far\n", "row 12 has no number"),
        ("frame,angle_deg\n" + "".join(f"{i},{i}\n" for i in range(11)) + "11\n", "row 12 has no number"),
        ("angle_deg\n" + "".join(f"{i}\n" for i in range(11)) + "nan\n", "frame 12 of 12 is nan"),
        ("frame,angle_deg\n" + "".join(f"{i // 2},{i}\n" for i in range(12)), "column frame is neither"),
        ("angle_deg\n" + "".join(f"{i % 4}\n" for i in range(12)), "rise or fall"),
    ],
)
def test_a_table_of_angles_that_does_not_fit_is_refused_by_name(recorded, table, message):
    folder, frames, _ = recorded
    np.save(folder / "a.npy", frames)
    (folder / "angles.csv").write_text(table, encoding="utf-8")
    with pytest.raises(InputError, match=message) as refused:
        read_frames(folder / "a.npy")
    assert str(refused.value).startswith(str(folder / "angles.csv"))


def test_a_missing_table_and_missing_frames_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((4, 9, 9)))
    for frames, message in (("a.npy", "angles.csv: not found; pass --angles"), ("b.npy", "b.npy: not found")):
        with pytest.raises(InputError, match=message):
            read_frames(tmp_path / frames)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((12, 9, 9), np.nan), "pixels are NaN"),
        (np.ones((12, 9, 9)), "every voxel is 1"),
        (np.ones((1, 9, 9)), "2 frames or more"),
        (np.ones((9, 9)), "expected frames of rows and columns"),
        (np.ones((12, 9, 9), dtype=complex), "real numbers"),
        (np.array([{}]), "cannot be read"),
    ],
)
def test_an_array_that_is_no_stack_of_frames_is_refused(recorded, array, message):
    np.save(recorded[0] / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as refused:
        read_frames(recorded[0] / "a.npy")
    assert str(refused.value).startswith(str(recorded[0] / "a.npy"))


def test_a_folder_of_unequal_frames_or_without_frames_is_refused(recorded):
    folder, frames, _ = recorded
    write_pngs(folder / "png", [*frames[:4], frames[4][:-1]])
    with pytest.raises(InputError, match=r"frame4.png: frame size \(19, 30\) differs"):
        read_frames(folder / "png")
    with pytest.raises(InputError, match="1 PNG files"):
        read_frames(write_pngs(folder / "one", frames[:1]))


def test_damaged_files_are_refused(recorded):
    for name in ("a.dcm", "a.nii.gz", "a.npy", "a.avi"):
        (recorded[0] / name).write_bytes(b"nothing of use")
        with pytest.raises(InputError, match="cannot be read") as refused:
            read_frames(recorded[0] / name)
        assert "\n" not in str(refused.value)


def test_an_output_that_is_no_nifti_name_or_the_input_itself_is_refused(recorded):
    folder, frames, _ = recorded
    sitk.WriteImage(sitk.GetImageFromArray(frames), str(folder / "a.nii.gz"))
    for output, message in (("a.nii.gz", "replace the input"), ("b.mha", "ends in .nii.gz")):
        with pytest.raises(InputError, match=message):
            convert(folder / "a.nii.gz", folder / output, axis_offset=5, pixel_spacing=(0.3, 0.2))
    assert sorted(p.name for p in folder.iterdir()) == ["a.nii.gz", "angles.csv"]
