"""Cohorts that are image files already: true axes and sizes, patients by their MR, and one's own folder by a table."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from synthetic import affine_of, save

from scripts.cohorts.pairs import patients_by_image
from scripts.cohorts.prepare import prepare
from scripts.data.checks import InputError
from scripts.data.datalist import FOLDERS, datalist
from scripts.data.pairs import LoadPaird
from scripts.phantoms.phantom import simulate_pair

SAMPLE = ROOT.parent / "shared" / "data" / "mrus"


def sources() -> list:
    """Two phantoms; voxels of 1.5 mm."""
    return [simulate_pair(np.random.default_rng(seed), (40, 48, 40), 1.5, (44, 46, 40), 1.5) for seed in (4, 5)]


@pytest.fixture(scope="module")
def phantoms():
    return sources()


def stored(volume, axes="PRS"):
    """A RAS array as a file that is stored posterior, right, superior first."""
    assert axes == "PRS"
    return np.flip(np.asarray(volume), 1).swapaxes(0, 1)


def write_mrus(root: Path, phantoms, names, size=1.5, naming=FOLDERS[0]):
    """Pairs as the authors give them: false headers, white noise on every image; case k is of patient k // 2."""
    rng = np.random.default_rng(0)
    header = np.diag([size, size, size, 1.0])
    header[:3, 3] = size
    for k, name in enumerate(names):
        pair = phantoms[k // 2 % len(phantoms)]
        for folder, image in zip(naming[:2], (pair.moving_image, pair.fixed_image), strict=True):
            noisy = np.clip(image.numpy() + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
            (root / folder).mkdir(parents=True, exist_ok=True)
            save(root / folder / f"{name}.nii.gz", stored(noisy), header)
        for folder, label in zip(naming[2:], (pair.moving_label, pair.fixed_label), strict=True):
            (root / folder).mkdir(parents=True, exist_ok=True)
            save(root / folder / f"{name}.nii.gz", stored(label.numpy()), header)


def rows(path: Path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(name, root, out, **options):
    assert prepare(name, str(root), str(out), num_workers=0, **options) == 0
    return datalist(str(out), "train", patient_pattern="([^_]+)_")


def test_mrus_gets_true_axes_and_sizes_and_patients_by_their_mr(phantoms, tmp_path):
    write_mrus(tmp_path / "raw", phantoms, [f"case{k:06d}" for k in range(4)], naming=FOLDERS[1])
    pairs = made("mrus", tmp_path / "raw", tmp_path / "out")
    assert [pair["case"] for pair in pairs] == [
        *("patient000_case000000", "patient000_case000001", "patient001_case000002", "patient001_case000003")
    ]
    assert [pair["patient"] for pair in pairs] == ["patient000"] * 2 + ["patient001"] * 2
    for pair, phantom in zip(pairs, (phantoms[0], phantoms[0], phantoms[1], phantoms[1]), strict=True):
        for side in ("moving", "fixed"):
            image, label = (nib.load(pair[f"{side}_{what}"]) for what in ("image", "label"))
            assert nib.aff2axcodes(image.affine) == ("P", "R", "S")
            np.testing.assert_allclose(image.header.get_zooms(), 1.5)
            np.testing.assert_array_equal(np.asarray(label.dataobj), stored(getattr(phantom, f"{side}_label").numpy()))
    assert "none is stated" in (tmp_path / "out" / "SOURCE.txt").read_text(encoding="utf-8")


def test_names_that_carry_the_patient_are_kept_and_agree_with_the_mr(phantoms, tmp_path):
    names = [f"patient{k // 2:03d}_obs{k:03d}" for k in range(4)]
    write_mrus(tmp_path / "raw", phantoms, names, size=0.4)
    pairs = made("mrus", tmp_path / "raw", tmp_path / "out")
    assert [pair["case"] for pair in pairs] == names
    np.testing.assert_allclose(nib.load(pairs[0]["fixed_image"]).header.get_zooms(), 1.56, rtol=1e-6)
    assert "0.4 × 0.4 × 0.4 mm replaced by the 1.56" in rows(tmp_path / "out" / "cases.csv")[0]["mended"]
    for folder in FOLDERS[0]:
        (tmp_path / "raw" / folder / f"{names[3]}.nii.gz").rename(
            tmp_path / "raw" / folder / "patient007_obs003.nii.gz"
        )
    assert len(made("mrus", tmp_path / "raw", tmp_path / "again")) == 2
    left = {row["case"]: row["reason"] for row in rows(tmp_path / "again" / "left_out.csv")}
    assert left["patient007_obs003"] == f"has the MR of {names[2]}, whose name says another patient"


def test_another_data_set_is_not_taken_for_mrus(phantoms, tmp_path):
    write_mrus(tmp_path / "raw", phantoms, ["case000000"], size=0.8)
    with pytest.raises(InputError, match=r"headers say voxels of \[0.8\] mm; those of this cohort all say 1.5, or 0.4"):
        prepare("mrus", str(tmp_path / "raw"), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected one folder, unpacked, with the sub-folders"):
        prepare("mrus", str(tmp_path / "empty"), str(tmp_path / "out"))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the authors' example data is not at hand")
def test_patients_of_the_authors_data_by_their_mr_are_those_of_the_names(tmp_path):
    images, names = {}, {}
    for path in sorted((SAMPLE / "moving_images").glob("*.nii.gz")):
        image = np.asarray(nib.load(path).dataobj, np.float32).ravel()
        images[path.name] = (image - image.mean()) / (image.std() * np.sqrt(image.size))
        names[path.name] = path.name.partition("_")[0]
    found, doubts = patients_by_image(images)
    assert not doubts and len(found) == 78 and len(set(found.values())) == len(set(names.values())) == 54
    assert len({(found[case], names[case]) for case in found}) == 54


def test_images_too_alike_for_two_patients_and_not_enough_for_one_are_named():
    rng = np.random.default_rng(0)
    one = rng.normal(size=20000)
    images = {"a": one, "b": one + 0.01 * rng.normal(size=one.size), "c": one + 0.25 * rng.normal(size=one.size)}
    images |= {"d": rng.normal(size=one.size), "e": one[:1000]}
    unit = {case: (x - x.mean()) / np.linalg.norm(x - x.mean()) for case, x in images.items()}
    found, doubts = patients_by_image(unit)
    assert found["a"] == found["b"] and len(set(found.values())) == 3
    assert list(doubts) == ["c"] and "correlation of 0.9" in doubts["c"]


def test_regpro_is_read_split_as_it_comes_and_keeps_its_headers(phantoms, tmp_path):
    root = tmp_path / "raw" / "nifti_data"
    write_mrus(root / "train", phantoms, ["case000000", "case000001"], size=0.8, naming=FOLDERS[1])
    write_mrus(root / "val", phantoms[1:], ["case000065"], size=0.8, naming=FOLDERS[1])
    for path in root.rglob("*.nii.gz"):  # larger voxels keep the glands' size
        image = nib.load(path)
        save(path, np.asarray(image.dataobj), np.diag([1.5, 1.5, 1.5, 1.0]))
    pairs = made("regpro", tmp_path / "raw", tmp_path / "out")
    assert [pair["case"] for pair in pairs] == [
        *("patient000_case000000", "patient000_case000001", "patient001_case000065")
    ]
    for pair in pairs:
        source = next(root.rglob(f"us_images/{pair['case'].partition('_')[2]}.nii.gz"))
        np.testing.assert_allclose(nib.load(pair["fixed_image"]).affine, nib.load(source).affine)
        np.testing.assert_array_equal(nib.load(pair["fixed_image"]).get_fdata(), nib.load(source).get_fdata())
    assert "CC BY-NC-SA 4.0" in (tmp_path / "out" / "SOURCE.txt").read_text(encoding="utf-8")
    pairs = made("regpro", tmp_path / "raw", tmp_path / "turned", moving_axes="PRS", fixed_axes="prs")
    assert nib.aff2axcodes(nib.load(pairs[0]["moving_image"]).affine) == ("P", "R", "S")
    for folder in ("mr_images", "us_images", "mr_labels", "us_labels"):
        shutil.copy(root / "train" / folder / "case000000.nii.gz", root / "val" / folder / "case000000.nii.gz")
    with pytest.raises(InputError, match="patient case000000 is in train and in val"):
        made("regpro", tmp_path / "raw", tmp_path / "third")


COLUMNS = ("case", "patient", "moving_image", "fixed_image", "moving_label", "fixed_label")


@pytest.fixture
def messy(phantoms, tmp_path):
    """A folder of one's own: odd names, an index map on one side, a file a structure on the other, false axes."""
    root = tmp_path / "my data, 2024"
    (root / "MR #1").mkdir(parents=True)
    pair = phantoms[0]
    save(root / "MR #1" / "t2 é.nii.gz", pair.moving_image.numpy(), pair.moving_affine)
    header = affine_of(np.eye(3), (1.5, 1.5, 1.5), (48, 40, 40), (0, 0, 0))
    save(root / "US.nii.gz", stored(pair.fixed_image.numpy()), header)
    index = (pair.moving_label.numpy()[..., :2] * [4, 9]).max(-1).astype(np.uint8)
    save(root / "MR #1" / "index.nii.gz", index, pair.moving_affine)
    for k in range(2):
        save(root / f"us_{k}.nii.gz", stored(pair.fixed_label.numpy()[..., k]), header)
    return root


ROW = {
    "case": "2024_01",
    "patient": "p_1",
    "moving_image": "MR #1/t2 é.nii.gz",
    "fixed_image": "US.nii.gz",
    "moving_label": "MR #1/index.nii.gz",
    "fixed_label": "us_0.nii.gz",
}
TOLD = {"moving_label_values": "4 9", "fixed_axes": "PRS"}


def write_table(path: Path, *lines: dict) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def test_a_folder_of_ones_own_becomes_a_clean_data_set(messy, phantoms, tmp_path):
    """The index map has two structures, and the files of the other side one each, put together by their columns."""
    save(
        messy / "both.nii.gz",
        np.stack([nib.load(messy / f"us_{k}.nii.gz").get_fdata() for k in (0, 1)], -1).astype("u1"),
        nib.load(messy / "US.nii.gz").affine,
    )
    write_table(messy / "mapping.csv", ROW | TOLD | {"fixed_label": "both.nii.gz"})
    (pair,) = made("folder", messy, tmp_path / "out")
    assert pair["case"] == "p-1_2024_01" and pair["patient"] == "p-1"
    item = LoadPaird()(pair)
    phantom = phantoms[0]
    np.testing.assert_array_equal(item["moving_image"][0], phantom.moving_image.numpy())
    np.testing.assert_allclose(item["moving_image"].affine, phantom.moving_affine, atol=1e-5)
    assert nib.aff2axcodes(item["fixed_image"].affine.numpy()) == ("P", "R", "S")
    for k in range(2):
        np.testing.assert_array_equal(item["fixed_label"][k], stored(phantom.fixed_label.numpy()[..., k]))
    inner = phantom.moving_label.numpy()[..., 1] > 0
    np.testing.assert_array_equal(item["moving_label"][1] > 0, inner)


def test_a_structure_a_file_and_one_that_a_side_lacks(messy, phantoms, tmp_path):
    for k in range(2):
        save(messy / f"mr_{k}.nii.gz", phantoms[0].moving_label.numpy()[..., k], phantoms[0].moving_affine)
    line = ROW | {"moving_label": "mr_0.nii.gz", "moving_label_2": "mr_1.nii.gz", "moving_label_3": "mr_1.nii.gz"}
    line |= {"fixed_label_2": "us_1.nii.gz", "fixed_label_3": "", "fixed_axes": "PRS"}
    write_table(messy / "my.csv", line)
    (pair,) = made("folder", messy, tmp_path / "out", mapping=str(messy / "my.csv"))
    item = LoadPaird()(pair)
    assert item["moving_label"].any((1, 2, 3)).tolist() == [True, True, True]
    assert item["fixed_label"].any((1, 2, 3)).tolist() == [True, True, False]
    np.testing.assert_array_equal(item["moving_label"][1], phantoms[0].moving_label.numpy()[..., 1])


def test_lines_that_cannot_be_used_are_left_out_with_their_reason(messy, tmp_path):
    good = ROW | {"moving_label_values": "9 4", "label": ""} | TOLD
    del good["label"]
    lines = {
        "gone": {"fixed_image": "gone.nii.gz"},
        "counts": {},
        "values": {"moving_label_values": "4"},
        "axes": {"fixed_axes": "XYZ"},
        "size": {"fixed_spacing": "1 2"},
        "a/b": {},
        "swapped": {"moving_label": "us_0.nii.gz"},
        "nobody": {"patient": ""},
    }
    index_of_one = {"moving_label": "gland.nii.gz", "moving_label_values": ""}
    index = nib.load(messy / "MR #1" / "index.nii.gz")
    save(messy / "gland.nii.gz", (np.asarray(index.dataobj) > 0).astype("u1"), index.affine)
    write_table(
        messy / "mapping.csv",
        good | index_of_one,
        *({"case": case} | {k: v for k, v in (good | more).items() if k != "case"} for case, more in lines.items()),
    )
    pairs = made("folder", messy, tmp_path / "out")
    assert [pair["case"] for pair in pairs] == ["p-1_2024_01"]
    left = {row["case"].removeprefix("p-1_"): row["reason"] for row in rows(tmp_path / "out" / "left_out.csv")}
    for case, text in {
        "gone": "gone.nii.gz: named in",
        "counts": "2 structures in label 1 of the moving image, 1 of the fixed one",
        "values": "value 9 in an index map of values [4]",
        "axes": "fixed_axes XYZ: expected where the three voxel axes run to",
        "size": "fixed_spacing ['1', '2']: expected three positive numbers",
        "a/b": "it must be a name, not a path",
        "swapped": "differs from its image",
        "nobody": "line 10: no patient, while others have one",
    }.items():
        assert text in left[case], (case, left[case])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no such table; it needs the columns case, moving_image, fixed_image, moving_label, fixed_label"),
        ([{"case": "a", "moving_image": "m.nii.gz"}], "no column fixed_image"),
        ([ROW | {"moving_lable_2": "x"}], "unknown column 'moving_lable_2'"),
        ([ROW | {"patient": "p_1"}, ROW | {"patient": "p-1", "case": "b"}], "patients p_1 and p-1 differ in - and _"),
    ],
)
def test_a_table_that_is_none_is_refused(lines, message, messy, tmp_path):
    if lines:
        write_table(messy / "mapping.csv", *lines)
    with pytest.raises(InputError) as refused:
        prepare("folder", str(messy), str(tmp_path / "out"), num_workers=0)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
