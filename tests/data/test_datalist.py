"""Pairs on disk become a datalist, patients stay together, and what cannot be used is refused by name."""

import json

import pytest

from scripts.data.checks import InputError
from scripts.data.datalist import FOLDERS, KEYS, SINGLE_FOLDERS, SINGLES, case_name, datalist, folds, single_images
from scripts.phantoms.phantom import write_cohort


def layout(root, cases=("a.nii.gz", "b.nii.gz"), names=FOLDERS[0]):
    """Empty files in the four folders of one layout."""
    for name in names:
        (root / name).mkdir(parents=True)
        for case in cases:
            (root / name / case).touch()
    return root


def cases(pairs):
    return [pair["case"] for pair in pairs]


@pytest.fixture
def patients(tmp_path):
    """Nine cases of four patients, not split."""
    return layout(tmp_path, [f"p{p}_{k}.mha" for p in range(4) for k in range(p % 3 + 1)])


@pytest.mark.parametrize("names", FOLDERS)
def test_four_folders_of_equal_names_are_pairs_in_either_naming(tmp_path, names):
    pairs = datalist(layout(tmp_path, names=names), "train")
    expected = dict(zip(KEYS, (str(tmp_path / name / "a.nii.gz") for name in names), strict=True))
    assert pairs[0] == {"case": "a", "patient": "a"} | expected
    assert cases(pairs) == ["a", "b"]


@pytest.mark.parametrize("names", FOLDERS)
def test_train_val_and_test_folders_are_the_splits(tmp_path, names):
    for split, case in (("train", "a.nii"), ("val", "b.mha"), ("test", "c.nrrd")):
        layout(tmp_path / split, [case], names)
    for split, case in (("train", "a"), ("val", "b"), ("test", "c")):
        assert cases(datalist(tmp_path, split)) == [case]
        assert f"/{split}/" in datalist(tmp_path, split)[0]["moving_image"]


def test_a_missing_split_is_empty(tmp_path):
    layout(tmp_path / "train", ["a.nii"])
    layout(tmp_path / "test", ["b.nii"])
    assert datalist(tmp_path, "val") == []


def test_without_splits_every_pair_is_in_train_and_in_test(tmp_path):
    layout(tmp_path)
    assert datalist(tmp_path, "train") == datalist(tmp_path, "test")
    assert datalist(tmp_path, "val") == []


def test_a_simulated_cohort_is_read_as_it_was_written(tmp_path):
    root = write_cohort(tmp_path / "cohort", 3, seed=0, split=(0.34, 0.33, 0.33))
    found = [datalist(root, split) for split in ("train", "val", "test")]
    assert sorted(sum(map(cases, found), [])) == ["case000000", "case000001", "case000002"]
    assert all(len(pairs) == 1 for pairs in found)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".NII.GZ", ""])
def test_every_image_suffix_and_a_dicom_folder_name_a_case(tmp_path, suffix):
    layout(tmp_path, ["patient1.scan2" + suffix] if suffix else [])
    if not suffix:
        for name in FOLDERS[0]:
            (tmp_path / name / "patient1.scan2").mkdir()
    assert cases(datalist(tmp_path, "train")) == ["patient1.scan2"]
    assert case_name(f"/data/patient1.scan2{suffix}") == "patient1.scan2"


def test_the_two_sides_of_a_case_may_have_different_suffixes_and_stray_files_are_ignored(tmp_path):
    layout(tmp_path, [])
    for name, suffix in zip(FOLDERS[0], (".nii.gz", ".mha", ".nrrd", ".nii"), strict=True):
        (tmp_path / name / f"a{suffix}").touch()
        for stray in (".DS_Store", "._a.nii.gz", "notes.txt", "a.raw"):
            (tmp_path / name / stray).touch()
    assert cases(datalist(tmp_path, "train")) == ["a"]


def test_labels_may_be_absent_where_they_are_not_needed_and_are_kept_where_present(tmp_path):
    layout(tmp_path / "bare", names=FOLDERS[0][:2])
    layout(tmp_path / "full")
    bare, full = (datalist(tmp_path / name, "test", labels=False) for name in ("bare", "full"))
    assert set(bare[0]) == {"case", "patient", *KEYS[:2]}
    assert set(full[0]) == {"case", "patient", *KEYS}
    with pytest.raises(InputError, match="moving_labels: folder not found"):
        datalist(tmp_path / "bare", "train")


def write_json(path, **content):
    path.write_text(json.dumps(content))
    return path


def item(root, stem, **more):
    for key in KEYS:
        (root / f"{stem}_{key}.nii").touch()
    return {key: f"{stem}_{key}.nii" for key in KEYS} | more


@pytest.mark.parametrize("names", [("training", "validation", "testing"), ("train", "val", "test")])
def test_a_json_names_pairs_relative_to_itself(tmp_path, names):
    items = [[item(tmp_path, f"c{i}", case=f"case {i}")] for i in range(3)]
    path = write_json(tmp_path / "datalist.json", **dict(zip(names, items, strict=True)))
    for i, split in enumerate(("train", "val", "test")):
        expected = {key: str(tmp_path / f"c{i}_{key}.nii") for key in KEYS}
        assert datalist(path, split) == [expected | {"case": f"case {i}", "patient": f"case {i}"}]


def test_a_json_may_name_the_patient_and_the_case_is_else_the_fixed_image(tmp_path):
    path = write_json(tmp_path / "datalist.json", training=[item(tmp_path, "a", patient=7), item(tmp_path, "b")])
    assert [(p["case"], p["patient"]) for p in datalist(path, "train")] == [
        ("a_fixed_image", "7"),
        ("b_fixed_image", "b_fixed_image"),
    ]


def test_76_patients_make_8_folds_of_6_and_4_of_7():
    sizes = sorted(len(fold) for fold in folds([f"p{i}" for i in range(76)], 12))
    assert sizes == [6] * 8 + [7] * 4


@pytest.mark.parametrize(("patients", "count"), [(76, 12), (10, 3), (5, 5), (2, 2)])
def test_every_patient_is_in_exactly_one_fold(patients, count):
    names = [f"p{i}" for i in range(patients)]
    dealt = folds(names + names[:3], count)  # a patient with two cases counts once
    assert len(dealt) == count
    assert sorted(sum(dealt, [])) == sorted(names)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_folds_depend_on_the_seed_alone():
    names = [f"p{i}" for i in range(76)]
    assert folds(names, 12, seed=1) == folds(names[::-1], 12, seed=1)
    assert folds(names, 12, seed=1) != folds(names, 12, seed=2)


def test_a_fold_tests_its_patients_and_trains_on_all_others(patients):
    tested = []
    for fold in range(3):
        train, val, test = (
            datalist(patients, split, fold=fold, fold_count=3, fold_seed=5, patient_pattern=r"^(p\d)_")
            for split in ("train", "val", "test")
        )
        assert val == test
        assert not {p["patient"] for p in train} & {p["patient"] for p in test}
        assert sorted(cases(train + test)) == cases(datalist(patients, "train"))
        tested += cases(test)
    assert sorted(tested) == cases(datalist(patients, "train"))


def test_the_patient_is_the_first_group_of_the_pattern_or_the_whole_match(patients):
    for pattern in (r"^(p\d)_", r"^p\d"):
        assert {p["patient"] for p in datalist(patients, "train", patient_pattern=pattern)} == {"p0", "p1", "p2", "p3"}


def refused(message, *args, **options):
    with pytest.raises(InputError) as error:
        datalist(*args, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_refused(tmp_path):
    refused(f"{tmp_path / 'none'}: folder not found; pass --dataset_dir", tmp_path / "none", "train")
    refused(f"{tmp_path}: expected the sub-folders moving_images, fixed_images", tmp_path, "train")
    layout(tmp_path)
    (tmp_path / "fixed_labels").rename(tmp_path / "fixed_label")
    refused(f"{tmp_path / 'fixed_labels'}: folder not found", tmp_path, "train")


def test_both_layouts_in_one_folder_are_refused(tmp_path):
    for names in FOLDERS:
        layout(tmp_path, names=names)
    refused("found both", tmp_path, "train")


@pytest.mark.parametrize("folder", FOLDERS[0])
def test_unpaired_names_are_refused_whichever_folder_lacks_one(tmp_path, folder):
    layout(tmp_path, ["a.nii", "b.nii", "c.nii"])
    (tmp_path / folder / "b.nii").unlink()
    where = tmp_path / ("fixed_images" if folder == "moving_images" else folder)
    refused(f"{where}: unpaired case b: it must have the same name", tmp_path, "train")
    (tmp_path / folder / "c.nii").unlink()
    refused("(2 such cases)", tmp_path, "train")


def test_two_files_of_one_case_are_refused(tmp_path):
    layout(tmp_path, ["a.nii", "b.nii"])
    (tmp_path / "fixed_images" / "b.nii.gz").touch()
    refused(f"{tmp_path / 'fixed_images'}: more than one file for case b", tmp_path, "train")


def test_an_empty_folder_is_refused(tmp_path):
    layout(tmp_path, [])
    refused(f"{tmp_path / 'moving_images'}: no images; expected files ending in .nii.gz", tmp_path, "train")


@pytest.mark.parametrize(("fold", "count"), [(-1, 3), (3, 3), (0, 0)])
def test_a_fold_out_of_range_is_refused(patients, fold, count):
    refused(f"fold {fold} of {count}", patients, "train", fold=fold, fold_count=count)


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_patients_than_folds_or_a_single_fold_are_refused(patients, count):
    refused(
        f"{count} folds need at least 2 folds and as many patients; found 4 patients",
        *(patients, "train"),
        fold=0,
        fold_count=count,
        patient_pattern=r"^(p\d)_",
    )


def test_folds_of_a_data_set_that_is_split_are_refused(tmp_path):
    layout(tmp_path / "train", ["a.nii"])
    layout(tmp_path / "test", ["b.nii"])
    refused("is already split into train, test", tmp_path, "train", fold=0, fold_count=2)


def test_a_patient_in_two_splits_is_refused(tmp_path):
    layout(tmp_path / "train", ["p1_a.nii", "p2_a.nii"])
    layout(tmp_path / "test", ["p1_b.nii"])
    assert cases(datalist(tmp_path, "test")) == ["p1_b"]
    refused("patient p1 is in train and in test", tmp_path, "train", patient_pattern=r"^(p\d)")
    items = {"training": [item(tmp_path, "a", patient="x")], "validation": [item(tmp_path, "b", patient="x")]}
    refused("patient x is in train and in val", write_json(tmp_path / "datalist.json", **items), "val")


def test_a_case_that_the_patient_pattern_does_not_match_is_refused(tmp_path):
    refused("b: the patient pattern 'a' does not match", layout(tmp_path), "train", patient_pattern="a")


def test_a_json_that_is_no_datalist_is_refused(tmp_path):
    path = tmp_path / "datalist.json"
    for content in ("{", "\x00\x01"):
        path.write_text(content)
        refused(f"{path}: not a readable JSON file", path, "train")
    for content in ("[]", "{}", '{"training": []}', "3"):
        path.write_text(content)
        refused(f"{path}: no pairs", path, "train")


def test_a_json_item_without_a_key_or_whose_file_is_missing_is_refused(tmp_path):
    good, bad = item(tmp_path, "a"), item(tmp_path, "b")
    del bad["fixed_label"]
    path = write_json(tmp_path / "datalist.json", training=[good, bad])
    refused(f"{path}: train item 1 lacks fixed_label", path, "train")
    assert len(datalist(path, "train", labels=False)) == 2
    (tmp_path / "a_moving_image.nii").unlink()
    refused(f"{tmp_path / 'a_moving_image.nii'}: named in {path} but not found", path, "train", labels=False)


@pytest.mark.parametrize("content", [{"training": ["a.nii"]}, {"training": {"a": 1}}, {"training": "a.nii"}])
def test_a_json_whose_items_are_no_dictionaries_is_refused(tmp_path, content):
    path = write_json(tmp_path / "datalist.json", **content)
    refused(str(path), path, "train")


def test_a_case_named_twice_in_a_json_is_refused(tmp_path):
    path = write_json(
        tmp_path / "datalist.json", training=[item(tmp_path, "a", case="x"), item(tmp_path, "b", case="x")]
    )
    refused(f"{path}: more than one pair is called case x", path, "train")


# ---- single images


def test_single_images_are_two_folders_or_the_keys_of_a_json(tmp_path):
    layout(tmp_path / "mr", names=SINGLE_FOLDERS)
    found = single_images(str(tmp_path / "mr"), "train")
    assert found[0] == {
        "case": "a",
        "patient": "a",
        "image": str(tmp_path / "mr/images/a.nii.gz"),
        "label": str(tmp_path / "mr/labels/a.nii.gz"),
        "group": str(tmp_path / "mr"),
    }
    item = {"image": "images/b.nii.gz", "label": "labels/b.nii.gz", "axes": "LPS", "case": "x"}
    (tmp_path / "mr/list.json").write_text(json.dumps({"training": [item]}))
    (found,) = single_images(str(tmp_path / "mr/list.json"), "train", axes="PRS")
    assert found["case"] == "x" and found["axes"] == "LPS" and found["label"].endswith("labels/b.nii.gz")
    (tmp_path / "mr/list.json").write_text(json.dumps({"training": [{"image": "images/b.nii.gz"}]}))
    with pytest.raises(InputError, match="train item 0 lacks label; an image needs image, label"):
        single_images(str(tmp_path / "mr/list.json"), "train")
    assert single_images(str(tmp_path / "mr/list.json"), "train", labels=False)


def test_a_mixture_of_data_sets_holds_single_images_and_both_sides_of_pairs(tmp_path):
    mr, pairs = str(layout(tmp_path / "mr", names=SINGLE_FOLDERS)), str(layout(tmp_path / "pairs"))
    found = single_images([mr, pairs], "train", axes=[None, "PRS"])
    assert [item["group"] for item in found] == [mr] * 2 + [f"{pairs} moving", f"{pairs} fixed"] * 2
    assert [item.get("axes") for item in found] == [None] * 2 + ["PRS"] * 4
    sides = single_images([mr, pairs], "train", moving_axes="LPS", fixed_axes="PRS")
    assert [item.get("axes") for item in sides] == [None] * 2 + ["LPS", "PRS"] * 2
    assert {key for item in found for key in item} == {"case", "patient", "image", "label", "group", "axes"}
    assert found[3]["image"].endswith("fixed_images/a.nii.gz") and found[3]["label"].endswith("fixed_labels/a.nii.gz")
    unsaid = [{k: v for k, v in item.items() if k != "axes"} for item in found]
    assert single_images(f"{mr},{pairs}", "train") == unsaid
    assert single_images(None, "train") == []
    with pytest.raises(InputError, match="1 for 2 data sets"):
        single_images([mr, pairs], "train", axes=["PRS"])


def test_folds_of_single_images_are_by_patient_in_each_data_set(tmp_path):
    layout(tmp_path / "mr", [f"p{p}_{k}.nii" for p in range(4) for k in range(2)], SINGLE_FOLDERS)
    options = {"fold_count": 4, "patient_pattern": "(p[0-9])_", "axes": None}
    held = [single_images(str(tmp_path / "mr"), "test", fold=k, **options) for k in range(4)]
    assert sorted(i["case"] for fold in held for i in fold) == [f"p{p}_{k}" for p in range(4) for k in range(2)]
    for k, fold in enumerate(held):
        rest = single_images(str(tmp_path / "mr"), "train", fold=k, **options)
        assert len({i["patient"] for i in fold}) == 1 and not {i["patient"] for i in fold} & {
            i["patient"] for i in rest
        }


def test_a_folder_of_single_images_is_not_read_as_pairs_nor_the_other_way_round(tmp_path):
    layout(tmp_path / "mr", names=SINGLE_FOLDERS)
    layout(tmp_path / "pairs")
    with pytest.raises(InputError, match="expected the sub-folders moving_images"):
        datalist(tmp_path / "mr", "train")
    with pytest.raises(InputError, match="expected the sub-folders images, labels"):
        datalist(tmp_path / "pairs", "train", layout=SINGLES)
