"""The inverse field undoes the transform, to other readers as well, and says where it is not known."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import run
from synthetic import GRIDS, moving_image, registration, save

from scripts.data.checks import InputError
from scripts.data.formats import save_displacement
from scripts.registration.apply import apply
from scripts.registration.invert import invert

LPS = np.array([-1.0, -1, 1])


def written(folder, found):
    save_displacement(folder / "ddf.nii.gz", found.displacement.numpy(), found.affine)
    return str(folder / "ddf.nii.gz"), str(moving_image(folder / "mr.nii.gz"))


def by_itk(path):
    return sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))


@pytest.mark.parametrize("grid", GRIDS)
def test_simpleitk_comes_back_to_where_it_started(grid, tmp_path, capsys):
    found = registration(grid)
    transform, mr = written(tmp_path, found)
    inverse = str(tmp_path / "inverse.nii.gz")
    invert([transform], mr, inverse)
    there, back = by_itk(transform), by_itk(inverse)
    image = nib.load(mr)
    known = np.asarray(nib.load(tmp_path / "inverse_known.nii.gz").dataobj) == 1
    assert 0.02 < known.mean() < 1 and np.array_equal(nib.load(inverse).affine, image.affine)
    voxels = np.argwhere(known)
    world = (voxels @ image.affine[:3, :3].T + image.affine[:3, 3]) * LPS
    chosen = np.random.default_rng(0).permutation(len(world))[:1000]
    apart = [np.subtract(there.TransformPoint(back.TransformPoint(p)), p) for p in world[chosen].tolist()]
    residual = np.linalg.norm(apart, axis=1) / found.voxel
    assert (residual <= 0.1).mean() >= 0.99
    assert "known at" in capsys.readouterr().out


def test_a_fixed_image_comes_onto_the_moving_grid_as_simpleitk_brings_it(tmp_path):
    found = registration("oblique, anisotropic")
    transform, mr = written(tmp_path, found)
    trus = np.random.default_rng(0).normal(100, 20, found.displacement.shape[1:]).astype(np.float32)
    trus = str(save(tmp_path / "trus.nii.gz", trus, found.affine))
    inverse, out = str(tmp_path / "inverse.nii.gz"), str(tmp_path / "out.nii.gz")
    invert([transform], mr, inverse)
    apply([inverse], out, moving=trus)
    ours, reference = sitk.ReadImage(out), sitk.ReadImage(mr)
    expected = sitk.Resample(sitk.ReadImage(trus), reference, by_itk(inverse), sitk.sitkLinear, 0.0)
    ours, expected = sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(expected)
    face = (ours == 0) != (expected == 0)  # a voxel on the very face of the image may fall on either side of it
    assert face.mean() < 1e-2 and (ours != 0).mean() > 0.02
    np.testing.assert_allclose(ours[~face], expected[~face], atol=1e-2)


def test_where_the_field_folds_the_inverse_is_not_known(tmp_path):
    found = registration("oblique, anisotropic", amplitude=14.0)
    transform, mr = written(tmp_path, found)
    shares = []
    for amplitude in (2.0, 14.0):
        found = registration("oblique, anisotropic", amplitude)
        save_displacement(tmp_path / "ddf.nii.gz", found.displacement.numpy(), found.affine)
        invert([transform], mr, str(tmp_path / "inverse.nii.gz"))
        shares.append(np.asarray(nib.load(tmp_path / "inverse_known.nii.gz").dataobj).mean())
    assert shares[1] < 0.9 * shares[0]
    assert np.isfinite(nib.load(tmp_path / "inverse.nii.gz").get_fdata()).all()


def test_what_cannot_be_inverted_is_refused_and_leaves_nothing(tmp_path):
    found = registration("permuted")
    transform, mr = written(tmp_path, found)
    far = np.eye(4)
    far[:3, 3] = 900
    elsewhere = str(save(tmp_path / "far.nii.gz", np.ones((5, 6, 7), np.float32), far))
    before = sorted(tmp_path.iterdir())
    for reference, output, message in (
        (elsewhere, "inverse.nii.gz", "no inverse anywhere on the reference"),
        (mr, "inverse.mha", "written as NIfTI"),
        (mr, "mr.nii.gz", "would replace the input"),
        (str(tmp_path / "none.nii.gz"), "inverse.nii.gz", "file not found"),
    ):
        with pytest.raises(InputError, match=message):
            invert([transform], reference, str(tmp_path / output))
    assert sorted(tmp_path.iterdir()) == before


def test_the_verb_from_another_folder(tmp_path):
    transform, mr = written(tmp_path, registration("permuted"))
    result = run("scripts", "invert", "--transform", transform, "--reference", mr, "--output", f"{tmp_path}/i.nii.gz")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Research use only" in result.stdout and (tmp_path / "i_known.nii.gz").exists()
