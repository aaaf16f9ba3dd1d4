"""The eight ways a volume can be stored: a group but for left and right, votes that agree, letters that mend it."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.data import MetaTensor

from scripts.bundle.workflow import register
from scripts.data.axes import declared
from scripts.data.formats import forward, read_transform
from scripts.network.fields import transform_points, world_grid
from scripts.phantoms.phantom import write_cohort
from scripts.registration.orientation import (
    CLEAR,
    WAYS,
    after,
    believed,
    codes,
    is_sure,
    turned,
    upright,
    upright_axes,
    votes,
    way_of,
)
from scripts.registration.segmentation import cube_affine, on_cube

EIGHT = range(len(WAYS))
CUBE = torch.arange(27.0).view(1, 3, 3, 3)


@pytest.mark.parametrize("way", EIGHT)
def test_upright_undoes_turned(way):
    assert torch.equal(upright(turned(CUBE, way), way), CUBE)
    assert torch.equal(turned(CUBE, 0), CUBE)


@pytest.mark.parametrize("way", EIGHT)
@pytest.mark.parametrize("turn", EIGHT)
def test_a_cube_made_upright_from_another_way_is_stored_as_after_says_but_for_left_and_right(way, turn):
    symmetric = CUBE + CUBE.flip(-3)  # a patient who is the same on both sides
    assert torch.equal(upright(turned(symmetric, way), turn), turned(symmetric, after(way, turn)))


@pytest.mark.parametrize("way", EIGHT)
def test_networks_that_know_the_way_of_what_they_see_vote_for_it(way):
    said = torch.stack([torch.eye(8)[after(way, turn)] * 9 for turn in EIGHT])
    for turns in (EIGHT, [0, 3], [0]):
        found = votes(said[list(turns)], turns)
        assert found.argmax() == way and found.exp().sum() == pytest.approx(1)
        assert is_sure(found) and not is_sure(torch.zeros(8).log_softmax(0))


@pytest.mark.parametrize(("ahead", "expected"), [(0.9 * CLEAR, 0), (1.1 * CLEAR, 5), (-1.0, 0)])
def test_a_header_is_believed_unless_another_way_is_clearly_likelier(ahead, expected):
    said = torch.full((8,), -9.0)
    said[0], said[5] = -ahead, 0
    assert believed(said) == expected


@pytest.mark.parametrize("config", ["inference.json", "evaluate.json"])
def test_a_flag_says_so_where_a_header_is_not_believed_and_nowhere_else(config):
    assert json.loads((ROOT / "configs" / config).read_text())["limits"]["orientation"] == [None, CLEAR]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PRS", "SRA"])
@pytest.mark.parametrize("way", EIGHT)
def test_the_letters_of_a_way_declare_the_volume_upright(axes, way):
    """A patient stored `way` under a header that says something else: declared by the letters, he is upright."""
    patient = torch.zeros(1, 4, 6, 8)
    patient[:, 1:3, 4:, :5] = 1  # the same from left to right, in front, below
    header = declared(np.eye(4), patient.shape[1:], axes)
    nearest = nib.orientations.io_orientation(header)
    shown = turned(patient, way)[0].numpy()  # as the header's order nearest to RAS has it
    stored = nib.orientations.apply_orientation(
        shown,
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)),
    )
    header = declared(np.eye(4), stored.shape, axes)
    assert (nearest == nib.orientations.io_orientation(header)).all()
    said = codes(header, way)
    mended = declared(header, stored.shape, said)
    image = nib.Nifti1Image(stored, mended)
    assert np.array_equal(nib.as_closest_canonical(image).get_fdata(), patient[0].numpy())
    assert np.sign(np.linalg.det(mended[:3, :3])) == np.sign(np.linalg.det(header[:3, :3]))
    if way == 0:
        assert said == axes


@pytest.mark.parametrize("way", EIGHT)
def test_a_cube_along_the_upright_axes_is_the_cube_made_upright(way):
    generator = torch.Generator().manual_seed(0)
    affine = torch.diag(torch.tensor([-1.0, 1.2, 0.9, 1], dtype=torch.float64))
    volume = MetaTensor(torch.rand(1, 9, 8, 7, generator=generator), affine=affine)
    axes, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    stored, shown = (
        on_cube(volume, cube_affine(torch.tensor([-4.0, 4, 3]), along, 9.0, 6), 6)
        for along in (axes, upright_axes(axes, way))
    )
    assert torch.allclose(upright(stored, way), shown, atol=1e-4) and stored.std() > 0.1
    assert way_of(affine.numpy(), codes(affine.numpy(), way)) == way


def test_headers_of_a_pair_that_lie_alike_change_no_registration(tmp_path):
    """The gland networks see both images upright, and so does the network that deforms; the flags say it."""
    shapes = {"fixed_shape": (44, 60, 44), "fixed_spacing": 1.5, "moving_shape": (52, 52, 36)}
    cohort = write_cohort(tmp_path / "cohort", 1, seed=7, split=(0, 0, 1), moving_spacing=(1.4, 1.4, 2.0), **shapes)
    places = []
    for axes in ("RAS", "ARS"):
        files = {}
        for side in ("moving", "fixed"):
            image = nib.load(next((cohort / "test" / f"{side}_images").iterdir()))
            affine = declared(image.affine, image.shape, axes)
            files[side] = tmp_path / f"{side}_{axes}.nii.gz"
            nib.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(files[side])
        register(str(files["moving"]), str(files["fixed"]), str(tmp_path / axes))
        moving, fixed = (nib.load(files[side]) for side in ("moving", "fixed"))
        x = world_grid(fixed.shape, torch.from_numpy(fixed.affine))[:, :, 8:-8:6, 8:-8:6, 8:-8:6]
        there, _ = forward(read_transform(tmp_path / axes / "ddf.nii.gz"), x)
        places.append(transform_points(torch.linalg.inv(torch.from_numpy(moving.affine)), there))
        record = json.loads((tmp_path / axes / "qc.json").read_text("utf-8"))
        assert any("--fixed_axes" in flag for flag in record["flags"]) == (axes == "ARS")
        assert record["weights_sha256"]  # the second stage took part
    assert (places[0] - places[1]).norm(dim=1).max() < 0.1  # voxels
