"""Axes that the user declares: the volume stays where its middle is, and only directions change."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from scripts.data.axes import checked_axes, declared
from scripts.data.checks import InputError

ALL = ["".join(p) for order in itertools.permutations(("RL", "AP", "SI")) for p in itertools.product(*order)]


@pytest.mark.parametrize("axes", ALL)
def test_a_declared_affine_has_these_axes_the_voxel_size_and_the_middle_of_the_header(axes):
    affine, shape = np.array([[0.6, 0.1, 0, 5], [-0.1, 0.6, 0, 7], [0, 0, 3, -9], [0, 0, 0, 1.0]]), (40, 30, 12)
    found = declared(affine, shape, axes)
    assert "".join(nib.aff2axcodes(found)) == axes
    np.testing.assert_allclose(np.linalg.norm(found[:3, :3], axis=0), np.linalg.norm(affine[:3, :3], axis=0))
    middle = np.append((np.array(shape) - 1) / 2, 1)
    np.testing.assert_allclose(found @ middle, affine @ middle, atol=1e-12)
    np.testing.assert_allclose(declared(found, shape, axes), found, atol=1e-12)


def test_without_a_declaration_the_header_holds():
    affine = np.diag([1.0, 2, 3, 1])
    assert declared(affine, (2, 2, 2), None) is not None and (declared(affine, (2, 2, 2), None) == affine).all()


def test_letters_are_read_in_any_case_and_what_is_no_three_directions_is_refused():
    assert checked_axes("--fixed_axes", "lps") == "LPS" and checked_axes("--fixed_axes", None) is None
    for bad in ("RAR", "RA", "RASI", "XYZ", 7, ["R", "A", "S"], "LRS", ""):
        with pytest.raises(InputError, match="--fixed_axes .*one letter of R/L, A/P and S/I each"):
            checked_axes("--fixed_axes", bad)
