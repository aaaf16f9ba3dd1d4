"""NIfTI headers changed at random: refused by name, or read as nibabel and SimpleITK read them, or mended aloud."""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import PAIR_AFFINE, PAIR_SIZE, save

from scripts.data.checks import InputError, Repaired, check_image
from scripts.data.volumes import load_volume

NUMBERS = [0, -0.0, 1, -1, 0.5, -0.5, 1.2, 1.5, 2, 3, -2, 1e-3, 1.5001, 1e30, -1e30, 1e-40, np.nan, np.inf, -np.inf]
NUMBER = st.sampled_from(NUMBERS) | st.floats(width=32)
SHORT = st.integers(-(2**15), 2**15 - 1)
FIELDS = {  # what to write, and into how many elements
    "sizeof_hdr": (st.sampled_from([0, 348, 349, 540, 1543569408, 469893120]), 0),
    "dim": (st.integers(-2, 9) | SHORT, 8),
    "datatype": (st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2304]) | SHORT, 0),
    "bitpix": (SHORT, 0),
    "pixdim": (NUMBER, 8),
    "vox_offset": (st.integers(340, 370) | NUMBER, 0),
    "scl_slope": (NUMBER, 0),
    "scl_inter": (NUMBER, 0),
    "xyzt_units": (st.integers(0, 255), 0),
    "qform_code": (st.integers(-1, 6) | SHORT, 0),
    "sform_code": (st.integers(-1, 6) | SHORT, 0),
    **{name: (NUMBER, 0) for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")},
    **{name: (NUMBER | st.floats(-2, 2, width=32), 4) for name in ("srow_x", "srow_y", "srow_z")},
    "magic": (st.sampled_from([b"n+1", b"ni1", b"n+2", b""]) | st.binary(max_size=4), 0),
}


@st.composite
def field(draw):
    """A field of the header, the element of it, and a value."""
    name = draw(st.sampled_from(sorted(FIELDS)))
    values, elements = FIELDS[name]
    return name, draw(st.integers(0, elements - 1)) if elements else ..., draw(values)


FORMS = st.sampled_from([{}, {"sform_code": 0}, {"qform_code": 0}, {"sform_code": 0, "qform_code": 0}])
BYTES = st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), max_size=3)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A good file: int16, oblique, 28 bytes longer than its voxels."""
    path = tmp_path_factory.mktemp("fuzz") / "good.nii"
    save(path, np.random.default_rng(0).integers(-99, 999, PAIR_SIZE).astype(np.int16), PAIR_AFFINE)
    path.write_bytes(path.read_bytes() + bytes(28))
    return path


def mutated(data, forms, fields, replaced):
    data = bytearray(data)
    header = np.ndarray((), nib.nifti1.header_dtype, buffer=data)
    with np.errstate(all="ignore"):
        for name, element, value in [*((name, ..., code) for name, code in forms.items()), *fields]:
            header[name][element] = value
    for at, byte in replaced:
        data[at] = byte
    return bytes(data)


def by_nibabel(path):
    image = nib.load(path)
    return np.asarray(image.dataobj, dtype=np.float32), image.affine


def by_simpleitk(path):
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T.astype(np.float32), np.diag([-1, -1, 1, 1]) @ affine


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(FORMS, st.lists(field(), max_size=3), BYTES)
@example({}, [], [])
@example({"sform_code": 0}, [("pixdim", 0, -0.5)], [])
@example({"qform_code": 0}, [("pixdim", 1, 3)], [])
@example({"qform_code": 0}, [("srow_x", 1, -0.45)], [])
@example({}, [("xyzt_units", ..., 3)], [])
@example({}, [("scl_slope", ..., 0), ("scl_inter", ..., 5)], [])
@example({}, [("scl_slope", ..., 2), ("scl_inter", ..., 5)], [])
@example({}, [("scl_slope", ..., 1e-38)], [])
@example({"qform_code": 0}, [("srow_x", 3, 2.5e7)], [])
@example({}, [("dim", 1, 6)], [])
@example({}, [("vox_offset", ..., 366)], [])
def test_a_changed_header_is_refused_or_read_as_others_read_it_or_mended_aloud(good, forms, fields, replaced):
    path = good.with_name("changed.nii")
    path.write_bytes(mutated(good.read_bytes(), forms, fields, replaced))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = load_volume(str(path))
            check_image(path, found.numpy())
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            return
    mended = any(one.category is Repaired and "made perpendicular" in str(one.message) for one in said)
    readers = [by_nibabel] if mended else [by_nibabel, by_simpleitk]  # ITK refuses what is mended
    with np.errstate(all="ignore"):
        for values, affine in (read(path) for read in readers):
            values = values.reshape(*found.shape[1:], -1).transpose(3, 0, 1, 2)
            np.testing.assert_allclose(found.numpy(), values, atol=1e-6 * np.abs(values).max())
            tolerance = (0.02 if mended else 1e-3) * np.abs(affine).max()
            np.testing.assert_allclose(found.affine, affine, atol=tolerance)
