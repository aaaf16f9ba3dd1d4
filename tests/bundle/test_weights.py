"""The weights in models/: what they are, and that the defaults register with them."""

import csv
import json
import re
from statistics import median

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, run

from scripts.data.checks import check_hash, known_hashes, sha256
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
    cohort = write_cohort(tmp_path / "cohort", patients=4, seed=2027, split=(0, 0, 1))
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


def test_a_registration_that_starts_from_its_own_result_stays_there(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", patients=1, seed=2027, split=(0, 0, 1))
    moving, fixed = (next((cohort / "test" / f"{side}_images").iterdir()) for side in ("moving", "fixed"))
    start, found = {}, []
    for name in ("first", "again"):
        settings = {"moving": moving, "fixed": fixed, "output_dir": tmp_path / name} | start
        result = run("scripts", "register", *flags(settings))
        assert result.returncode == 0, result.stderr[-3000:]
        start = {"initial_transform": tmp_path / name / "ddf.nii.gz"}
        found.append(nib.load(start["initial_transform"]).get_fdata())
    assert np.median(np.linalg.norm(found[0], axis=-1)) > 5
    assert np.median(np.linalg.norm(found[1] - found[0], axis=-1)) < 1.5  # mm: less than two voxels of a further fit


def test_the_record_names_the_ddf_network_only_when_it_took_part(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", patients=1, seed=2027, split=(0, 0, 1))
    moving, fixed = (next((cohort / "test" / f"{side}_images").iterdir()) for side in ("moving", "fixed"))
    records, ddfs = [], []
    for more in ({}, {"use_network": True}):
        out = tmp_path / f"out{len(records)}"
        settings = {"moving": moving, "fixed": fixed, "output_dir": out} | more
        result = run("scripts", "register", *flags(settings))
        assert result.returncode == 0, result.stderr[-3000:]
        records.append(json.loads((out / "qc.json").read_text("utf-8")))
        ddfs.append((out / "ddf.nii.gz").read_bytes())
    hashes = [record["weights_sha256"] for record in records]
    assert hashes == [None, sha256(str(ROOT / "models" / "model.pt"))]
    assert records[0]["precision"] == "float32" and ddfs[0] != ddfs[1]
    assert all(len(record["segmentation_weights_sha256"]) == 2 for record in records)
