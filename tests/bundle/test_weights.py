"""The weights in models/: what they are, and that the defaults register with them."""

import csv
import re
from statistics import median

import pytest
import torch
from conftest import ROOT, flags, run

from scripts.data.checks import check_hash, known_hashes
from scripts.phantoms.phantom import write_cohort

MODELS = ROOT / "models"


def test_each_weights_file_has_a_known_hash_and_a_place_in_the_model_card():
    files = {path.name for path in MODELS.glob("*.pt")}
    card = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert files == set(known_hashes(MODELS)) == set(re.findall(r"^\| `models/(\S+)` \|", card, re.MULTILINE))


@pytest.mark.parametrize("name", known_hashes(MODELS))
def test_weights_are_small_plain_tensors_of_their_known_hash(name):
    path = MODELS / name
    assert path.stat().st_size < 25e6
    weights = torch.load(path, weights_only=True)
    assert all(type(value) is torch.Tensor and value.isfinite().all() for value in weights.values())
    check_hash(path)


def test_the_defaults_register_new_phantoms_better_than_their_centres(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", patients=2, seed=2027, split=(0, 0, 1))
    medians = {}
    for name, overlay, more in (
        ("shipped", [], {}),
        ("centre", ["initial_transform_only.yaml"], {"initial_transform": "centre", "spacing": 3.0}),
    ):
        files = str([str(ROOT / "configs" / file) for file in ("evaluate.json", *overlay)])
        settings = {"dataset_dir": cohort, "output_dir": tmp_path / name} | more
        result = run("monai.bundle", "run", "--config_file", files, *flags(settings), cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        with (tmp_path / name / "cases.csv").open() as file:
            rows = list(csv.DictReader(file))
        medians[name] = {k: median(float(row[k]) for row in rows) for k in ("dsc", "true_error_mm", "folded_percent")}
    assert medians["shipped"]["dsc"] > medians["centre"]["dsc"]
    assert medians["shipped"]["true_error_mm"] < medians["centre"]["true_error_mm"]
    assert medians["shipped"]["folded_percent"] == 0
