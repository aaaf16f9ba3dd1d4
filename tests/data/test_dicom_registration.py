"""DICOM in and out: a series reads as a NIfTI file does, and two series registered leave an object and a series."""

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import flags, run
from synthetic import GRIDS, OBLIQUE, affine_of, save, write_dicom_pair, write_series

from scripts.data.dicom.registration import save_warped_series
from scripts.data.files import written_together
from scripts.data.volumes import load_volume


@pytest.mark.parametrize("modality", ["MR", "US"])
def test_a_dicom_folder_gives_the_nifti_files_volume_and_affine(modality, tmp_path):
    volume = np.random.default_rng(0).integers(0, 1000, (11, 9, 6)).astype(np.int16)
    affine = affine_of(OBLIQUE, (0.8, 0.9, 2.5), volume.shape, (-31.0, 12.5, 40.0))
    write_series(tmp_path / "series", volume, affine, modality)
    save(tmp_path / "volume.nii.gz", volume, affine)
    dicom, nifti = (load_volume(str(tmp_path / name)) for name in ("series", "volume.nii.gz"))
    np.testing.assert_array_equal(dicom.numpy(), nifti.numpy())
    np.testing.assert_allclose(dicom.affine, nifti.affine, atol=1e-5)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Two DICOM series, as --formats dicom leaves them: a folder with mr, trus and out."""
    folder = write_dicom_pair(tmp_path_factory.mktemp("dicom"))
    settings = {"moving": folder / "mr", "fixed": folder / "trus", "output_dir": folder / "out", "formats": "dicom"}
    result = run("scripts", "register", *flags(settings))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def headers(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def read_series(folder):
    """A series as GDCM reads it, with what it says about its slices."""
    return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))


def test_the_object_names_both_series_and_their_frames_of_reference(registered):
    stored = pydicom.dcmread(registered / "out" / "registration.dcm")
    moving, fixed = headers(registered / "mr"), headers(registered / "trus")
    (item,) = stored.DeformableRegistrationSequence
    assert stored.FrameOfReferenceUID == fixed[0].FrameOfReferenceUID != moving[0].FrameOfReferenceUID
    assert item.SourceFrameOfReferenceUID == moving[0].FrameOfReferenceUID
    assert (stored.StudyInstanceUID, stored.PatientID) == (fixed[0].StudyInstanceUID, "P7")
    (other,) = stored.StudiesContainingOtherReferencedInstancesSequence
    assert other.StudyInstanceUID == moving[0].StudyInstanceUID
    for (series,), files in ((stored.ReferencedSeriesSequence, fixed), (other.ReferencedSeriesSequence, moving)):
        assert series.SeriesInstanceUID == files[0].SeriesInstanceUID
        referenced = {reference.ReferencedSOPInstanceUID for reference in series.ReferencedInstanceSequence}
        assert referenced == {file.SOPInstanceUID for file in files}


def test_the_objects_vectors_are_those_of_the_field(registered):
    (item,) = pydicom.dcmread(registered / "out" / "registration.dcm").DeformableRegistrationSequence
    (grid,) = item.DeformableRegistrationGridSequence
    vectors = np.frombuffer(grid.VectorGridData, "<f4").reshape(*grid.GridDimensions[::-1], 3)
    image = sitk.GetImageFromArray(vectors.astype(float), isVector=True)
    row, column = np.array(grid.ImageOrientationPatient, dtype=float).reshape(2, 3)
    image.SetOrigin([float(v) for v in grid.ImagePositionPatient])
    image.SetSpacing(list(grid.GridResolution))
    image.SetDirection(np.column_stack([row, column, np.cross(row, column)]).ravel().tolist())
    field = sitk.ReadImage(str(registered / "out" / "ddf.nii.gz"), sitk.sitkVectorFloat64)
    inside = np.random.default_rng(0).uniform(0, np.array(field.GetSize()) - 1, (1000, 3))
    points = [field.TransformContinuousIndexToPhysicalPoint(voxel) for voxel in inside.tolist()]
    assert not np.allclose(image.GetDirection(), np.eye(3).ravel(), atol=0.1), "the grid is not oblique"
    by_object, by_field = (
        np.array([transform.TransformPoint(point) for point in points])
        for transform in (sitk.DisplacementFieldTransform(image), sitk.DisplacementFieldTransform(field))
    )
    assert np.abs(by_object - by_field).max() < 1e-3
    assert np.linalg.norm(by_field - points, axis=1).min() > 5, "the worlds are too close to tell apart"


def test_the_warped_series_is_the_warped_image_where_the_trus_is(registered):
    series, reference = (read_series(registered / name) for name in ("out/warped_moving_image", "trus"))
    nifti = sitk.ReadImage(str(registered / "out" / "warped_moving_image.nii.gz"))
    for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(series, of)(), getattr(reference, of)(), atol=1e-6)
    by_voxel = sitk.GetArrayFromImage(series), sitk.GetArrayFromImage(nifti)
    assert np.abs(by_voxel[0] - by_voxel[1]).max() <= 0.501 and np.ptp(by_voxel[0]) > 100
    np.testing.assert_allclose(series.GetDirection(), nifti.GetDirection(), atol=1e-5)


def test_the_warped_series_says_that_it_is_derived_and_for_research(registered):
    moving, fixed = headers(registered / "mr"), headers(registered / "trus")
    warped = headers(registered / "out" / "warped_moving_image")
    used = {file.SOPInstanceUID for file in (*moving, *fixed)}
    assert len({file.SOPInstanceUID for file in warped} - used) == len(warped) == len(fixed)
    (series,) = {file.SeriesInstanceUID for file in warped}
    assert series not in {moving[0].SeriesInstanceUID, fixed[0].SeriesInstanceUID}
    for file in warped:
        assert (file.Modality, *file.ImageType[:2]) == ("MR", "DERIVED", "SECONDARY")
        assert file.FrameOfReferenceUID == fixed[0].FrameOfReferenceUID
        assert (file.StudyInstanceUID, file.PatientID) == (fixed[0].StudyInstanceUID, "P7")
        assert file.RelatedSeriesSequence[0].SeriesInstanceUID == moving[0].SeriesInstanceUID
        assert "research use only" in file.SeriesDescription and "Research use only" in file.ImageComments


def test_dciodvfy_finds_no_error(registered):
    dciodvfy = shutil.which("dciodvfy")
    if dciodvfy is None:
        pytest.skip("dicom3tools are not installed")
    for name in ("registration.dcm", "warped_moving_image/0001.dcm"):
        result = subprocess.run([dciodvfy, str(registered / "out" / name)], capture_output=True, text=True)
        assert "Error" not in result.stdout + result.stderr, result.stderr


@pytest.mark.parametrize("span", [1.0, 1000.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_intensities_of_any_span_are_kept_on_every_grid(grid, span, tmp_path):
    rng, size = np.random.default_rng(1), (7, 6, 5)
    volume, affine = rng.uniform(-0.4, 0.9, size) * span, affine_of(*GRIDS[grid], size, (20, -30, 55))
    pair = [write_series(tmp_path / modality, volume, affine, modality) for modality in ("MR", "US")]
    save_warped_series(tmp_path / "warped", volume, affine, *pair)
    written = load_volume(str(tmp_path / "warped"))
    voxels = rng.integers(0, size, (50, 3))
    world = nib.affines.apply_affine(affine, voxels)
    found = nib.affines.apply_affine(np.linalg.inv(written.affine), world)
    np.testing.assert_allclose(found, found.round(), atol=1e-4)
    values = written[0].numpy()[tuple(found.round().astype(int).T)]
    np.testing.assert_allclose(values, volume[tuple(voxels.T)], atol=2e-5 if span == 1 else 0.501)


def test_a_folder_that_is_written_again_keeps_nothing_of_before(tmp_path):
    for names in (("1.dcm", "2.dcm"), ("1.dcm",)):
        with written_together(tmp_path / "out") as partial:
            (partial / "series").mkdir()
            for name in names:
                (partial / "series" / name).touch()
    assert [path.name for path in Path(tmp_path / "out").rglob("*.dcm")] == ["1.dcm"]
