"""Every command with files and folders of odd names: read as they are called, written where it was said."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from scripts import __main__ as cli
from scripts.bundle.workflow import run_config
from scripts.data.datalist import RESULTS
from scripts.data.meshes import Surface, write_surface

CHEAP = {"initial_transform": "centre", "spacing": 4.0, "refine_steps": 0, "use_network": False, "weights": None}
CHEAP |= {"glands": False}
PLACES = ["2024_01_05", "12,34 us#2 ~é", "$x", "1e5"]


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs a command as if its words had been typed; returns its exit code and the last line on stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["scripts", *map(str, words)])
        monkeypatch.setattr(cli.gc, "freeze", lambda: None)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err.strip().split("\n")[-1]
        return code, said.split("\r")[-1]  # a bar of progress, on a slow machine

    return run


def options(**given):
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def images(cohort, tmp_path, monkeypatch):
    """A working folder with a pair."""
    monkeypatch.chdir(tmp_path)
    for side in ("moving", "fixed"):
        shutil.copy(next((cohort / "test" / f"{side}_images").iterdir()), f"{side}.nii.gz")
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_every_command_takes_names_as_they_are(place, images, typed):
    os.mkdir(place)
    moving, fixed = f"{place}/moving {place}.nii.gz", f"{place}/{place}.nii.gz"
    shutil.copy("moving.nii.gz", moving)
    shutil.copy("fixed.nii.gz", fixed)
    out = f"{place}/{place} out"
    assert typed("register", *options(moving=moving, fixed=fixed, output_dir=out, **CHEAP))[0] == 0
    told = options(moving=moving, fixed=fixed, output_dir=f"{place}/none", write_spread=True, **CHEAP)
    code, said = typed("register", *told)
    assert code == 1 and "write_spread: these weights are of no ensemble" in said
    left = set(os.listdir(out))
    assert {"ddf.nii.gz", "qc.json"} <= left <= set(RESULTS)
    assert json.loads(open(f"{out}/qc.json").read())["case"] == place
    field = f"{place}/1e3"
    shutil.copy(f"{out}/ddf.nii.gz", f"{field}.nii.gz")
    chain = f"{out}/ddf.nii.gz,{field}.nii.gz"
    assert typed("apply", *options(transform=chain, moving=moving, output=f"{place}/w.nii.gz"))[0] == 0
    os.mkdir(f"{place}/many")
    shutil.copy(moving, f"{place}/many/{place}.nii.gz")
    assert typed("apply", *options(transform=chain, moving=f"{place}/many", output=f"{place}/2_0"))[0] == 0
    assert os.listdir(f"{place}/2_0") == [f"{place}.nii.gz"]
    with open(f"{place}/p.csv", "w") as file:
        file.write("x,y,z\n0,0,0\n")
    points = options(transform=chain, points=f"{place}/p.csv", points_from="fixed", coordinates="RAS")
    assert typed("apply", *points, "--output", f"{place}/q.csv")[0] == 0
    image = sitk.ReadImage(fixed)
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    write_surface(f"{place}/{place}.stl", Surface(middle * np.array([-1, -1, 1]) + np.eye(3), np.array([[0, 1, 2]])))
    points = options(transform=f"{out}/ddf.nii.gz", points=f"{place}/{place}.stl", points_from="fixed")
    assert typed("apply", *points, "--output", f"{place}/on {place}.stl")[0] == 0
    assert typed("invert", *options(transform=chain, reference=moving, output=f"{place}/i.nii.gz"))[0] == 0
    np.save(f"{place}/s.npy", np.random.default_rng(0).integers(0, 255, (12, 20, 30)).astype(np.uint8))
    with open(f"{place}/1_0.csv", "w") as file:
        csv.writer(file).writerows([["angle_deg"], *([str(2.0 * n)] for n in range(12))])
    sweep = options(frames=f"{place}/s.npy", angles=f"{place}/1_0.csv", axis_offset=10, pixel_spacing="[1,1]")
    assert typed("sweep", *sweep, "--output", f"{place}/sweep.nii.gz")[0] == 0
    data = f"{place}/3_0"
    for side, file in (("moving", moving), ("fixed", fixed)):
        os.makedirs(f"{data}/{side}_images")
        shutil.copy(file, f"{data}/{side}_images/{place}.nii.gz")
    assert typed("check", data, "--labels", "False", "--num_workers", "0")[0] == 0
    run_config("inference.json", dataset_dir=str(images / data), output_dir=str(images / place / "all#1"), **CHEAP)
    assert (
        set(os.listdir(f"{place}/all#1")) == {place, "index.html"} and set(os.listdir(f"{place}/all#1/{place}")) == left
    )
    assert sorted(os.listdir(".")) == sorted(["moving.nii.gz", "fixed.nii.gz", place])


@pytest.mark.parametrize("place", PLACES)
def test_prepare_takes_names_as_they_are(place, cohort, tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir(place)
    line = {"case": place}
    for side in ("moving", "fixed"):
        for what in ("image", "label"):
            line[f"{side}_{what}"] = f"{place} {side} {what}.nii.gz"
            shutil.copy(next((cohort / "test" / f"{side}_{what}s").iterdir()), f"{place}/{line[f'{side}_{what}']}")
    with open(f"{place}/{place}.csv", "w", newline="") as file:
        csv.writer(file).writerows([line.keys(), line.values()])
    words = options(output_dir=f"{place} out", mapping=f"{place}/{place}.csv", num_workers=0)
    assert typed("prepare", "folder", place, *words)[0] == 0
    assert os.listdir(f"{place} out/fixed_labels") == [f"{place}.nii.gz"]
    assert sorted(os.listdir(".")) == sorted([place, f"{place} out"])


def test_links_are_read_by_the_name_that_says_what_they_are(images, typed):
    """A MetaImage and its voxels in a store of keys, as git-annex has it, and a link without a suffix."""
    sitk.WriteImage(sitk.ReadImage("moving.nii.gz"), "mr.mhd")
    os.makedirs("store/1")
    os.rename("mr.mhd", "store/1/key")
    os.rename("mr.raw", "store/other")
    os.rename("fixed.nii.gz", "store/trus.nii.gz")
    os.symlink("store/1/key", "mr.mhd")
    os.symlink("store/other", "mr.raw")
    os.symlink("store/trus.nii.gz", "trus")
    assert typed("register", *options(moving="mr.mhd", fixed="trus", output_dir="out", **CHEAP))[0] == 0
    os.rename("out/ddf.nii.gz", "store/field.nii.gz")
    os.symlink("store/field.nii.gz", "field")
    assert typed("apply", *options(transform="field", moving="mr.mhd", output="w.nii.gz"))[0] == 0
    assert (
        typed("apply", *options(transform="field", moving="moving.nii.gz", reference="trus", output="v.nii.gz"))[0] == 0
    )
    assert typed("invert", *options(transform="field", reference="mr.mhd", output="i.nii.gz"))[0] == 0
    again = options(moving="mr.mhd", fixed="trus", output_dir="o2", **CHEAP | {"initial_transform": "field"})
    code, said = typed("register", *again)
    assert code == 0, said
    for side, link, name in (("moving", "mr.mhd", "a.mhd"), ("fixed", "trus", "a")):
        os.makedirs(f"DIR/{side}_images")
        os.symlink(os.path.abspath(link), f"DIR/{side}_images/{name}")
    os.symlink(os.path.abspath("mr.raw"), "DIR/moving_images/mr.raw")
    assert typed("check", "DIR", "--labels", "False", "--num_workers", "0")[0] == 0


def test_no_command_replaces_its_inputs(images, typed, cohort):
    pair = options(moving="moving.nii.gz", fixed="fixed.nii.gz", **CHEAP)
    assert typed("register", *pair, "--output_dir", "out")[0] == 0
    field = "out/ddf.nii.gz"
    os.link(field, "hard.nii.gz")
    os.symlink(field, "soft.nii.gz")
    os.link("moving.nii.gz", "i_known.nii.gz")
    os.makedirs("many")
    os.makedirs("warped")
    os.link("moving.nii.gz", "many/ddf.nii.gz")
    np.save("s_inside.nii.gz.npy", np.zeros((12, 20, 30), np.uint8))
    os.rename("s_inside.nii.gz.npy", "s_inside.nii.gz")
    with open("p.csv", "w") as file:
        file.write("x,y,z\n0,0,0\n")
    shutil.copytree(cohort / "test", "demo/mine")
    with open("demo/.demonstration", "w"):
        pass
    through = options(transform=field)
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    points = options(points="p.csv", points_from="fixed", coordinates="RAS")
    for words in (
        ("register", *pair, "--output_dir", "out", "--initial_transform", field),
        ("register", *pair, "--output_dir", "out", "--initial_transform", "soft.nii.gz"),
        ("register", *pair, "--output_dir", "out", "--moving_labels", "out/warped_moving_image.nii.gz"),
        ("apply", *through, "--moving", "moving.nii.gz", "--output", "moving.nii.gz"),
        ("apply", *through, "--moving", "moving.nii.gz", "--output", "hard.nii.gz"),
        ("apply", *through, "--moving", "moving.nii.gz", "--output", "soft.nii.gz"),
        ("apply", *through, "--moving", "many", "--output", "out"),
        ("apply", *through, "--moving", "many", "--output", "many/new"),
        ("apply", *through, *points, "--output", "p.csv"),
        ("invert", *through, "--reference", "moving.nii.gz", "--output", "hard.nii.gz"),
        ("invert", *through, "--reference", "moving.nii.gz", "--output", "i.nii.gz"),
        ("sweep", *options(frames="s_inside.nii.gz", axis_offset=1, output="s.nii.gz")),
        ("demo", *options(output_dir="demo", pairs="demo/mine")),
    ):
        code, said = typed(*words)
        assert code == 1 and said.startswith("error: "), (words, said)
        assert "would replace the input" in said or "lies in the input" in said, said
        assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


def test_a_name_that_breaks_lines_does_not_break_a_refusal(images, typed):
    code, said = typed("register", *options(moving="no\nsuch", fixed="fixed.nii.gz", output_dir="out"))
    assert code == 1 and said.startswith("error: ") and "no such: file not found" in said
    assert not os.path.exists("out")
