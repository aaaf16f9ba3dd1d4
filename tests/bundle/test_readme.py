"""The commands of the README and the guides do what they say: all are parsed, and most run, from a copy of the bundle.

The copy's folder holds what the commands name: `DIR`, five small phantoms, `SINGLE`, the MR of some of them,
`mr.nii.gz`, `trus.nii.gz` and points. A command is run as it stands, with the settings of `SHRUNK` appended: fewer
steps of a smaller network. What is not run is in `ELSEWHERE`, with the test that does run it, or why none can.
"""

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import warm
from conftest import QUICK, ROOT, TINY, flags
from torch.distributed.run import get_args_parser

from scripts import __main__ as cli
from scripts.data.formats import forward, read_transform
from scripts.data.meshes import Surface, write_surface
from scripts.network.fields import world_grid
from scripts.registration.precision import computes_bfloat16
from scripts.study.plan import merged, overlays_of

PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "README.md",
    ROOT / "docs" / "transforms.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
ELSEWHERE = {  # how a command begins -> why it is not run here
    "make": "the Makefile: it sets up an environment of its own",
    ".": "likewise",
    "pip": "the environment is there",
    "ray": "there is one machine",
    "torchrun": "tests/training/test_distributed.py",
    "python integrations/deploy/app.py": "tests/bundle/test_deploy.py, in an environment of its own",
    "python -m scripts register --moving MR_SERIES": "tests/data/test_dicom_registration.py",
    "python -m scripts apply --transform out/ddf.nii.gz --moving seg.dcm": "tests/registration/test_targets.py",
    "python -m scripts learn": "tests/study/test_own_pairs.py",
    "python -m scripts register --moving mr.nii.gz --fixed trus.nii.gz --output_dir out --overlay learned": "likewise",
    "python -m scripts prepare": "tests/cohorts",
    "python -m scripts segment DIR/fixed_images": "tests/registration/test_segment.py, of folders",
    "python -m scripts crossval": "tests/study/test_crossval.py",
    "python -m scripts report": "tests/study/test_report.py",
    "python -m scripts sweep": "tests/phantoms/test_sweep.py",
    "python -m monai.bundle ckpt_export": "tests/bundle/test_bundle.py",
    "python -m monai.bundle onnx_export": "tests/bundle/test_bundle.py",
    "python -m monai.bundle trt_export": "wants a GPU and TensorRT",
    "python -m monai.bundle download": "tests/bundle/test_release.py",
    "python -m monai.bundle run --config_file bundles/": "tests/bundle/test_release.py",
    "python -m monai.bundle run --config_file configs/inference.json": "the last block of the pipeline guide does",
    "python -m monai.bundle run --config_file ['configs/train.json','configs/variant_": "tests/bundle/test_bundle.py",
}
SHRUNK = {  # a config or an overlay -> what is appended to a command that names it; `register` runs inference.json
    "inference.json": {"refine_steps": 2},
    "evaluate.json": {"refine_steps": 2},
    "train.json": {k: v for k, v in QUICK.items() if k != "initial_transform"},
    "segmentation.yaml": {"phantom_pool": 2, "spacing": 0.8},
    "second_stage_weights.yaml": {"initial_channels": QUICK["initial_channels"]},
    "baseline.yaml": {k: v for k, v in TINY.items() if k != "initial_transform"} | {"refine_steps": 0},
}


def commands(page):
    """The commands of a page's ```sh blocks, each a list of words; variables set before are replaced by their value."""
    found, variables = [], {}
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            assigned = re.fullmatch(r'(\w+)="(.*)"', line.strip())
            if assigned:
                variables |= [assigned.groups()]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            found += [words] if words else []
    return found


def elsewhere(words):
    """Whether a command is one of `ELSEWHERE`."""
    return " ".join(words).startswith(tuple(ELSEWHERE))


def options(words):
    """Name -> value of the --flags among words, which also know --name=value."""
    pairs = [word[2:].partition("=") for word in words if word.startswith("--")]
    after = {word[2:]: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    return {name: value or after.get(name, "") for name, _, value in pairs}


def config_files(value):
    """The files of --config_file, one or a list; those of a downloaded bundle are this bundle's."""
    files = ast.literal_eval(value) if value.startswith("[") else [value]
    return [ROOT / file.removeprefix("bundles/prostate_mr_trus_registration/") for file in files]


def check(words):
    """Program, verb, flags, config files and settings exist."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.module and launch.training_script == "monai.bundle"
        check(["python", "-m", launch.training_script, *launch.training_script_args])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(w for w in words[1:] if "=" not in w) <= set(targets)
    elif words[0] == "pip":
        assert all((ROOT / file).is_file() for flag, file in zip(words, words[1:], strict=False) if flag == "-r")
    elif words[:2] == ["python", "-m"]:
        module, verb, given = words[2], words[3], options(words[4:])
        owner = {"scripts": cli, "monai.bundle": monai.bundle}[module]
        known = inspect.signature(getattr(owner, verb)).parameters
        settings = set(given) - set(known)
        if "config_file" in given:
            files = config_files(given["config_file"])
        elif settings:
            assert "settings" in known, f"{verb} has no {settings}"
            files = [ROOT / "configs" / ("train.json" if verb == "crossval" else "inference.json")]
        assert not settings or {s.split("#")[0] for s in settings} <= set(merged(files)), f"{words}: {settings}"
        for variant in given.get("variants", "").split(",") if "variants" in given else []:
            assert overlays_of(variant) or variant == "baseline"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert elsewhere(words), f"{words}: no such command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_commands_of_a_page_name_exists(page):
    for words in commands(page):
        check(words)


@pytest.fixture(scope="module")
def bundle(cohort, tmp_path_factory):
    """A copy of the bundle, and in its folder the files that the commands name."""
    folder = tmp_path_factory.mktemp("bundle")
    for part in ("configs", "scripts", "models"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(cohort, folder / "DIR")
    for part, source in (("images", "moving_images"), ("labels", "moving_labels")):
        shutil.copytree(cohort / "train" / source, folder / "SINGLE" / part)
    (pair,) = (cohort / "test" / "fixed_images").iterdir()
    for name, source in (("mr", "moving_images"), ("trus", "fixed_images"), ("zones", "moving_labels")):
        shutil.copy(cohort / "test" / source / pair.name, folder / f"{name}.nii.gz")
    middles = []
    for name, flip in (("mr", (1, 1, 1)), ("trus", (-1, -1, 1))):
        image = nib.load(folder / f"{name}.nii.gz")
        centre = image.affine @ [*((n - 1) / 2 for n in image.shape), 1]
        middles.append([c * sign for c, sign in zip(centre[:3].tolist(), flip, strict=True)])
    point = {"id": "1", "label": "T", "position": middles[0]}
    markup = {"type": "Fiducial", "coordinateSystem": "RAS", "coordinateUnits": "mm", "controlPoints": [point]}
    (folder / "targets.mrk.json").write_text(json.dumps({"markups": [markup]}))
    (folder / "seeds.csv").write_text("x,y,z\n" + ",".join(map(str, middles[1])) + "\n")  # LPS
    (folder / "spheres.csv").write_text(
        "name,x,y,z,radius\nT," + ",".join(map(str, [-middles[0][0], -middles[0][1], middles[0][2], 5])) + "\n"
    )
    corners = np.array(middles[0]) + 4 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    write_surface(folder / "lesion.stl", Surface(corners, faces))
    return folder


def test_the_commands_run(bundle):
    """In the order of the pages, each once; what one leaves is there for the next."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = []
    for words in sum(map(commands, PAGES), []):
        if elsewhere(words) or words in done:
            continue
        shrunk = {}
        given = "configs/inference.json" if words[3:4] == ["register"] else "[]"
        for file in config_files(options(words).get("config_file", given)):
            shrunk |= SHRUNK.get(file.name, {})
        command = shlex.join([*words, *flags(shrunk)])
        if words[:2] == ["python", "-m"]:
            result = warm.run(*shlex.split(command)[2:], cwd=bundle)
        else:
            typed, said = ["bash", "-c", command], {"capture_output": True, "text": True}
            result = subprocess.run(typed, cwd=bundle, env=environment, **said, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
        done.append(words)
    left = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    wanted = {"out/ddf.nii.gz", "out/overview.png", "out/qc.json", "runs/train/model.pt"}
    wanted |= {"runs/segmentation/segmentation.pt", "gland.nii.gz"}
    wanted |= {
        "lesion_on_trus.stl",
        "spheres_on_trus.csv",
        "eval/cases.csv",
        "mr_on_trus.nii.gz",
        "zones_on_trus.nii.gz",
        "on_trus.mrk.json",
        "on_mr.csv",
    }
    assert wanted <= left and len(done) >= 10


SMALLER = {  # of the plain training loop; the other blocks run as they are
    "initial_channels=32": "initial_channels=4",
    "spacing=0.8": "spacing=4.0",
    "batch_size=4, epoch_length=500": "batch_size=2, epoch_length=2",
    "range(200)": "range(1)",
}


@pytest.fixture
def modules_of_its_own():
    """What is imported from a copy of the bundle is forgotten, and this bundle's modules are as they were."""

    def ours():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"}

    before = ours()
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def test_the_python_of_the_pipeline_guide_runs(bundle, monkeypatch, modules_of_its_own):
    """Each block by itself; `BUNDLE` is the copy, `DIR` and the images lie in the working folder."""
    page = (ROOT / "docs" / "guides" / "pipeline.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3 and all(blocks[0].count(text) == 1 for text in SMALLER)
    for text, smaller in SMALLER.items():
        blocks[0] = blocks[0].replace(text, smaller)
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = []
    for block in blocks:
        found.append({})
        exec(compile(block.replace("BUNDLE", str(bundle)), "pipeline.md", "exec"), found[-1])
    assert found[0]["loss"].isfinite() and (bundle / "model.pt").is_file()
    (by_config,) = (bundle / "out").glob("*/ddf.nii.gz")
    pair = found[1]["pair"]
    x = world_grid(pair["displacement"].shape[1:], pair["field_affine"])
    apart = forward(read_transform(by_config), x)[0] - x - pair["displacement"]
    rounding = 0.2 if computes_bfloat16(torch.device("cpu")) else 1e-3  # mm: the config's network is in bfloat16 there
    assert apart.abs().max() < rounding  # the transforms of the guide are those of the config
