"""A replica of TCIA's Prostate-MRI-US-Biopsy comes back as it was made; what does not fit is left out, and said."""

import csv
import os
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import warm
from conftest import ROOT
from replica import LPS, SPACING, Replica, phantom, surface_of

from scripts.cohorts.prepare import prepare
from scripts.data.checks import InputError
from scripts.data.datalist import FOLDERS, datalist
from scripts.data.volumes import load_volume

GONE = "the DICOM files of its series are not there"


@pytest.fixture(scope="module")
def sides():
    return phantom()


@pytest.fixture
def replica(tmp_path, sides):
    return Replica(tmp_path / "downloaded", sides)


def made(replica, **options) -> Path:
    out = replica.root.parent / "out"
    assert prepare("tcia", str(replica.root), str(out), num_workers=0, **options) == 0
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def left_out(out: Path) -> dict[str, str]:
    return {row["case"]: row["reason"] for row in table(out / "left_out.csv")}


def assert_same(path: str, truth, structure=None):
    """The file shows the values of `truth` at their places of the world, whichever way its axes run."""
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    voxels = np.stack(np.meshgrid(*map(np.arange, truth.image.shape), indexing="ij"), -1).reshape(-1, 3)
    at = nib.affines.apply_affine(np.linalg.inv(image.affine) @ truth.affine, voxels)
    np.testing.assert_allclose(at, at.round(), atol=1e-4)
    at = at.round().astype(int)
    expected = truth.image if structure is None else truth.label[..., structure]
    found = values if structure is None else values[..., structure]
    assert found.size == expected.size
    np.testing.assert_array_equal(found[tuple(at.T)], expected.ravel())
    itk = sitk.ReadImage(path)  # a second reader, of the same place
    corner = itk.TransformIndexToPhysicalPoint([0] * itk.GetDimension())[:3]
    np.testing.assert_allclose(corner, (LPS @ image.affine)[:3, 3], atol=1e-3)


def test_images_affines_and_labels_come_back_exactly(replica):
    """Binary and text surfaces, a size by the private element and by PixelSpacing; two TRUS of a patient."""
    mr = replica.add_mr(1)
    us = replica.add_trus(1, text=True)
    replica.add_mr(2, text=True)
    replica.add_trus(2, sized="spacing")
    replica.add_trus(2, date="20110101")
    out = made(replica)
    pairs = datalist(str(out), "train", patient_pattern="([^_]+)_")
    assert [pair["patient"] for pair in pairs] == [replica.patient(1), replica.patient(2), replica.patient(2)]
    for pair in pairs:
        for side, truth in (("moving", replica.mr), ("fixed", replica.trus)):
            assert_same(pair[f"{side}_image"], truth)
            assert_same(pair[f"{side}_label"], truth, structure=0)
            assert nib.load(pair[f"{side}_label"]).shape[3:] == (1,)
    row = table(out / "cases.csv")[0]
    assert (row["moving_series"], row["fixed_series"], row["structures"]) == (mr, us, "prostatesurface")
    assert row["case"] == f"{replica.patient(1)}_{us[-6:]}" and left_out(out) == {}
    truth = replica.mr.label[..., 0].sum() * abs(np.linalg.det(replica.mr.affine[:3, :3])) / 1000
    assert float(row["moving_gland_ml"]) == pytest.approx(truth, abs=0.05)
    said = (out / "SOURCE.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in said and "10.7937/TCIA.2020.A61IOC1A" in said


def test_the_trus_lies_as_the_general_reader_lays_it(replica):
    """register --fixed FILE.dcm and the prepared volume are the same place of the world."""
    replica.add_mr(1)
    replica.add_trus(1)
    pair = datalist(str(made(replica)), "train")[0]
    (file,) = (path for path in replica.root.rglob("*.dcm") if "-US " in str(path))
    read = load_volume(str(file))
    np.testing.assert_allclose(read.affine, nib.load(pair["fixed_image"]).affine, atol=1e-5)
    np.testing.assert_array_equal(read[0], np.asarray(nib.load(pair["fixed_image"]).dataobj))
    middle = nib.affines.apply_affine(read.affine.numpy(), (np.array(read.shape[1:]) - 1) / 2)
    np.testing.assert_allclose(middle, [SPACING / 2, SPACING / 2, -SPACING / 2], atol=1e-6)  # RAS


def test_targets_of_both_sides_follow_the_gland_when_asked_for(replica):
    mr, us = replica.add_mr(1), replica.add_trus(1)
    for name, structure in (("Target2", 1), ("Target10", 2)):
        replica.surface(1, mr, name, surface_of(replica.mr, structure))
        replica.surface(1, us, name, surface_of(replica.trus, structure))
    replica.surface(1, mr, "Target1", surface_of(replica.mr, 2))  # only there
    replica.surface(1, mr, "Target3", surface_of(replica.mr, 2))
    replica.surface(1, us, "Target3", surface_of(replica.trus, 2, opened=True))
    out = made(replica, targets=True)
    pair, row = datalist(str(out), "train")[0], table(out / "cases.csv")[0]
    assert row["structures"] == "prostatesurface target2 target10" and row["labels"] == "3"
    assert "target left out" in row["notes"] and "not closed" in row["notes"]
    for side, truth in (("moving", replica.mr), ("fixed", replica.trus)):
        for structure in range(3):
            assert_same(pair[f"{side}_label"], truth, structure)
    assert "fusion device" in (out / "SOURCE.txt").read_text(encoding="utf-8")


def test_what_cannot_be_used_is_left_out_with_its_reason(replica):
    replica.add_mr(1)
    replica.add_trus(1)
    replica.add_mr(2)
    replica.add_trus(2, surface=False)
    replica.add_mr(3, surface=False)
    replica.add_trus(3)
    first, second = replica.add_mr(4, date="20090101"), replica.add_mr(4, date="20100301")
    replica.add_trus(4)
    replica.add_mr(5, surface=surface_of(replica.mr, opened=True))
    replica.add_trus(5)
    replica.add_mr(6)
    replica.add_trus(6, surface=surface_of(replica.trus, moved=(200, 0, 0)))
    replica.add_mr(7)
    replica.add_trus(7, sized=None)
    replica.add_mr(8)
    replica.add_trus(8, ImagePositionPatient=["0", "0", "0"], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])
    replica.add_mr(9)
    replica.add_trus(9, files=2)
    replica.add_mr(10, surface=surface_of(replica.mr, 2))  # a landmark is no gland
    replica.add_trus(10)
    replica.add_mr(11)
    replica.add_trus(11, Modality="OT")
    lost = replica.add_mr(12)
    replica.add_trus(12)
    slices = [path for path in replica.root.rglob("*.dcm") if f"MRI {lost[-5:]}" in str(path)]
    slices.sort(key=lambda path: pydicom.dcmread(path).InstanceNumber)  # their names are in no order
    slices[len(slices) // 2].unlink()
    gone = replica.add_mr(13)
    replica.add_trus(13)
    for path in [path for path in replica.root.rglob("*.dcm") if f"MRI {gone[-5:]}" in str(path)]:
        path.unlink()
    out = made(replica)
    assert [row["patient"] for row in table(out / "cases.csv")] == [replica.patient(1)]
    found = [(row["case"], row["reason"]) for row in table(out / "left_out.csv")]
    for number, text in {
        2: "no prostate surface of TRUS; 1 MR and 1 US series",
        3: "no prostate surface of MR; 1 MR and 1 US series",
        4: f"2 MR series with a prostate surface, {first} (t2 spc, 20090101), {second} (t2 spc, 20100301), for",
        5: "the surface is not closed",
        6: "0% of it lies in its image",
        7: "nothing says how large a pixel is: no PixelSpacing with SliceThickness, no (1129,1016)",
        8: "states where it lies",
        9: "2 files; one file of many frames is a volume of this cohort",
        10: "a prostate 5 to 500",
        11: "no prostate surface of TRUS; 1 MR and 0 US series",
        12: "slices are unevenly spaced",
        13: "no prostate surface of MR; 0 MR and 1 US series",
    }.items():
        reasons = [reason for case, reason in found if case.startswith(replica.patient(number))]
        assert any(text in reason for reason in reasons), (number, reasons)
    assert (f"STLs/{replica.patient(13)}-ProstateSurface-seriesUID-{gone}.STL", GONE) in found


def test_of_several_mr_the_last_before_the_trus_is_taken_when_asked_for(replica):
    early, late = replica.add_mr(1, date="20090101"), replica.add_mr(1, date="20100301")
    replica.add_mr(1, date="20120101")
    replica.add_trus(1, date="20090601")
    replica.add_trus(1, date="20100301")
    replica.add_trus(1, date="20080101")
    out = made(replica, last_mr=True)
    assert sorted(row["moving_series"] for row in table(out / "cases.csv")) == sorted([early, late])
    assert "none or several are the last before it" in left_out(out)[replica.patient(1)]


def test_trees_of_hostile_names_are_read_and_what_is_no_part_of_them_is_named(replica):
    uid = replica.add_mr(1)
    replica.add_trus(1)
    root = replica.root
    odd = root / "manifest" / "a\nb, 'c' $x;é"
    odd.mkdir()
    for path in list(root.rglob("*.dcm")):  # all in one folder, of one name but for a number
        path.rename(odd / f"1-{len(list(odd.iterdir())):03d}")
    (odd / "empty.dcm").write_bytes(b"")
    (odd / "DICOMDIR.txt").write_text("no image")
    (odd / ".hidden.dcm").write_bytes(b"damaged")
    (odd / "folder.dcm").mkdir()
    (root / "UCLA.xlsx").write_bytes(b"PK")
    os.symlink("nowhere", odd / "dangling.dcm")
    stl = next((root / "STLs").iterdir())
    shutil.copy(stl, root / "STLs" / "prostate, final (2).stl")
    shutil.copy(stl, root / "STLs" / f"Prostate-MRI-US-Biopsy-0009-Target1-seriesUID-{uid}.STL")
    again = root / "again"
    again.mkdir()
    shutil.copy(stl, again / stl.name)  # the same file once more is no news
    out = made(replica)
    (pair,) = datalist(str(out), "train")
    assert_same(pair["moving_image"], replica.mr)
    found = left_out(out)
    assert "no series, is empty or damaged" in found["manifest/a\nb, 'c' $x;é/empty.dcm"]
    assert "cannot be read as DICOM" in found["manifest/a\nb, 'c' $x;é/dangling.dcm"]
    assert "does not say of which patient" in found["STLs/prostate, final (2).stl"]
    other = found[f"STLs/Prostate-MRI-US-Biopsy-0009-Target1-seriesUID-{uid}.STL"]
    assert f"patient Prostate-MRI-US-Biopsy-0009, its series {uid} Prostate-MRI-US-Biopsy-0001" in other
    assert len(found) == 4


def test_a_part_of_a_gland_outside_its_image_is_noted(replica):
    replica.add_mr(1)
    replica.add_trus(1, surface=surface_of(replica.trus, moved=(0, 0, 20)))
    row = table(made(replica) / "cases.csv")[0]
    assert "% of it lies outside its image" in row["notes"]


def files_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for name in FOLDERS[0] for path in (out / name).glob("*.nii.gz")}


def test_a_case_that_is_there_whole_is_not_done_again(replica):
    for number in (1, 2, 3):
        replica.add_mr(number)
        replica.add_trus(number)
    out = made(replica, limit=2)
    before = files_of(out)
    assert len(before) == 8 and len(table(out / "cases.csv")) == 2
    torn = sorted(path for path in before if "0001" in path.name and "fixed_labels" in str(path))[0]
    torn.unlink()
    made(replica)
    after = files_of(out)
    assert len(after) == 12 and len(table(out / "cases.csv")) == 3
    assert all((after[path] == before[path]) == ("0002" in path.name) for path in before)
    made(replica, limit=1)
    assert files_of(out) == after and len(table(out / "cases.csv")) == 3


def test_a_run_that_is_killed_goes_on(replica):
    for number in range(1, 9):
        replica.add_mr(number)
        replica.add_trus(number)
    out = replica.root.parent / "out"
    words = ["scripts", "prepare", "tcia", str(replica.root), "--output_dir", str(out), "--num_workers", "0"]
    process = warm.start(*words, cwd=ROOT, folder=replica.root.parent)
    while process.is_alive() and not (out / "moving_labels").is_dir():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert len(files_of(out)) < 32
    made(replica)
    pairs = datalist(str(out), "train")
    assert len(pairs) == len(table(out / "cases.csv")) == 8
    for pair in pairs:
        assert_same(pair["fixed_label"], replica.trus, structure=0)


def test_a_folder_that_another_command_made_is_refused_and_left_as_it_is(replica, tmp_path):
    replica.add_mr(1)
    replica.add_trus(1)
    out = made(replica)
    before = files_of(out)
    with pytest.raises(InputError, match="was made otherwise, see its SOURCE.txt"):
        made(replica, targets=True)
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    for folder, message in ((tmp_path / "mine", "not empty"), (replica.root / "out", "lies in the input")):
        with pytest.raises(InputError, match=message):
            prepare("tcia", str(replica.root), str(folder), num_workers=0)


def test_a_source_without_surfaces_or_images_is_refused(replica, tmp_path):
    replica.root.mkdir()
    with pytest.raises(InputError, match="no STL surface in it"):
        made(replica)
    replica.surface(1, "1.2", "ProstateSurface", surface_of(replica.mr))
    with pytest.raises(InputError, match="no DICOM image in it"):
        made(replica)
    replica.add_mr(1)
    with pytest.raises(InputError, match="no pair could be written; left_out.csv in it says why"):
        made(replica)
    with pytest.raises(InputError, match="no such folder; unpack an archive first"):
        prepare("tcia", str(tmp_path / "gone"), str(tmp_path / "out2"))
    with pytest.raises(InputError, match="--mapping has no meaning for tcia"):
        made(replica, mapping="x.csv")
