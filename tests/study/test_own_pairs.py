"""Own pairs, one command: both stages learn, each pair is held out once from both, and the result registers."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, run
from test_crossval import unsplit  # noqa: F401  a fixture

from scripts.study.own_pairs import errors
from scripts.study.watch import tail

STEPS = ("--segmentation_iterations", "1", "--second_stage_iterations", "2", "--folds", "2")


def test_one_command_learns_both_stages_says_what_held_out_pairs_gain_and_its_result_registers(
    unsplit,  # noqa: F811
    tmp_path,
):
    dataset, out = unsplit / "train", tmp_path / "learned"
    said = run("scripts", "learn", str(dataset), "--output_dir", str(out), *STEPS, "--cohort_device", "disk").stdout
    assert "4 pairs of 4 patients, 2 folds" in said and "Research use only" in said and "initial transform" in said
    cases = list(csv.DictReader((out / "cases.csv").open()))
    assert len({row["case"] for row in cases}) == 4 and all(float(row["spread_mm"]) >= 0 for row in cases)
    strengths = list(csv.DictReader((out / "runs" / "second_stage" / "fold0" / "evaluation" / "strengths.csv").open()))
    landmarks = list(csv.DictReader((out / "landmarks.csv").open()))
    for row in strengths:  # nothing of the field is the initial transform, all of it what was evaluated
        (same,) = [one for one in landmarks if (one["case"], one["label"]) == (row["case"], row["label"])]
        for strength, column in ((0, "distance_before_mm"), (1, "distance_mm")):
            if float(row["strength"]) == strength:
                assert float(row["distance_mm"]) == pytest.approx(float(same[column]), abs=1e-4)
    weights = yaml.safe_load((out / "weights.yaml").read_text())
    assert weights["strength"] in (0, 0.25, 0.5, 0.75, 1)
    for fold in range(2):  # neither stage has seen the pairs that it is tested on
        log = (out / "runs" / "second_stage" / f"fold{fold}" / "log.txt").read_text(errors="replace")
        assert f"runs/segmentation/fold{fold}/model.pt" in log and f"segmentation/fold{1 - fold}" not in log
        assert f"fold{fold}" in weights["segmentation_path"][fold] and f"fold{fold}" in weights["ckpt_path"][fold]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.pt")}
    # the folds' gland networks share the eight images; each second stage has the glands that its own network finds
    assert sorted(len(list(folder.iterdir())) for folder in (out / "cohort").iterdir()) == [2, 2, 8]
    shutil.rmtree(out / "cohort")
    again = run("scripts", "learn", str(dataset), "--output_dir", str(out), *STEPS).stdout
    assert again.splitlines()[-8:] == said.splitlines()[-8:]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("model.pt")} and len(before) == 4
    pair = [f"--{side}={dataset / f'{side}_images' / 'case000000.nii.gz'}" for side in ("moving", "fixed")]
    run("scripts", "register", *pair, f"--output_dir={tmp_path / 'one'}", f"--overlay={out / 'weights.yaml'}")
    record = json.loads((tmp_path / "one" / "qc.json").read_text())
    assert record["weights"] == weights["ckpt_path"] and len(record["weights_sha256"]) == 2
    assert record["spread_mm"] >= 0 and (record["max_displacement_mm"] > 0) == (weights["strength"] > 0)


def test_after_ctrl_c_no_other_fold_begins(unsplit, tmp_path):  # noqa: F811
    words = [
        "scripts",
        "learn",
        str(unsplit / "train"),
        "--output_dir",
        str(tmp_path / "out"),
        "--folds=2",
        "--cores=1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background may ignore it
    )
    folder = tmp_path / "out" / "runs" / "segmentation"
    while "Training" not in tail(folder / "fold0" / "log.txt"):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=120)
    assert process.returncode == 130 and not (folder / "fold1").exists()


def test_the_errors_of_cases_leave_out_what_is_not_there():
    rows = [("a", "3"), ("a", "4"), ("b", ""), ("c", "nan"), ("c", "2")]
    found = errors([{"case": case, "distance_mm": distance} for case, distance in rows])
    assert found == pytest.approx([12.5**0.5, 2])
