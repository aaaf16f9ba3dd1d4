"""No run replaces, removes or joins what it reads, whatever the two are called."""

import os

import pytest
from conftest import ROOT

from scripts.data import formats
from scripts.data.checks import InputError
from scripts.data.datalist import KEYS, RESULTS, check_output
from scripts.data.files import listed, readable, written_together
from scripts.data.kept import links, refuse_overlap
from scripts.registration.outputs import LABEL


def refused(message, reads, writes):
    with pytest.raises(InputError) as error:
        refuse_overlap(reads, writes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A file, a folder with a file, and links of every kind to them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "series").mkdir()
    for name in ("input", "series/slice.dcm", "other"):
        (tmp_path / name).write_text(name)
    os.link("input", "hard")
    (tmp_path / "soft").symlink_to("input")
    (tmp_path / "chain").symlink_to("soft")
    (tmp_path / "folder").symlink_to(".")
    (tmp_path / "linked_series").symlink_to("series")
    return tmp_path


NAMES_OF_INPUT = ["input", "./input", "hard", "soft", "chain", "folder/input", "series/../input"]


@pytest.mark.parametrize("name", NAMES_OF_INPUT)
@pytest.mark.parametrize("target", NAMES_OF_INPUT)
def test_a_file_is_known_by_every_name(world, name, target):
    refused(f"{os.path.normpath(target) if '..' not in target else target}: would replace", [name], [target])
    refuse_overlap([name], ["other", "new", "new/input", "series/input"])


def test_a_link_on_the_way_to_an_input_is_an_input(world):
    (world / "elsewhere").mkdir()
    refused("would replace", ["chain"], [world / "soft"])
    assert [path.name for path in links("chain")] == ["chain", "soft", "input"]
    (world / "circle").symlink_to("circle")
    refuse_overlap(["circle"], ["other"])


@pytest.mark.parametrize("folder", ["series", "linked_series", "folder/series", "series/"])
def test_nothing_is_put_into_a_folder_that_is_read_nor_is_it_replaced(world, folder):
    for target in ("series/new", "linked_series/a/b/new", "folder/folder/series/new"):
        refused("lies in the input", [folder], [target])
    for target in ("series", "linked_series", "series/slice.dcm"):
        refused("would replace", [folder], [target])
    refuse_overlap([folder], ["series_2/new", "new"])


def test_a_folder_that_goes_must_hold_no_input(world):
    for target in ("series", "linked_series", world):
        refused("would replace the input series/slice.dcm", ["series/slice.dcm"], [target])


def test_what_a_registration_leaves_or_removes_is_known():
    assert set(RESULTS) == {
        *("warped_moving_image.nii.gz", LABEL, "ddf.nii.gz", "overview.png", "qc.json", "qa.json"),
        *("moving_gland.nii.gz", "fixed_gland.nii.gz", "spread.nii.gz", "view.html"),
        *(formats.WARPED_SERIES, *formats.FILES.values()),
    }


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("role", [*KEYS, "inputs"])
def test_a_registration_replaces_none_of_its_inputs_whatever_they_are_called(tmp_path, name, role):
    path = tmp_path / "out" / "a" / name
    path.parent.mkdir(parents=True)
    path.touch()
    pair = {"case": "a"} | {key: str(tmp_path / f"{key}.nii.gz") for key in KEYS}
    pair, inputs = (pair, [None, "centre", [str(path)]]) if role == "inputs" else (pair | {role: str(path)}, ())
    for where, case_folders in (("out", True), ("out/a", False)):
        with pytest.raises(InputError, match=f"{name}: would replace the input"):
            check_output(str(tmp_path / where), [pair], inputs, case_folders=case_folders)
    check_output(str(tmp_path / "out"), [pair], inputs, case_folders=False)
    check_output(str(tmp_path / "out" / "a"), [pair], inputs, names=["cases.csv"], case_folders=False)


def test_results_do_not_land_in_a_series_of_the_case_s_name(tmp_path):
    (tmp_path / "P7").mkdir()
    pair = {"case": "P7", "moving_image": str(tmp_path / "mr.nii.gz"), "fixed_image": str(tmp_path / "P7")}
    with pytest.raises(InputError, match=f"lies in the input {tmp_path / 'P7'}"):
        check_output(str(tmp_path), [pair])


def test_patterns_and_other_files_are_outputs_too(tmp_path):
    (tmp_path / "checkpoint_epoch=3.pt").touch()
    (tmp_path / "model.pt").touch()
    for name in ("checkpoint_epoch=3.pt", "model.pt"):
        with pytest.raises(InputError, match="would replace the input"):
            check_output(
                *(str(tmp_path), [], [str(tmp_path / name)], ["checkpoint_epoch=*.pt"]),
                case_folders=False,
                others=[str(tmp_path / "model.pt")],
            )


def test_a_folder_in_the_place_of_a_result_stays_and_is_named(tmp_path):
    (tmp_path / "a.nii.gz").mkdir()
    (tmp_path / "a.nii.gz" / "mine.dcm").touch()
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be written"), written_together(tmp_path) as partial:
        (partial / "a.nii.gz").touch()
    assert (tmp_path / "a.nii.gz" / "mine.dcm").exists()


# ---- names


def test_a_reader_sees_the_suffix_of_a_link_or_else_of_what_it_leads_to(tmp_path):
    for link, target, seen in (
        ("mr.nii.gz", "key", "mr.nii.gz"),
        ("mr", "key.nii.gz", "key.nii.gz"),
        ("mr.mha", "key.nii.gz", "mr.mha"),
        ("mr", "key", "mr"),
    ):
        (tmp_path / target).touch()
        (tmp_path / link).symlink_to(target)
        (tmp_path / "far").symlink_to(link)
        assert readable(tmp_path / link) == str(tmp_path / seen)
        assert readable(tmp_path / "far") == str(tmp_path / ("far" if seen == "mr" else seen))
        for name in (link, target, "far"):
            (tmp_path / name).unlink()
    (tmp_path / "link").symlink_to(tmp_path)
    assert readable(tmp_path / "link") == str(tmp_path / "link")


def test_a_comma_in_the_name_of_what_is_there_parts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12,34", "a,b,c", "['x']", " blank"):
        (tmp_path / name).touch()
    assert listed("12,34") == ["12,34"] and listed("new, 12,34,a,b,c,b") == ["new", "12,34", "a,b,c", "b"]
    assert listed("itk, slicer") == ["itk", "slicer"] == listed(("itk", "slicer")) == listed("['itk', 'slicer']")
    assert listed("['x']") == ["['x']"] and listed(" blank") == [" blank"] and listed("[x") == ["[x"]
    assert listed(f"{ROOT},{tmp_path / '12,34'}") == [str(ROOT), str(tmp_path / "12,34")]
