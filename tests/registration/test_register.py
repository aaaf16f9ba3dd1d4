"""Registration of one pair: what it leaves agrees with ITK, bad input leaves nothing."""

import gzip
import json
import shutil
import sys

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT, TINY, flags, run
from scipy.spatial.transform import Rotation

from scripts.bundle import workflow
from scripts.registration.apply import apply

GRIDS = {
    "plain": (np.eye(3), (3.0, 3.0, 3.0)),
    "oblique, anisotropic": (Rotation.from_euler("xyz", (14, -9, 21), degrees=True).as_matrix(), (2.6, 3.4, 3.1)),
    "flipped": (np.diag([-1.0, 1.0, -1.0]), (3.0, 2.5, 3.5)),
    "permuted": (np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]), (3.2, 3.0, 2.7)),
}


def write_volume(path, shape, rotation, spacing, origin, seed):
    """A smooth random image of three bumps, oblique or flipped as the header says."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    image = sum(
        rng.uniform(50, 200) * np.exp(-((grid - rng.uniform(0.25, 0.75, 3) * shape) ** 2).sum(-1) / rng.uniform(20, 90))
        for _ in range(3)
    )
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(rotation) * spacing
    affine[:3, 3] = origin
    nifti = nib.Nifti1Image((image + rng.normal(0, 3, shape)).astype(np.float32), affine)
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1)
    nib.save(nifti, path)
    return path


def register(moving, fixed, output, trained, **settings):
    settings = {"moving": moving, "fixed": fixed, "output_dir": output} | TINY | settings
    settings.setdefault("ckpt_path", trained / "moving_model.pt")
    return run("scripts", "register", *flags(settings))


@pytest.mark.parametrize(
    ("start", "grid"),
    [
        ("centre", "plain"),
        ("linear", "oblique, anisotropic"),
        ("displacement", "oblique, anisotropic"),
        ("centre", "flipped"),
        ("displacement", "flipped"),
        ("linear", "permuted"),
        ("displacement", "permuted"),
    ],
)
def test_simpleitk_gets_the_warped_image_from_the_field_and_the_original_moving_image(start, grid, trained, tmp_path):
    rotation, spacing = GRIDS[grid]
    other = Rotation.from_euler("xyz", (5, 8, -11), degrees=True).as_matrix()
    fixed = write_volume(tmp_path / "fixed.nii.gz", (23, 29, 21), rotation, spacing, (12, -40, 7), seed=1)
    moving = write_volume(tmp_path / "moving.nii.gz", (30, 27, 25), other, (2.9, 2.7, 3.3), (-60, 25, 80), seed=2)
    if start != "centre":
        centre = {}
        for name, path in (("fixed", fixed), ("moving", moving)):
            image = sitk.ReadImage(str(path))
            centre[name] = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
        shift = np.subtract(centre["moving"], centre["fixed"]) + [4, -3, 2]
        transform = sitk.Euler3DTransform(centre["fixed"], 0.1, -0.15, 0.2, shift.tolist())
        if start == "displacement":
            bump = sitk.BSplineTransformInitializer(sitk.ReadImage(str(fixed)), (2, 2, 2))
            bump.SetParameters(np.random.default_rng(3).normal(0, 3, len(bump.GetParameters())).tolist())
            transform = sitk.CompositeTransform([transform, bump])
            grid = sitk.ReadImage(str(fixed))
            place = (grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection())
            field = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, *place)
            transform = sitk.DisplacementFieldTransform(field)
        sitk.WriteTransform(transform, str(tmp_path / "start.h5"))
        start = tmp_path / "start.h5"
    settings = TINY | {"ckpt_path": trained / "moving_model.pt", "initial_transform": str(start)}
    workflow.register(moving, fixed, tmp_path / "out", **settings)

    reference, image = sitk.ReadImage(str(fixed)), sitk.ReadImage(str(moving))
    field = sitk.ReadImage(str(tmp_path / "out" / "ddf.nii.gz"), sitk.sitkVectorFloat64)
    by_itk = sitk.Resample(image, reference, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0)
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "warped_moving_image.nii.gz")))
    by_itk = sitk.GetArrayFromImage(by_itk)
    intensities = sitk.GetArrayFromImage(image)
    difference = np.abs(ours - by_itk) / np.ptp(intensities)
    # a voxel on the very face of the moving volume may fall on either side of it
    on_the_face = (ours == 0) != (by_itk == 0)
    assert on_the_face.mean() < 1e-3
    assert difference[~on_the_face].max() < 1e-3
    apply([str(tmp_path / "out" / "ddf.nii.gz")], str(tmp_path / "again.nii.gz"), moving=str(moving))
    again = sitk.ReadImage(str(tmp_path / "again.nii.gz"))  # without a reference, on the fixed image's grid
    np.testing.assert_allclose(again.GetOrigin(), reference.GetOrigin(), atol=1e-3)
    assert np.mean(np.abs(sitk.GetArrayFromImage(again) - ours) / np.ptp(intensities) > 1e-3) < 1e-3
    record = json.loads((tmp_path / "out" / "qc.json").read_text())
    assert record["max_displacement_mm"] > 1, "the network moved nothing, so nothing was tested"
    assert 0.2 < (ours != 0).mean()
    np.testing.assert_allclose(
        nib.load(tmp_path / "out" / "warped_moving_image.nii.gz").affine, nib.load(fixed).affine, atol=1e-4
    )


def test_labels_come_out_binary_on_the_fixed_grid_with_scores(trained, cohort, tmp_path):
    files = {
        k: next((cohort / "test" / f"{k}s").iterdir())
        for k in ("moving_image", "fixed_image", "moving_label", "fixed_label")
    }
    labels = {"moving_labels": files["moving_label"], "fixed_labels": files["fixed_label"]}
    result = register(files["moving_image"], files["fixed_image"], tmp_path / "out", trained, **labels)
    assert result.returncode == 0, result.stderr[-3000:]
    warped = nib.load(tmp_path / "out" / "warped_moving_label.nii.gz")
    assert warped.shape == nib.load(files["fixed_label"]).shape
    assert set(np.unique(np.asarray(warped.dataobj))) == {0, 1}
    record = json.loads((tmp_path / "out" / "qc.json").read_text())
    assert 0 <= record["gland_dsc"] <= 1 and record["notice"].startswith("Research use only")


def damaged(kind, folder, good):
    """A copy of a good image with one defect."""
    nifti = nib.load(good)
    array, path = np.asarray(nifti.dataobj, dtype=np.float32), folder / f"{kind}.nii.gz"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "text":
        path.write_bytes(gzip.compress(b"this is no image"))
    elif kind != "missing":
        array = {"nan": array.copy(), "constant": np.zeros_like(array), "slice": array[:, :, :1]}[kind]
        if kind == "nan":
            array[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(array, nifti.affine), path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "NaN"),
        ("constant", "constant"),
        ("slice", "single slice"),
        ("truncated", "cannot be read"),
        ("text", "cannot be read"),
        ("missing", "not found"),
    ],
)
def test_a_bad_image_is_refused_in_one_line_and_leaves_nothing(kind, message, trained, tmp_path):
    good = write_volume(tmp_path / "good.nii.gz", (18, 19, 20), np.eye(3), (3, 3, 3), (0, 0, 0), seed=1)
    bad = damaged(kind, tmp_path, good)
    result = register(bad, good, tmp_path / "out", trained)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert str(bad) in line and message in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_or_unfitting_weights_are_refused(trained, tmp_path):
    image = write_volume(tmp_path / "a.nii.gz", (18, 19, 20), np.eye(3), (3, 3, 3), (0, 0, 0), seed=1)
    for settings, message in (
        ({"ckpt_path": tmp_path / "none.pt"}, "no weights there"),
        ({"initial_channels": 8}, "does not fit the network"),
        ({"ckpt_path": image}, "not a readable weights file"),
    ):
        result = register(image, image, tmp_path / "out", trained, **settings)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()


def test_help_shows_an_example():
    result = run("scripts", "register", "--help")
    assert result.returncode == 0 and "--moving mr.nii.gz" in result.stdout + result.stderr


def test_pairs_that_several_threads_read_are_registered_as_those_that_one_reads(cohort, tmp_path):
    for kind in ("moving_images", "fixed_images"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number, file in enumerate(sorted((cohort / "train" / kind).iterdir())[:3]):
            shutil.copy(file, tmp_path / "data" / kind / f"case{number}.nii.gz")
    before = torch.get_num_threads(), sys.getswitchinterval()
    for workers in (0, 2):  # in this process, which has computed
        settings = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / str(workers)), "device": "cpu"}
        monai.bundle.run(config_file=str(ROOT / "configs/inference.json"), num_workers=workers, **settings)
        assert (torch.get_num_threads(), sys.getswitchinterval()) == before
    for number in range(3):
        fields = [nib.load(tmp_path / str(n) / f"case{number}" / "ddf.nii.gz").get_fdata() for n in (0, 2)]
        np.testing.assert_allclose(*fields, atol=0.05)  # mm; one thread or two round differently
