"""Targets through a transform: surfaces, DICOM segmentations, spheres, and what makes their places doubtful."""

import csv
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.sr.codedict import codes
from scipy.spatial.transform import Rotation
from synthetic import GRIDS, SIZE, affine_of, multi_frame, registration, save, write_series
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkIOGeometry import vtkSTLReader

from scripts.data.checks import InputError
from scripts.data.formats import save_displacement
from scripts.data.meshes import SUFFIXES, Surface, read_surface, write_surface
from scripts.registration.apply import apply, apply_to_segmentations

LPS = np.array([-1.0, -1.0, 1.0])
SERIES = affine_of(
    Rotation.from_euler("xyz", (10, -6, 15), degrees=True).as_matrix(), (1.4, 1.2, 3.0), SIZE, (5, -9, 40)
)


def saved(folder, found, name="ddf.nii.gz"):
    save_displacement(folder / name, found.displacement.numpy(), found.affine)
    return str(folder / name)


def by_sitk(path, points):
    """Points (N, 3), RAS mm, through a displacement file by SimpleITK."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS


def surface(vertices, system="LPS"):
    """Triangles of neighbouring vertices, all of them used."""
    first = np.arange(len(vertices))
    return Surface(vertices, np.stack([first, np.roll(first, 1), np.roll(first, 2)], axis=1), system)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_thousand_vertices_are_where_simpleitk_takes_them_and_come_back(suffix, grid, tmp_path, capsys):
    found = registration(grid)
    path, points = saved(tmp_path, found), found.points(1000)
    source, there, back = (tmp_path / f"{name}{suffix}" for name in ("fixed", "moving", "back"))
    write_surface(source, surface(points))
    apply([path], str(there), points=str(source), points_from="fixed")
    told = read_surface(there)
    assert told.system == "LPS" and len(told.vertices) == 1000
    corners = read_surface(source)
    assert np.abs(told.vertices[told.faces] - by_sitk(path, corners.vertices)[corners.faces]).max() < 1e-3

    inner = found.points(1000, seed=1)
    middle = found.affine[:3, :3] @ ((np.array(SIZE) - 1) / 2) + found.affine[:3, 3]
    inner = middle + 0.8 * (inner - middle)  # float32 may put a vertex on the very border outside
    write_surface(there, surface(by_sitk(path, inner)))
    apply([path], str(back), points=str(there), points_from="moving")
    told, corners = read_surface(back), surface(inner)
    assert np.abs(told.vertices[told.faces] - inner[corners.faces]).max() < 1e-3
    assert "1000 of 1000 vertices of the moving image" in capsys.readouterr().out


def test_a_surface_stays_as_it_is_under_no_displacement_and_vtk_reads_it(tmp_path):
    found = registration("permuted")
    save_displacement(tmp_path / "ddf.nii.gz", np.zeros((3, *SIZE)), found.affine)
    source, target = tmp_path / "a.stl", tmp_path / "b.stl"
    write_surface(source, surface(found.points(200)))
    for way in ("fixed", "moving"):
        apply([str(tmp_path / "ddf.nii.gz")], str(target), points=str(source), points_from=way)
        one, other = read_surface(source), read_surface(target)
        assert np.array_equal(one.vertices, other.vertices) and np.array_equal(one.faces, other.faces)
    reader = vtkSTLReader()
    reader.SetFileName(str(target))
    reader.Update()
    assert reader.GetOutput().GetNumberOfPolys() == 200 and "SPACE=LPS" in reader.GetHeader()
    assert np.isfinite(vtk_to_numpy(reader.GetOutput().GetPoints().GetData())).all()


def test_a_surface_with_vertices_outside_or_in_a_fold_is_not_written_in_part(tmp_path):
    found = registration("permuted")
    path, points = saved(tmp_path, found), found.points(50)
    points[7] += 900
    write_surface(tmp_path / "a.ply", surface(points))
    with pytest.raises(InputError, match=r"1 of 50 vertices have no place in the other image \(1 outside the field\)"):
        apply([path], str(tmp_path / "b.ply"), points=str(tmp_path / "a.ply"), points_from="fixed")
    folded = registration("oblique, anisotropic", amplitude=14.0)
    write_surface(tmp_path / "a.ply", surface(folded.points(500)))
    with pytest.raises(InputError, match="the field folds here") as error:
        apply([saved(tmp_path, folded)], str(tmp_path / "b.ply"), points=str(tmp_path / "a.ply"), points_from="fixed")
    assert "\n" not in str(error.value) and not (tmp_path / "b.ply").exists()
    with pytest.raises(InputError, match="written as .ply"):
        apply([path], str(tmp_path / "b.stl"), points=str(tmp_path / "a.ply"), points_from="fixed")


# --- spheres ---


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def linear(folder, matrix):
    """A field that is a matrix, on a grid of ±60 mm, and the targets of a table in its middle, at its rim, beyond."""
    affine = affine_of(np.eye(3), (4, 4, 4), (31, 31, 31), (0, 0, 0))
    x = affine[:3, :3] @ np.stack(np.meshgrid(*[np.arange(31)] * 3, indexing="ij")).reshape(3, -1) + affine[:3, 3:]
    save_displacement(folder / "ddf.nii.gz", (matrix @ x - x).reshape(3, 31, 31, 31), affine)
    table = "name,x,y,z,radius (mm)\nmiddle,1,2,3,5\nrim,58,0,0,6\nbeyond,400,0,0,4\nplain,1,2,3,\n"
    (folder / "targets.csv").write_text(table)
    return str(folder / "ddf.nii.gz"), affine


def test_a_sphere_becomes_the_ellipsoid_of_the_field(tmp_path, capsys):
    matrix = Rotation.from_euler("xyz", (20, 30, 40), degrees=True).as_matrix() @ np.diag([1.2, 0.9, 1.1])
    path, _ = linear(tmp_path, matrix)
    for way, axes in (("fixed", (1.2, 0.9)), ("moving", (1 / 0.9, 1 / 1.2))):
        out = tmp_path / f"{way}.csv"
        apply([path], str(out), points=str(tmp_path / "targets.csv"), points_from=way, coordinates="RAS")
        middle, rim, beyond, plain = rows_of(out)
        sizes = [float(middle[name]) for name in ("radius_max_mm", "radius_min_mm", "volume_ratio")]
        ratio = np.prod([1.2, 0.9, 1.1]) ** (1 if way == "fixed" else -1)
        np.testing.assert_allclose(sizes, (5 * axes[0], 5 * axes[1], ratio), rtol=1e-4)
        assert middle["radius (mm)"] == "5" and middle["status"] == "ok"
        assert middle["doubt"].startswith("not asked, because there is no moving_gland.nii.gz")
        assert beyond["status"] == "outside the field" and beyond["volume_ratio"] == beyond["doubt"] == ""
        assert plain["volume_ratio"] == plain["doubt"] == "" and plain["x"] == middle["x"]
    assert "part of its sphere: outside the field" in rows_of(tmp_path / "fixed.csv")[1]["doubt"]
    assert "these figures are no error bars" in capsys.readouterr().out


def test_a_place_is_doubted_by_the_glands_found_and_by_the_spread(tmp_path, capsys):
    path, affine = linear(tmp_path, np.eye(3))
    grid = np.stack(np.meshgrid(*[np.arange(31)] * 3, indexing="ij"), -1) @ affine[:3, :3] + affine[:3, 3]
    ball = (np.linalg.norm(grid, axis=-1) < 22).astype(np.uint8)
    for name in ("moving", "fixed"):
        save(tmp_path / f"{name}_gland.nii.gz", ball, affine)
    save(tmp_path / "spread.nii.gz", np.where(grid[..., 2] > 0, 0.4, 2.0).astype(np.float32), affine)
    places = {"deep": (0, 0, 10), "apart": (0, 0, -10), "outside": (0, 40, 10)}
    lines = [f"{name},{x},{y},{z},4\n" for name, (x, y, z) in places.items()]
    (tmp_path / "targets.csv").write_text("name,r,a,s,radius\n" + "".join(lines))
    apply([path], str(tmp_path / "out.csv"), points=str(tmp_path / "targets.csv"), points_from="moving")
    deep, apart, outside = rows_of(tmp_path / "out.csv")
    for row, (name, place) in zip((deep, apart, outside), places.items(), strict=True):
        for side in ("moving", "fixed"):
            true = np.linalg.norm(place) - 22
            assert abs(float(row[f"outside_{side}_gland_mm"]) - true) < 2, name  # half a voxel
    assert deep["doubt"] == "" and float(deep["spread_mm"]) == pytest.approx(0.4, abs=1e-5)
    assert apart["doubt"] == "the networks are 2.0 mm apart"
    assert "outside the gland found in the moving image" in outside["doubt"] and "fixed image" in outside["doubt"]
    said = capsys.readouterr().out
    assert said.count("CHECK") == 2 and "deep: sphere of 4 mm becomes 4.0 to 4.0 mm" in said


@pytest.mark.parametrize("radius", ["-1", "0", "big", "inf", "nan"])
def test_a_radius_that_is_none_is_refused(radius, tmp_path):
    path, _ = linear(tmp_path, np.eye(3))
    (tmp_path / "targets.csv").write_text(f"x,y,z,radius\n1,2,3,{radius}\n")
    with pytest.raises(InputError, match="a radius is no number above 0") as error:
        apply(
            [path],
            str(tmp_path / "o.csv"),
            points=str(tmp_path / "targets.csv"),
            points_from="fixed",
            coordinates="RAS",
        )
    assert "\n" not in str(error.value)


# --- DICOM segmentations ---


def segmentation(path, series, masks, patient="P7"):
    """A segmentation of masks (M, X, Y, Z) of a series by highdicom; the first segment with an algorithm."""
    files = sorted(series.iterdir(), key=lambda file: int(pydicom.dcmread(file).InstanceNumber))
    images = [pydicom.dcmread(file) for file in files]
    for image in images:
        image.PatientID = patient
        for name in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
            setattr(image, name, "")
        image.ReferringPhysicianName = ""
    by = hd.AlgorithmIdentificationSequence("drawer", codes.DCM.ArtificialIntelligence, "1.0")
    told = [
        hd.seg.SegmentDescription(
            number,
            f"Lesion {number}",
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Lesion,
            "SEMIAUTOMATIC" if number == 1 else "MANUAL",
            by if number == 1 else None,
            tracking_uid=hd.UID(),
            tracking_id=f"T{number}",
        )
        for number in range(1, len(masks) + 1)
    ]
    pixels = np.ascontiguousarray(np.asarray(masks).transpose(3, 2, 1, 0).astype(np.uint8))
    made = hd.seg.Segmentation(images, pixels, "BINARY", told, hd.UID(), 1, hd.UID(), 1, "M", "m", "1", "0")
    made.save_as(path)
    return str(path)


@pytest.fixture
def dicom(tmp_path):
    """A moving series and a fixed one on another grid, and a segmentation of the moving one, whose segments overlap."""
    rng = np.random.default_rng(0)
    moving = write_series(tmp_path / "mr", rng.uniform(0, 500, SIZE), SERIES, "MR")
    wide = affine_of(np.eye(3), (1.1, 1.3, 1.7), (34, 26, 30), (5, -9, 40))
    fixed = write_series(tmp_path / "trus", rng.uniform(0, 500, (34, 26, 30)), wide, "US")
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 9:19, 8:15, 7:12] = True
    masks[1, 13:22, 6:12, 9:14] = True
    return moving, fixed, segmentation(tmp_path / "seg.dcm", moving, masks), masks


def zero(folder):
    affine = affine_of(np.eye(3), (5, 5, 5), (31, 31, 31), (5, -9, 40))
    save_displacement(folder / "zero.nii.gz", np.zeros((3, 31, 31, 31)), affine)
    return str(folder / "zero.nii.gz")


def test_a_segmentation_on_its_own_series_under_no_displacement_stays_as_it_is(dicom, tmp_path):
    moving, _, path, masks = dicom
    out = tmp_path / "out.dcm"
    apply([zero(tmp_path)], str(out), moving=path, reference=str(moving), label=True)
    before, after = hd.seg.segread(path), hd.seg.segread(out)
    for name in ("SegmentLabel", "SegmentAlgorithmType", "TrackingUID", "TrackingID"):
        assert [s.get(name) for s in after.SegmentSequence] == [s.get(name) for s in before.SegmentSequence]
    for number in (1, 2):
        one, other = before.get_segment_description(number), after.get_segment_description(number)
        assert one.segmented_property_type == other.segmented_property_type == codes.SCT.Lesion
        ours, theirs = (s.get_volume(segment_numbers=[number], combine_segments=True) for s in (after, before))
        np.testing.assert_array_equal(ours.array, theirs.array)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    assert after.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "drawer"


def test_a_segmentation_on_another_series_is_where_simpleitk_has_it_and_refers_to_that_series(dicom, tmp_path, capsys):
    moving, fixed, path, masks = dicom
    affine = affine_of(np.eye(3), (5, 5, 5), (31, 31, 31), (5, -9, 40))
    bumps = np.zeros((3, 31, 31, 31))
    bumps[:] = 2.5 * np.sin(np.arange(31) / 3)
    save_displacement(tmp_path / "ddf.nii.gz", bumps, affine)
    out = tmp_path / "out.dcm"
    apply([str(tmp_path / "ddf.nii.gz")], str(out), moving=path, reference=str(fixed), label=True)
    written = pydicom.dcmread(out)
    image = pydicom.dcmread(next(fixed.iterdir()))
    assert written.FrameOfReferenceUID == image.FrameOfReferenceUID and written.PatientID == "P7"
    assert written.StudyInstanceUID == image.StudyInstanceUID and written.Modality == "SEG"
    assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    assert "research use only" in written.SeriesDescription and "Research use only" in written.ContentDescription
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(fixed))
    theirs = sitk.ReadImage(files)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "ddf.nii.gz"), sitk.sitkVectorFloat64))
    for number, mask in enumerate(masks):
        source = sitk.GetImageFromArray(mask.transpose(2, 1, 0).astype(np.float64))
        source.CopyInformation(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(moving))))
        share = sitk.GetArrayFromImage(sitk.Resample(source, theirs, field, sitk.sitkLinear, 0.0))
        clear = np.abs(share - 0.5) > 1e-3
        ours = np.zeros(share.shape, bool)
        for frame, content in zip(written.PerFrameFunctionalGroupsSequence, written.pixel_array, strict=True):
            if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number + 1:
                place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float).tolist()
                index = theirs.TransformPhysicalPointToIndex(place)
                assert index[:2] == (0, 0)
                ours[index[2]] = content
        assert ours.any() and (ours == (share >= 0.5))[clear].all()
    said = capsys.readouterr().out
    assert "Lesion 1: " in said and "ml, on the fixed grid" in said and "CHECK" not in said


def test_the_series_may_be_one_enhanced_file(dicom, tmp_path):
    moving, _, path, masks = dicom
    enhanced = multi_frame(np.ones(SIZE), SERIES, "MR")
    enhanced.file_meta = pydicom.dataset.FileMetaDataset()
    enhanced.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    out, reference = tmp_path / "out.dcm", str(tmp_path / "enhanced.dcm")
    apply([zero(tmp_path)], str(out), moving=path, reference=reference, label=True)
    written = hd.seg.segread(out)
    assert written.pixel_array.sum() == masks.sum()
    assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == enhanced.SeriesInstanceUID


def test_a_segment_that_is_cut_off_or_gone_is_named_and_one_of_a_single_slice_is_read(dicom, tmp_path, capsys):
    moving, fixed, _, masks = dicom
    masks[:] = False
    masks[0, 9:19, 8:15, 9] = True
    single = segmentation(tmp_path / "single.dcm", moving, masks[:1])
    apply([zero(tmp_path)], str(tmp_path / "one.dcm"), moving=single, reference=str(moving), label=True)
    assert hd.seg.segread(tmp_path / "one.dcm").pixel_array.sum() == masks.sum()
    masks[1, 0:2, 0:2, 0:2] = True
    two = segmentation(tmp_path / "two.dcm", moving, masks)
    small = affine_of(np.eye(3), (2, 2, 2), (9, 11, 31), (1, -9, 40))
    save_displacement(tmp_path / "small.nii.gz", np.zeros((3, 9, 11, 31)), small)
    capsys.readouterr()
    apply([str(tmp_path / "small.nii.gz")], str(tmp_path / "cut.dcm"), moving=two, reference=str(fixed), label=True)
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Lesion")]
    assert "% of it lies outside the field" in first and "nothing of it is left" in second


def test_segmentations_of_a_series_are_taken_along_and_those_of_another_are_named(dicom, tmp_path, capsys):
    moving, fixed, path, masks = dicom
    other = segmentation(tmp_path / "other.dcm", fixed, np.ones((1, 34, 26, 30), bool))
    files = [Path(other), Path(path)]
    written = apply_to_segmentations(Path(zero(tmp_path)), files, moving, fixed, tmp_path / "out")
    assert [file.name for file in written] == ["targets_2.dcm"] == [file.name for file in (tmp_path / "out").iterdir()]
    assert len(hd.seg.segread(written[0]).SegmentSequence) == len(masks)
    assert "not in the moving image's frame, left out" in capsys.readouterr().out


def test_segmentations_that_cannot_be_written_are_refused_in_one_line(dicom, tmp_path):
    moving, fixed, path, masks = dicom
    field, out = zero(tmp_path), str(tmp_path / "out.dcm")
    nifti = str(save(tmp_path / "label.nii.gz", masks[0].astype(np.uint8), SERIES))
    image = str(save(tmp_path / "fixed.nii.gz", np.zeros(SIZE, np.float32), SERIES))
    other = segmentation(tmp_path / "other.dcm", moving, masks, patient="P8")
    far = affine_of(np.eye(3), (5, 5, 5), (31, 31, 31), (900, 0, 0))
    save_displacement(tmp_path / "far.nii.gz", np.zeros((3, 31, 31, 31)), far)
    for told, message in (
        ({"moving": nifti, "reference": str(fixed), "label": True}, ".dcm is for a DICOM segmentation"),
        ({"moving": path, "reference": str(fixed)}, "with --label True"),
        ({"moving": path, "label": True}, "name the fixed one by --reference"),
        ({"moving": path, "reference": image, "label": True}, "fixed.nii.gz: a DICOM segmentation refers to a DICOM"),
        ({"moving": other, "reference": str(fixed), "label": True}, "PatientID 'P8'"),
        ({"moving": path, "reference": path, "label": True}, "a segmentation is no image"),
    ):
        with pytest.raises(InputError, match=message) as error:
            apply([field], out, **told)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no segment reaches the fixed grid"):
        apply([str(tmp_path / "far.nii.gz")], out, moving=path, reference=str(fixed), label=True)
    assert not (tmp_path / "out.dcm").exists()


def test_labels_of_any_file_are_said_one_by_one(dicom, tmp_path, capsys):
    _, _, _, masks = dicom
    labels = np.where(masks[0], 7, 0)
    labels[:2, :2, :2] = 9
    path = str(save(tmp_path / "labels.nii.gz", labels.astype(np.uint8), SERIES))
    small = affine_of(np.eye(3), (2, 2, 2), (25, 25, 31), (5, -9, 40))
    save_displacement(tmp_path / "small.nii.gz", np.zeros((3, 25, 25, 31)), small)
    grid = affine_of(np.eye(3), (2, 2, 2), (9, 9, 9), (5, -9, 40))
    reference = str(save(tmp_path / "fixed.nii.gz", np.zeros((9, 9, 9), np.float32), grid))
    apply([str(tmp_path / "small.nii.gz")], str(tmp_path / "o.nii.gz"), moving=path, reference=reference, label=True)
    seven, nine = [line for line in capsys.readouterr().out.splitlines() if line.startswith("label ")]
    assert seven.startswith("label 7: 1.76 ml") and "CHECK" not in seven
    assert nine.startswith("label 9: ") and "CHECK: nothing of it is left" in nine


def test_a_segmentation_goes_to_nifti_where_the_fixed_image_is_none_of_dicom(dicom, tmp_path):
    _, _, path, masks = dicom
    reference = str(save(tmp_path / "fixed.nii.gz", np.zeros(SIZE, np.float32), SERIES))
    apply([zero(tmp_path)], str(tmp_path / "out.nii.gz"), moving=path, reference=reference, label=True)
    ours = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj)
    np.testing.assert_array_equal(ours, torch.from_numpy(masks).movedim(0, -1).numpy())
