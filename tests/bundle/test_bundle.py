"""The bundle as MONAI's own tools see it, typed as its users type it, from the bundle's folder and from others."""

import csv
import json
import locale
import math
import shutil
import sys

import pytest
import torch
import yaml
from conftest import QUICK, ROOT, TINY, flags, logged, run
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow

from scripts.data.datalist import KEYS
from scripts.network.networks import SummedDDFNet
from scripts.network.segmentation import GlandNetwork
from scripts.network.wrapped import SecondStageNet
from scripts.study.plan import merged

CONFIGS = ROOT / "configs"
# the last needs elastix
REGISTER_ONLY = {
    "second_stage_weights.yaml",
    "initial_transform_only.yaml",
    "segment.yaml",
    "segmentation_weights.yaml",
    "variant_rigid.yaml",
}
BELOW = {  # the overlay that one stands upon
    "fine_tune.yaml": "segmentation.yaml",
    "own_pairs.yaml": "segmentation.yaml",
    "variant_affine_field.yaml": "second_stage.yaml",
    "variant_mean_field.yaml": "second_stage.yaml",
}
SHIPPED = {  # an item of inference.json -> its weights, and what it is
    "network_def": (ROOT / "models" / "model.pt", SummedDDFNet(8, in_channels=4).eval()),
    "second_stage_def": (ROOT / "models" / "second_stage.pt", SecondStageNet().eval()),
}
OVERLAYS = [path for path in CONFIGS.glob("*.yaml") if not path.is_symlink()]  # a link is an old name of another
OVERLAYS = sorted({p.name for p in OVERLAYS if merged([p]).get("iterations") != 0} - REGISTER_ONLY)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A process state in which the bundle's code is on no path and not yet imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    saved = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "scripts"}
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "scripts"]:
        del sys.modules[name]
    sys.modules.update(saved)


@pytest.fixture(scope="module")
def two_pairs(cohort, tmp_path_factory):
    """A datalist of one pair to train on and one to validate with."""
    pairs = {s: [{k: str(next((cohort / s / f"{k}s").iterdir())) for k in KEYS}] for s in ("train", "val")}
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(pairs))
    return str(path)


def test_training_leaves_weights_checkpoints_metrics_and_tensorboard_events(trained):
    names = [p.name for p in trained.iterdir()]
    assert "model.pt" in names and "checkpoint_epoch=1.pt" in names and "cases.csv" in names
    shown, (case,) = logged(trained), csv.DictReader((trained / "cases.csv").open())
    assert set(shown["train_loss"]) == {1, 2} and all(math.isfinite(v) for v in shown["train_loss"].values())
    assert shown["dsc"][1] == pytest.approx(float(case["dsc"]), abs=1e-4)
    weights = torch.load(trained / "model.pt", weights_only=True)
    assert weights["down.0.conv.conv.weight"].shape == (4, 2, 7, 7, 7)


def test_the_learned_start_trains_from_the_command_line_and_registers_alone(cohort, tmp_path):
    settings = {"dataset_dir": cohort, "output_dir": tmp_path, "ckpt_dir": tmp_path, "phantom_pool": 2} | QUICK
    settings |= {"phantom_share": 0.5, "initial_weights": ROOT / "models" / "start_phantoms.pt"}
    files = str([str(CONFIGS / "train.json"), str(CONFIGS / "segmentation.yaml")])
    result = run("monai.bundle", "run", "--config_file", files, *flags(settings), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    settings = {
        "dataset_dir": cohort,
        "output_dir": tmp_path / "out",
        "segmentation_path": tmp_path / "segmentation.pt",
    }
    for config in ("inference.json", "evaluate.json"):
        files = str([str(CONFIGS / config), str(CONFIGS / "initial_transform_only.yaml")])
        result = run("monai.bundle", "run", "--config_file", files, *flags(settings), cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/qc.json")]
    assert record["initial_transform"] == "learned" and len(record["segmentation_weights_sha256"][0]) == 64
    assert record["weights"] is record["weights_sha256"] is None
    assert record["max_displacement_mm"] == pytest.approx(0, abs=1e-3) and record["folded_percent"] == 0
    (row,) = csv.DictReader((tmp_path / "out" / "cases.csv").open())
    assert row["dsc"] == row["dsc_before"] and float(row["dsc"]) > 0.3


def test_training_with_a_learned_start_sees_the_glands_and_fine_tuning_starts_where_the_weights_left_off(
    two_pairs, tmp_path
):
    network = GlandNetwork()
    torch.nn.init.constant_(network.unfold.conv_block.bias, 5.0)  # everything is gland
    torch.save(network.state_dict(), tmp_path / "segmentation.pt")
    settings = QUICK | {"dataset_dir": two_pairs, "batch_size": 1}
    settings |= {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    settings |= {
        "initial_transform": "learned",
        "spacing": "gland",
        "segmentation_path": str(tmp_path / "segmentation.pt"),
    }
    workflow = ConfigWorkflow(str(CONFIGS / "train.json"), logging_file=False, **settings)
    workflow.initialize()
    workflow.run()
    assert workflow.network_def.down[0].conv.conv.weight.shape[1] == 4
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    settings |= {"initial_weights": str(tmp_path / "model.pt"), "learning_rate": 0.0, "val_interval": 2}
    settings |= {"output_dir": str(tmp_path / "again"), "ckpt_dir": str(tmp_path / "again")}
    again = ConfigWorkflow(str(CONFIGS / "train.json"), logging_file=False, **settings)
    again.initialize()
    again.run()
    found = torch.load(tmp_path / "again" / "model.pt", weights_only=True)
    assert all(torch.equal(v, found[k]) for k, v in weights.items() if "norm.running" not in k and "tracked" not in k)


def test_resume_continues_from_the_newest_checkpoint(trained, cohort, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    folder = str(tmp_path / "run")
    settings = {"dataset_dir": str(cohort), "output_dir": folder, "ckpt_dir": folder, "resume": True} | QUICK
    workflow = ConfigWorkflow(str(CONFIGS / "train.json"), logging_file=False, **(settings | {"iterations": 4}))
    workflow.initialize()
    workflow.run()
    assert workflow.trainer.state.iteration == 4
    assert (tmp_path / "run" / "checkpoint_epoch=2.pt").exists()


def test_evaluation_writes_one_row_per_case_and_per_landmark(trained, cohort, tmp_path):
    settings = {"dataset_dir": cohort, "output_dir": tmp_path, "ckpt_path": trained / "model.pt"} | TINY
    result = run("monai.bundle", "run", "--config_file", "configs/evaluate.json", *flags(settings))
    assert result.returncode == 0, result.stderr[-3000:]
    cases = list(csv.DictReader((tmp_path / "cases.csv").open()))
    landmarks = list(csv.DictReader((tmp_path / "landmarks.csv").open()))
    assert len(cases) == 1 and len(landmarks) >= 5
    assert 0 < float(cases[0]["dsc"]) < 1 and float(cases[0]["tre_before_mm"]) > 0


def test_inference_registers_every_pair_of_a_folder(trained, cohort, tmp_path):
    settings = {"dataset_dir": cohort, "output_dir": tmp_path, "ckpt_path": trained / "moving_model.pt"} | TINY
    config = str(CONFIGS / "inference.json")
    result = run("monai.bundle", "run", "--config_file", config, *flags(settings), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (case,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert {p.name for p in case.iterdir()} == {
        "warped_moving_image.nii.gz",
        "warped_moving_label.nii.gz",
        "ddf.nii.gz",
        "overview.png",
        "qc.json",
        "qa.json",
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_overlay_trains_a_step_and_ten_on_a_gpu(name, two_pairs, tmp_path):
    steps = 10 if torch.cuda.is_available() else 1
    settings = {"dataset_dir": two_pairs, "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)} | QUICK
    settings |= {"phantom_pool": 2, "batch_size": 1, "iterations": steps, "epoch_length": steps}
    below = [str(CONFIGS / BELOW[name])] if name in BELOW else []
    files = [str(CONFIGS / "train.json"), *below, str(CONFIGS / name)]
    workflow = ConfigWorkflow(files, logging_file=False, **settings)
    workflow.initialize()
    workflow.run()
    assert workflow.trainer.state.iteration == steps
    assert math.isfinite(workflow.trainer.state.output["loss"])
    assert all(parameter.isfinite().all() for parameter in workflow.trainer.network.parameters())


@pytest.mark.parametrize(("name", "alpha"), [("variant_global_net", 0), ("variant_composite_net", 0.5)])
def test_affine_networks_train_with_the_papers_learning_rate_and_alpha(name, alpha):
    settings = ConfigParser.load_config_files([str(CONFIGS / "train.json"), str(CONFIGS / f"{name}.yaml")])
    assert (settings["learning_rate"], settings["alpha"]) == (1e-6, alpha)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.[jy]*")), ids=lambda p: p.name)
def test_each_config_is_read_where_text_is_ascii(path):
    # MONAI opens configs in the locale's encoding, and reading or writing DICOM can leave a process in the C locale
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "C")
        assert ConfigParser.load_config_file(str(path))
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_properties_of_training_are_complete_from_another_folder(cohort, elsewhere):
    settings = {"dataset_dir": str(cohort)} | TINY
    train = str(CONFIGS / "train.json")
    workflow = create_workflow(config_file=train, workflow_type="train", logging_file=False, **settings)
    assert workflow.check_properties() == []
    assert workflow.network_def.eval()(torch.rand(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    assert workflow.bundle_root == str(ROOT)


def test_the_second_stage_exports_to_torchscript_of_any_size(tmp_path):
    weights, network = SHIPPED["second_stage_def"]
    arguments = {
        "filepath": tmp_path / "second_stage.ts",
        "ckpt_file": weights,
        "meta_file": CONFIGS / "metadata.json",
        "config_file": CONFIGS / "inference.json",
    }
    result = run("monai.bundle", "ckpt_export", "second_stage_def", *flags(arguments), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    network.load_state_dict(torch.load(weights, weights_only=True))
    scripted = torch.jit.load(tmp_path / "second_stage.ts")
    for size in ((32, 32, 32), (16, 24, 32)):
        image = torch.rand(1, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_network_exports_to_onnx_and_onnxruntime_computes_the_same(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    weights, network = SHIPPED[name]
    arguments = {
        "filepath": tmp_path / "model.onnx",
        "ckpt_file": weights,
        "meta_file": CONFIGS / "metadata.json",
        "config_file": CONFIGS / "inference.json",
        "input_shape": [1, 4, 32, 32, 32],  # the grid measured by the gland
    }
    result = run("monai.bundle", "onnx_export", name, *flags(arguments), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    network.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.rand(1, 4, 32, 32, 32)
    (found,) = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"image": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(image), rtol=1e-4, atol=1e-4)


def test_mlflow_logs_a_run(cohort, tmp_path):
    pytest.importorskip("mlflow", reason="some 50 packages that only its users need: pip install mlflow")
    settings = {"dataset_dir": cohort, "output_dir": tmp_path, "ckpt_dir": tmp_path} | QUICK
    files = ["--config_file", "configs/train.json", "--tracking", "mlflow"]
    result = run("monai.bundle", "run", *files, *flags(settings))
    assert result.returncode == 0, result.stderr[-3000:]
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlruns.db")
    (found,) = mlflow.search_runs(search_all_experiments=True).to_dict("records")
    client, shown = mlflow.MlflowClient(), logged(tmp_path)
    for tag in ("train_loss", "dsc"):
        history = {metric.step: metric.value for metric in client.get_metric_history(found["run_id"], tag)}
        assert history == pytest.approx(shown[tag], rel=1e-6)


def test_metadata_lists_the_pinned_versions():
    metadata = json.loads((ROOT / "metadata.json").read_text())
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)
    assert (metadata["monai_version"], metadata["pytorch_version"]) == (pins["monai"], pins["torch"])
    assert all(pins[name] == version for name, version in metadata["required_packages_version"].items())


def test_the_three_configs_share_their_common_items():
    train, evaluate, inference = (
        json.loads((CONFIGS / f"{n}.json").read_text()) for n in ("train", "evaluate", "inference")
    )
    own = {"output_dir", "handlers", "datalist", "run"}
    own |= {
        "renamed",
        "initialize",
        "dataloader",
        "checked_output",
        "postprocessing",
        "num_workers",
    }  # inference goes on after a refusal, and its fields have a grid of their own; training has two datalists, and
    # processes that make phantoms where the others have threads that read
    refined = {
        "inferer",
        "segment_glands",
        "network_def",
        "network",
    }  # prediction has the second stage, or fits the field to the glands found; training does not
    # training starts as the paper's Baseline, the others as the weights in models/ want it
    for overlay, config in (("baseline", train), ("two_stage", evaluate)):
        settings = yaml.safe_load((CONFIGS / f"{overlay}.yaml").read_text())
        shared = ("initial_transform", "spacing", "initial_channels")
        defaults = {k: str(config[k]).removeprefix("$@start or ").strip("'") for k in shared}
        own |= {k for k in shared if str(settings[k]) == defaults[k]}
    assert own >= {"initial_transform", "spacing", "initial_channels"}
    for a, b, apart in ((train, inference, refined), (train, evaluate, refined), (evaluate, inference, set())):
        assert all(a[k] == b[k] for k in set(a) & set(b) - own - apart)


def test_the_second_stage_registers_with_the_network_that_it_trained():
    trained, used = (yaml.safe_load((CONFIGS / f"second_stage{kind}.yaml").read_text()) for kind in ("", "_weights"))
    shared = ("network_def", "initial_channels", "sees_images", "summands")
    assert all(trained[name] == used[name] for name in shared)


def test_default_hyper_parameters_are_the_papers():
    train = json.loads((CONFIGS / "train.json").read_text())
    assert train["scales"] == [0, 1, 2, 4, 8, 16, 32]
    names = ("initial_channels", "spacing", "alpha", "learning_rate", "batch_size", "augmentation", "bending")
    assert [train[n] for n in names] == [32, 0.8, 0.5, 1e-5, 4, 0.1, "label-reg"]


def test_bad_data_ends_a_bundle_run_with_one_line(tmp_path):
    result = run("monai.bundle", "run", "--config_file", "configs/train.json", "--dataset_dir", str(tmp_path / "none"))
    assert result.returncode != 0
    assert (
        result.stderr.strip().splitlines()[-1]
        == f"error: {tmp_path / 'none'}: folder not found; pass --dataset_dir DIR"
    )
    assert "Traceback" not in result.stderr
