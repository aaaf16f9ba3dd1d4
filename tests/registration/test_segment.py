"""The gland of single images: a mask on the image's own grid, a record, a picture; refusals that name the image."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose
from PIL import Image
from synthetic import write
from torch import nn

from scripts.bundle.workflow import segment
from scripts.data.axes import declared
from scripts.data.checks import InputError, refusal
from scripts.data.pairs import LoadSingled
from scripts.registration.segment import SegmentImages
from scripts.registration.segmentation import SegmentGlandsd

SHAPE = (44, 36, 20)
OBLIQUE = np.array([[0.9, 0.3, 0, 12], [-0.3, 0.9, 0, -40], [0, 0, 2.4, 7], [0, 0, 0, 1.0]])
LIMITS = {"agreement": [0.8, None], "orientation": [None, 0.2]}


class Bright(nn.Module):
    """A network that calls gland what is bright."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        return torch.cat([self.gain * (x - 0.5), torch.zeros(len(x), 8, *x.shape[2:])], dim=1)


@pytest.fixture
def weights(tmp_path):
    torch.save(Bright().state_dict(), tmp_path / "bright.pt")
    return str(tmp_path / "bright.pt")


def body(centre=(20, 18, 9)):
    """Bright in an ellipsoid: image and its label."""
    x = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1) - centre
    inside = ((x / (10, 8, 5)) ** 2).sum(-1) <= 1
    return (200 * inside + np.random.default_rng(0).uniform(0, 20, SHAPE)).astype(np.float32), inside.astype(np.uint8)


def images(folder, affine=OBLIQUE, count=1):
    made = []
    for k in range(count):
        image, label = body((20 + k, 18, 9))
        made.append({"case": f"p{k}", "image": write(folder / f"p{k}.nii.gz", image, affine)})
        made[-1]["label"] = write(folder / f"p{k}_label.nii.gz", label, affine)
    return made


def run(items, out, weights, **options):
    load = Compose([LoadSingled(axes=options.pop("axes", None)), SegmentGlandsd(Bright(), weights)])
    SegmentImages(Dataset(items, load), str(out), weights, LIMITS, **options).run()


def test_the_mask_lies_on_the_image_s_own_grid_and_the_record_says_what_it_is(tmp_path, weights, capsys):
    (item,) = images(tmp_path)
    run([item], tmp_path / "out", weights, probability=True)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"p0.nii.gz", "p0.json", "p0.png", "p0_probability.nii.gz"}
    mask, label = nib.load(tmp_path / "out/p0.nii.gz"), nib.load(item["label"])
    np.testing.assert_allclose(mask.affine, OBLIQUE, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8 and set(np.unique(mask.dataobj)) == {0, 1}
    a, b = (np.asarray(one.dataobj) > 0 for one in (mask, label))
    record = json.loads((tmp_path / "out/p0.json").read_text())
    assert record["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6) and record["dice"] > 0.85
    assert record["volume_ml"] == pytest.approx(a.sum() * abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000)
    centre = nib.affines.apply_affine(OBLIQUE, np.argwhere(a).mean(0))
    np.testing.assert_allclose(record["centre_mm"], centre, atol=0.5)
    assert record["notice"].startswith("Research use only") and record["case"] == "p0" and record["flags"] == []
    assert record["header_axes"] == record["declared_axes"] == "RAS" and record["limits"] == LIMITS
    probability = nib.load(tmp_path / "out/p0_probability.nii.gz")
    assert ((np.asarray(probability.dataobj) > 0.5) == a).all()
    with Image.open(tmp_path / "out/p0.png") as picture:
        assert picture.width == 1500
    assert "p0: " in capsys.readouterr().out


def test_without_a_label_there_is_all_but_a_dice(tmp_path, weights, capsys):
    (item,) = images(tmp_path)
    item.pop("label")
    run([item], tmp_path / "out", weights)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"p0.nii.gz", "p0.json", "p0.png"}
    assert "dice" not in json.loads((tmp_path / "out/p0.json").read_text())
    assert "p0: " in (said := capsys.readouterr().out) and "Dice" not in said


def test_declared_axes_leave_the_mask_in_the_world_of_the_header(tmp_path, weights):
    lying = declared(OBLIQUE, SHAPE, "PRS")
    (item,) = images(tmp_path, lying)
    run([item], tmp_path / "out", weights, axes="RAS")
    record = json.loads((tmp_path / "out/p0.json").read_text())
    np.testing.assert_allclose(nib.load(tmp_path / "out/p0.nii.gz").affine, lying, atol=1e-5)
    assert (record["header_axes"], record["declared_axes"]) == ("PRS", "RAS") and record["dice"] > 0.85


def test_of_several_images_there_is_a_table_and_a_refused_one_is_named_when_the_others_are_done(
    tmp_path, weights, capsys
):
    items = images(tmp_path, count=3)
    items[1]["image"] = write(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.float32), OBLIQUE)
    with pytest.raises(InputError, match="1 of 3 images refused, for the reasons above: p1"):
        run(items, tmp_path / "out", weights)
    with (tmp_path / "out/glands.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == ["p0", "p2"] and all(float(row["dice"]) > 0.85 for row in table)
    said = capsys.readouterr()
    assert "Dice of 2: median 0." in said.out and "refused: p1: " in said.err


@pytest.mark.parametrize(("told", "dark", "expected"), [
    ("auto", False, {"modality": "MR", "modality_by": "image", "contradicted": False}),
    ("auto", True, {"modality": "US", "modality_by": "image", "contradicted": False}),
    ("us", False, {"modality": "US", "modality_by": "option", "contradicted": True}),
    ("MR", False, {"modality": "MR", "modality_by": "option", "contradicted": False}),
])  # fmt: skip
def test_the_modality_is_what_is_said_or_what_it_looks_like(tmp_path, weights, told, dark, expected):
    (item,) = images(tmp_path)
    if dark:  # at the borders of two axes, as a fan is
        image = body()[0]
        image[:6], image[-6:], image[:, :5], image[:, -5:] = 0, 0, 0, 0
    else:
        image = body()[0] / 4 + 60
        image[0, 0, 0] = 0  # air
    write(tmp_path / "p0.nii.gz", image.astype(np.float32), OBLIQUE)
    run([item], tmp_path / "out", weights, modality=told)
    record = json.loads((tmp_path / "out/p0.json").read_text())
    assert expected.items() <= record.items()
    assert any("does not look like it" in flag for flag in record["flags"]) == expected["contradicted"]


def test_what_cannot_be_meant_is_refused_before_anything_is_read(tmp_path):
    image = write(tmp_path / "a.nii.gz", body()[0], OBLIQUE)
    (tmp_path / "none").mkdir()
    out = str(tmp_path / "gland.nii.gz")
    for given, options, why in (
        ((image, str(tmp_path / "gland.png")), {}, "expected a name that ends in .nii.gz"),
        ((str(tmp_path), str(tmp_path / "out.nii.gz")), {}, "expected a folder"),
        ((image, str(tmp_path / "a.nii.gz")), {}, "would replace the input"),
        ((image, out, "ct"), {}, "--modality ct: expected one of mr, us, auto"),
        ((image, out), {"dataset_dir": "x"}, "--dataset_dir: has no meaning"),
        ((image, out), {"image_axis": "LPS"}, "no such option of segment; did you mean --image_axes"),
        ((image, out), {"image_axes": "LPX"}, "--image_axes LPX: expected"),
        ((str(tmp_path / "none"), str(tmp_path / "out")), {}, "no images"),
        ((str(tmp_path / "lost.nii.gz"), out), {}, "lost.nii.gz: file not found"),
    ):
        with pytest.raises(Exception) as raised:  # noqa: B017, the configs wrap it
            segment(*given, **options)
        assert why in str(refusal(raised.value))
    assert not (tmp_path / "gland.nii.gz").exists() and not (tmp_path / "out").exists()
