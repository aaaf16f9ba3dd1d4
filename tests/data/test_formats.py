"""Transform files as the tools they are for read them: each takes points where our own warp takes them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT
from monai.data import MetaTensor
from synthetic import (
    GRIDS,
    SIZE,
    affine_of,
    edit_header,
    moving_affine,
    moving_image,
    registration,
    save,
    to_itk,
    write_series,
)

from scripts.data.checks import InputError
from scripts.data.formats import (
    FILES,
    Displacement,
    Grid,
    checked_formats,
    forward,
    read_transform,
    save_displacement,
    save_formats,
)
from scripts.registration import apply, outputs
from scripts.registration.outputs import SaveRegistrations

LPS = np.array([-1.0, -1.0, 1.0])
POINTS = 1000


@pytest.fixture(scope="module", params=GRIDS)
def written(request, tmp_path_factory):
    """The files of a registration for every tool without DICOM, on each grid, and the registration."""
    folder = tmp_path_factory.mktemp("formats")
    found = registration(request.param)
    save_displacement(folder / "ddf.nii.gz", found.displacement.numpy(), found.affine)
    tools = [tool for tool in FILES if tool != "dicom"]
    fixed = Grid(found.affine, tuple(found.displacement.shape[1:]))
    save_formats(folder, tools, {"displacement": found.displacement}, found.affine, fixed, final=folder)
    return folder, found


def ours(found, points):
    """Where a registration takes points (N, 3) of the fixed world, both RAS mm."""
    step = Displacement(found.displacement, torch.from_numpy(found.affine))
    moved, known = forward([step], torch.from_numpy(points).T[None, :, :, None, None])
    assert known.all()
    return moved[0, :, :, 0, 0].T.numpy()


def assert_agrees(found, points, by_tool):
    """Within a hundredth of a voxel of where ours takes the points; all (N, 3), RAS mm."""
    apart = np.linalg.norm(by_tool - ours(found, points), axis=1).max() / found.voxel
    assert apart < 0.01, f"{apart:.4f} voxels apart"


def test_our_own_points_are_those_of_the_start_and_the_bumps_themselves():
    found = registration("oblique, anisotropic")
    moved = ours(found, found.points(POINTS))
    assert np.linalg.norm(moved - found.points(POINTS), axis=1).min() > 20, "the worlds are too close to tell apart"


@pytest.mark.parametrize("name", ["ddf.h5", "ddf.nii.gz"])
def test_simpleitk(written, name):
    folder, found = written
    if name.endswith(".h5"):
        transform = sitk.ReadTransform(str(folder / name))
    else:
        transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / name), sitk.sitkVectorFloat64))
    points = found.points(POINTS)
    by_tool = np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    assert_agrees(found, points, by_tool)
    assert np.abs(by_tool - ours(found, points)).max() < 1e-4  # NIfTI has the affine in float32


def test_transformix(written, tmp_path):
    folder, found = written
    itk = pytest.importorskip("itk")
    if not hasattr(itk, "TransformixFilter"):
        pytest.skip("itk-elastix is not installed")
    points = found.points(POINTS)
    lines = [" ".join(f"{v:.9f}" for v in point) for point in points * LPS]
    (tmp_path / "points.txt").write_text("\n".join(["point", str(POINTS), *lines, ""]))
    parameters = itk.ParameterObject.New()
    parameters.ReadParameterFile(str(folder / "transformix.txt"))
    moving = itk.imread(str(moving_image(tmp_path / "moving.nii.gz")), itk.F)
    itk.transformix_filter(
        moving,
        parameters,
        fixed_point_set_file_name=str(tmp_path / "points.txt"),
        output_directory=str(tmp_path),
        log_to_console=False,
    )
    rows = (tmp_path / "outputpoints.txt").read_text().splitlines()
    outputs = [row.split("OutputPoint = [")[1].split("]")[0].split() for row in rows]
    assert_agrees(found, points, np.array(outputs, dtype=float) * LPS)

    warped = itk.transformix_filter(moving, parameters, log_to_console=False)
    step = Displacement(found.displacement, torch.from_numpy(found.affine))
    volume = MetaTensor(
        torch.from_numpy(nib.load(tmp_path / "moving.nii.gz").get_fdata())[None],
        affine=torch.from_numpy(moving_affine()),
    )
    mine = apply.warp([step], volume, torch.from_numpy(found.affine), SIZE)[0].numpy()
    theirs = itk.array_from_image(warped).transpose(2, 1, 0)
    inside = (mine != 0) & (theirs != 0)
    assert inside.mean() > 0.9 and np.abs(mine - theirs)[inside].max() < 0.01 * np.ptp(mine)


def test_ants(written):
    folder, found = written
    ants = pytest.importorskip("ants", reason="antspyx is not installed; it wants an older numpy than is pinned")
    pandas = pytest.importorskip("pandas")
    points = found.points(POINTS)
    table = pandas.DataFrame(points * LPS, columns=["x", "y", "z"])
    moved = ants.apply_transforms_to_points(3, table, [str(folder / "ddf.nii.gz")])
    assert_agrees(found, points, moved[["x", "y", "z"]].to_numpy() * LPS)


NIFTYREG_HEADER = {  # all that reg_transform -disp of NiftyReg 1.5.70 sets itself; the rest is its reference's
    "dim": [5, *SIZE, 1, 3, 1, 1],
    "datatype": 16,
    "bitpix": 32,
    "intent_code": 1007,
    "intent_p1": 1,
    "intent_p2": 0,
    "intent_p3": 0,
    "intent_name": b"NREG_TRANS",
    "scl_slope": 1,
    "scl_inter": 0,
    "sform_code": 1,
    "qform_code": 1,
    "xyzt_units": 2,
    "vox_offset": 352,
}


def test_the_niftyreg_header_is_that_of_reg_transform(written):
    folder, found = written
    image = nib.load(folder / "niftyreg.nii.gz")
    raw = nib.Nifti1Header.from_fileobj(nib.openers.ImageOpener(folder / "niftyreg.nii.gz"), check=False)
    for name, value in NIFTYREG_HEADER.items():
        assert np.array_equal(raw[name], value), f"{name}: {raw[name]}"
    np.testing.assert_allclose(image.affine, found.affine, atol=1e-5)
    vectors = np.asarray(image.dataobj)[:, :, :, 0]  # RAS, as NiftyReg's world is
    np.testing.assert_allclose(np.moveaxis(vectors, -1, 0), found.displacement.numpy(), atol=1e-4)


def test_niftyreg(written, tmp_path):
    folder, found = written
    if shutil.which("reg_transform") is None:
        pytest.skip("NiftyReg is not installed")
    points = found.points(POINTS)
    np.savetxt(tmp_path / "points.txt", points, fmt="%.6f")
    moved = tmp_path / "moved.txt"
    command = ["reg_transform", "-land", str(folder / "niftyreg.nii.gz"), str(tmp_path / "points.txt"), str(moved)]
    subprocess.run(command, check=True, capture_output=True)
    assert_agrees(found, points, np.loadtxt(moved))


@pytest.mark.parametrize("name", ["ddf.h5", "ddf.nii.gz", "niftyreg.nii.gz"])
def test_what_is_written_is_read_back(written, name):
    folder, found = written
    (step,) = read_transform(folder / name)
    torch.testing.assert_close(step.field, found.displacement, atol=1e-5, rtol=0)
    np.testing.assert_allclose(step.affine.numpy(), found.affine, atol=1e-5)


def linear():
    """An affine transform of ITK about a centre."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((1.1, 0.1, 0, -0.2, 0.9, 0.05, 0, 0.1, 1.2))
    transform.SetTranslation((5, -7, 11))
    transform.SetCenter((30, 20, 10))
    return transform


@pytest.mark.parametrize("suffix", ["tfm", "txt", "h5", "mat"])
def test_linear_files_of_itk_and_ants_are_starts(suffix, tmp_path):
    sitk.WriteTransform(linear(), str(tmp_path / f"start.{suffix}"))
    (matrix,) = (step.numpy() for step in read_transform(tmp_path / f"start.{suffix}"))
    points = np.random.default_rng(0).uniform(-80, 80, (20, 3))
    by_itk = np.array([linear().TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    np.testing.assert_allclose(points @ matrix[:3, :3].T + matrix[:3, 3], by_itk, atol=1e-5)


def test_a_composite_is_applied_as_itk_applies_it(tmp_path):
    found = registration("oblique, anisotropic")
    save_displacement(tmp_path / "ddf.nii.gz", found.displacement.numpy(), found.affine)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "ddf.nii.gz"), sitk.sitkVectorFloat64))
    composite = sitk.CompositeTransform([linear(), field])
    sitk.WriteTransform(composite, str(tmp_path / "composite.h5"))
    steps = read_transform(tmp_path / "composite.h5")
    points = found.points(POINTS)
    moved, known = forward(steps, torch.from_numpy(points).T[None, :, :, None, None])
    by_itk = np.array([composite.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    np.testing.assert_allclose(moved[0, :, :, 0, 0].T.numpy(), by_itk, atol=1e-6)
    assert known.all()


def test_what_is_no_such_transform_is_refused_in_one_line(tmp_path):
    sitk.WriteTransform(sitk.BSplineTransform(3, 3), str(tmp_path / "spline.tfm"))
    (tmp_path / "text.tfm").write_text("no transform")
    (tmp_path / "text.nii.gz").write_text("no image")
    save(tmp_path / "image.nii.gz", np.zeros((4, 5, 6), np.float32), np.eye(4))
    image = nib.Nifti1Image(np.zeros((4, 5, 6, 1, 3), np.float32), np.eye(4))
    image.header.set_intent("vector", name="NREG_TRANS")
    nib.save(image, tmp_path / "positions.nii.gz")
    image = nib.Nifti1Image(np.full((4, 5, 6, 1, 3), np.nan, np.float32), np.eye(4))
    image.header.set_intent("vector")
    nib.save(image, tmp_path / "nan.nii.gz")
    for name, message in {
        "none.h5": "not found",
        "spline.tfm": "a BSplineTransform; expected",
        "text.tfm": "ITK cannot read this transform",
        "text.nii.gz": "cannot be read as an image",
        "image.nii.gz": "no displacement",
        "positions.nii.gz": "not a displacement to NiftyReg",
        "nan.nii.gz": "NaN",
    }.items():
        with pytest.raises(InputError, match=message) as refusal:
            read_transform(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value) and "\n" not in str(refusal.value)


def test_unknown_formats_are_refused_before_anything_is_registered():
    assert checked_formats("itk, slicer,itk") == ["itk", "slicer"] == checked_formats(("itk", "slicer"))
    assert checked_formats(None) == [] == checked_formats([])
    with pytest.raises(InputError, match="formats: fsl is none of itk, slicer, ants"):
        SaveRegistrations("out", None, "centre", tools="itk,fsl")
    with pytest.raises(InputError, match="a.nii.gz: .*DICOM series|pydicom is not installed"):
        pair = {"moving_image": "a.nii.gz", "fixed_image": "b.nii.gz"}
        SaveRegistrations("out", None, "centre", tools="dicom", pairs=[pair])
    config = json.loads((ROOT / "configs" / "inference.json").read_text())
    saver = next(h for h in config["handlers"] if isinstance(h, dict) and h["_target_"].endswith("SaveRegistrations"))
    assert config["formats"] is None and saver["tools"] == "@formats"


def case(found, folder, **files):
    """What a registration leaves, as far as its files need it."""
    fixed = MetaTensor(torch.rand(1, *SIZE), affine=torch.from_numpy(found.affine))
    moving = MetaTensor(torch.rand(1, 34, 36, 30), affine=torch.from_numpy(moving_affine()))
    zero = {
        "pred": torch.zeros(3, 4, 4, 4),
        "grid_affine": torch.eye(4),
        "initial_transform": torch.eye(4, dtype=torch.float64),
    }
    zero["image"] = torch.zeros(2, 4, 4, 4)
    zero["initial_stretch"] = torch.ones(3)
    images = {"original_fixed_image": fixed, "original_moving_image": moving, "warped_moving_image": fixed}
    names = {"case": "a", "moving_file": "moving.nii.gz", "fixed_file": "fixed.nii.gz"} | files
    return zero | images | names | {"displacement": found.displacement, "field_affine": fixed.affine.double()}


def test_the_files_of_all_tools_appear_with_the_others_or_not_at_all(tmp_path, monkeypatch):
    item = case(registration("permuted"), tmp_path)
    tools = ["itk", "slicer", "ants", "niftyreg", "elastix"]
    outputs.save_registration(tmp_path / "out", item, {}, tools)
    names = {"warped_moving_image.nii.gz", "ddf.nii.gz", "overview.png", "qc.json", "qa.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {FILES[tool] for tool in tools}
    assert str(tmp_path / "out" / "ddf.nii.gz") in (tmp_path / "out" / "transformix.txt").read_text()

    def broken(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(outputs, "save_overview", broken)
    with pytest.raises(RuntimeError):
        outputs.save_registration(tmp_path / "half", item, {}, tools)
    assert not list((tmp_path / "half").iterdir())


@pytest.fixture
def pair(tmp_path):
    """Two small DICOM series of one patient, as a datalist has them."""
    volume, affine = np.zeros((5, 6, 7)), affine_of(np.eye(3), (2, 2, 3), (5, 6, 7), (0, 0, 0))
    return {f"{kind}_image": str(write_series(tmp_path / kind, volume, affine)) for kind in ("moving", "fixed")}


@pytest.mark.parametrize("grid", GRIDS)
def test_dicom(grid, pair, tmp_path):
    registered = pytest.importorskip("pydicomrt.reg", reason="pydicomrt is not installed")
    found = registration(grid)
    files = {"moving_file": pair["moving_image"], "fixed_file": pair["fixed_image"]}
    assert checked_formats("dicom", [pair]) == ["dicom"]
    outputs.save_registration(tmp_path / "out", case(found, tmp_path, **files), {}, ["dicom"])
    stored = pydicom.dcmread(tmp_path / "out" / "registration.dcm")
    checked = registered.check_deformable_reg_iod(stored)
    assert checked["result"], checked["content"]

    (item,) = registered.get_deformable_registrations(stored)
    field = item["DeformableRegistrationGrid"]
    image = sitk.GetImageFromArray(field["VectorGridData"].astype(float), isVector=True)
    image.SetOrigin([float(v) for v in field["ImagePositionPatient"]])
    image.SetSpacing([float(v) for v in field["GridResolution"]])
    row, column = np.array(field["ImageOrientationPatient"], dtype=float).reshape(2, 3)
    image.SetDirection(np.column_stack([row, column, np.cross(row, column)]).ravel().tolist())
    transform = sitk.DisplacementFieldTransform(image)
    points = found.points(POINTS)
    assert_agrees(found, points, np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS)


def test_dicom_of_two_patients_or_without_a_frame_of_reference_is_refused(pair):
    def change(element, value):
        for path in Path(pair["fixed_image"]).iterdir():
            header = pydicom.dcmread(path)
            setattr(header, element, value)
            header.save_as(path)

    change("PatientID", "P8")
    with pytest.raises(InputError, match="PatientID 'P7', but .* has 'P8'"):
        checked_formats("dicom", [pair])
    change("FrameOfReferenceUID", "")
    with pytest.raises(InputError, match="no FrameOfReferenceUID"):
        checked_formats("dicom", [pair])


def as_vectors(found):
    """The displacement of a registration as SimpleITK's image, LPS mm."""
    lps = found.displacement.numpy() * np.array([-1, -1, 1]).reshape(3, 1, 1, 1)
    return sitk.Compose([to_itk(component, found.affine) for component in lps])


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii", ".nii.gz"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_displacement_image_of_any_format_is_the_same_field(suffix, compressed, tmp_path):
    found = registration("oblique, anisotropic")
    path = str(tmp_path / f"1Warp{suffix}")
    sitk.WriteImage(as_vectors(found), path, compressed)
    (step,) = read_transform(path)
    np.testing.assert_array_equal(step.field.numpy(), found.displacement.numpy())
    np.testing.assert_allclose(step.affine, found.affine, atol=1e-5)
    theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))
    points = found.points(50)
    ours, known = forward([step], torch.from_numpy(points).T[None, :, :, None, None])
    assert known.all()
    expected = np.array([theirs.TransformPoint(point) for point in (points * LPS).tolist()]) * LPS
    np.testing.assert_allclose(ours[0, :, :, 0, 0].T, expected, atol=1e-4)


def test_a_displacement_image_passes_the_gate_of_images(tmp_path):
    found = registration("permuted")
    vectors = as_vectors(found)
    for name in ("a.nrrd", "a.mha", "a.nii"):
        sitk.WriteImage(vectors, str(tmp_path / name))
    nrrd, mha = ((tmp_path / name).read_bytes() for name in ("a.nrrd", "a.mha"))
    (tmp_path / "ras.nrrd").write_bytes(nrrd.replace(b"left-posterior-superior", b"right-anterior-superior", 1))
    frame = b"measurement frame: (0,1,0) (1,0,0) (0,0,1)\nencoding: "
    (tmp_path / "frame.nrrd").write_bytes(nrrd.replace(b"encoding: ", frame, 1))
    (tmp_path / "bare.mha").write_bytes(re.sub(rb"ElementSpacing = .*\n", b"", mha, count=1))
    (tmp_path / "cut.mha").write_bytes(mha[:-9])
    edit_header(tmp_path / "a.nii", qoffset_z=999)
    sitk.WriteImage(sitk.VectorIndexSelectionCast(vectors, 0), str(tmp_path / "one.nrrd"))
    volumes = [sitk.VectorIndexSelectionCast(vectors, k) for k in range(3)]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(tmp_path / "4.mha"))
    for name, message in {
        "ras.nrrd": "a displacement in right-anterior-superior; ITK's are in left-posterior-superior",
        "frame.nrrd": "measurement frame of its own",
        "bare.mha": "nothing says how large a voxel is",
        "cut.mha": "cannot be read as an image",
        "a.nii": "sform and qform disagree",
        "one.nrrd": "no displacement: expected three components a voxel; found 1 volumes",
        "4.mha": "no displacement: expected three components a voxel; found 3 volumes",
    }.items():
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: ")) as refusal:
            read_transform(tmp_path / name)
        assert message in str(refusal.value) and "\n" not in str(refusal.value)
