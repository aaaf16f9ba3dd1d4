"""The simulated cohort keeps its promise: the true displacement on disk explains the labels on disk."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import center_of_mass, map_coordinates

from scripts.data.checks import InputError
from scripts.data.datalist import datalist
from scripts.data.pairs import LoadPaird
from scripts.phantoms.anatomy import Anatomy, TrueMap
from scripts.phantoms.phantom import MODES, simulate_pair, write_cohort

PATIENTS = 10
FOLDERS = ("moving_images", "fixed_images", "moving_labels", "fixed_labels", "true_ddf")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "new", PATIENTS, seed=3)


@pytest.fixture(scope="module")
def cases(cohort):
    """Per case: folder -> NIfTI image, as read back from the disk."""
    paths = sorted(cohort.glob("*/fixed_images/*.nii.gz"), key=lambda path: path.name)
    return [{folder: nib.load(path.parents[1] / folder / path.name) for folder in FOLDERS} for path in paths]


def world(image):
    """World points of the voxel centres, RAS mm, shape (X, Y, Z, 3)."""
    return nib.affines.apply_affine(image.affine, np.moveaxis(np.indices(image.shape[:3]), 0, -1))


def sample(array, image, points):
    """Linear interpolation of `array` on the grid of `image` at world points."""
    voxels = nib.affines.apply_affine(np.linalg.inv(image.affine), points)
    return map_coordinates(np.asarray(array, float), np.moveaxis(voxels, -1, 0), order=1)


def warped_and_fixed(case, points):
    """(moving label at `points` of the moving world, fixed label), binary, for every channel."""
    moving, fixed = (np.asarray(case[folder].dataobj) for folder in ("moving_labels", "fixed_labels"))
    for m in range(fixed.shape[-1]):
        yield sample(moving[..., m], case["moving_labels"], points) >= 0.5, fixed[..., m] > 0


def true_points(case):
    """Moving world points of the fixed voxels, by the displacement on disk (LPS)."""
    return world(case["true_ddf"]) + np.asarray(case["true_ddf"].dataobj)[:, :, :, 0] * (-1, -1, 1)


def inside_moving(case, points):
    """Which world points lie between the voxel centres of the MR."""
    voxels = nib.affines.apply_affine(np.linalg.inv(case["moving_labels"].affine), points)
    return np.all((voxels >= 0) & (voxels <= np.subtract(case["moving_labels"].shape[:3], 1)), axis=-1)


def centroid_distance(a, b, spacing=1.6):
    return spacing * np.linalg.norm(np.subtract(center_of_mass(a), center_of_mass(b)))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_cohort_has_the_four_folders_and_the_shares_of_its_split(cohort):
    names = {
        part: [path.name for path in sorted((cohort / part / "fixed_images").iterdir())]
        for part in ("train", "val", "test")
    }
    assert {part: len(files) for part, files in names.items()} == {"train": 7, "val": 1, "test": 2}
    assert sorted(sum(names.values(), [])) == [f"case{k:06d}.nii.gz" for k in range(PATIENTS)]
    for part, files in names.items():
        assert all(sorted(path.name for path in (cohort / part / folder).iterdir()) == files for folder in FOLDERS)


def test_headers_state_millimetres_scanner_space_and_a_vector_intent(cases):
    for case in cases:
        for folder, image in case.items():
            assert image.header.get_xyzt_units()[0] == "mm"
            assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
            np.testing.assert_allclose(image.get_sform(), image.get_qform(), atol=1e-3)
            assert image.get_data_dtype() == (np.float32 if folder == "true_ddf" else np.uint8)
        assert case["true_ddf"].header["intent_code"] == 1007
        assert case["true_ddf"].shape == (*case["fixed_images"].shape, 1, 3)


def test_a_case_depends_on_the_seed_and_its_number_not_on_how_many_are_made(cases, tmp_path):
    again = write_cohort(tmp_path / "again", 2, seed=3, split=(0.5, 0, 0.5))
    for k, part in enumerate(("train", "test")):
        for folder in FOLDERS:
            image = nib.load(again / part / folder / f"case{k:06d}.nii.gz")
            assert np.asarray(image.dataobj).tobytes() == np.asarray(cases[k][folder].dataobj).tobytes()
            np.testing.assert_array_equal(image.affine, cases[k][folder].affine)


def test_different_cases_and_seeds_differ(cases):
    images = [np.asarray(case["moving_images"].dataobj) for case in cases]
    images.append(simulate_pair(np.random.default_rng([4, 0])).moving_image.round().numpy())
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_labels_are_binary_not_empty_and_inside_the_gland(cases):
    for case in cases:
        moving, fixed = (np.asarray(case[folder].dataobj) for folder in ("moving_labels", "fixed_labels"))
        assert moving.shape[-1] == fixed.shape[-1] >= 5
        for label in (moving, fixed):
            assert set(np.unique(label)) == {0, 1}
            assert label.any(axis=(0, 1, 2)).all()
            assert (label <= label[..., :1]).all()


def test_glands_have_the_volumes_of_men_sent_to_biopsy():
    x = torch.arange(-50, 51, 2.0)
    points = x[:, None, None], x[:, None], x
    volumes = [8e-3 * (Anatomy(np.random.default_rng(k)).gland(*points)[0] > 0).sum().item() for k in range(80)]
    assert min(volumes) > 15 and max(volumes) < 114  # mL
    assert 45 < np.median(volumes) < 65 and np.quantile(volumes, 0.9) > 1.8 * np.quantile(volumes, 0.1)


def test_landmarks_are_named_after_the_gland_its_zone_and_the_urethra():
    found = {simulate_pair(np.random.default_rng(k)).label_names for k in range(8)}
    assert all(
        names[:3] == ("gland", "transition_zone", "urethra") and len(set(names)) == len(names) for names in found
    )
    assert len(found) > 5


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_the_anatomy_itself_at_both_ends_of_the_true_displacement(mode):
    pair = simulate_pair(np.random.default_rng(1), mode=mode)
    fixed = nib.affines.apply_affine(pair.fixed_affine, np.moveaxis(np.indices(pair.fixed_image.shape), 0, -1))
    moving = nib.affines.apply_affine(pair.moving_affine, np.moveaxis(np.indices(pair.moving_image.shape), 0, -1))
    ends = (fixed + pair.true_displacement.numpy(), pair.fixed_label), (moving, pair.moving_label)
    for points, label in ends:
        depths = pair.anatomy.depths(*torch.from_numpy(np.moveaxis(points - pair.true_map.moving_centre, -1, 0)))
        for name, channel in zip(pair.label_names, label.unbind(-1), strict=True):
            sure = depths[name].abs() > 1e-3  # mm: float32 beside float64
            assert torch.equal((depths[name] > 0)[sure], (channel > 0)[sure])


def test_the_true_displacement_carries_every_moving_label_onto_the_fixed_one(cases):
    for case in cases:
        (gland, fixed_gland), *landmarks = warped_and_fixed(case, true_points(case))
        assert dice(gland, fixed_gland) > 0.9
        seen = inside_moving(case, true_points(case))  # what the MR cuts, it cuts of both
        assert (
            max(centroid_distance(warped & seen, fixed & seen) for warped, fixed in landmarks) < 2.4
        )  # mm, 1.5 voxels: the urethra ends thin


def test_simpleitk_warps_the_moving_label_by_the_file_alike(cases):
    for case in cases[:2]:
        transform = sitk.DisplacementFieldTransform(
            sitk.Cast(sitk.ReadImage(case["true_ddf"].get_filename()), sitk.sitkVectorFloat64)
        )
        fixed = sitk.ReadImage(case["fixed_images"].get_filename())
        # ITK reads a 4-D label as 4-D; its channels are cut out one by one.
        channels = sitk.ReadImage(case["moving_labels"].get_filename(), sitk.sitkFloat32)
        inside = inside_moving(case, true_points(case))
        for m, (expected, _) in enumerate(warped_and_fixed(case, true_points(case))):
            warped = sitk.GetArrayFromImage(sitk.Resample(channels[..., m], fixed, transform, sitk.sitkLinear, 0.0)).T
            assert dice((warped >= 0.5) & inside, expected & inside) > 0.99  # ITK extrapolates by half a voxel


def test_the_true_map_never_folds_on_the_grid(cases):
    for case in cases:
        spacing = case["fixed_images"].header.get_zooms()
        jacobian = np.stack(np.gradient(true_points(case), *spacing, axis=(0, 1, 2)), axis=-1)
        assert np.linalg.det(jacobian).min() > 0.1


@pytest.mark.parametrize("large", [{"deformation": 100}, {"press": (50, 60)}, {"swelling": 0.4, "deformation": 9}])
def test_the_true_map_never_folds_however_large_the_motion_asked_for(large):
    for seed in range(12):
        true_map = TrueMap(np.random.default_rng(seed), np.zeros(3), np.zeros(3), **large)
        points = torch.from_numpy(np.random.default_rng(seed).uniform(-40, 40, (3, 5000)))
        jacobian = torch.stack(
            [
                (torch.stack(true_map(*(points + step))) - torch.stack(true_map(*(points - step)))) / 2e-4
                for step in 1e-4 * torch.eye(3, dtype=torch.float64)[..., None]
            ],
            dim=-1,
        )
        assert torch.linalg.det(jacobian.transpose(0, 1)).min() > 0


def test_the_inverse_of_the_true_map_leads_back():
    for seed in range(5):
        true_map = TrueMap(np.random.default_rng(seed), (10, -20, 5), (-7, 3, 0), deformation=5, swelling=0.1)
        points = torch.from_numpy(np.random.default_rng(seed).uniform(-50, 50, (3, 4, 5, 6)))
        back = torch.stack(true_map.inverse(*true_map(*points)))
        torch.testing.assert_close(back, points, rtol=0, atol=2e-3)  # mm


def test_grid_lines_and_points_in_full_give_the_same_map_and_depths():
    true_map, anatomy = TrueMap(np.random.default_rng(0), (0, 0, 0), (5, 0, 0)), Anatomy(np.random.default_rng(0))
    lines = torch.linspace(-30, 30, 5)[:, None, None], torch.linspace(-30, 30, 6)[:, None], torch.linspace(-30, 30, 7)
    full = torch.broadcast_tensors(*lines)
    torch.testing.assert_close(torch.stack(true_map(*lines)), torch.stack(true_map(*full)))
    for name, depth in anatomy.depths(*lines).items():
        torch.testing.assert_close(depth.expand(5, 6, 7), anatomy.depths(*full)[name])


def test_the_displacement_is_not_affine():
    pair = simulate_pair(np.random.default_rng(0))
    gland = pair.fixed_label[..., 0].numpy() > 0
    design = np.column_stack([np.argwhere(gland), np.ones(gland.sum())])
    displacement = pair.true_displacement.numpy()[gland]
    residual = displacement - design @ np.linalg.lstsq(design, displacement, rcond=None)[0]
    assert 0.3 < np.sqrt((residual**2).sum(1).mean()) < 5  # mm


def test_a_start_by_the_centres_of_the_volumes_leaves_millimetres_to_register(cases):
    errors = []
    for case in cases:
        fixed, moving = (
            nib.affines.apply_affine(case[folder].affine, (np.array(case[folder].shape) - 1) / 2)
            for folder in ("fixed_images", "moving_images")
        )
        _, *landmarks = warped_and_fixed(case, world(case["fixed_images"]) - fixed + moving)
        errors.append(np.sqrt(np.mean([centroid_distance(*landmark) ** 2 for landmark in landmarks])))
    assert 4 < np.nanmean(errors) < 12 and np.isnan(errors).sum() <= 2  # landmarks may land outside


def test_the_two_worlds_share_no_origin(cases):
    for case in cases[:3]:
        shift = np.linalg.norm(np.asarray(case["true_ddf"].dataobj), axis=-1)
        assert shift.min() > 10  # mm: the worlds share no origin


def test_aligned_mr_and_trus_intensities_hardly_correlate_in_the_gland(cases):
    correlations = []
    for case in cases:
        gland = np.asarray(case["fixed_labels"].dataobj)[..., 0] > 0
        mr = sample(case["moving_images"].dataobj, case["moving_images"], true_points(case)[gland])
        trus = np.asarray(case["fixed_images"].dataobj)[gland]
        correlations.append(abs(np.corrcoef(mr, trus)[0, 1]))
        assert mr.std() > 3 and trus.std() > 3
    assert np.median(correlations) < 0.4


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_seen_outside_the_sector(mode):
    seen = 0
    for k in range(6):
        pair = simulate_pair(np.random.default_rng(k), mode=mode)
        points = torch.from_numpy(
            nib.affines.apply_affine(pair.fixed_affine, np.moveaxis(np.indices(pair.fixed_image.shape), 0, -1))
        )
        margin = pair.probe.margin(*pair.probe.beam(*points.unbind(-1)))
        reach = 1.6 * 3**0.5 * 12.1  # mm: the widest blur has standard deviation 3 voxels and ends after 4 of them
        assert pair.fixed_image[margin < -reach].abs().max() == 0 if (margin < -reach).any() else True
        sharp = 1.6 * 3  # mm: the standard deviation of the widest blur
        outside, inside = pair.fixed_image[margin < -sharp], pair.fixed_image[margin > sharp]
        assert len(outside) == 0 or outside.mean() < 0.5 * inside.mean()
        seen += len(outside) > 0
    assert seen >= 3


def test_a_calcification_casts_a_shadow():
    darker = []
    for k in range(26):
        pair = simulate_pair(np.random.default_rng(k))
        for name in {"calcification", "calcification_2"} & set(pair.label_names):
            points = nib.affines.apply_affine(pair.fixed_affine, np.moveaxis(np.indices(pair.fixed_image.shape), 0, -1))
            across, ahead, distance = (b.numpy() for b in pair.probe.beam(*torch.from_numpy(points).unbind(-1)))
            label = pair.fixed_label[..., pair.label_names.index(name)].numpy() > 0
            centre, z = [b[label].mean() for b in (across, ahead, distance)], points[label][:, 2].mean()
            beside = np.abs(across * centre[1] - ahead * centre[0]) / distance
            behind = (distance > centre[2] + 5) & (distance < centre[2] + 14) & (ahead > 0)
            behind &= np.abs(points[..., 2] - z) < 1.6
            shadow, near = behind & (beside < 1.6), behind & (beside > 6) & (beside < 10)
            image = pair.fixed_image.numpy()
            if shadow.any() and near.any():
                darker.append(image[near].mean() - image[shadow].mean())
    assert len(darker) > 6 and np.mean(np.array(darker) > 0) > 0.7 and np.mean(darker) > 5


def contrast(image, label):
    """Grey level of the gland above that of the 6 mm around it."""
    gland = label[..., 0][None, None].float()
    around = (torch.nn.functional.max_pool3d(gland, 7, 1, 3) - gland)[0, 0] > 0
    return (image[gland[0, 0] > 0].mean() - image[around].mean()).item()


def test_randomised_glands_are_brighter_or_darker_than_what_surrounds_them():
    pairs = [simulate_pair(np.random.default_rng([5, k]), moving_spacing=2, mode="randomised") for k in range(18)]
    for side in ("moving", "fixed"):
        found = np.array([contrast(getattr(p, f"{side}_image"), getattr(p, f"{side}_label")) for p in pairs])
        assert (found > 3).sum() >= 3 and (found < -3).sum() >= 3


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode 'real' must be one of realistic, randomised, clinical"):
        simulate_pair(np.random.default_rng(0), mode="real")


@pytest.mark.parametrize("mode", MODES)
def test_any_grid_that_holds_some_of_the_gland_gives_finite_images_and_no_empty_label(mode):
    for k in range(8):
        rng = np.random.default_rng([6, k])
        pair = simulate_pair(rng, rng.integers(16, 40, 3), rng.uniform(1, 3, 3), (20, 24, 28), rng.uniform(1, 4), mode)
        for side in ("moving", "fixed"):
            image, label = getattr(pair, f"{side}_image"), getattr(pair, f"{side}_label")
            assert image.dtype == torch.float32 and image.shape == label.shape[:3]
            assert 0 <= image.min() and image.max() <= 255 and image.isfinite().all()
            assert label.shape[-1] == len(pair.label_names) and label.flatten(0, 2).any(0).all()


def test_pairs_of_a_patient_share_the_anatomy_but_not_the_motion(tmp_path):
    sizes = {"fixed_shape": (30, 22, 22), "fixed_spacing": 3.0, "moving_shape": (32, 32, 32), "moving_spacing": 3.0}
    write_cohort(tmp_path / "new", 12, seed=2, split=(1, 0, 0), pairs_per_patient=3, **sizes)
    pairs = datalist(str(tmp_path / "new"), "train", patient_pattern=r"(.*)_\d+$")
    counts = {pair["patient"]: 0 for pair in pairs}
    assert sorted(counts) == [f"patient{p:06d}" for p in range(12)]
    for pair in pairs:
        counts[pair["patient"]] += 1
        assert pair["case"] == f"{pair['patient']}_{counts[pair['patient']]}"
    assert set(counts.values()) == {1, 2, 3}

    anatomy = Anatomy(np.random.default_rng(0))
    pairs = [simulate_pair(np.random.default_rng(k), anatomy=anatomy) for k in range(3)]
    assert all(set(pair.label_names) <= set(anatomy.label_names) for pair in pairs)
    volumes = [pair.moving_label[..., 0].sum().item() for pair in pairs]
    assert max(volumes) < 1.02 * min(volumes)
    assert not torch.equal(pairs[0].fixed_label[..., 0], pairs[1].fixed_label[..., 0])


def test_a_folder_with_files_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_cohort(tmp_path, 3)


@pytest.mark.parametrize(
    "patients, split", [(2, (0.7, 0.1, 0.2)), (0, (1, 0, 0)), (5, (0.5, 0.2, 0.2)), (5, (0.5, 0.5))]
)
def test_a_split_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, patients, split):
    with pytest.raises(ValueError, match="split"):
        write_cohort(tmp_path / "new", patients, split=split)
    assert not (tmp_path / "new").exists()


def test_a_grid_too_small_for_the_anatomy_is_refused_by_name():
    with pytest.raises(ValueError, match="the gland has no voxel in the fixed label"):
        simulate_pair(np.random.default_rng(0), fixed_shape=(2, 2, 2), fixed_spacing=200)


def test_pairs_per_patient_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs_per_patient"):
        write_cohort(tmp_path / "new", 5, pairs_per_patient=0)
    assert not (tmp_path / "new").exists()


def test_the_true_displacement_is_listed_and_loaded_in_ras(cohort, cases, tmp_path):
    pairs = datalist(str(cohort), "train")
    loaded = LoadPaird()(pairs[0])["true_ddf"]
    points = world(cases[0]["true_ddf"]) + loaded.movedim(0, -1).numpy()
    np.testing.assert_allclose(points, true_points(cases[0]), atol=1e-4)
    other = next(p for p in datalist(str(cohort), "test"))
    cropped = nib.load(other["true_ddf"]).slicer[:-1]
    nib.save(cropped, tmp_path / "cropped.nii.gz")
    with pytest.raises(InputError, match="is no displacement on the fixed grid"):
        LoadPaird()(other | {"true_ddf": str(tmp_path / "cropped.nii.gz")})
