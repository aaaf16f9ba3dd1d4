"""The QC record: what it holds, and that a registration that should be doubted is flagged."""

import json

import jsonschema
import pytest
import torch
from conftest import ROOT, flags, run

from scripts.data.checks import InputError
from scripts.phantoms.phantom import write_cohort
from scripts.registration.qc import MEANINGS
from scripts.registration.qc import flags as flags_of
from scripts.registration.segmentation import agreement, cut_percent

SCHEMA = json.loads((ROOT / "configs" / "qc_schema.json").read_text("utf-8"))
LIMITS = json.loads((ROOT / "configs" / "inference.json").read_text("utf-8"))["limits"]


def test_a_figure_is_flagged_beyond_its_limits_and_only_there():
    limits = {"folded_percent": [None, 0], "initial_stretch_min": [0.6, None], "agreement": [0.8, 1]}
    inside = {"folded_percent": 0, "initial_stretch_min": 0.6, "moving_agreement": 0.8, "fixed_agreement": None}
    assert flags_of(inside, limits) == []
    assert flags_of(inside | {"folded_percent": 0.1}, limits) == ["the field folds (folded_percent 0.1, limit 0)"]
    assert "implausible initial transform" in flags_of(inside | {"initial_stretch_min": 0.4}, limits)[0]
    (found,) = flags_of(inside | {"fixed_agreement": 0.5}, limits)
    assert found == "the networks do not agree on the gland in the fixed image (fixed_agreement 0.5, limit 0.8)"
    with pytest.raises(InputError, match="limits: folding is none of folded_percent"):
        flags_of(inside, {"folding": [None, 0]})


def test_evaluations_flag_by_the_same_limits():
    assert json.loads((ROOT / "configs" / "evaluate.json").read_text("utf-8"))["limits"] == LIMITS


def test_the_shipped_limits_are_of_figures_that_the_schema_has():
    for name in LIMITS:
        sides = ("moving_", "fixed_") if "{side}" in MEANINGS[name] else ("",)
        assert all(f"{side}{name}" in SCHEMA["properties"] for side in sides)


def test_looks_that_agree_and_looks_that_do_not():
    look = torch.zeros(1, 8, 8, 8)
    look[:, 2:6, 2:6, 2:6] = 1
    half = look.clone()
    half[:, 4:] = 0
    assert agreement(torch.stack([look, look, look])) == 1
    assert agreement(torch.stack([look, look, half])) == pytest.approx(2 / 3)
    assert agreement(torch.stack([look, torch.zeros_like(look)])) == 0


def test_a_gland_at_the_edge_of_the_image_is_cut():
    gland, inside = torch.zeros(12, 12, 12), torch.ones(12, 12, 12)
    gland[4:8, 4:8, 4:8] = 1
    assert cut_percent(gland, inside) == 0
    inside[8:] = 0
    assert 10 < cut_percent(gland, inside) < 50


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    cohort = write_cohort(tmp_path_factory.mktemp("qa") / "cohort", patients=1, seed=2027, split=(0, 0, 1))
    return {k: next((cohort / "test" / f"{k}s").iterdir()) for k in ("moving_image", "fixed_image", "moving_label")}


def registered(folder, pair, **settings):
    files = {"moving": pair["moving_image"], "fixed": pair["fixed_image"], "output_dir": folder}
    result = run("scripts", "register", *flags(files | settings))
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((folder / "qc.json").read_text("utf-8"))
    jsonschema.validate(record, SCHEMA, jsonschema.Draft202012Validator)
    return record, result.stdout


def test_the_record_of_a_good_pair_is_as_the_schema_says_and_without_flags(pair, tmp_path):
    record, said = registered(tmp_path / "out", pair)
    assert record["flags"] == [] and "CHECK" not in said
    assert record["limits"] == LIMITS
    assert 0 < record["inverse_consistency_mm"] < 5
    assert record["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_a_limit_of_one_s_own_flags_aloud(pair, tmp_path):
    record, said = registered(tmp_path / "out", pair, **{"limits#blur": "[None, 0.01]"})
    assert [flag.split(" (")[0] for flag in record["flags"]] == [
        MEANINGS["blur"].format(side=side) for side in ("moving", "fixed")
    ]
    assert said.count("CHECK: ") == 2
