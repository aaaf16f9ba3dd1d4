"""DICOM as clinics have it: read where its tags say it lies, or refused in one line that is true."""

import json
import re
import shutil
import warnings
from pathlib import Path

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import ROOT
from pydicom.dataset import Dataset
from synthetic import (
    GRIDS,
    OBLIQUE,
    affine_of,
    decimals,
    functional,
    multi_frame,
    save,
    to_itk,
    write_dicom,
    write_series,
)

from scripts.data.checks import InputError, Repaired
from scripts.data.datalist import OPTIONS, datalist
from scripts.data.gate import check_dataset
from scripts.data.pairs import LoadPaird
from scripts.data.volumes import load_volume
from scripts.phantoms.sweep import read_frames

SIZE, VOXEL = (7, 6, 5), (1.5, 1.2, 2.0)
AFFINE = affine_of(OBLIQUE, VOXEL, SIZE, (10, -20, 30))
VOLUME = np.random.default_rng(3).integers(-99, 999, SIZE).astype(np.int16)
LAID = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([*VOXEL, 1.0])  # rows to the left, columns to the back, from 0
ENHANCED_US = "1.2.840.10008.5.1.4.1.1.6.2"


def loaded(path, **options):
    """The volume and what was said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = load_volume(str(path), **options)
    return volume, [str(one.message) for one in said if one.category is Repaired]


def refused(path, message, **options):
    with warnings.catch_warnings(), pytest.raises(InputError) as error:
        warnings.simplefilter("ignore", Repaired)
        load_volume(str(path), **options)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    assert message in text, text


def assert_same(found, volume=VOLUME, affine=AFFINE, atol=0.0):
    """The same values at the same places of the world, whichever way the axes run."""
    assert found.shape[0] == 1 and found.shape[1:].numel() == volume.size
    voxels = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
    at = nib.affines.apply_affine(np.linalg.inv(found.affine.numpy()) @ affine, voxels)
    np.testing.assert_allclose(at, at.round(), atol=1e-4)
    np.testing.assert_allclose(found[0].numpy()[tuple(at.round().astype(int).T)], volume.ravel(), atol=atol)


def regions(x=0.15, y=0.12, units=3, form=1):
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType = form, 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = units
    region.PhysicalDeltaX, region.PhysicalDeltaY = x, y
    return region


def us(**elements):
    return multi_frame(VOLUME, AFFINE, "US", **elements)


def eigen(data, value, vr="DS"):
    """The private voxel size of TCIA's Prostate-MRI-US-Biopsy."""
    data.add_new((0x1129, 0x0010), "LO", "Eigen, Inc")
    data.add_new((0x1129, 0x1016), vr, value)
    return data


def own_volume(**pixel_measures):
    """An enhanced US volume, whose frames lie in the volume's own frame of reference."""
    data = us(SOPClassUID=ENHANCED_US)
    data.SharedFunctionalGroupsSequence = [
        functional(
            PlaneOrientationVolumeSequence={"ImageOrientationVolume": [1.0, 0, 0, 0, 1, 0]},
            PixelMeasuresSequence={"PixelSpacing": [1.2, 1.5]} | pixel_measures,
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        functional(PlanePositionVolumeSequence={"ImagePositionVolume": [0.0, 0.0, 2.0 * k]}) for k in range(SIZE[2])
    ]
    return data


# --- geometry from the tags ---


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [[0, 2, 4, 1, 3], [4, 3, 2, 1, 0], [3, 0, 4, 1, 2]])
def test_frames_of_an_enhanced_mr_lie_where_they_say_in_any_order(grid, order, tmp_path):
    affine = affine_of(*GRIDS[grid], SIZE, (20, -30, 55))
    found, said = loaded(write_dicom(tmp_path / "mr", multi_frame(VOLUME, affine, order=order)))
    assert_same(found, affine=affine)
    assert not said


def test_a_single_file_is_as_good_as_a_folder_and_both_as_simpleitk_reads_them(tmp_path):
    folder = write_series(tmp_path / "slices", VOLUME, AFFINE)
    (tmp_path / "one").mkdir()
    path = write_dicom(tmp_path / "one" / "mr.dcm", multi_frame(VOLUME, AFFINE, order=[3, 0, 4, 1, 2]))
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    by_sitk = np.eye(4)
    by_sitk[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    by_sitk[:3, 3] = image.GetOrigin()
    for found, _ in map(loaded, (folder, path, tmp_path / "one")):
        np.testing.assert_array_equal(found[0], sitk.GetArrayFromImage(image).T)
        np.testing.assert_allclose(found.affine, np.diag([-1, -1, 1, 1]) @ by_sitk, atol=1e-6)


SIZED = {
    "between slices": us(PixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0),
    "between slices, counted backwards": us(PixelSpacing=[1.2, 1.5], SpacingBetweenSlices=-2.0),
    "thickness of ultrasound": us(PixelSpacing=[1.2, 1.5], SliceThickness=2.0),
    "regions": us(SequenceOfUltrasoundRegions=[regions()], SpacingBetweenSlices=2.0),
    "two regions of one size": us(SequenceOfUltrasoundRegions=[regions(), regions()], SpacingBetweenSlices=2.0),
    "regions beside a trace": us(
        SequenceOfUltrasoundRegions=[regions(), regions(1, 2, form=3)], SpacingBetweenSlices=2.0
    ),
    "regions and spacing that agree": us(
        SequenceOfUltrasoundRegions=[regions()], PixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0
    ),
    "at the imager": us(ImagerPixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0),
    "nominal": us(NominalScannedPixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0),
    "shared measures": us(
        SharedFunctionalGroupsSequence=[
            functional(PixelMeasuresSequence={"PixelSpacing": [1.2, 1.5], "SpacingBetweenSlices": 2.0})
        ]
    ),
    "enhanced ultrasound": own_volume(),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_stated_size_is_read_and_what_is_not_stated_is_said(name, tmp_path):
    found, said = loaded(write_dicom(tmp_path / "us.dcm", SIZED[name]))
    np.testing.assert_allclose(found.affine, LAID, atol=1e-6)
    np.testing.assert_array_equal(found[0], VOLUME)
    assert any("nothing says where its frames lie" in one or "within its own volume" in one for one in said)


def test_the_first_frames_position_and_directions_are_those_of_a_file_without_others(tmp_path):
    lps = np.diag([-1.0, -1.0, 1.0]) @ AFFINE[:3]
    data = us(PixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0, ImagePositionPatient=decimals(lps[:, 3]))
    data.ImageOrientationPatient = decimals(lps[:, :2] / VOXEL[:2])
    assert_same(loaded(write_dicom(tmp_path / "us.dcm", data))[0])


@pytest.mark.parametrize("encoded", ["1.5", b"1.5 ", np.float32(1.5).tobytes(), np.float64(1.5).tobytes()])
@pytest.mark.parametrize("implicit", [False, True])
def test_a_trus_of_tcia_lies_as_its_private_elements_cohort_does(encoded, implicit, tmp_path):
    syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    data = eigen(us(), encoded, "DS" if isinstance(encoded, str) else "UN")
    found, said = loaded(write_dicom(tmp_path / "us.dcm", data, syntax))
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "us.dcm")))  # frame, row, column
    cube = stored.transpose(1, 0, 2)[:, ::-1, ::-1]  # x by rows, y by frames backwards, z by columns backwards
    origin = -1.5 * np.array(cube.shape) / 2
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nib.affines.from_matvec(np.eye(3) * 1.5, origin)
    assert_same(found, cube, affine)
    assert any("Prostate-MRI-US-Biopsy" in one for one in said)


UNSIZED = {
    "nothing": (us(), "how large a pixel is and how far apart its 5 frames lie"),
    "a film": (
        us(SequenceOfUltrasoundRegions=[regions()], FrameTime="40"),
        "how far apart its 5 frames lie, which follow in time (its pixels are 1.5 × 1.2 mm)",
    ),
    "regions in seconds": (
        us(SequenceOfUltrasoundRegions=[regions(units=4)], SpacingBetweenSlices=2.0),
        "how large a pixel is (its slices lie 2 mm apart)",
    ),
    "an enhanced MR without groups": (
        multi_frame(
            VOLUME,
            AFFINE,
            SpacingBetweenSlices=2.0,
            PerFrameFunctionalGroupsSequence=[],
            SharedFunctionalGroupsSequence=[],
        ),
        "how large a pixel is (its slices lie 2 mm apart)",
    ),
    "the thickness of MR slices": (
        us(Modality="MR", PixelSpacing=[1.2, 1.5], SliceThickness=2.0),
        "how far apart its 5 frames lie (its pixels are 1.5 × 1.2 mm)",
    ),
    "an aspect ratio": (
        us(PixelAspectRatio=["4", "5"], SpacingBetweenSlices=2.0),
        "how large a pixel is (its slices lie 2 mm apart)",
    ),
}


@pytest.mark.parametrize("name", UNSIZED)
def test_a_size_that_nothing_states_is_refused_unless_it_is_given(name, tmp_path):
    data, message = UNSIZED[name]
    path = write_dicom(tmp_path / "us.dcm", data)
    refused(path, f"nothing says {message}; state the voxel size by --fixed_spacing '[x,y,z]', in mm", side="fixed")
    found, _ = loaded(path, spacing=list(VOXEL), side="fixed")
    np.testing.assert_allclose(found.affine, LAID, atol=1e-6)


@pytest.mark.parametrize("name", ["image.mha", "image.nrrd", "image.tif"])
def test_a_file_of_another_format_without_a_size_is_refused_unless_it_is_given(name, tmp_path):
    path = tmp_path / name
    sitk.WriteImage(to_itk(VOLUME.clip(0), np.eye(4)), str(path))
    sizeless, count = re.subn(rb"(ElementSpacing|space directions|spacings)[^\n]*\n", b"", path.read_bytes())
    assert count == (not name.endswith("tif"))
    path.write_bytes(sizeless)
    refused(path, "nothing says how large a voxel is; state the voxel size by --moving_spacing", side="moving")
    found, said = loaded(path, spacing=VOXEL, side="moving")
    assert not said
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), VOXEL)


def test_a_nifti_without_a_size_takes_the_one_that_is_given(tmp_path):
    image = nib.Nifti1Image(VOLUME, np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(np.eye(4), 1)
    content = bytearray(image.to_bytes())
    content[80:92] = bytes(12)  # pixdim 1 to 3
    (tmp_path / "image.nii").write_bytes(content)
    refused(tmp_path / "image.nii", "voxel size [0.0, 0.0, 0.0] mm in pixdim")
    found, _ = loaded(tmp_path / "image.nii", spacing=VOXEL)
    np.testing.assert_allclose(found.affine, np.diag([*VOXEL, 1]), atol=1e-6)


def test_a_given_size_replaces_another_that_is_stated_aloud_and_is_three_positive_numbers(tmp_path):
    save(tmp_path / "image.nii", VOLUME, AFFINE)
    found, said = loaded(tmp_path / "image.nii", spacing=1.0)
    np.testing.assert_allclose(found.affine, AFFINE @ np.diag([1 / 1.5, 1 / 1.2, 1 / 2, 1]), atol=1e-6)
    assert any("voxel size 1.5 × 1.2 × 2 mm replaced by the 1 × 1 × 1 mm" in one for one in said)
    for given in ([1, 2], [1, 2, 0], [1, 2, np.nan], "wide", [1, 2, -3]):
        with pytest.raises(InputError, match="fixed_spacing .*: expected three positive numbers"):
            load_volume(str(tmp_path / "image.nii"), spacing=given, side="fixed")


def test_sizes_that_contradict_each_other_are_refused(tmp_path):
    both = us(SequenceOfUltrasoundRegions=[regions()], PixelSpacing=[0.8, 0.8], SpacingBetweenSlices=2.0)
    path = write_dicom(tmp_path / "us.dcm", both)
    refused(path, "pixels of 0.8 × 0.8 mm by PixelSpacing, of 1.5 × 1.2 mm by SequenceOfUltrasoundRegions")
    two = us(SequenceOfUltrasoundRegions=[regions(), regions(0.3, 0.3)], SpacingBetweenSlices=2.0)
    refused(write_dicom(path, two), "2 ultrasound regions")
    refused(write_dicom(path, us(PixelSpacing=[0, 0.8], SpacingBetweenSlices=2.0)), "it must be positive")
    refused(write_dicom(path, eigen(us(PixelSpacing=[0.8, 0.8]), "1.5")), "private element (1129,1016)")
    refused(write_dicom(path, eigen(us(SliceThickness=2), "1.5")), "2 mm by SliceThickness")
    refused(write_dicom(path, eigen(us(), "wide", "LO")), "'wide' in the private element (1129,1016)")


@pytest.mark.parametrize("modality", ["MR", "US"])
def test_slices_without_positions_are_stacked_aloud_if_order_and_distance_are_stated(modality, tmp_path):
    def without(**elements):
        folder = tmp_path / f"series{len(list(tmp_path.iterdir()))}"
        write_series(folder, VOLUME, AFFINE, modality, ImageOrientationPatient=None, **elements)
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            del header.ImagePositionPatient
            if "SliceLocation" in elements:
                header.SliceLocation = 40 - 2.0 * header.InstanceNumber
            header.save_as(path)
        return folder

    found, said = loaded(without(SpacingBetweenSlices="2"))
    np.testing.assert_allclose(found.affine, LAID, atol=1e-6)
    np.testing.assert_array_equal(found[0], VOLUME)
    assert any("nothing says where its frames lie" in one for one in said)
    found, _ = loaded(without(SliceLocation="0"))
    np.testing.assert_array_equal(found[0], VOLUME[:, :, ::-1])
    np.testing.assert_allclose(found.affine, LAID, atol=1e-6)
    if modality == "MR":
        refused(without(), "how far apart its 5 frames lie")  # a slice's thickness is no distance
    gap = without(SpacingBetweenSlices="2")
    next(p for p in gap.iterdir() if pydicom.dcmread(p).InstanceNumber == 3).unlink()
    refused(gap, "slices are unevenly spaced, InstanceNumber 2 is followed by 4; is one missing?")


# --- several volumes ---


def echoes(folder, *times, **elements):
    """A series of several echoes, each the volume plus its time."""
    uid = pydicom.uid.generate_uid()
    for time in times:
        made = write_series(folder / str(time), VOLUME + time, AFFINE, SeriesInstanceUID=uid, EchoTime=time, **elements)
        for path in made.iterdir():
            path.rename(folder / path.name)
        made.rmdir()
    return folder


def phases(count, time_fastest, group=None):
    """An enhanced MR of several volumes, the k-th the volume plus 1000 k; `group` names each in its frames."""
    volumes = np.concatenate([VOLUME + 1000 * k for k in range(count)], axis=2)
    places = np.arange(count * SIZE[2]).reshape(count, SIZE[2])
    order = (places.T if time_fastest else places).ravel()
    data = multi_frame(volumes, AFFINE, order=order.tolist())
    lps = np.diag([-1.0, -1.0, 1.0]) @ AFFINE[:3]
    for item, at in zip(data.PerFrameFunctionalGroupsSequence, order, strict=True):
        item.PlanePositionSequence[0].ImagePositionPatient = decimals(lps @ [0, 0, at % SIZE[2], 1])
        if group:
            item.update(functional(**group(int(at) // SIZE[2])))
    return data


PHASES = {
    "EffectiveEchoTime": lambda k: {"MREchoSequence": {"EffectiveEchoTime": 20.0 + 80 * k}},
    "DiffusionBValue": lambda k: {"MRDiffusionSequence": {"DiffusionBValue": 20.0 + 80 * k}},
    "TemporalPositionIndex": lambda k: {"FrameContentSequence": {"TemporalPositionIndex": 20 + 80 * k}},
    "StackID": lambda k: {"FrameContentSequence": {"StackID": str(20 + 80 * k)}},
    "FrameAcquisitionNumber": lambda k: {"FrameContentSequence": {"FrameAcquisitionNumber": 20 + 80 * k}},
}


@pytest.mark.parametrize("time_fastest", [False, True])
@pytest.mark.parametrize("name", [None, *PHASES])
def test_volumes_of_an_enhanced_file_are_named_and_chosen(name, time_fastest, tmp_path):
    path = write_dicom(tmp_path / "mr.dcm", phases(3, time_fastest, PHASES.get(name)))
    named = f"2: {name}=100, 5 images" if name else "2: image 2 at each place, 5 images"
    refused(path, f"3 volumes (1: {name}=20" if name else "3 volumes (1: image 1 at each place", side="moving")
    refused(path, named, side="moving")
    refused(path, "choose one, for example --moving_series", side="moving")
    for series in ["2", 2, *([f"{name}=100", f"{name}=100.0"] if name else [])]:
        assert_same(loaded(path, series=series)[0], VOLUME + 1000)


def test_echoes_of_a_series_are_named_and_chosen(tmp_path):
    folder = echoes(tmp_path / "series", 20, 100)
    refused(folder, "2 volumes (1: EchoTime=20, 5 images; 2: EchoTime=100, 5 images); choose one", side="fixed")
    refused(folder, "for example --fixed_series EchoTime=100", side="fixed")
    refused(folder, "keep the one that is meant")
    assert_same(loaded(folder, series="EchoTime=100")[0], VOLUME + 100)
    assert_same(loaded(folder, series=1)[0], VOLUME + 20)
    refused(folder, "the series is 3; found 2 volumes", series=3)
    refused(folder, "none is the series EchoTime=50", series="EchoTime=50")
    with pytest.raises(InputError, match="EchoTime: expected a number, or NAME=VALUE"):
        load_volume(str(folder), series="EchoTime")


def test_an_incomplete_echo_beside_another_does_not_fill_its_gap(tmp_path):
    folder = echoes(tmp_path / "series", 20, 100)
    for time, place in ((20, 2), (100, 4)):  # each place has an image of either echo
        next(
            p for p in folder.iterdir() if (h := pydicom.dcmread(p)).EchoTime == time and h.InstanceNumber == place
        ).unlink()
    refused(folder, "2 volumes (1: EchoTime=20, 4 images; 2: EchoTime=100, 4 images)")
    refused(folder, "is one missing?", series=1)


def test_text_that_differs_without_meaning_does_not_make_two_series(tmp_path):
    folder = write_series(tmp_path / "series", VOLUME, AFFINE, EchoTime="100")
    for k, path in enumerate(sorted(folder.iterdir())[:2]):
        header = pydicom.dcmread(path)
        header.SliceThickness, header.EchoTime, header.SeriesDescription = "2.0000", "100.00", f"MR phantom {k}"
        header.PixelSpacing = ["1.20000", "1.5"]
        header.save_as(path)
    header.EchoNumbers, header.TemporalPositionIdentifier = 1, 1  # and left out of the others
    header.save_as(path)
    found, said = loaded(folder)
    assert_same(found)
    assert not said


def test_series_sizes_and_directions_in_one_folder_are_named(tmp_path):
    one = write_series(tmp_path / "one", VOLUME, AFFINE, SeriesNumber=3)
    for path in write_series(tmp_path / "two", VOLUME + 7, AFFINE, SeriesNumber=5).iterdir():
        path.rename(one / path.name)
    refused(
        one, "2 DICOM series in one folder (1: SeriesNumber=3, MR phantom, 5 images; 2: SeriesNumber=5", side="fixed"
    )
    assert_same(loaded(one, series="SeriesNumber=5")[0], VOLUME + 7)
    uid = pydicom.uid.generate_uid()
    axes = affine_of(OBLIQUE[:, [1, 2, 0]], VOXEL, SIZE, (10, -20, 30))
    both = write_series(tmp_path / "both", VOLUME, AFFINE, SeriesInstanceUID=uid)
    for path in list(write_series(tmp_path / "localiser", VOLUME[:, :, :1], axes, SeriesInstanceUID=uid).iterdir()):
        path.rename(both / path.name)
    refused(both, "2 volumes (1: plane=", side="fixed")
    refused(both, "plane=axial, 5 images")
    small = write_series(tmp_path / "small", VOLUME, AFFINE, SeriesInstanceUID=uid)
    for path in list(write_series(tmp_path / "big", VOLUME[:6, :5], AFFINE, SeriesInstanceUID=uid).iterdir()):
        path.rename(small / path.name)
    refused(small, "size=7 × 6 of 1.5 × 1.2 mm, 5 images")


def test_a_film_of_one_slice_a_single_slice_and_a_mosaic_are_refused_as_such(tmp_path):
    folder = write_series(tmp_path / "film", VOLUME, AFFINE, ImagePositionPatient=None)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.ImagePositionPatient = [1, 2, 3]
        header.save_as(path)
    refused(folder, "5 images at one place, a film of a single slice")
    single = write_series(tmp_path / "single", VOLUME[:, :, :1], AFFINE)
    refused(single, "a single slice, size (7, 6, 1)")
    mosaic = write_series(tmp_path / "mosaic", VOLUME, AFFINE, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    refused(mosaic, "a mosaic of slices in one picture")


def test_a_number_chooses_a_volume_of_another_format(tmp_path):
    save(tmp_path / "two.nii.gz", np.stack([VOLUME, VOLUME + 5], -1), AFFINE)
    assert_same(loaded(tmp_path / "two.nii.gz", series=2)[0], VOLUME + 5)
    refused(tmp_path / "two.nii.gz", "the series is 3, but it holds 2 volumes; give a number", series=3)


# --- copies, gaps, shear ---


@pytest.mark.parametrize("new_uid", [False, True])
def test_copies_are_left_out_by_name(new_uid, tmp_path):
    folder = write_series(tmp_path / "series", VOLUME, AFFINE)
    for path in sorted(folder.iterdir())[1:3]:
        copy = folder / f"{path.stem} (1).dcm"
        shutil.copy(path, copy)
        if new_uid:
            header = pydicom.dcmread(copy)
            header.SOPInstanceUID = pydicom.uid.generate_uid()
            header.save_as(copy)
    found, (said,) = loaded(folder)
    assert_same(found)
    assert "copies of other images of it are left out: " in said and said.count("(1).dcm") + said.count(", ") >= 2


def test_different_images_that_claim_one_place_or_one_identity_are_refused(tmp_path):
    folder = write_series(tmp_path / "series", VOLUME, AFFINE)
    path = sorted(folder.iterdir())[1]
    header = pydicom.dcmread(path)
    header.PixelData = (VOLUME[:, :, 0].T * 0 + 3).astype("<i2").tobytes()
    header.save_as(folder / "other.dcm")
    refused(folder, "differ, but have one SOPInstanceUID")
    header.SOPInstanceUID = pydicom.uid.generate_uid()
    header.save_as(folder / "other.dcm")
    refused(folder, "different images at one place")


@pytest.mark.parametrize("frames", [[0, 1, 3, 4], [0, 2, 3, 4], [0, 1, 2, 4]])
def test_a_missing_frame_is_refused_by_name(frames, tmp_path):
    path = write_dicom(tmp_path / "mr.dcm", multi_frame(VOLUME, AFFINE, order=frames))
    refused(path, "slices are unevenly spaced")
    k = int(np.diff(frames).argmax()) + 1
    refused(path, f"4 mm between mr.dcm frame {k} and mr.dcm frame {k + 1}, else 2; is one missing?")


def test_a_tilted_gantry_is_refused_as_a_sheared_nifti_is_and_a_little_is_mended(tmp_path):
    for tilt, name in ((0.35, "tilted"), (0.01, "nearly")):
        sheared = AFFINE.copy()
        sheared[:3, 2] += 2.0 * tilt * AFFINE[:3, 1] / 1.2
        series = write_series(tmp_path / name, VOLUME, sheared)
        enhanced = write_dicom(tmp_path / f"{name}.dcm", multi_frame(VOLUME, sheared, order=[4, 0, 1, 3, 2]))
        for path in (series, enhanced):
            for header in [] if path == enhanced else map(pydicom.dcmread, path.iterdir()):
                assert "GantryDetectorTilt" not in header
            if name == "tilted":
                refused(path, "its axes are 19.3° from perpendicular")
            else:
                found, (said,) = loaded(path)
                np.testing.assert_allclose(found.affine, sheared, atol=0.1)
                assert "made perpendicular" in said


# --- voxels ---


def coloured(volume, photometric, **elements):
    """A multi-frame file whose 8-bit frames have three channels, (X, Y, Z, 3)."""
    data = us(PixelSpacing=[1.2, 1.5], SpacingBetweenSlices=2.0, SamplesPerPixel=3, PlanarConfiguration=0, **elements)
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PhotometricInterpretation = photometric
    data.PixelData = volume.transpose(2, 1, 0, 3).astype(np.uint8).tobytes()
    return data


GREY = np.random.default_rng(5).integers(0, 256, SIZE)


@pytest.mark.parametrize("planar", [0, 1])
def test_grey_in_colour_is_grey(planar, tmp_path):
    rgb = coloured(np.stack([GREY] * 3, -1), "RGB")
    if planar:
        rgb.PlanarConfiguration = 1
        rgb.PixelData = np.stack([GREY] * 3, -1).transpose(2, 3, 1, 0).astype(np.uint8).tobytes()
    ybr = coloured(np.stack([GREY, GREY * 0 + 128, GREY * 0 + 128], -1), "YBR_FULL")
    for data in (rgb, ybr):
        found, said = loaded(write_dicom(tmp_path / "us.dcm", data))
        np.testing.assert_allclose(found[0], GREY, atol=1)
        assert not any("luminance" in one for one in said)


def test_a_palette_of_greys_is_grey_and_a_colour_its_luminance(tmp_path):
    data = coloured(np.stack([GREY] * 3, -1), "PALETTE COLOR", SOPInstanceUID="1.2.3")
    data.SamplesPerPixel = 1
    data.PixelData = GREY.transpose(2, 1, 0).astype(np.uint8).tobytes()
    for colour in ("Red", "Green", "Blue"):
        setattr(data, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(data, f"{colour}PaletteColorLookupTableData", (np.arange(256)[::-1] * 257).astype("<u2").tobytes())
    found, said = loaded(write_dicom(tmp_path / "us.dcm", data))
    np.testing.assert_array_equal(found[0], (255 - GREY) * 257)
    mixed = np.stack([GREY, GREY // 2, GREY // 4], -1)
    found, said = loaded(write_dicom(tmp_path / "us.dcm", coloured(mixed, "RGB")))
    np.testing.assert_allclose(found[0], mixed @ [0.299, 0.587, 0.114], atol=1e-3)
    assert any("colours made grey by their luminance" in one for one in said)


def test_each_frame_has_its_own_rescale(tmp_path):
    data = multi_frame(VOLUME, AFFINE, order=[1, 0, 2, 4, 3])
    for k, item in enumerate(data.PerFrameFunctionalGroupsSequence):
        item.update(functional(PixelValueTransformationSequence={"RescaleSlope": 1 + k, "RescaleIntercept": -10 * k}))
    slope, shift = np.array([2, 1, 3, 5, 4]), np.array([-10, 0, -20, -40, -30])
    assert_same(loaded(write_dicom(tmp_path / "mr.dcm", data))[0], VOLUME * slope + shift)


def test_unused_bits_are_no_grey_levels(tmp_path):
    folder = write_series(tmp_path / "series", VOLUME.clip(0), AFFINE, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        stored = np.frombuffer(header.PixelData, "<u2") | 0x8000  # an overlay of old
        header.PixelData = stored.astype("<u2").tobytes()
        header.save_as(path)
    assert_same(loaded(folder)[0], VOLUME.clip(0))


def test_inverted_display_is_said_and_the_values_are_those_stored(tmp_path):
    found, (said,) = loaded(write_series(tmp_path / "series", VOLUME, AFFINE, PhotometricInterpretation="MONOCHROME1"))
    assert_same(found)
    assert "MONOCHROME1" in said


@pytest.mark.parametrize("kind", ["JPEGLosslessProcess14_1", "JPEG2000Lossless", "JPEGLSLossless", "RLELossless"])
def test_compressed_voxels_are_those_that_were_stored(kind, tmp_path):
    volume = np.random.default_rng(2).integers(0, 999, (32, 33, 3)).astype(np.int16)
    affine = affine_of(OBLIQUE, VOXEL, volume.shape, (10, -20, 30))
    for path in write_series(tmp_path / "series", volume, affine).iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write() and pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    assert_same(loaded(tmp_path / "series")[0], volume, affine)


def test_what_cannot_be_decoded_here_is_named(tmp_path):
    path = next(write_series(tmp_path / "series", VOLUME, AFFINE).iterdir())
    data = pydicom.dcmread(path)
    data.PixelData = pydicom.encaps.encapsulate([b"none"])
    data["PixelData"].is_undefined_length = True
    write_dicom(path, data, pydicom.uid.MPEG4HP41)
    with pytest.raises(InputError, match="its voxels cannot be read: .*MPEG-4"):
        load_volume(str(tmp_path / "series"))


def test_files_of_before_2001_without_a_preamble_are_read(tmp_path):
    folder = write_series(tmp_path / "series", VOLUME, AFFINE)
    for k, path in enumerate(list(folder.iterdir())):
        header = pydicom.dcmread(path)
        path.unlink()
        del header.file_meta
        header.save_as(folder / f"IM{k}", implicit_vr=True, little_endian=True)
    assert_same(loaded(folder)[0])


def test_damaged_files_and_what_is_no_image_are_refused_by_name(tmp_path):
    folder = write_series(tmp_path / "series", VOLUME, AFFINE)
    (folder / "notes.txt").write_text("of no matter")
    (folder / ".hidden").write_bytes(b"\0" * 200)
    path = sorted(folder.glob("*.dcm"))[2]
    assert_same(loaded(folder)[0])
    for content in (b"", path.read_bytes()[:-30], b"\0" * 128 + b"DICM" + b"\7" * 50, b"text"):
        path.write_bytes(content)
        refused_file(folder, path)
    plan = Dataset()
    plan.SOPClassUID, plan.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3"
    refused(write_dicom(tmp_path / "plan.dcm", plan), "holds no image, but RT Structure Set Storage")
    (tmp_path / "deep").mkdir()
    shutil.move(folder, tmp_path / "deep" / "series")
    refused(tmp_path / "deep", "no DICOM image in this folder; it has sub-folders")


def refused_file(folder, path):
    with pytest.raises(InputError) as error:
        load_volume(str(folder))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# --- segmentations ---


def segmentation(masks, affine, numbers=None, kind="BINARY", planes=None, turned=False):
    """A DICOM segmentation of masks (M, X, Y, Z); planes without a labelled voxel are left out."""
    masks = np.asarray(masks)
    numbers = list(range(1, len(masks) + 1)) if numbers is None else numbers
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    if turned:  # rows stored the other way round
        masks = masks[:, :, ::-1]
        lps = lps @ np.array([[1, 0, 0, 0], [0, -1, 0, masks.shape[2] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    data, frames, groups = Dataset(), [], []
    data.SOPClassUID, data.Modality = "1.2.840.10008.5.1.4.1.1.66.4", "SEG"
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(data, name, pydicom.uid.generate_uid())
    data.SegmentSequence = []
    for number, mask in zip(numbers, masks, strict=True):
        item = Dataset()
        item.SegmentNumber, item.SegmentLabel, item.SegmentAlgorithmType = number, f"segment {number}", "MANUAL"
        data.SegmentSequence.append(item)
        for k in range(mask.shape[2])[::-1]:
            if mask[:, :, k].any():
                frames.append(mask[:, :, k].T)
                groups.append(
                    functional(
                        PlanePositionSequence={"ImagePositionPatient": decimals(lps @ [0, 0, k, 1])},
                        SegmentIdentificationSequence={"ReferencedSegmentNumber": number},
                    )
                )
    data.SharedFunctionalGroupsSequence = [
        functional(
            PlaneOrientationSequence={"ImageOrientationPatient": decimals(lps[:, :2] / spacing[:2])},
            PixelMeasuresSequence={"PixelSpacing": decimals(spacing[1::-1]), "SpacingBetweenSlices": spacing[2]},
        )
    ]
    data.PerFrameFunctionalGroupsSequence = groups
    data.NumberOfFrames, data.Columns, data.Rows = len(frames), *masks.shape[1:3]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.SegmentationType, data.PixelRepresentation = kind, 0
    bits = 1 if kind == "BINARY" else 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    if kind == "BINARY":
        data.PixelData = pydicom.pixels.pack_bits(np.stack(frames).astype(np.uint8))
    else:
        data.MaximumFractionalValue = 200
        data.PixelData = (np.stack(frames) * 200).astype(np.uint8).tobytes()
        data["PixelData"].VR = "OB"
    return data


def masks(count=2):
    found = np.zeros((count, *SIZE), bool)
    found[0, 2:5, 1:4, 1:4] = True
    found[-1, 3:, 2:3, 2:4] = True  # overlaps the first
    return found


@pytest.fixture
def pair(tmp_path):
    """Images as DICOM, labels as segmentations of both."""
    paths = {}
    for side, modality in (("moving", "MR"), ("fixed", "US")):
        paths[f"{side}_image"] = str(write_series(tmp_path / side, VOLUME + (side == "fixed"), AFFINE, modality))
        paths[f"{side}_label"] = write_dicom(tmp_path / f"{side}.dcm", segmentation(masks(), AFFINE))
    return paths


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_segmentation_lies_on_its_image_segment_by_segment(kind, turned, pair):
    write_dicom(pair["fixed_label"], segmentation(masks(), AFFINE, kind=kind, turned=turned))
    found = LoadPaird()(pair)["fixed_label"]
    np.testing.assert_array_equal(found, masks())
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)
    alone, _ = loaded(pair["fixed_label"])  # from its first plane to its last
    at = nib.affines.apply_affine(np.linalg.inv(AFFINE) @ alone.affine.numpy(), np.argwhere(alone[0].numpy()))
    assert {*map(tuple, at.round().astype(int))} == {*map(tuple, np.argwhere(masks()[0]))}


def test_segments_are_chosen_by_their_numbers_where_values_are_declared(pair):
    for key in ("moving_label", "fixed_label"):
        write_dicom(pair[key], segmentation(masks(), AFFINE, numbers=[7, 3]))
    found = LoadPaird(label_values=[3, 7])(pair)["fixed_label"]
    np.testing.assert_array_equal(found, masks()[::-1])
    with pytest.raises(InputError, match=r"moving.dcm: segment 7 is none of \[3, 4\]"):
        LoadPaird(label_values=[3, 4])(pair)


def test_a_segmentation_off_its_image_or_of_shares_is_refused(pair):
    beside, tall = AFFINE.copy(), AFFINE.copy()
    beside[:3, 3] += 0.4 * AFFINE[:3, 0]
    tall[:3, 2] *= 1.5
    outside = AFFINE.copy()
    outside[:3, 3] += 5 * AFFINE[:3, 0]
    for affine, message in ((beside, "voxels off its image's"), (tall, "off its image's"), (outside, "lie outside")):
        write_dicom(pair["moving_label"], segmentation(masks(), affine))
        with pytest.raises(InputError, match=f"moving.dcm: .*{message}"):
            LoadPaird()(pair)
    write_dicom(pair["moving_label"], segmentation(masks() * 0.5, AFFINE, kind="FRACTIONAL"))
    with pytest.raises(InputError, match="moving.dcm: shares of a voxel from 0 to 200"):
        LoadPaird()(pair)


# --- settings ---


def test_settings_reach_the_files_of_pairs_batches_and_the_check(tmp_path, capsys):
    for side in ("moving", "fixed"):
        (tmp_path / f"{side}_images").mkdir()
    write_dicom(tmp_path / "moving_images" / "a.dcm", phases(2, True, PHASES["EffectiveEchoTime"]))
    write_dicom(tmp_path / "fixed_images" / "a.dcm", us())
    (pair,) = datalist(str(tmp_path), "test", labels=False)
    told = {"moving_series": "EffectiveEchoTime=100", "fixed_spacing": list(VOXEL)}
    assert check_dataset(str(tmp_path), labels=False, num_workers=0) == 1
    assert "choose one, for example --moving_series EffectiveEchoTime=100" in capsys.readouterr().out
    assert check_dataset(str(tmp_path), labels=False, num_workers=0, **told) == 0
    for found in (LoadPaird(**told)(pair), LoadPaird()(pair | told)):
        assert_same(found["moving_image"], VOLUME + 1000)
        np.testing.assert_allclose(np.linalg.norm(found["fixed_image"].affine[:3, :3], axis=0), VOXEL)
        assert not set(told) & set(found)
    listed = {name: pair[name] for name in ("moving_image", "fixed_image")} | told
    (tmp_path / "list.json").write_text(json.dumps({"test": [listed]}))
    (again,) = datalist(str(tmp_path / "list.json"), "test", labels=False)
    assert {name: again[name] for name in told} == told


@pytest.mark.parametrize("name", ["train", "inference", "evaluate"])
def test_the_settings_are_those_of_every_config(name):
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert all(config[option] is None and config["load"][option] == f"@{option}" for option in OPTIONS)


def test_a_label_takes_the_size_that_its_image_is_given(tmp_path):
    paths = {}
    for side in ("moving", "fixed"):
        for kind, array in (("image", VOLUME + (side == "fixed")), ("label", masks()[0].astype(np.uint8))):
            path = tmp_path / f"{side}_{kind}.mha"
            sitk.WriteImage(to_itk(array, np.eye(4)), str(path))
            path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1\n", b""))
            paths[f"{side}_{kind}"] = str(path)
    found = LoadPaird(moving_spacing=VOXEL, fixed_spacing=2)(paths)
    np.testing.assert_allclose(found["moving_label"].affine, found["moving_image"].affine)
    np.testing.assert_allclose(np.linalg.norm(found["fixed_label"].affine[:3, :3], axis=0), 2)


def test_a_sweeps_pixel_size_may_be_that_of_its_ultrasound_regions(tmp_path):
    path = write_dicom(tmp_path / "sweep.dcm", us(SequenceOfUltrasoundRegions=[regions()]))
    (tmp_path / "angles.csv").write_text("angle_deg\n" + "\n".join(map(str, range(SIZE[2]))))
    sweep = read_frames(Path(path))
    np.testing.assert_array_equal(sweep.frames, VOLUME.transpose(2, 1, 0))
    assert sweep.pixel_spacing == pytest.approx((1.2, 1.5))
