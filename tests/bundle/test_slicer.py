"""The 3D Slicer module outside Slicer: what it runs, and what it then loads, as ITK reads it. Not its panel."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT
from synthetic import write_dicom_pair

from scripts import __main__ as cli

specification = importlib.util.spec_from_file_location("module", ROOT / "integrations" / "slicer" / "ProstateMRTRUS.py")
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
logic = module.ProstateMRTRUSLogic()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A phantom's MR and TRUS as NRRD files, which is how the module gets volumes out of the scene."""
    folder = write_dicom_pair(tmp_path_factory.mktemp("slicer"))
    for series, name in (("mr", "moving"), ("trus", "fixed")):
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / series))
        sitk.WriteImage(sitk.ReadImage(files), str(folder / f"{name}.nrrd"))
    return folder


def here(command, cwd, **_):
    """The command in this process, which has ITK loaded; a new one takes half a minute for that alone."""
    assert command[:3] == [sys.executable, "-m", "scripts"] and cwd == str(ROOT)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["scripts", *command[3:]])
        patch.setattr(cli.gc, "freeze", lambda: None)
        cli.main()
    return subprocess.CompletedProcess(command, 0, said.getvalue())


@pytest.mark.parametrize("how", [here, pytest.param(subprocess.run, marks=pytest.mark.slow)])
def test_what_slicer_loads_takes_the_moving_volume_to_the_warped_one(how, pair, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", how)
    moving, fixed, out = pair / "moving.nrrd", pair / "fixed.nrrd", pair / f"out put {how.__name__}"
    record = logic.run(sys.executable, str(ROOT), str(moving), str(fixed), str(out))
    transform = sitk.ReadTransform(str(out / module.TRANSFORM))
    warped = sitk.ReadImage(str(out / module.WARPED))
    moving = sitk.Cast(sitk.ReadImage(str(moving)), sitk.sitkFloat32)
    by_itk = sitk.GetArrayFromImage(sitk.Resample(moving, warped, transform, sitk.sitkLinear, 0.0))
    ours = sitk.GetArrayFromImage(warped)
    both = (ours != 0) & (by_itk != 0)  # a voxel on the very face of the moving volume may fall on either side of it
    assert both.mean() > 0.5 and ((ours != 0) != (by_itk != 0)).mean() < 1e-3
    assert np.abs(ours - by_itk)[both].max() < 1e-3 * np.ptp(ours)
    assert record == json.loads((out / module.RECORD).read_text())
    takes_targets_to_the_trus(out, transform, moving, warped)
    lines = logic.summary(record | {"flags": ["the field folds"]}).splitlines()
    assert lines[:2] == [module.NOTICE, "CHECK: the field folds"]


def takes_targets_to_the_trus(out, transform, moving, fixed):
    """Markups and a segmentation of the MR go where ITK has them, and what has no place is named."""
    middle = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    marked = [transform.TransformPoint(middle), (900.0, 0.0, 0.0)]
    controls = [{"id": str(i), "label": f"T-{i}", "position": list(p)} for i, p in enumerate(marked)]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": controls}
    (out / "t.mrk.json").write_text(json.dumps({"markups": [markup]}))
    told = [sys.executable, str(ROOT)]
    checks = logic.carry(*told, str(out / "t.mrk.json"), str(out / "on_trus.mrk.json"), str(out))
    found = json.loads((out / "on_trus.mrk.json").read_text())["markups"][0]["controlPoints"]
    np.testing.assert_allclose(found[0]["position"], middle, atol=0.01)
    assert found[1]["positionStatus"] == "undefined" and len(checks) == 1 and "outside the field" in checks[0]
    index = np.indices(moving.GetSize()[::-1])[::-1]
    at = moving.TransformPhysicalPointToContinuousIndex(marked[0])
    apart = np.sqrt(sum(((index[i] - at[i]) * moving.GetSpacing()[i]) ** 2 for i in range(3)))
    ball = sitk.GetImageFromArray((apart < 8).astype(np.uint8))
    ball.CopyInformation(moving)
    for name, value in (("ID", "s1"), ("Name", "Lesion"), ("LabelValue", "1"), ("Layer", "0")):
        ball.SetMetaData(f"Segment0_{name}", value)
    sitk.WriteImage(ball, str(out / "t.seg.nrrd"))
    logic.carry(*told, str(out / "t.seg.nrrd"), str(out / "on_trus.nii.gz"), str(out))
    ours = sitk.ReadImage(str(out / "on_trus.nii.gz"))
    share = sitk.Resample(sitk.Cast(ball, sitk.sitkFloat64), fixed, transform, sitk.sitkLinear, 0.0)
    share = sitk.GetArrayFromImage(share)
    clear = np.abs(share - 0.5) > 1e-3
    assert share.max() > 0.9 and (sitk.GetArrayFromImage(ours) == (share >= 0.5))[clear].all()


def test_a_refusal_is_one_line_that_says_why(pair, tmp_path):
    good = [str(pair / "fixed.nrrd"), str(tmp_path / "out")]
    for python, bundle, message in (
        (sys.executable, str(ROOT), "error: .*missing.nrrd: file not found"),
        (sys.executable, str(tmp_path), "No module named scripts"),
        (str(tmp_path / "python"), str(ROOT), "set Python and the bundle's folder"),
    ):
        with pytest.raises(RuntimeError, match=message) as refusal:
            logic.run(python, bundle, str(tmp_path / "missing.nrrd"), *good)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
