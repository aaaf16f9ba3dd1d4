"""A pair whose axes are declared is registered as it lies in truth, and its files are in the worlds of its headers."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from synthetic import write

from scripts.data.axes import declared
from scripts.data.checks import InputError
from scripts.data.pairs import LoadPaird, LoadSingled
from scripts.registration import qc
from scripts.registration.outputs import save_overview
from scripts.registration.transforms import KeepOriginalsd, OntoFixedGridd, ToOriginalGridd, as_headers_say

SHAPES = {"moving": (24, 20, 12), "fixed": (18, 22, 16)}
TRUE = {"moving": declared(np.diag([1.0, 1.1, 2.5, 1]), SHAPES["moving"], "LPS"), "fixed": np.diag([1.2, 0.9, 1.4, 1])}
TRUE["fixed"][:3, 3] = 5, -9, 30


def files(folder, headers):
    """A pair of noise with the headers given."""
    random, made = np.random.default_rng(0), {}
    for side, shape in SHAPES.items():
        voxels = random.uniform(0, 100, shape).astype(np.float32)
        made[f"{side}_image"] = write(folder / f"{side}.nii.gz", voxels, headers[side])
    return made


def registered(pair, initial_transform="centre", bend=True, **axes):
    d = OntoFixedGridd(1.5, initial_transform)(KeepOriginalsd()(LoadPaird(**axes)(pair)))
    x = torch.linspace(0, 3, d["image"].shape[1])[:, None, None].expand(d["image"].shape[1:])
    return ToOriginalGridd()(d | {"pred": bend * torch.stack([x.sin(), 0 * x, x.cos()])})


def moving_voxels(item):
    """Where each voxel of the fixed image lies in the moving one, by what the files say."""
    told = as_headers_say(item)
    fixed, moving = (told[f"original_{side}_image"].affine.double().numpy() for side in ("fixed", "moving"))
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPES["fixed"]], indexing="ij"), -1)
    points = voxels @ fixed[:3, :3].T + fixed[:3, 3] + np.moveaxis(told["displacement"].numpy(), 0, -1)
    return (points - moving[:3, 3]) @ np.linalg.inv(moving[:3, :3]).T


@pytest.mark.parametrize("lies", [{"fixed": "PRS"}, {"moving": "LAI"}, {"fixed": "SPL", "moving": "PRI"}])
def test_declared_axes_give_the_registration_that_true_headers_give(lies, tmp_path):
    headers = TRUE | {side: declared(TRUE[side], SHAPES[side], axes) for side, axes in lies.items()}
    (tmp_path / "true").mkdir()
    (tmp_path / "lying").mkdir()
    codes = {"moving": "LPS", "fixed": "RAS"}
    expected = registered(files(tmp_path / "true", TRUE))
    found = registered(files(tmp_path / "lying", headers), **{f"{side}_axes": codes[side] for side in lies})
    np.testing.assert_allclose(moving_voxels(found), moving_voxels(expected), atol=1e-3)
    np.testing.assert_allclose(found["warped_moving_image"], expected["warped_moving_image"], atol=1e-2)
    told = as_headers_say(found)
    for side in ("moving", "fixed"):
        np.testing.assert_allclose(told[f"original_{side}_image"].affine, headers[side], atol=1e-5)
    unaware = registered(files(tmp_path / "lying", headers))
    assert np.abs(moving_voxels(unaware) - moving_voxels(expected)).max() > 3


@pytest.mark.parametrize("named", ["header", "file"])
def test_an_initial_transform_is_between_the_worlds_of_the_headers(named, tmp_path):
    pair = files(tmp_path, TRUE)
    matrix = np.eye(4)
    if named == "file":
        matrix[:3, :3] += np.random.default_rng(1).normal(0, 0.02, (3, 3))
        matrix[:3, 3] = 3, -2, 1
        lps = np.diag([-1, -1, 1, 1]) @ matrix @ np.diag([-1, -1, 1, 1])
        numbers = [*lps[:3, :3].ravel(), *lps[:3, 3]]
        text = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        text += f"Parameters: {' '.join(map(repr, map(float, numbers)))}\nFixedParameters: 0 0 0\n"
        (tmp_path / "start.txt").write_text(text)
        named = str(tmp_path / "start.txt")
    item = registered(pair, named, bend=False, moving_axes="PRS", fixed_axes="AIL")
    told = as_headers_say(item)
    affine = told["original_fixed_image"].affine.numpy()
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPES["fixed"]], indexing="ij"), -1)
    x = voxels @ affine[:3, :3].T + affine[:3, 3]
    wanted = x @ matrix[:3, :3].T + matrix[:3, 3] - x
    np.testing.assert_allclose(np.moveaxis(told["displacement"].numpy(), 0, -1), wanted, atol=1e-3)


def test_a_single_image_lies_as_declared_and_its_label_with_it(tmp_path):
    voxels = np.random.default_rng(0).uniform(0, 1, (6, 7, 8)).astype(np.float32)
    item = {"case": "a", "image": write(tmp_path / "a.nii.gz", voxels, np.diag([1.0, 2, 3, 1]))}
    item["label"] = write(tmp_path / "l.nii.gz", (voxels > 0.5).astype(np.uint8), np.diag([1.0, 2, 3, 1]))
    plain, turned = LoadSingled()(item), LoadSingled(axes="PIR")(item)
    assert torch.equal(turned["image"].as_tensor(), plain["image"].as_tensor())
    np.testing.assert_allclose(turned["image"].affine, declared(np.diag([1.0, 2, 3, 1]), (6, 7, 8), "PIR"))
    assert torch.equal(turned["label"].affine, turned["image"].affine)
    assert torch.equal(turned["header"], plain["image"].affine) and turned["file"] == item["image"]
    assert torch.equal(LoadSingled()(item | {"axes": "PIR"})["image"].affine, turned["image"].affine)
    with pytest.raises(InputError, match="--image_axes XYZ: expected"):
        LoadSingled(axes="XYZ")(item)


def test_the_overview_and_what_it_says_are_those_of_true_headers(tmp_path):
    lying = {"fixed": "PRS", "moving": "LAI"}
    headers = {side: declared(TRUE[side], SHAPES[side], axes) for side, axes in lying.items()}
    pictures, said = [], []
    for name, used, axes in (("true", TRUE, {}), ("lying", headers, {"fixed_axes": "RAS", "moving_axes": "LPS"})):
        (tmp_path / name).mkdir()
        item = registered(files(tmp_path / name, used), **axes)
        moved = qc.deformation(item)
        record = qc.quality(item, {}, moved) | {"flags": [], "initial_matrix": item["initial_transform"].tolist()}
        save_overview(tmp_path / f"{name}.png", item, moved, record)
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=float))
        said.append(qc.motion(record))
    np.testing.assert_allclose(pictures[0], pictures[1], atol=8)
    assert said[0] == said[1]
    assert said[0].startswith("MR moved by 0.0 mm from aligned centres, stretched by 1.00 to 1.00, deformed by up to")


def test_what_moved_how_far_is_what_the_initial_transform_and_the_network_did(tmp_path):
    pair = files(tmp_path, TRUE)
    images = [sitk.ReadImage(pair[f"{side}_image"]) for side in ("fixed", "moving")]
    fixed, moving = (i.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in i.GetSize()]) for i in images)
    transform = sitk.AffineTransform(np.diag((0.8, 1.0, 1.25)).ravel(), np.subtract(moving, fixed) + [3, 0, 4], fixed)
    sitk.WriteTransform(transform, str(tmp_path / "start.tfm"))
    item = registered(pair, str(tmp_path / "start.tfm"))
    record = qc.quality(item, {}, qc.deformation(item))
    record["initial_matrix"] = item["initial_transform"].tolist()
    assert record["translation_mm"] == pytest.approx(5, abs=1e-3)
    assert "moved by 5.0 mm from aligned centres, stretched by 0.80 to 1.25, deformed by up to" in qc.motion(record)
    assert record["max_displacement_mm"] == pytest.approx(1.5, abs=0.1)  # a sine and a cosine, 1.5 mm
    assert record["gland_displacement_mm"] is None  # no gland was looked for, none labelled
