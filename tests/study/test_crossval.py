"""What a cross-validation writes does not depend on what was killed on the way, and nothing fails unseen."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, flags, run

from scripts.data.checks import InputError
from scripts.data.datalist import FOLDERS
from scripts.phantoms.phantom import write_cohort
from scripts.study.crossval import cross_validate, on_ray
from scripts.study.fold import run_fold
from scripts.study.plan import DONE, LOG, Run, deal, name_of, overlays_of, runs_of, write_plan
from scripts.study.tables import collect, patients
from scripts.study.watch import last_lines, progress, watch

HEADER = "case,patient,dsc,tre_mm,empty_warped"
LANDMARKS = "case,patient,label,distance_mm,empty_warped"


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory) -> Path:
    """Four tiny phantoms, not split."""
    size = {"fixed_shape": (22, 30, 22), "fixed_spacing": 3.0, "moving_shape": (26, 26, 20)}
    folder = tmp_path_factory.mktemp("unsplit") / "cohort"
    return write_cohort(folder, 4, seed=3, split=(1, 0, 0), moving_spacing=(2.8, 2.8, 3.6), **size)


def layout(folder, patients):
    for name in FOLDERS[0]:
        (folder / name).mkdir(parents=True)
        for i in range(patients):
            (folder / name / f"p{i}_a.nii.gz").touch()
    return folder


# ---- real processes on a real Ray, killed


def crossval(dataset, output, **more):
    settings = TINY | {"iterations": 4, "epoch_length": 1, "batch_size": 2, "val_interval": 100}
    settings |= {"dataset_dir": dataset, "output_dir": output, "folds": 2, "cores_per_fold": 1} | more
    return ["scripts", "crossval", *flags(settings)]


def training_in(folder):
    """Process ids of what trains or evaluates in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "monai.bundle" in words and any(str(folder) in word for word in words):
            found.append(int(entry.name))
    return found


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def scores(path, **wanted):
    """Rows of a table, of one fold where it has several, without the columns that no two runs share."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == v for k, v in wanted.items())]
    return [{k: v for k, v in row.items() if k not in ("seconds", "variant", "fold")} for row in rows]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_a_killed_fold_and_a_killed_runner_leave_no_trace_in_the_tables(unsplit, tmp_path):
    pytest.importorskip("ray")
    killed, plain, told = tmp_path / "killed", tmp_path / "plain", tmp_path / "told.txt"
    first = killed / "runs" / "baseline" / "fold0"
    command = [sys.executable, "-m", *crossval(unsplit, killed, variants="baseline,delta0")]
    with told.open("w") as out:
        runner = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        wait_for(lambda: (first / "checkpoint_epoch=1.pt").exists())
        os.kill(training_in(first)[0], signal.SIGKILL)
        wait_for(lambda: "training was killed by SIGKILL" in told.read_text())
        assert runner.poll() is None  # the others go on
        wait_for(lambda: training_in(killed))
        runner.kill()
        runner.wait()
    wait_for(lambda: not training_in(killed), 120)  # nothing trains on unseen
    assert not (first / "model.pt").exists() and not (killed / "cases.csv").exists()

    again = run(*crossval(unsplit, killed, variants="baseline,delta0"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "--resume=True" in (first / LOG).read_text() and "Resumed from" in (first / LOG).read_text()
    assert len(scores(killed / "cases.csv")) == 8 and "delta0           dsc    median" in again.stdout
    assert len(list(csv.DictReader((killed / "statistics.csv").open()))) == 2 * 5  # variants, metrics

    broken = tmp_path / "broken.yaml"
    broken.write_text("precision: half\n")
    more = {"variants": f"baseline,{broken}", "only": "baseline:0,broken:0"}
    with told.open("w") as out:  # a scheduler tells the runner alone to stop
        runner = subprocess.Popen([sys.executable, "-m", *crossval(unsplit, plain, **more)], cwd=ROOT, stdout=out)
        stopped = plain / "runs" / "baseline" / "fold0"
        wait_for(lambda: (stopped / LOG).exists() and "Training:" in (stopped / LOG).read_text())
        runner.terminate()
        assert runner.wait(60) == 143
    assert not training_in(plain) and not (stopped / "model.pt").exists()
    assert "stopped by SIGTERM after step" in (stopped / LOG).read_text()
    undisturbed = run(*crossval(unsplit, plain, **more))  # one after the other, without Ray
    assert undisturbed.returncode == 1 and "error: 1 failed" in undisturbed.stderr
    assert (
        "training ended with exit code 1" in undisturbed.stdout and "error: precision is 'half'" in undisturbed.stdout
    )
    assert (plain / "runs" / "baseline" / "fold0" / DONE).exists()
    evaluation = plain / "runs" / "baseline" / "fold0" / "evaluation"
    for name in ("cases.csv", "landmarks.csv"):
        assert scores(killed / name, variant="baseline", fold="0") == scores(evaluation / name)
    a, b = (torch.load(f / "runs/baseline/fold0/model.pt", weights_only=True) for f in (killed, plain))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- small processes in their place


def a_run(folder, train="pass", evaluate="", fold=0, cases="ab"):
    """A run whose processes are lines of Python; the evaluation writes its cases.csv."""
    where = folder / "evaluation"
    lines = [HEADER, *(f"{c},{c},0.8,3,0" for c in cases)]
    tables = {"cases.csv": "\n".join(lines), "landmarks.csv": f"{LANDMARKS}\na,a,0,1,False"}
    write = f"import pathlib as p; d = p.Path({str(where)!r}); d.mkdir(exist_ok=True);"
    write += f"[(d / name).write_text(text) for name, text in {tables!r}.items()]"
    return Run("baseline", fold, str(folder), ["-c", train], ["-c", evaluate or write], ["a", "b"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_a_fold_whose_machine_dies_goes_on_on_another(tmp_path):
    """Two of Ray's nodes on this machine, a core each; one is killed while both train."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    go = tmp_path / "go"
    train = f"""
import os, pathlib, sys, time
here = pathlib.Path("{{folder}}")
(here / "checkpoint_epoch=1.pt").touch()
(here / "pid").write_text(str(os.getpid()))
print("resumed" if "--resume=True" in sys.argv else "began")
while "--resume=True" not in sys.argv and not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.1)
"""
    folders = [tmp_path / f"fold{k}" for k in range(2)]
    runs = [a_run(folder, train.format(folder=folder), fold=k) for k, folder in enumerate(folders)]
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        futures = on_ray(runs, cluster.address, 1)
        wait_for(lambda: all((folder / "pid").exists() for folder in folders), 120)
        pids = [int((folder / "pid").read_text()) for folder in folders]
        cluster.remove_node(other, allow_graceful=False)
        wait_for(lambda: sum(Path(f"/proc/{pid}").exists() for pid in pids) == 1, 120)  # nothing trains on unseen
        go.touch()
        assert [future.result(240) for future in futures.values()] == [None, None]
    finally:
        sys.modules["ray"].shutdown()
        cluster.shutdown()
    assert sorted("\nresumed" in (folder / LOG).read_text() for folder in folders) == [False, True]


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    assert run_fold(a_run(tmp_path, "print('trained')")) is None
    assert json.loads((tmp_path / DONE).read_text())["cases"] == ["a", "b"]
    log = (tmp_path / LOG).read_text()
    assert run_fold(a_run(tmp_path, "print('trained')")) is None
    assert (tmp_path / LOG).read_text() == log


def test_trained_weights_are_evaluated_and_not_trained_again(tmp_path):
    (tmp_path / "model.pt").touch()
    assert run_fold(a_run(tmp_path, "1 / 0")) is None


def test_a_checkpoint_is_resumed_from(tmp_path):
    (tmp_path / "checkpoint_epoch=3.pt").touch()
    assert run_fold(a_run(tmp_path, "import sys; sys.exit('--resume=True' not in sys.argv)")) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"train": "1 / 0"}, "training ended with exit code 1"),
        ({"train": "import os; os.kill(os.getpid(), 9)"}, "training was killed by SIGKILL"),
        ({"train": "import os; os.kill(os.getpid(), 15)"}, "stopped: training got SIGTERM"),
        ({"train": "import sys; sys.exit(143)"}, "stopped: training got SIGTERM"),
        ({"evaluate": "import sys; sys.exit(143)"}, "stopped: evaluation got SIGTERM"),
        ({"evaluate": "1 / 0"}, "evaluation ended with exit code 1"),
        ({"cases": "ac"}, "evaluated 2 cases that are not the 2 of folds.json"),
    ],
)
def test_a_failure_says_how_and_what_was_printed_last_and_leaves_no_marker(tmp_path, how, message):
    failure = run_fold(a_run(tmp_path, **how))
    assert failure.startswith(message)
    assert "1 / 0" not in how.values() or "ZeroDivisionError: division by zero" in failure.splitlines()[-1]
    assert not (tmp_path / DONE).exists()


def test_the_processes_get_their_share_of_the_cores(tmp_path):
    run_fold(a_run(tmp_path, "import os; print('threads', os.environ['OMP_NUM_THREADS'])"), threads=3)
    assert "threads 3" in (tmp_path / LOG).read_text()


def test_two_runners_never_train_one_fold_at_once(tmp_path):
    slow = "import time; print('begins', flush=True); time.sleep(0.5); print('ends', flush=True)"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.study.fold import *;"
    code += f"print(run_fold(Run(*{tuple(a_run(tmp_path, slow))!r})))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate()[0] for p in both] == [b"None\n"] * 2
    words = [w for w in (tmp_path / LOG).read_text().split("\n") if w in ("begins", "ends")]
    assert words == ["begins", "ends"]  # the second found the first's marker


def ended(value):
    future = Future()
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    return future


def test_watching_reports_each_failure_and_waits_for_all(tmp_path, capsys):
    runs = [a_run(tmp_path / str(k), fold=k) for k in range(4)]
    futures = [ended(None), ended("training ended"), ended(RuntimeError("node lost")), ended("stopped: by SIGTERM")]
    failures = watch(runs, dict(zip([("baseline", k) for k in range(4)], futures, strict=True)))
    assert list(failures.values()) == ["training ended", "RuntimeError: node lost", "stopped: by SIGTERM"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown if line.startswith("baseline")] == [
        ["baseline", "0", "done"],
        ["baseline", "1", "failed"],
        ["baseline", "2", "failed"],
        ["baseline", "3", "stopped"],
    ]


def test_progress_is_read_from_what_this_start_printed(tmp_path):
    one = a_run(tmp_path)
    assert progress(one, 0)[0] == "waiting"
    bar = "Training:  50%|█████     | 2/4 [00:01<00:03,  1.00step/s, loss=0.912]"
    (tmp_path / LOG).write_text(f"Training:   0%|   | 0/4 [00:00<?, ?step/s]\r{bar}\r")
    assert progress(one, 0) == ("training", 2, 4, "0.912", "00:03")
    assert progress(one, (tmp_path / LOG).stat().st_size)[0] == "waiting"
    assert last_lines(tmp_path / LOG).endswith(bar)
    (tmp_path / "model.pt").touch()
    assert progress(one, 0)[0] == "evaluating"


# ---- folds, commands, tables


def test_the_paper_s_76_patients_make_8_folds_of_6_and_4_of_7_that_share_nobody(tmp_path):
    dealt = deal(str(layout(tmp_path, 76)), 12, 5, r"(p\d+)_")
    assert sorted(map(len, dealt)) == [6] * 8 + [7] * 4
    assert len({patient for fold in dealt for patient in fold}) == 76
    assert all(cases == [f"{patient}_a"] for fold in dealt for patient, cases in fold.items())


def test_a_run_is_two_plain_commands_and_the_evaluation_knows_the_paper_s_networks(tmp_path):
    plan = {"folds": [{"p": ["a"]}, {"q": ["b"]}], "fold_seed": 4, "settings": {"iterations": 9, "spacing": 1.0}}
    plan["settings"]["segmentation_path"] = "/starts/{fold}.pt"
    *_, last = runs_of({"baseline": [], "delta0": overlays_of("delta0")}, plan, "/data", tmp_path)
    names = [[Path(f).name for f in eval(words[4])] for words in (last.train, last.evaluate)]
    assert names == [["train.json", "variant_delta0.yaml"], ["evaluate.json", "baseline.yaml", "variant_delta0.yaml"]]
    assert {"--fold=1", "--fold_count=2", "--fold_seed=4", "--spacing=1.0"} < set(last.train) & set(last.evaluate)
    assert "--segmentation_path='/starts/1.pt'" in last.evaluate
    assert "--iterations=9" in last.train and "--iterations=9" not in last.evaluate
    assert f"--ckpt_path='{tmp_path}/runs/delta0/fold1/model.pt'" in last.evaluate
    plan["settings"]["segmentation_path"] = ["/starts/{fold}.pt", "/other.pt"]  # several networks, averaged
    *_, last = runs_of({"baseline": []}, plan, "/data", tmp_path)
    assert "--segmentation_path=['/starts/1.pt', '/other.pt']" in last.evaluate


def test_parts_of_a_variant_are_joined_in_their_order(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("alpha: 0.2\n")
    names = [path.name for path in overlays_of(f"baseline+delta0+segmentation+{mine}")]
    assert names == ["variant_delta0.yaml", "segmentation.yaml", "mine.yaml"]
    assert name_of(f"delta0+{mine}") == "delta0+mine" and name_of("baseline") == "baseline"


def test_what_learns_nothing_is_only_evaluated_and_an_overlay_names_the_one_that_scores_in_its_place(tmp_path):
    plan = {"folds": [{"p": ["a"]}], "fold_seed": 0, "settings": {"iterations": 9}}
    variants = {
        name: overlays_of(name) for name in ("nmi+centroids", "segmentation+fine_tune", "second_stage+mean_field")
    }
    pairwise, start, field = runs_of(variants, plan, "/data", tmp_path)
    assert pairwise.train == []
    scored = [[Path(file).name for file in eval(run.evaluate[4])] for run in (pairwise, start, field)]
    assert scored[0] == ["evaluate.json", "baseline.yaml", "variant_nmi.yaml", "variant_centroids.yaml"]
    assert scored[1] == ["evaluate.json", "segmentation_weights.yaml", "fine_tune.yaml"]
    assert scored[2] == ["evaluate.json", "second_stage_weights.yaml", "variant_mean_field.yaml"]
    assert progress(pairwise, 0)[0] == "waiting"
    Path(pairwise.folder).mkdir(parents=True)
    pairwise.log.write_text("$ python")
    assert progress(pairwise, 0)[0] == "evaluating"


def test_a_patient_s_tre_is_over_all_landmarks_of_all_its_cases_without_the_gland():
    rows = [
        ("a1", "a", 0, 9),
        ("a1", "a", 1, 3),
        ("a2", "a", 0, 9),
        ("a2", "a", 1, 4),
        ("a2", "a", 2, "nan"),
        ("b", "b", 0, 1),
    ]
    landmarks = [dict(zip(LANDMARKS.split(","), (*map(str, row), str(row[3] == "nan")), strict=True)) for row in rows]
    a, b = patients("baseline", landmarks)
    assert (a["cases"], a["landmarks"], a["empty_warped"]) == (2, 2, 1) and a["tre_mm"] == pytest.approx(12.5**0.5)
    assert b["landmarks"] == 0 and math.isnan(b["tre_mm"])


def test_tables_hold_the_variants_that_are_complete_and_compare_them_with_the_first(tmp_path):
    runs = []
    for variant, dsc in (("baseline", 0.8), ("delta0", 0.7), ("l2", 0.9)):
        for fold in range(2):
            folder = tmp_path / "runs" / variant / f"fold{fold}"
            (folder / "evaluation").mkdir(parents=True)
            rows = [f"{c}{fold},{c},{dsc + i / 100},{'' if c == 'b' else 3 + i},0" for i, c in enumerate("abcd")]
            (folder / "evaluation" / "cases.csv").write_text("\n".join([HEADER, *rows]))
            (folder / "evaluation" / "landmarks.csv").write_text(f"{LANDMARKS}\na{fold},a,1,1.5,False\n")
            if (variant, fold) != ("l2", 1):
                (folder / DONE).touch()
            runs.append(Run(variant, fold, str(folder), [], [], []))
    text = collect(runs, tmp_path)
    cases, landmarks, found = (
        list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("cases", "landmarks", "statistics")
    )
    assert len(cases) == 16 and list(cases[0])[:4] == ["variant", "fold", "case", "patient"]
    assert [(row["variant"], row["fold"]) for row in landmarks] == [
        ("baseline", "0"),
        ("baseline", "1"),
        ("delta0", "0"),
        ("delta0", "1"),
    ]
    assert [(row["variant"], row["metric"], row["against"]) for row in found] == [
        ("baseline", "tre_mm", ""),
        ("baseline", "dsc", ""),
        ("delta0", "tre_mm", "baseline"),
        ("delta0", "dsc", "baseline"),
    ]
    assert float(found[3]["difference"]) == pytest.approx(-0.1)
    assert (found[2]["pairs"], found[2]["left_out"]) == ("6", "b0 b1")
    assert "left out: b0 b1" in text and "l2" not in text


# ---- refusals


def refused(message, *arguments, **named):
    with pytest.raises(InputError) as error:
        cross_validate(*arguments, **named)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_variants_settings_and_folds_are_refused(tmp_path):
    data, out = str(layout(tmp_path / "data", 4)), str(tmp_path / "out")
    refused("delta7: no such variant; known are baseline, affine_field, alpha001", data, out, 2, ["delta7"])
    refused("two of one name", data, out, 2, ["baseline", "baseline"])
    refused(
        "--iteratons: no such option of crossval; did you mean --iterations?",
        data,
        out,
        2,
        ["baseline"],
        settings={"iteratons": 5},
    )
    refused("--resume: is set for each fold", data, out, 2, ["baseline"], settings={"resume": True})
    refused("5 folds need at least 2 folds and as many patients", data, out, 5, ["baseline"])
    refused("--only baseline:2: give VARIANT:FOLD, folds from 0 to 1", data, out, 2, ["baseline"], only=["baseline:2"])
    assert not Path(out).exists()


def test_a_setting_that_takes_a_variant_s_own_away_is_said(tmp_path, capsys):
    """Global-Net with the Baseline's learning rate diverges, and its row then says nothing about the network."""
    done = tmp_path / "out" / "runs" / "global_net" / "fold0" / DONE
    done.parent.mkdir(parents=True)
    done.touch()
    place = {"dataset_dir": str(layout(tmp_path / "data", 3)), "output_dir": str(tmp_path / "out"), "fold_count": 3}
    variants, settings = ["baseline", "global_net"], {"learning_rate": 1e-3, "initial_channels": 8}
    assert cross_validate(**place, variants=variants, only=["global_net:0"], settings=settings) == 0
    said = capsys.readouterr().out
    assert "global_net sets learning_rate to 1e-06 itself; --learning_rate 0.001 overrides it" in said
    assert said.count("overrides") == 1


def test_a_restart_with_other_patients_seed_or_settings_is_refused(tmp_path):
    data = str(layout(tmp_path / "data", 4))
    plan = {"fold_seed": 0, "settings": {"iterations": 5}, "folds": deal(data, 2, 0, None)}
    write_plan(tmp_path / "folds.json", plan)
    write_plan(tmp_path / "folds.json", plan)
    for changed, message in (({"fold_seed": 1}, "other fold_seed"), ({"settings": {}}, "other settings")):
        with pytest.raises(InputError, match=message):
            write_plan(tmp_path / "folds.json", plan | changed)
    for name in FOLDERS[0]:
        (tmp_path / "data" / name / "p3_a.nii.gz").unlink()
    with pytest.raises(InputError, match=r"folds.json: made of other patients .*\(1 differ, for example p3_a\)"):
        write_plan(tmp_path / "folds.json", plan | {"folds": deal(data, 2, 0, None)})


def test_without_ray_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-crossval.txt.* --only baseline:0"):
        on_ray([a_run(tmp_path)], None, None)
