"""The QC record: what it holds, and that a registration that should be doubted is flagged; one pair for all."""

import json

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, run
from monai.data import MetaTensor

from scripts.data.checks import InputError, sha256
from scripts.data.formats import forward, read_transform
from scripts.network.fields import world_grid
from scripts.phantoms.phantom import simulate_pair, write_cohort
from scripts.registration.precision import computes_bfloat16
from scripts.registration.qc import MEANINGS, border_brightness
from scripts.registration.qc import flags as flags_of
from scripts.registration.segmentation import agreement, cut_percent
from scripts.registration.targets import sampled

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


def test_a_fan_is_dark_at_its_borders_and_a_box_or_a_slab_is_not():
    x, y, _ = torch.meshgrid(*(torch.linspace(-1, 1, 40),) * 3, indexing="ij")
    fan = (torch.atan2(x, y + 1.2).abs() < 0.6) & ((x**2 + (y + 1.2) ** 2).sqrt() < 2)
    slab = torch.ones(1, 40, 40, 40)
    slab[..., :8] = slab[..., -8:] = 0
    assert border_brightness(fan[None].float()) < 0.5
    assert border_brightness(slab) == pytest.approx(1)
    for volume in (fan[None].float(), slab):
        found = border_brightness(volume)
        assert border_brightness(100 * volume.permute(0, 2, 3, 1) - 20) == pytest.approx(found)


def test_exchanged_phantoms_are_flagged_and_others_are_not():
    low, _ = LIMITS["border_difference"]
    for seed in range(6):
        pair = simulate_pair(np.random.default_rng(seed), (32, 32, 26), (2.4, 2.4, 3), (36, 40, 30), (2, 2, 2))
        apart = border_brightness(pair.moving_image[None]) - border_brightness(pair.fixed_image[None])
        assert apart > low
        (flag,) = flags_of({"border_difference": -apart}, LIMITS)
        assert flag.startswith("the images seem to be exchanged")


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


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory):
    """The folder of the pair registered by the defaults, its record and what was said."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return folder, *registered(folder, pair, write_glands=True, write_spread=True)


def test_the_record_of_a_good_pair_is_as_the_schema_says_and_without_flags(plain):
    _, record, said = plain
    assert record["flags"] == [] and "CHECK" not in said
    assert record["limits"] == LIMITS
    assert 0 < record["spread_mm"] < 5 and record["inverse_consistency_mm"] is None
    assert record["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_spread_at_each_voxel_of_the_field_is_on_average_over_the_gland_that_of_the_record(plain):
    folder, record, _ = plain
    spread, field = nib.load(folder / "spread.nii.gz"), nib.load(folder / "ddf.nii.gz")
    assert spread.shape == field.shape[:3] and np.array_equal(spread.affine, field.affine)
    gland = nib.load(folder / "fixed_gland.nii.gz")
    inside = np.argwhere(np.asarray(gland.dataobj)) @ gland.affine[:3, :3].T + gland.affine[:3, 3]
    there = sampled(MetaTensor(spread.get_fdata()[None], affine=spread.affine), torch.from_numpy(inside))
    assert there.mean().item() == pytest.approx(record["spread_mm"], rel=0.1)


def test_the_record_names_the_ddf_network_only_when_it_took_part_and_a_limit_of_one_s_own_flags_aloud(
    pair, plain, tmp_path
):
    without, before, _ = plain
    record, said = registered(tmp_path / "out", pair, use_network=False, **{"limits#blur": "[None, 0.01]"})
    hashes = [found["weights_sha256"] for found in (before, record)]
    assert hashes == [sha256(str(ROOT / "models" / "second_stage.pt")), None]
    assert before["precision"] == ("bfloat16" if computes_bfloat16(torch.device("cpu")) else "float32")
    assert 0 < record["inverse_consistency_mm"] < 5 and record["spread_mm"] is None  # the refinement took part
    assert len({(folder / "ddf.nii.gz").read_bytes() for folder in (without, tmp_path / "out")}) == 2
    assert all(len(found["segmentation_weights_sha256"]) == 2 for found in (before, record))
    assert [flag.split(" (")[0] for flag in record["flags"]] == [
        MEANINGS["blur"].format(side=side) for side in ("moving", "fixed")
    ]
    assert said.count("CHECK: ") == 2


def test_a_registration_that_starts_from_its_own_result_stays_there(pair, plain, tmp_path):
    first = plain[0] / "ddf.nii.gz"
    registered(tmp_path / "again", pair, initial_transform=first)
    fixed = nib.load(pair["fixed_image"])
    x = world_grid(fixed.shape, torch.from_numpy(fixed.affine))
    there, again = (forward(read_transform(path), x)[0] for path in (first, tmp_path / "again" / "ddf.nii.gz"))
    assert (there - x).norm(dim=1).median() > 5
    assert (again - there).norm(dim=1).median() < 1.5  # mm: less than two voxels of a further fit
