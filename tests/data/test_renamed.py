"""Old names work on, and say the new one."""

import json

import pytest
from conftest import ROOT, TINY, flags, run
from monai.bundle import ConfigParser

from scripts.data.checks import InputError
from scripts.data.renamed import FIGURES, SETTINGS, current, former, say_settings
from scripts.registration import qc
from scripts.study.plan import overlays_of


def test_an_old_key_becomes_the_new_one_aloud_and_both_are_refused(capsys):
    assert current({"start": "centre", "alpha": 1}, SETTINGS) == {"initial_transform": "centre", "alpha": 1}
    assert capsys.readouterr().err.count("initial_transform") == 1
    assert current({"alpha": 1}, SETTINGS) == {"alpha": 1} and not capsys.readouterr().err
    with pytest.raises(InputError, match="initial_transform, which is given too"):
        current({"start": "centre", "initial_transform": "header"}, SETTINGS)


@pytest.mark.parametrize("name", ["train", "inference", "evaluate"])
def test_each_config_reads_its_old_settings(name):
    parser = ConfigParser()
    parser.read_config(ROOT / "configs" / f"{name}.json")
    given = {"start": "header", "start_path": "mine.pt", "start_kind": "translation", "wrong_way": 0.5}
    given = {old: value for old, value in given.items() if old in parser.get()}
    assert given.keys() >= {"start", "start_path", "start_kind"}
    parser.update(given)
    for old, value in given.items():
        assert parser.get_parsed_content(SETTINGS[old]) == value


def test_an_old_setting_that_an_overlay_overrules_is_refused_not_ignored(capsys):
    say_settings({"start": "header", "start_path": None}, {"start": "header", "start_path": "a.pt"})
    assert capsys.readouterr().err.splitlines() == [
        "renamed: --start is now --initial_transform; the old name works until version 0.6"
    ]
    with pytest.raises(InputError, match="pass --initial_transform header"):
        say_settings({"start": "header"}, {"start": "learned"})


def test_the_old_overlays_and_limits_work_and_the_old_record_has_its_names(capsys):
    assert [path.resolve().name for path in overlays_of("start+fine_tune")] == ["segmentation.yaml", "fine_tune.yaml"]
    limits = {"wrong_way": [None, 0.2]}
    (flag,) = qc.flags({"moving_orientation": 0.5, "moving_axes": "LPI"}, limits)
    assert "axes LPI" in flag and "orientation" in capsys.readouterr().err
    record = {new: 0.1 for new in FIGURES.values()} | {"case": "a", "limits": {"orientation": [None, 0.2]}}
    assert former(record) == {old: 0.1 for old in FIGURES} | {"case": "a", "limits": limits}


def test_a_registration_by_old_options_says_so_in_one_line_each(files, tmp_path):
    named = {key.replace("_image", ""): files[key] for key in ("moving_image", "fixed_image")}
    settings = TINY | {"refine_steps": 0, "use_network": False, "weights": None, "output_dir": tmp_path / "out"}
    settings["start"] = settings.pop("initial_transform")
    result = run("scripts", "register", *flags(named | settings))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("renamed:") == 1
    records = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("qc", "qa")]
    assert records[0]["initial_transform"] == records[1]["start"] == "centre"
