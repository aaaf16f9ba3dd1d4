"""What the shipped weights give for one phantom does not drift; run as a script, this writes golden.json anew.

Write it only when weights, phantom or method are meant to change, and say so in the changelog.
"""

import json
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bundle.workflow import register
from scripts.data import renamed
from scripts.data.formats import forward, read_transform
from scripts.data.lps import FLIP
from scripts.network.fields import world_grid
from scripts.phantoms.phantom import write_cohort

GOLDEN = Path(__file__).with_name("golden.json")
FIGURES = ("gland_dsc", "tre_mm", "initial_stretch_min", "initial_stretch_max", "moving_agreement", "fixed_agreement")


def outcome(folder: Path) -> dict:
    """The displacement in mm at every eighth voxel of the middle of the fixed image, and some figures."""
    shapes = {"fixed_shape": (44, 60, 44), "fixed_spacing": 1.5, "moving_shape": (52, 52, 36)}
    cohort = write_cohort(folder / "cohort", 1, seed=7, split=(0, 0, 1), moving_spacing=(1.4, 1.4, 2.0), **shapes)
    files = {k: next((cohort / "test" / f"{k}s").iterdir()) for k in ("moving_image", "fixed_image")}
    labels = {k: str(next((cohort / "test" / k).iterdir())) for k in ("moving_labels", "fixed_labels")}
    register(str(files["moving_image"]), str(files["fixed_image"]), str(folder / "out"), **labels)
    fixed = nib.load(files["fixed_image"])
    x = world_grid(fixed.shape, torch.from_numpy(fixed.affine))[:, :, 10:-10:8, 14:-14:8, 10:-10:8]
    moved, known = forward(read_transform(folder / "out" / "ddf.nii.gz"), x)
    assert known.all()
    field = ((moved - x)[0].movedim(0, -1) * FLIP).numpy()  # in LPS, as the file has it
    record = json.loads((folder / "out" / "qc.json").read_text("utf-8"))
    image = nib.load(files["moving_image"]).get_fdata()
    return {
        "phantom_mean": image.mean(),
        "displacement_mm": field.reshape(-1, 3).round(4).tolist(),
        **{name: record[name] for name in FIGURES},
    }


def test_the_shipped_weights_give_what_they_gave(tmp_path):
    golden = {renamed.FIGURES.get(k, k): v for k, v in json.loads(GOLDEN.read_text("utf-8")).items()}
    found = outcome(tmp_path)
    assert abs(found["phantom_mean"] - golden["phantom_mean"]) < 1e-3 * golden["phantom_mean"], "another phantom"
    apart = np.linalg.norm(np.subtract(found["displacement_mm"], golden["displacement_mm"]), axis=1)
    assert apart.max() < 0.1  # mm: processors differ in their rounding, and a fit of thirty steps passes that on
    for name in FIGURES:
        assert abs(found[name] - golden[name]) < 0.01, name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(outcome(Path(folder))) + "\n", encoding="utf-8")
