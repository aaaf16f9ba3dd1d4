"""The 3D Slicer module outside Slicer: what it runs, and what it then loads, as ITK reads it. Not its panel."""

import importlib.util
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scripts", *command[3:]])
        patch.setattr(cli.gc, "freeze", lambda: None)
        cli.main()
    return subprocess.CompletedProcess(command, 0)


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
    lines = logic.summary(record | {"flags": ["the field folds"]}).splitlines()
    assert lines[:2] == [module.NOTICE, "CHECK: the field folds"]


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
