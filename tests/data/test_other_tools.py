"""Images and labels as other tools write them: read as an independent reader does, or refused in one line."""

import gzip
import itertools
import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import run
from scipy.spatial.transform import Rotation
from synthetic import PAIR_AFFINE, PAIR_SIZE, content, edit_header, save, to_itk, write, write_series

from scripts.data.checks import InputError, Repaired
from scripts.data.datalist import FOLDERS, KEYS, case_name, datalist
from scripts.data.labels import load_maps
from scripts.data.pairs import LoadPaird
from scripts.data.volumes import load_volume
from scripts.phantoms.sweep import read_frames
from scripts.registration.apply import warp_label

LPS = np.diag([-1.0, -1, 1, 1]) @ PAIR_AFFINE
VALUES = (50 + 20 * content()[0]).clip(0, 120).round()  # of an image that every type holds


def said(function, *arguments, **options):
    """What a function returns, and what was said to be mended."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, [str(one.message) for one in found if one.category is Repaired]


def refusal(function, *arguments, **options) -> str:
    with warnings.catch_warnings(), pytest.raises(InputError) as error:
        warnings.simplefilter("ignore", Repaired)
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def equals_sitk(volume, path):
    """Whether a volume is what SimpleITK reads, voxels and places."""
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array = array[..., None] if array.ndim == 3 else array
    theirs = array.transpose(3, 2, 1, 0).astype(np.float32)
    np.testing.assert_array_equal(volume.numpy(), theirs[:1] if len(volume) == 1 else theirs)
    corner = [n - 1 for n in volume.shape[1:]]
    ours = volume.affine.numpy() @ [*corner, 1]
    np.testing.assert_allclose(ours[:3] * [-1, -1, 1], image.TransformIndexToPhysicalPoint(corner), atol=1e-4)


def write_nrrd(path, array, affine=PAIR_AFFINE, keys=(), kind="list", more=(), encoding="gzip"):
    """An NRRD by hand, uint8 or float64: (X, Y, Z), or (L, X, Y, Z) with a first axis of some kind."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    directions = " ".join(f"({','.join(f'{v:.17g}' for v in column)})" for column in lps[:3, :3].T)
    layered = array.ndim == 4
    fields = {
        "type": {"uint8": "unsigned char", "float64": "double"}[array.dtype.name],
        "dimension": array.ndim,
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, array.shape)),
        "space directions": "none " * layered + directions,
        "kinds": f"{kind} " * layered + "domain domain domain",
        "endian": "little",
        "encoding": encoding,
        "space origin": f"({','.join(f'{v:.17g}' for v in lps[:3, 3])})",
    } | dict(more)
    header = "NRRD0004\n# by hand\n" + "".join(f"{k}: {v}\n" for k, v in fields.items() if v is not None)
    header += "".join(f"{k}:={v}\n" for k, v in dict(keys).items()) + "\n"
    voxels = array.tobytes(order="F")
    Path(path).write_bytes(header.encode() + (gzip.compress(voxels) if encoding == "gzip" else voxels))
    return str(path)


# ---- voxels of any type


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_voxels_of_any_type_are_read_as_simpleitk_reads_them(tmp_path, suffix, kind):
    path = write(tmp_path / f"image{suffix}", VALUES.astype(kind))
    volume, repairs = said(load_volume, path)
    assert repairs == []
    equals_sitk(volume, path)
    np.testing.assert_array_equal(volume[0].numpy(), VALUES.astype(np.float32))


@pytest.mark.parametrize("kind", ["i1", "u2", "i4", "u4", "i8", "u8", "f8"])
def test_nifti_voxels_of_any_type_are_read_too(tmp_path, kind):
    nib.save(nib.Nifti1Image(VALUES.astype(kind), PAIR_AFFINE, dtype=np.dtype(kind)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(load_volume(str(tmp_path / "a.nii.gz"))[0].numpy(), VALUES.astype(np.float32))


def picture(path, channels):
    """Channels (C, X, Y, Z) as the components of a voxel, by SimpleITK."""
    sitk.WriteImage(sitk.Compose([to_itk(channel, PAIR_AFFINE) for channel in channels]), str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz"])
@pytest.mark.parametrize("alpha", [False, True])
def test_grey_in_colour_is_grey_and_colour_is_refused(files, tmp_path, suffix, alpha):
    level = VALUES.astype(np.uint8)
    opaque = [np.full_like(level, 255)] * alpha
    files["moving_image"] = picture(tmp_path / f"grey{suffix}", [level, level, level, *opaque])
    np.testing.assert_array_equal(LoadPaird()(files)["moving_image"][0], level)
    files["moving_image"] = picture(tmp_path / f"colour{suffix}", [level, level, level + 1, *opaque])
    text = refusal(LoadPaird(), files)
    assert f"expected one image, found {3 + alpha} channels" in text and "grey levels" in text
    np.testing.assert_array_equal(LoadPaird(moving_series=3)(files)["moving_image"][0], level + 1.0)


def test_grey_in_nifti_s_own_colours_and_in_a_colour_nrrd_is_grey(tmp_path):
    level = VALUES.astype(np.uint8)
    pixels = np.repeat(level[..., None], 3, axis=-1).view([(c, "u1") for c in "RGB"])[..., 0]
    nib.save(nib.Nifti1Image(pixels, PAIR_AFFINE), tmp_path / "rgb.nii.gz")
    write_nrrd(tmp_path / "rgb.nrrd", np.stack([level] * 3), kind="RGB-color")
    for name in ("rgb.nii.gz", "rgb.nrrd"):
        np.testing.assert_array_equal(load_volume(str(tmp_path / name)).numpy(), level[None].astype(np.float32))


@pytest.mark.parametrize("kind, size", [("complex", 2), ("3D-symmetric-matrix", 6)])
def test_complex_voxels_and_tensors_are_refused(tmp_path, kind, size):
    path = write_nrrd(tmp_path / "t.nrrd", np.random.default_rng(0).normal(size=(size, *PAIR_SIZE)), kind=kind)
    assert "expected real numbers" in refusal(load_volume, path)


# ---- headers


def test_a_pair_of_hdr_and_img_goes_through_the_checks_of_nifti(tmp_path):
    hdr, img = tmp_path / "a.hdr", tmp_path / "a.img"
    pair = nib.Nifti1Pair(VALUES.astype(np.int16), PAIR_AFFINE)
    pair.set_qform(PAIR_AFFINE, 1)
    nib.save(pair, hdr)
    for name in (hdr, img):
        volume, repairs = said(load_volume, str(name))
        assert repairs == []
        equals_sitk(volume, hdr)
    good = hdr.read_bytes()
    edit_header(hdr, qoffset_z=33)
    assert "sform and qform disagree" in refusal(load_volume, str(img))
    hdr.write_bytes(good)
    edit_header(hdr, magic=b"")
    assert "Analyze 7.5" in refusal(load_volume, str(hdr))
    hdr.write_bytes(good)
    img.write_bytes(img.read_bytes()[:-9])
    assert "cannot be read as an image" in refusal(load_volume, str(hdr))
    img.unlink()
    assert "a.img, the other half of it, is not there" in refusal(load_volume, str(hdr))


def test_a_zipped_half_is_read_and_a_damaged_one_is_not(tmp_path):
    path = tmp_path / "a.hdr"
    sitk.WriteImage(to_itk(VALUES.astype(np.int16), PAIR_AFFINE), str(tmp_path / "a.nii"))
    whole = (tmp_path / "a.nii").read_bytes()
    path.write_bytes(whole[:348])
    edit_header(path, magic=b"ni1", vox_offset=0)
    zipped = bytearray(gzip.compress(whole[352:], compresslevel=0))
    (tmp_path / "a.img.gz").write_bytes(zipped)
    np.testing.assert_array_equal(load_volume(str(path))[0].numpy(), VALUES.astype(np.float32))
    zipped[-30] ^= 16
    (tmp_path / "a.img.gz").write_bytes(zipped)
    assert "CRC" in refusal(load_volume, str(path))


def test_a_format_that_is_not_read_is_named_with_those_that_are(tmp_path):
    for name in ("a.mgz", "a.nia", "a.txt", "a"):
        (tmp_path / name).write_bytes(b"n+1 something")
        text = refusal(load_volume, str(tmp_path / name))
        assert "cannot be read as an image: expected NIfTI" in text and "MetaImage, NRRD and DICOM" in text


def test_a_format_under_another_s_name_evades_no_check(tmp_path):
    write(tmp_path / "a.nii", VALUES.astype(np.int16))
    series = write_series(tmp_path / "series", VALUES, PAIR_AFFINE)
    for source in (tmp_path / "a.nii", next(series.iterdir())):
        for name in ("b.mha", "b.nrrd"):
            (tmp_path / name).write_bytes(source.read_bytes())
            assert "another format under this name" in refusal(load_volume, str(tmp_path / name))


def test_frames_of_a_sweep_may_be_of_any_type_too(tmp_path):
    (tmp_path / "angles.csv").write_text("angle_deg\n" + "\n".join(map(str, range(PAIR_SIZE[2]))))
    for kind, name in itertools.product(("i1", "i8", "u4"), ("f.mha", "f.nrrd")):
        sweep = read_frames(Path(write(tmp_path / name, VALUES.astype(kind))))
        np.testing.assert_array_equal(sweep.frames, VALUES.transpose(2, 1, 0).astype(np.float32))


def test_a_header_that_itk_would_fill_up_or_misread_is_refused(tmp_path):
    voxels = VALUES.astype(np.uint8)
    lines = "ObjectType = Image\nNDims = 3\nDimSize = 7 6 5\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    path = tmp_path / "bare.mha"
    path.write_bytes(lines.encode() + voxels.tobytes(order="F"))
    assert "nothing says how large a voxel is" in refusal(load_volume, str(path))
    volume, repairs = said(load_volume, str(path), spacing=[1, 2, 3])
    assert repairs == []
    np.testing.assert_allclose(np.abs(np.diag(volume.affine.numpy())), [1, 2, 3, 1])
    bare = {"space": None, "space directions": None, "space origin": None}
    for more, message in (
        (bare, "nothing says how large a voxel is"),
        (bare | {"spacings": "1 -2 3"}, "it must be positive"),
        ({"space units": '"cm" "cm" "cm"'}, "its unit is cm"),
        ({"space": "scanner-xyz"}, "does not say where right, front and head are"),
    ):
        assert message in refusal(load_volume, write_nrrd(tmp_path / "a.nrrd", voxels, more=more)), message
    bare = write_nrrd(tmp_path / "a.nrrd", voxels, more=bare | {"spacings": "1 2 3"})
    volume, repairs = said(load_volume, bare)
    assert repairs == [f"{bare}: nothing says which way its axes point, so they are taken to be ITK's, LPS"]
    equals_sitk(volume, bare)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "left-anterior-superior"])
def test_an_nrrd_in_another_space_lies_where_simpleitk_puts_it(tmp_path, space):
    path = write_nrrd(tmp_path / "a.nrrd", VALUES.astype(np.uint8), more={"space": space})
    equals_sitk(load_volume(path), path)


# ---- labels on the same voxels, stored otherwise


TURNS = [(axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


@pytest.mark.parametrize("axes, signs", TURNS[::5])
def test_labels_whose_axes_are_stored_otherwise_come_onto_their_image(files, axes, signs):
    label = content()[1]
    turned = label.transpose(*axes, 3)
    flip = [axis for axis in range(3) if signs[axis] < 0]
    turned = np.flip(turned, flip)
    back = np.zeros((4, 4))  # voxel of the label -> voxel of the image
    back[3, 3] = 1
    for axis, source in enumerate(axes):
        back[source, axis] = signs[axis]
        back[source, 3] = 0 if signs[axis] > 0 else PAIR_SIZE[source] - 1
    write(Path(files["fixed_label"]), turned, PAIR_AFFINE @ back)
    loaded, repairs = said(LoadPaird(), files)
    assert repairs == []
    np.testing.assert_array_equal(loaded["fixed_label"], np.moveaxis(label, -1, 0))
    np.testing.assert_allclose(loaded["fixed_label"].affine, PAIR_AFFINE, atol=1e-5)


def test_a_label_of_half_a_voxel_beside_or_turned_by_a_degree_is_refused(files):
    beside = PAIR_AFFINE.copy()
    beside[:3, 3] += PAIR_AFFINE[:3, 0] / 2
    turned = PAIR_AFFINE.copy()
    turned[:3, :3] = Rotation.from_euler("z", 5, degrees=True).as_matrix() @ turned[:3, :3]
    mirrored = np.diag([-1, 1, 1])[:, [1, 0, 2]]  # axes exchanged, but not their sizes
    swapped = PAIR_AFFINE.copy()
    swapped[:3, :3] = PAIR_AFFINE[:3, :3] @ mirrored
    for affine in (beside, turned, swapped):
        write(Path(files["fixed_label"]), content()[1], affine)
        assert "headers differ" in refusal(LoadPaird(), files)


# ---- values


def test_what_rounding_left_of_0_and_1_is_taken_off(files):
    soft = content()[1] * np.float32(0.99999994) + np.float32(1e-8)
    assert set(np.unique(soft)) == {np.float32(1e-8), np.float32(0.99999994)}
    write(Path(files["moving_label"]), soft)
    loaded, repairs = said(LoadPaird(), files)
    assert repairs == []
    np.testing.assert_array_equal(loaded["moving_label"], np.moveaxis(content()[1], -1, 0))
    write(Path(files["moving_label"]), content()[1] * np.float32(0.99))
    assert "label values 0, 0.99000001; expected 0 and 1" in refusal(LoadPaird(), files)


@pytest.mark.parametrize("full, kind", [(255, np.uint8), (65535, np.uint16)])
def test_labels_of_two_values_as_pictures_have_them_are_binary_aloud(files, full, kind):
    write(Path(files["moving_label"]), content()[1].astype(kind) * kind(full))
    loaded, repairs = said(LoadPaird(), files)
    assert repairs == [f"{files['moving_label']}: label values 0 and {full} taken as 0 and 1"]
    np.testing.assert_array_equal(loaded["moving_label"], np.moveaxis(content()[1], -1, 0))


def test_a_number_or_text_declares_label_values_as_a_list_does(files):
    for key in KEYS[2:]:
        write(Path(files[key]), content()[1][..., 0] * np.uint8(255))
    for values in (255, [255], (255,), "255", "[255]", 255.0):
        loaded, repairs = said(LoadPaird(label_values=values), files)
        assert repairs == [] and loaded["moving_label"].unique().tolist() == [0, 1]
    for values in ("gland", [], 1.5, [1, 1], -1, float("nan")):
        assert "expected whole numbers above 0" in refusal(LoadPaird, label_values=values)
    write(Path(files["fixed_label"]), content()[1][..., 0])
    assert "value 1 in an index map of values [255]" in refusal(LoadPaird(label_values=255), files)
    assert said(LoadPaird(), files)[0]["fixed_label"].shape == (1, *PAIR_SIZE)


# ---- segmentations of 3D Slicer


def index_map(seed=0):
    return np.random.default_rng(seed).integers(0, 3, PAIR_SIZE).astype(np.uint8)


def keys_of(*segments):
    """The keys of segments (name, layer, value)."""
    found = {"Segmentation_ReferenceImageExtentOffset": "0 0 0"}
    for number, (name, layer, value) in enumerate(segments):
        found |= {f"Segment{number}_ID": f"S_{number}", f"Segment{number}_Name": name}
        found |= {f"Segment{number}_Layer": layer, f"Segment{number}_LabelValue": value}
    return found


def test_segments_that_share_a_layer_and_segments_in_layers_are_channels_in_the_file_s_order(files, tmp_path):
    shared, other = index_map(), index_map(1)
    expected = np.stack([other == 2, shared == 1, shared == 2])
    path = tmp_path / "s.seg.nrrd"
    layers = np.stack([shared, other * (other == 2).astype(np.uint8)])
    files["fixed_label"] = write_nrrd(path, layers, keys=keys_of(("g", 1, 2), ("a", 0, 1), ("b", 0, 2)))
    np.testing.assert_array_equal(LoadPaird()(files)["fixed_label"], expected)
    files["fixed_label"] = write_nrrd(path, shared, keys=keys_of(("a", 0, 2), ("b", 0, 1)))
    files["moving_label"] = write(tmp_path / "two.nii.gz", np.moveaxis(expected[1:], 0, -1).astype(np.uint8))
    np.testing.assert_array_equal(LoadPaird()(files)["fixed_label"], expected[[2, 1]])
    write(tmp_path / "two.nii.gz", shared)
    loaded = LoadPaird(label_values=[1, 2])(files)
    np.testing.assert_array_equal(loaded["fixed_label"], loaded["moving_label"])


def test_segments_of_before_layers_are_one_a_channel(files, tmp_path):
    keys = {f"Segment{k}_ID": f"S{k}" for k in range(3)}
    layers = np.moveaxis(content()[1], -1, 0)
    files["fixed_label"] = write_nrrd(tmp_path / "s.seg.nrrd", np.ascontiguousarray(layers), keys=keys)
    np.testing.assert_array_equal(LoadPaird()(files)["fixed_label"], layers)
    same = np.stack([layers[0]] * 3)  # three segments, not a grey picture
    files["fixed_label"] = write_nrrd(tmp_path / "s.seg.nrrd", same, keys=keys)
    np.testing.assert_array_equal(LoadPaird()(files)["fixed_label"], same)


def test_a_segmentation_that_is_cropped_or_turned_is_put_where_it_lies(files, tmp_path):
    index = np.zeros(PAIR_SIZE, np.uint8)
    index[2:5, 1:4, 1:5] = index_map()[2:5, 1:4, 1:5]
    part, first = index[2:5, 1:4, 1:5], np.eye(4)
    first[:3, 3] = 2, 1, 1
    keys = keys_of(("a", 0, 1), ("b", 0, 2))
    expected = np.stack([index == 1, index == 2])
    files["moving_label"] = write(tmp_path / "m.nii.gz", np.moveaxis(expected, 0, -1).astype(np.uint8))
    turn = np.array([[0, -1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # (i, j) is (2 - j, i) of the part
    for array, affine in (
        (part, PAIR_AFFINE @ first),
        (np.flip(part, 0).transpose(1, 0, 2), PAIR_AFFINE @ first @ turn),
        (np.pad(part, 3), PAIR_AFFINE @ first @ np.array([[1, 0, 0, -3], [0, 1, 0, -3], [0, 0, 1, -3], [0, 0, 0, 1]])),
    ):
        files["fixed_label"] = write_nrrd(tmp_path / "s.seg.nrrd", np.ascontiguousarray(array), affine, keys)
        loaded = LoadPaird()(files)["fixed_label"]
        np.testing.assert_array_equal(loaded, expected)
        np.testing.assert_allclose(loaded.affine, PAIR_AFFINE, atol=1e-4)


def test_a_segmentation_that_cannot_be_right_is_refused(files, tmp_path):
    keys, path = keys_of(("a", 0, 1)), tmp_path / "s.seg.nrrd"
    one = (index_map() == 1).astype(np.uint8)
    beyond = PAIR_AFFINE.copy()
    beyond[:3, 3] += 3 * PAIR_AFFINE[:3, 1]
    beside = PAIR_AFFINE.copy()
    beside[:3, 3] += PAIR_AFFINE[:3, 1] / 3
    for array, affine, named, values, message in (
        (index_map(), PAIR_AFFINE, keys, None, "value 2 of layer 0 belongs to no segment"),
        (one, beyond, keys, None, "labelled voxels lie outside its image"),
        (one, beside, keys, None, "its voxels are not those of its image"),
        (one, PAIR_AFFINE, keys_of(("a", 0, 1), ("b", 1, 1)), None, "more layers than the 1"),
        (one, PAIR_AFFINE, keys, 2, "values [2], but its segments have 1 (a)"),
    ):
        files["fixed_label"] = write_nrrd(path, array, affine, named)
        assert message in refusal(LoadPaird(values), {k: v for k, v in files.items() if k != "moving_label"}), message


def test_apply_takes_a_segmentation_as_it_is_stored_or_by_segments_where_they_overlap(tmp_path):
    shared = index_map()
    path = write_nrrd(tmp_path / "s.seg.nrrd", shared, keys=keys_of(("a", 0, 2), ("b", 0, 1)))
    margin = (slice(1, -1),) * 3  # of an empty voxel, because such a file ends where what is segmented does
    volume = load_maps(path)
    np.testing.assert_array_equal(volume[0].numpy()[margin], shared)
    np.testing.assert_allclose(volume.affine.numpy() @ [1, 1, 1, 1], PAIR_AFFINE[:, 3], atol=1e-5)
    assert volume.sum() == shared.sum()
    layers = np.stack([shared, (shared > 0).astype(np.uint8)])
    path = write_nrrd(tmp_path / "l.seg.nrrd", layers, keys=keys_of(("all", 1, 1), ("a", 0, 1), ("b", 0, 2)))
    volume = load_maps(path)
    np.testing.assert_array_equal(volume.numpy()[:, *margin], np.stack([shared > 0, shared == 1, shared == 2]))
    warped = warp_label(path, [], volume, volume.affine, volume.shape[1:])
    np.testing.assert_array_equal(warped, np.moveaxis(volume.numpy(), 0, -1))


def test_a_segmentation_has_the_name_of_its_case():
    names = ("p1.seg.nrrd", "p1.nrrd", "p1.hdr", "p1.nii.gz", "P1.SEG.NRRD")
    assert [case_name(name) for name in names] == ["p1"] * 4 + ["P1"]


# ---- labels where none are needed


def test_labels_may_be_there_for_some_or_on_one_side_where_none_are_needed(tmp_path):
    for name in FOLDERS[0]:
        (tmp_path / name).mkdir()
    for k, name in itertools.product(range(3), FOLDERS[0][:2]):
        save(tmp_path / name / f"p{k}.nii.gz", content(seed=k + 5 * (name[0] == "f"))[0], PAIR_AFFINE)
    for k in (0, 2):
        save(tmp_path / FOLDERS[0][2] / f"p{k}.nii.gz", content(seed=k)[1], PAIR_AFFINE)
    (tmp_path / FOLDERS[0][3]).rmdir()
    pairs = datalist(str(tmp_path), "test", labels=False)
    assert [("moving_label" in pair, "fixed_label" in pair) for pair in pairs] == [(k != 1, False) for k in range(3)]
    assert LoadPaird()(pairs[0])["moving_label"].shape == (3, *PAIR_SIZE)
    assert "fixed_labels: folder not found" in refusal(datalist, str(tmp_path), "test")
    items = [{"moving_image": p["moving_image"], "fixed_image": p["fixed_image"], "moving_label": None} for p in pairs]
    (tmp_path / "list.json").write_text(json.dumps({"test": [items[0]]}))
    assert "moving_label" not in datalist(str(tmp_path / "list.json"), "test", labels=False)[0]
    save(tmp_path / FOLDERS[0][2] / "stranger.nii.gz", content()[1], PAIR_AFFINE)
    assert "unpaired case stranger" in refusal(datalist, str(tmp_path), "test", labels=False)


def test_check_takes_a_number_of_label_values_and_a_pair_without_labels(tmp_path):
    for key, name in zip(KEYS[:3], FOLDERS[0], strict=False):
        (tmp_path / name).mkdir()
        image, label = content(seed=len(key))
        save(
            tmp_path / name / "a.nii.gz", label[..., 0] * np.uint8(255) if key.endswith("label") else image, PAIR_AFFINE
        )
    result = run("scripts", "check", str(tmp_path), "--label_values", "255", "--labels", "False", "--num_workers", "0")
    assert result.returncode == 0 and "1 pairs, 0 refused" in result.stdout, result.stderr[-2000:]


# ---- one image twice, images exchanged


def test_one_image_twice_is_refused_whatever_its_file_and_axes(files, tmp_path):
    image = content()[0]
    back = np.array([[0, -1, 0, PAIR_SIZE[0] - 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    for path, array, affine in (
        (tmp_path / "copy.nii.gz", image, PAIR_AFFINE),
        (tmp_path / "moved.mha", image, PAIR_AFFINE @ np.diag([2.0, 2, 2, 1])),
        (tmp_path / "turned.nrrd", np.flip(image, 0).transpose(1, 0, 2), PAIR_AFFINE @ back),
    ):
        files["fixed_image"] = write(path, array, affine)
        text = refusal(LoadPaird(), {key: files[key] for key in KEYS[:2]})
        assert text == f"{files['moving_image']}: holds the same image as {path}; give the MR and the TRUS"
    files["fixed_image"] = write(tmp_path / "other.nii.gz", np.flip(image, 0) + np.float32(1e-3), PAIR_AFFINE)
    LoadPaird()({key: files[key] for key in KEYS[:2]})


def test_dicom_that_says_that_the_images_are_exchanged_is_refused(tmp_path):
    volume, affine = 100 * content()[0], np.diag([1.5, 1.2, 2.0, 1])
    mr = str(write_series(tmp_path / "mr", volume, affine, "MR"))
    us = str(write_series(tmp_path / "us", volume + 7 * content(seed=1)[0], affine, "US", SliceThickness="2"))
    LoadPaird()({"moving_image": mr, "fixed_image": us})
    assert "they are exchanged" in refusal(LoadPaird(), {"moving_image": us, "fixed_image": mr})
    other = write(tmp_path / "a.nii.gz", content(seed=3)[0])
    assert "its modality is US" in refusal(LoadPaird(), {"moving_image": us, "fixed_image": other})
    LoadPaird()({"moving_image": mr, "fixed_image": other})
