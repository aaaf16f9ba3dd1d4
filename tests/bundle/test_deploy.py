"""The MONAI Deploy application, run by its SDK, without a GPU: it leaves what `register` leaves."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ROOT, flags, run
from synthetic import write_dicom_pair

pytest.importorskip("monai.deploy.core", reason="MONAI Deploy is not installed, see requirements-deploy.txt")


def deploy(folder, output):
    command = [sys.executable, str(ROOT / "integrations" / "deploy" / "app.py"), "--input", folder, "--output", output]
    return subprocess.run(map(str, command), cwd=output.parent, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with the MR and the TRUS series of a phantom, each in a study of its own."""
    return write_dicom_pair(tmp_path_factory.mktemp("studies"))


def test_the_application_leaves_what_register_leaves(pair, tmp_path):
    result = deploy(pair, tmp_path / "deployed")
    assert result.returncode == 0, result.stderr[-3000:]
    settings = {"moving": pair / "mr", "fixed": pair / "trus", "output_dir": tmp_path / "registered"}
    assert run("scripts", "register", *flags(settings), "--formats", "dicom").returncode == 0
    names = [
        {path.relative_to(out) for path in out.rglob("*")} for out in (tmp_path / "deployed", tmp_path / "registered")
    ]
    assert names[0] == names[1]
    fields = [np.asarray(nib.load(tmp_path / of / "ddf.nii.gz").dataobj) for of in ("deployed", "registered")]
    np.testing.assert_array_equal(*fields)
    fixed = pydicom.dcmread(next((pair / "trus").iterdir()))
    for path in ("registration.dcm", "warped_moving_image/0001.dcm"):
        written = pydicom.dcmread(tmp_path / "deployed" / path)
        assert written.FrameOfReferenceUID == fixed.FrameOfReferenceUID
        assert "research use only" in written.SeriesDescription


def test_an_input_without_an_mr_is_refused(pair, tmp_path):
    result = deploy(pair / "trus", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: 0 series in the input match {'Modality': 'MR'}")
    assert not list((tmp_path / "out").glob("*"))
