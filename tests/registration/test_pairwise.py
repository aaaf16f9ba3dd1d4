"""elastix beside the network: what it finds means the same here as there."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from scripts.bundle.workflow import register
from scripts.data.checks import InputError
from scripts.data.root import CONFIGS
from scripts.network.networks import NoField
from scripts.registration import pairwise
from scripts.registration.initial_transform import read_initial_transform
from scripts.registration.transforms import OntoFixedGridd

NAMES = ("nmi", "ncc", "ssd")


def blobs(points):
    """A smooth image at points (3, …) in mm."""
    random = np.random.default_rng(0)
    centres, widths, heights = random.uniform(-22, 22, (40, 3)), random.uniform(4, 9, 40), random.uniform(0.3, 1, 40)
    return sum(
        h * np.exp(-((points - c.reshape(3, *[1] * (points.ndim - 1))) ** 2).sum(0) / (2 * w * w))
        for c, w, h in zip(centres, widths, heights, strict=True)
    )


def volume(affine, size, move=None):
    """`blobs` on a grid whose world is moved."""
    move = np.eye(4) if move is None else move
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    world = np.einsum("ij,j...->i...", (move @ affine)[:3, :3], grid) + (move @ affine)[:3, 3].reshape(3, 1, 1, 1)
    return MetaTensor(torch.from_numpy(blobs(world)[None]).float(), affine=torch.from_numpy(affine))


def test_a_rigid_start_finds_a_known_motion_on_oblique_and_flipped_grids():
    fixed_affine, moving_affine = np.eye(4), np.eye(4)
    fixed_affine[:3, :3] = Rotation.from_euler("xyz", [10, -15, 20], degrees=True).as_matrix() @ np.diag([2, 1.5, 2.5])
    fixed_affine[:3, 3] = -fixed_affine[:3, :3] @ (np.array([24, 32, 20]) - 1) / 2
    moving_affine[:3, :3] = Rotation.from_euler("z", -12, degrees=True).as_matrix() @ np.diag([-2.2, 2, -2])
    moving_affine[:3, 3] = -moving_affine[:3, :3] @ (np.array([26, 26, 28]) - 1) / 2 + [40, -7, 90]  # another frame
    truth = np.eye(4)  # fixed world -> moving world
    truth[:3, :3] = Rotation.from_rotvec([4, -6, 5], degrees=True).as_matrix()
    truth[:3, 3] = np.array([40, -7, 90]) + [3, -2, 2.5]
    fixed = volume(fixed_affine, (24, 32, 20))
    moving = volume(moving_affine, (26, 26, 28), np.linalg.inv(truth))
    (found,) = (step.numpy() for step in read_initial_transform("rigid", moving, fixed))
    corners = np.array([[x, y, z, 1] for x in (-20, 20) for y in (-20, 20) for z in (-20, 20)]).T
    (centred,) = (step.numpy() for step in read_initial_transform("centre", moving, fixed))
    apart = [np.linalg.norm(((start - truth) @ corners)[:3], axis=0).max() for start in (centred, found)]
    assert apart[0] > 4 and apart[1] < 2.5  # a voxel


def hurried(folder, name, iterations):
    """The parameter map `name` with fewer iterations, as a file."""
    text, most = (CONFIGS / "elastix" / f"{name}.txt").read_text(), "(MaximumNumberOfIterations 150)"
    assert text.count(most) == 1
    path = folder / f"{name}.txt"
    path.write_text(text.replace(most, f"(MaximumNumberOfIterations {iterations})"))
    return path


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]]


@pytest.mark.parametrize("name", [NAMES[0], *OTHERS])
def test_elastix_undoes_a_known_deformation_in_voxels_of_the_grid(name, tmp_path):
    size = (30, 34, 26)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)
    waves = [np.sin(2 * np.pi * grid[(axis + 1) % 3] / size[(axis + 1) % 3] + axis) for axis in range(3)]
    truth = 2 * np.stack(waves)  # voxels
    moving = blobs(1.6 * (grid - np.array(size).reshape(3, 1, 1, 1) / 2))
    fixed = map_coordinates(moving, grid + truth, order=3, mode="nearest")  # fixed(p) = moving(p + u)
    images = torch.from_numpy(np.stack([moving, fixed])[None]).float()
    images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
    inferer = pairwise.ElastixInferer(str(hurried(tmp_path, name, 50)))
    ddf = inferer(images, NoField())
    assert ddf.shape == (1, 3, *size) and ddf.dtype == torch.float32
    inner = (slice(None), *[slice(5, -5)] * 3)
    error = np.linalg.norm((ddf[0].numpy() - truth)[inner], axis=0)
    assert np.median(error) < 0.5 * np.median(np.linalg.norm(truth[inner], axis=0))


def test_a_pair_that_elastix_gives_up_on_keeps_its_start_and_says_so(capsys, tmp_path):
    impossible = tmp_path / "impossible.txt"
    text = (CONFIGS / "elastix" / "ncc.txt").read_text()
    impossible.write_text(text.replace("(RequiredRatioOfValidSamples 0.05)", "(RequiredRatioOfValidSamples 1.01)"))
    ddf = pairwise.ElastixInferer(str(impossible))(torch.rand(1, 2, 12, 13, 14), NoField())
    assert ddf.shape == (1, 3, 12, 13, 14) and not ddf.any()
    assert "elastix gave up, the pair keeps its initial transform:" in capsys.readouterr().out


def test_centroids_of_labelled_glands_coincide_and_an_unlabelled_pair_is_refused():
    label = torch.zeros(2, 1, 20, 20, 20)
    label[0, :, 3:7, 4:8, 5:9] = label[1, :, 10:14, 9:13, 8:12] = 1
    affine = torch.diag(torch.tensor([1.0, 2.0, 1.5, 1.0], dtype=torch.float64))
    pair = {f"{side}_image": MetaTensor(torch.rand(1, 20, 20, 20), affine=affine) for side in ("moving", "fixed")}
    labels = {f"{s}_label": MetaTensor(v, affine=affine) for s, v in zip(("moving", "fixed"), label, strict=True)}
    start = OntoFixedGridd(None, "centroids")(pair | labels)["initial_transform"]
    assert torch.allclose(start[:3, 3], torch.tensor([-7.0, -10.0, -4.5], dtype=torch.float64))
    with pytest.raises(InputError, match='initial transform "centroids" needs label 0, the gland, in moving_label'):
        OntoFixedGridd(None, "centroids")(pair | {"case": "p1"})


def test_without_elastix_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "itk", types.SimpleNamespace())  # itk alone
    with pytest.raises(InputError, match="pip install -r requirements-crossval.txt"):
        pairwise.ElastixInferer(str(CONFIGS / "elastix" / "ncc.txt"))(torch.rand(1, 2, 8, 8, 8), NoField())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_register_runs_elastix_as_an_evaluation_does_on_two_threads(cohort, tmp_path, two_threads):
    """It has no figures of a fit of ours for the QC record; and more threads than one have crashed it beside torch."""
    moving, fixed = (next((cohort / "test" / f"{side}_images").iterdir()) for side in ("moving", "fixed"))
    settings = {"moving": moving, "fixed": fixed, "output_dir": tmp_path / "out", "initial_transform": "centre"}
    settings |= {"inferer#parameters": str(hurried(tmp_path, "nmi", 10))}
    register(**settings, overlay=CONFIGS / "variant_nmi.yaml")
    record = json.loads((tmp_path / "out" / "qc.json").read_text("utf-8"))
    assert record["inverse_consistency_mm"] is None and record["max_displacement_mm"] > 0
    assert "fixed_agreement" not in record, "a gland was looked for that nothing uses"
