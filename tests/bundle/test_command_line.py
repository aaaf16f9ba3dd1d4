"""What is typed is what is meant: text stays text, settings are those a config has, a mistake is one line."""

import inspect
import json
import sys
import typing

import pytest
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow
from monai.bundle.scripts import create_workflow

from scripts import __main__ as cli
from scripts.bundle.command_line import arguments, call, parted
from scripts.bundle.settings import check_settings
from scripts.bundle.workflow import register
from scripts.data.checks import InputError, refusal

CONFIGS = ROOT / "configs"
VERBS = {
    name: getattr(cli, name)
    for name in (
        *("register", "apply", "invert", "check", "phantom", "sweep", "demo", "crossval", "report", "release"),
        *("check_config", "prepare"),
    )
}
ODD = [
    *("us#2.nii.gz", "2024_01_05", "12,34", "1e5", "1e3", "007", "0x1F", "None", "True", "~", "~/x", "a b", " a"),
    *(
        "prostaté",
        "$HOME",
        "$open('x')",
        "@x",
        "%x",
        "[a]",
        "(1)",
        "{a: b}",
        "'q'",
        "a=b",
        "a:b",
        "\\",
        "1.50",
        "..",
        "é#",
    ),
]
OWN_TYPES = {int: ("3", 3), float: ("1e1", 10.0), bool: ("false", False)}


def texts_of(verb):
    """The options of a verb that take text."""
    hints = typing.get_type_hints(verb)
    hints.pop("return")
    return [name for name, hint in hints.items() if str in (hint, *typing.get_args(hint))]


def required(verb, but):
    """Words for what a verb cannot do without."""
    hints = typing.get_type_hints(verb)
    found = []
    for name, one in inspect.signature(verb).parameters.items():
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD and name != but:
            found += [f"--{name}", "1" if hints[name] is float else "x"]
    return found


def one_line(message, action, *given):
    with pytest.raises(Exception) as error:
        action(*given)
    found = refusal(error.value)
    assert found is not None and message in str(found) and "\n" not in str(found), error.value


@pytest.mark.parametrize(("verb", "option"), [(v, o) for v in VERBS for o in texts_of(VERBS[v])])
def test_text_reaches_every_verb_as_it_was_typed(verb, option):
    verb = VERBS[verb]
    for text in ODD:
        for words in ([f"--{option}", text], [f"--{option}={text}"], [f"--{option.replace('_', '-')}", text]):
            assert arguments(verb, [*required(verb, option), *words])[option] == text


@given(st.text(min_size=1).filter(lambda text: not text.startswith("-")))
@settings(max_examples=200, deadline=None)
def test_any_text_reaches_a_verb(text):
    assert arguments(cli.release, ["--output_dir", text]) == arguments(cli.release, [text]) == {"output_dir": text}
    assert arguments(cli.release, [f"--output_dir=-{text}"]) == {"output_dir": f"-{text}"}


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_and_one_without_a_value_are_one_line_with_the_nearest(verb):
    verb, name = VERBS[verb], texts_of(VERBS[verb])[-1]
    one_line(f"--{name}: give a value", arguments, verb, [*required(verb, name), f"--{name}"])
    one_line(f"--{name}: give a value", arguments, verb, [*required(verb, name), f"--{name}", "--x", "1"])
    if "settings" not in inspect.signature(verb).parameters:
        mistyped = f"{name[:-2]}{name[-1]}x" if len(name) > 4 else f"{name}x"
        message = f"--{mistyped}: no such option of {verb.__name__}; did you mean --{name}?"
        one_line(message, arguments, verb, [*required(verb, name), f"--{mistyped}", "x"])
        one_line("no such option", arguments, verb, ["--"])


def test_kinds_are_read_and_others_are_refused():
    found = arguments(cli.phantom, ["out", "3", "--seed=7", "--like_paper", "--mode", "randomised"])
    assert found == {"output_dir": "out", "patients": 3, "seed": 7, "like_paper": True, "mode": "randomised"}
    assert arguments(cli.check, ["d", "--nolabels"])["labels"] is False
    assert arguments(cli.check, ["d", "--labels", "false", "--label_values", "3"]) == {
        "dataset_dir": "d",
        "labels": False,
        "label_values": [3],
    }
    assert arguments(cli.check, ["d", "--label_values", "[1,2]", "--num_workers", "None"])["label_values"] == [1, 2]
    sweep = ["--frames", "f", "--output", "o", "--axis_offset", "-1.5"]
    assert arguments(cli.sweep, [*sweep, "--spacing", "2"])["spacing"] == 2
    assert arguments(cli.sweep, [*sweep, "--spacing", "1,2,3"])["spacing"] == [1, 2, 3]
    assert arguments(cli.release, ["-o", "x"]) == {"output_dir": "x"}
    one_line("--patients many: expected a whole number", arguments, cli.phantom, ["o", "--patients", "many"])
    one_line("--patients 2024_01: expected", arguments, cli.phantom, ["o", "--patients", "2024_01"])
    one_line("--labels maybe: expected True or False", arguments, cli.check, ["d", "--labels", "maybe"])
    one_line("--label_values [a]: expected numbers", arguments, cli.check, ["d", "--label_values", "[a]"])
    one_line("sweep needs --output and --axis_offset", arguments, cli.sweep, ["f"])
    one_line("y: one value too many for report", arguments, cli.report, ["cv", "v", "x", "y"])
    one_line("regster: no such verb; did you mean register?", call, VERBS, ["regster"])
    assert parted(["a", "--b", "-1", "--c", "--d=e=f", "-g"]) == (
        [("b", "-1"), ("c", None), ("d", "e=f"), ("g", None)],
        ["a"],
    )


def test_settings_are_read_as_python_but_for_those_that_are_text():
    words = ["--moving", "m", "--fixed", "f", "--output_dir", "o", "--spacing", "2.5", "--formats", "itk,niftyreg"]
    words += [
        "--ckpt_path",
        "12_3",
        "--segmentation_path",
        "a.pt,b.pt",
        "--use_network",
        "--limits",
        "{'blur': [None, 1]}",
    ]
    found = arguments(cli.register, words)
    assert found["spacing"] == 2.5 and found["formats"] == ["itk", "niftyreg"] and found["use_network"] is True
    assert found["ckpt_path"] == "12_3" and found["segmentation_path"] == ["a.pt", "b.pt"]
    assert found["limits"] == {"blur": [None, 1]}


# ---- settings of a config


INFERENCE = [str(CONFIGS / "inference.json")]
TRAIN = [str(CONFIGS / "train.json")]


@pytest.mark.parametrize(
    ("name", "files", "meant"),
    [
        ("refine_step", INFERENCE, "refine_steps"),
        ("format", INFERENCE, "formats"),
        ("startt", INFERENCE, "start"),
        ("iteratons", TRAIN, "iterations"),
        ("limits#blurr", INFERENCE, "limits#blur"),
        ("network_def#checkpontng", INFERENCE, "network_def#checkpointing"),
        ("train#trainer#max_epoch", TRAIN, "train#trainer#max_epochs"),
        ("trian#trainer#max_epochs", TRAIN, "train#trainer#max_epochs"),
        ("handlers#0#load_pth", INFERENCE, "handlers#0#load_path"),
        ("left_rigth", [*TRAIN, str(CONFIGS / "segmentation.yaml")], "left_right"),
    ],
)
def test_a_setting_that_there_is_none_of_is_refused_with_the_nearest(name, files, meant):
    one_line(f"--{name}: no such option of x; did you mean --{meant}?", check_settings, [name], files, "x")


def test_a_setting_that_nothing_is_like_is_refused_all_the_same():
    one_line("--zzzzzz: no such option of x", check_settings, ["zzzzzz"], INFERENCE, "x")


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ({"refine_steps": 3, "start": "centre", "limits#blur": [None, 1], "limits::blur": [None, 1]}, INFERENCE),
        ({"left_right": 1}, [*TRAIN, str(CONFIGS / "segmentation.yaml")]),
        ({"train#trainer#amp": True, "validate#dataset#cache_num": 0}, TRAIN),  # arguments that no config names
        ({"handlers#0#_disabled_": True, "handlers#1#output_dir": "x", "+handlers": []}, INFERENCE),
        ({"mine": 3, "network_def#initial_channels": "@mine"}, INFERENCE),  # one's own, which another value uses
        ({"mine": {"deep": 3}, "mine#deep": 4, "spacing": "$@mine::deep"}, INFERENCE),
        ({"joint": 3, "spacing": "%joint"}, INFERENCE),
    ],
)
def test_settings_that_mean_something_pass(given, files):
    check_settings(given, files, "x")


def test_what_is_no_config_is_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "none.yaml", "image.nii.gz"):
        one_line(f"{name}: cannot be read as a config", check_settings, [], [*INFERENCE, str(tmp_path / name)], "x")


def test_every_overlay_has_only_settings_that_pass():
    for path in CONFIGS.glob("*.yaml"):
        from scripts.study.plan import merged

        check_settings(merged([path]), [*TRAIN, str(path)], path.name)


def test_register_refuses_what_has_no_effect_before_anything_is_read(tmp_path):
    pair = {"moving": "none", "fixed": "none", "output_dir": str(tmp_path / "out")}
    for name, message in (
        ("moving_label", "no such option of register; did you mean --moving_labels?"),
        ("dataset_dir", "has no meaning for one pair"),
        ("datalist", "has no meaning for one pair"),
    ):
        with pytest.raises(InputError, match=f"--{name}: ") as error:
            register(**pair, **{name: "x"})
        assert message in str(error.value)
    one_line("none.yaml: overlay not found", lambda: register(**pair, overlay="none.yaml"))
    assert not (tmp_path / "out").exists()


# ---- monai.bundle run


def asked(monkeypatch, *words, **override):
    """The workflow that `monai.bundle run` makes of words; `override` is what Fire reads of them."""
    import monai.bundle

    program = f"{monai.bundle.__path__[0]}/__main__.py"
    monkeypatch.setattr(sys, "argv", [program, "run", "--config_file", *INFERENCE, *words])
    return create_workflow(config_file=INFERENCE[0], logging_file=False, **override)


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_names_reach_the_config_of_a_bundle_run_as_they_were_typed(monkeypatch):
    def found(words, **override):
        parser = asked(monkeypatch, *words, **override).parser
        return [parser.get_parsed_content(name) for name in override]

    assert found(["--output_dir", "2024_01_06"], output_dir=20240106) == ["2024_01_06"]
    assert found(["--output_dir=1e3", "--dataset_dir", "us#2"], output_dir=1000.0, dataset_dir="us") == ["1e3", "us#2"]
    assert found(["--dataset_dir", "12,34"], dataset_dir=(12, 34)) == ["12,34"]
    assert found(["--dataset_dir='/x/a#b'"], dataset_dir="/x/a#b") == ["/x/a#b"]
    assert found(["--segmentation_path", "['a#1.pt', 'b.pt']"], segmentation_path=["a#1.pt", "b.pt"]) == [
        ["a#1.pt", "b.pt"]
    ]
    assert found(["--output_dir", "$@bundle_root + '/x'"], output_dir="$@bundle_root + '/x'") == [f"{ROOT}/x"]
    assert found(["--ckpt_path", "None"], ckpt_path=None) == [f"{ROOT}/models/second_stage.pt"]  # MONAI leaves None out


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_a_bundle_run_refuses_unknown_settings_and_knows_monai_s_own(monkeypatch, tmp_path):
    for name, meant in (("refine_step", "refine_steps"), ("trackin", "tracking"), ("experiment_name", "")):
        with pytest.raises(Exception) as error:
            asked(monkeypatch, f"--{name}", "1", **{name: 1})
        found = str(refusal(error.value))
        assert found.startswith(f"--{name}: no such option of inference.json")
        assert not meant or found.endswith(f"; did you mean --{meant}?")
    own = {"meta_file": str(CONFIGS / "metadata.json"), "workflow_name": "ConfigWorkflow", "init_id": "initialize"}
    asked(monkeypatch, **own, **{"run_id": "mine", "mine": ["$print(1)"], "_meta_#version": "9"})
    arguments = {"refine_step": 3}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    one_line("--refine_step: no such option", lambda: asked(monkeypatch, args_file=str(tmp_path / "args.json")))


def test_settings_of_a_workflow_made_in_python_are_its_author_s():
    workflow = ConfigWorkflow(*INFERENCE, logging_file=False, workflow_type="infer", mine=3)
    workflow.initialize()
    assert workflow.parser.get_parsed_content("mine") == 3


def test_a_mistyped_option_ends_both_command_lines_with_one_line(tmp_path):
    for words, message in (
        (("scripts", "report", "--variant", "x", "--datset_dir", "y"), "--datset_dir: no such option of report"),
        (
            ("monai.bundle", "run", "--config_file", *INFERENCE, "--refine_step", "3", "--output_dir", "2024_01_06"),
            "--refine_step: no such option of inference.json; did you mean --refine_steps?",
        ),
    ):
        result = run(*words, cwd=ROOT if words[0] == "scripts" else tmp_path)
        assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
        assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
