"""The simulated cohort keeps its promise: the true displacement on disk explains the labels on disk."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import center_of_mass, map_coordinates

from scripts.phantom import TrueMap, simulate_pair, write_cohort

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
    images.append(simulate_pair(np.random.default_rng([4, 0])).moving_image.round())
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_labels_are_binary_not_empty_and_inside_the_gland(cases):
    for case in cases:
        moving, fixed = (np.asarray(case[folder].dataobj) for folder in ("moving_labels", "fixed_labels"))
        assert moving.shape[-1] == fixed.shape[-1] and 5 <= fixed.shape[-1] <= 7
        for label in (moving, fixed):
            assert set(np.unique(label)) == {0, 1}
            assert label.any(axis=(0, 1, 2)).all()
            assert (label <= label[..., :1]).all()


def test_the_gland_has_a_plausible_volume(cases):
    for case in cases:
        volume = np.asarray(case["moving_labels"].dataobj)[..., 0].sum() * 1.5 * 1.5 * 1.8 / 1000
        assert 20 < volume < 65  # mL


def test_the_true_displacement_carries_every_moving_label_onto_the_fixed_one(cases):
    for case in cases:
        (gland, fixed_gland), *landmarks = warped_and_fixed(case, true_points(case))
        assert dice(gland, fixed_gland) > 0.9
        assert all(centroid_distance(warped, fixed) < 1.6 for warped, fixed in landmarks)  # a voxel


def test_simpleitk_warps_the_moving_label_by_the_file_alike(cases):
    for case in cases[:2]:
        transform = sitk.DisplacementFieldTransform(
            sitk.Cast(sitk.ReadImage(case["true_ddf"].get_filename()), sitk.sitkVectorFloat64)
        )
        fixed = sitk.ReadImage(case["fixed_images"].get_filename())
        # ITK reads a 4-D label as 4-D; its channels are cut out one by one.
        channels = sitk.ReadImage(case["moving_labels"].get_filename(), sitk.sitkFloat32)
        for m, (expected, _) in enumerate(warped_and_fixed(case, true_points(case))):
            warped = sitk.Resample(channels[..., m], fixed, transform, sitk.sitkLinear, 0.0)
            assert dice(sitk.GetArrayFromImage(warped).T >= 0.5, expected) > 0.99


def test_the_true_map_never_folds_on_the_grid(cases):
    for case in cases:
        spacing = case["fixed_images"].header.get_zooms()
        jacobian = np.stack(np.gradient(true_points(case), *spacing, axis=(0, 1, 2)), axis=-1)
        assert np.linalg.det(jacobian).min() > 0.1


def test_the_true_map_never_folds_however_large_the_deformation_asked_for():
    for seed in range(20):
        true_map = TrueMap(np.random.default_rng(seed), np.zeros(3), np.zeros(3), deformation=100)
        points = np.random.default_rng(seed).uniform(-40, 40, (5000, 3))
        steps = 1e-4 * np.eye(3)
        jacobian = np.stack([(true_map(points + step) - true_map(points - step)) / 2e-4 for step in steps], axis=-1)
        assert np.linalg.det(jacobian).min() > 0


def test_the_displacement_is_not_affine():
    pair = simulate_pair(np.random.default_rng(0))
    gland = pair.fixed_label[..., 0] > 0
    design = np.column_stack([np.argwhere(gland), np.ones(gland.sum())])
    displacement = pair.true_displacement[gland]
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
    assert 4 < np.mean(errors) < 12


def test_the_two_worlds_share_no_origin(cases):
    for case in cases[:3]:
        shift = np.linalg.norm(np.asarray(case["true_ddf"].dataobj), axis=-1)
        assert shift.min() > 10  # mm: the worlds share no origin


def test_aligned_mr_and_trus_intensities_hardly_correlate_in_the_gland(cases):
    for case in cases:
        gland = np.asarray(case["fixed_labels"].dataobj)[..., 0] > 0
        mr = sample(case["moving_images"].dataobj, case["moving_images"], true_points(case)[gland])
        trus = np.asarray(case["fixed_images"].dataobj)[gland]
        assert abs(np.corrcoef(mr, trus)[0, 1]) < 0.6
        assert mr.std() > 10 and trus.std() > 10


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
    with pytest.raises(ValueError, match="no voxel in the (moving|fixed) label"):
        simulate_pair(np.random.default_rng(0), fixed_shape=(4, 4, 4))
