"""Headers changed at random: refused by name, or read as others read them, or mended aloud.

Others are nibabel and SimpleITK for NIfTI, and for the frames of a DICOM file each frame's own tags, by pydicom.
"""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import PAIR_AFFINE, PAIR_SIZE, functional, multi_frame, save, write_dicom

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


NUMBER_TEXT = st.sampled_from(["0", "1", "1.5", "2", "-1.2", "1e3", "1e30", "nan", "", "wide"])
VECTOR = st.lists(NUMBER_TEXT, min_size=1, max_size=3)
TURN = st.sampled_from(
    [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0], [0.9, 0, 0, 0, 1, 0], [1, 0, 0.01, 0, 1, 0]]
)
GROUPED = {  # element -> its functional group, and values
    "ImagePositionPatient": ("PlanePositionSequence", VECTOR),
    "ImageOrientationPatient": ("PlaneOrientationSequence", TURN | st.lists(NUMBER_TEXT, max_size=6)),
    "PixelSpacing": ("PixelMeasuresSequence", VECTOR),
    "SpacingBetweenSlices": ("PixelMeasuresSequence", NUMBER_TEXT),
    "RescaleSlope": ("PixelValueTransformationSequence", NUMBER_TEXT),
    "RescaleIntercept": ("PixelValueTransformationSequence", NUMBER_TEXT),
    "EffectiveEchoTime": ("MREchoSequence", st.sampled_from([0.0, 20.0, 100.0, float("nan")])),
    "StackID": ("FrameContentSequence", st.sampled_from(["", "1", "2"])),
    "InStackPositionNumber": ("FrameContentSequence", st.integers(0, 6)),
}
PLAIN = {  # elements of the data set
    "NumberOfFrames": st.sampled_from(["0", "1", "4", "5", "6", "-1", "", "many"]),
    "Rows": st.sampled_from([0, 5, 6, 7, 60000]),
    "Columns": st.sampled_from([0, 6, 7, 60000]),
    "BitsStored": st.sampled_from([0, 1, 12, 16, 17]),
    "PixelRepresentation": st.sampled_from([0, 1, 2]),
    "SamplesPerPixel": st.sampled_from([0, 1, 3]),
    "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "RGB", "YBR_FULL", "PALETTE COLOR", ""]),
    "Modality": st.sampled_from(["US", "MR", ""]),
    "SOPClassUID": st.sampled_from(["1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.3", ""]),
    "PerFrameFunctionalGroupsSequence": st.just([]),
    "SharedFunctionalGroupsSequence": st.just([]),
}


@st.composite
def edit(draw):
    """An element, a value or None to leave it out, and a frame, None for what frames share."""
    name = draw(st.sampled_from([*GROUPED, *GROUPED, *PLAIN]))  # what frames say of themselves more often
    values = GROUPED[name][1] if name in GROUPED else PLAIN[name]
    return name, draw(st.none() | values | values), draw(st.none() | st.integers(0, PAIR_SIZE[2] - 1))


@pytest.fixture(scope="module")
def anything_may_be_written():
    before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    yield
    pydicom.config.settings.writing_validation_mode = before


def edited(data, edits):
    for name, value, frame in edits:
        places = [data]
        if name in GROUPED:
            group = GROUPED[name][0]
            which = "SharedFunctionalGroupsSequence" if frame is None else "PerFrameFunctionalGroupsSequence"
            items = data.get(which) or []
            if len(items) <= (frame or 0):
                continue
            item = items[frame or 0]
            if group not in item:
                item.update(functional(**{group: {}}))
            places = item[group].value
        if value is None:
            places[0].pop(name, None)
        else:
            setattr(places[0], name, value)
    return data


def of_frame(data, frame, name):
    """What a frame says of itself, or shares; None if nothing."""
    for which, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = data.get(which) or []
        group = items[index].get(GROUPED[name][0]) if items else None
        value = group[0].get(name) if group else None
        if value not in (None, "") and len(np.atleast_1d(value)):
            return np.array(value, float)
    return None


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.permutations(range(PAIR_SIZE[2])), st.lists(edit(), max_size=3))
@example([3, 0, 4, 1, 2], [])
@example([3, 0, 4, 1, 2], [("RescaleSlope", "2", 1), ("RescaleIntercept", "1", None)])
@example([0, 1, 2, 3, 4], [("ImagePositionPatient", ["0", "1", "2"], 2)])
@example([0, 1, 2, 3, 4], [("PixelSpacing", ["1", "2"], None)])
@example([0, 1, 2, 3, 4], [("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], None)])
@example([0, 1, 2, 3, 4], [("PerFrameFunctionalGroupsSequence", [], None), ("SpacingBetweenSlices", "2", None)])
def test_changed_frames_are_refused_or_lie_where_each_says_or_it_is_said_that_none_does(
    anything_may_be_written, tmp_path_factory, order, edits
):
    volume = np.random.default_rng(0).integers(0, 999, PAIR_SIZE).astype(np.int16)
    path = str(tmp_path_factory.getbasetemp() / "changed.dcm")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            write_dicom(path, edited(multi_frame(volume, PAIR_AFFINE, order=order), edits))
        except (ValueError, TypeError, AttributeError):
            return  # no file can say that
        try:
            found = load_volume(path)
        except InputError as error:
            assert str(error).startswith(path) and "\n" not in str(error)
            return
    texts = [str(one.message) for one in said if one.category is Repaired]
    data = pydicom.dcmread(path)
    if any("nothing says where its frames lie" in text for text in texts):
        assert any(of_frame(data, k, "ImagePositionPatient") is None for k in range(len(order)))
        return
    mended = any("made perpendicular" in text for text in texts)
    columns, rows = np.meshgrid(np.arange(data.Columns), np.arange(data.Rows))
    for k, stored in enumerate(data.pixel_array):
        position, turn, size = (
            of_frame(data, k, name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        )
        lps = position + np.multiply.outer(columns * size[1], turn[:3]) + np.multiply.outer(rows * size[0], turn[3:])
        voxels = nib.affines.apply_affine(np.linalg.inv(found.affine.numpy()), lps * [-1, -1, 1])
        assert np.abs(voxels - voxels.round()).max() < 0.11 + mended, "a frame is not where it says"
        if mended:
            continue
        slope, shift = (of_frame(data, k, name) for name in ("RescaleSlope", "RescaleIntercept"))
        values = stored * (1 if slope is None else slope) + (0 if shift is None else shift)
        at = tuple(voxels.round().astype(int).reshape(-1, 3).T)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(found[0].numpy()[at], values.astype(np.float32).ravel(), rtol=1e-5)
