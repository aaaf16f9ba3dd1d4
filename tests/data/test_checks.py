"""What cannot be used is refused in one line that names the file, and nothing is written; what is mended is said."""

import gzip
import json
import re
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT, TINY, flags, run
from monai.data import Dataset
from synthetic import PAIR_AFFINE, PAIR_SIZE, content, edit_header, to_itk, write

from scripts.data.checks import InputError, Repaired
from scripts.data.datalist import FOLDERS, KEYS, check_output
from scripts.data.gate import PairLoader, check_dataset
from scripts.data.pairs import LoadPaird

IMAGES, LABELS = KEYS[:2], KEYS[2:]


def refused(files, key, message, **options):
    """Loading raises one line that starts with the file of `key` and holds `message`, and leaves nothing behind."""
    before = sorted(Path(files["moving_image"]).parent.rglob("*"))
    with warnings.catch_warnings(), pytest.raises(InputError) as error:
        warnings.simplefilter("ignore", Repaired)
        LoadPaird(**options)(files)
    text = str(error.value)
    assert text.startswith(f"{files[key]}: "), text
    assert message in text, text
    assert "\n" not in text
    assert sorted(Path(files["moving_image"]).parent.rglob("*")) == before


def changed(by):
    """A defect made by a function of the path, in place."""
    return lambda path: by(Path(path))


def with_header(**fields):
    return lambda path: edit_header(path, **fields)


def image(change=lambda array: array, affine=PAIR_AFFINE):
    return lambda path: write(Path(path), change(content()[0].copy()), affine)


def label(change):
    return lambda path: write(Path(path), change(content()[1]))


def bytes_of(change):
    return changed(lambda path: path.write_bytes(change(path.read_bytes())))


def with_bad(value):
    def change(array):
        array[0, 0, :3] = value
        return array

    return image(change)


def flipped(data, at):
    """One bit of some bytes turned."""
    data = bytearray(data)
    data[at] ^= 16
    return bytes(data)


def stored(data):
    """Gzip of data whose voxels are stored as they are, so that a changed bit still inflates."""
    return gzip.compress(gzip.decompress(data), compresslevel=0)


def sheared(cosine):
    """An affine whose first two axes have this cosine between them."""
    affine = PAIR_AFFINE.copy()
    x, y = (affine[:3, i] / np.linalg.norm(affine[:3, i]) for i in (0, 1))
    affine[:3, 1] = (cosine * x + np.sqrt(1 - cosine**2) * y) * np.linalg.norm(affine[:3, 1])
    return affine


def only_sform(affine, pixdim=(1.5, 1.2, 2.0)):
    rows = dict(zip(("srow_x", "srow_y", "srow_z"), np.asarray(affine)[:3], strict=True))
    return with_header(**rows, sform_code=1, qform_code=0, pixdim=dict(zip((1, 2, 3), pixdim, strict=True)))


def coloured(same=False):
    """The voxels of an RGB picture; with equal colours it is grey."""
    pixels = np.random.default_rng(3).integers(0, 256, (*PAIR_SIZE, 3), np.uint8)
    pixels[..., 1:] = pixels[..., :1] if same else pixels[..., 1:]
    return np.ascontiguousarray(pixels).view([(c, "u1") for c in "RGB"])[..., 0]


FLAT = PAIR_AFFINE @ np.diag([0.0, 1, 1, 1])
DOUBLE = PAIR_AFFINE @ np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
BAD_FILES = {  # the file, what is done to it, the message
    "missing": (KEYS, changed(Path.unlink), "file not found"),
    "empty": (KEYS, bytes_of(lambda data: b""), "cannot be read as an image"),
    "ten bytes": (KEYS, bytes_of(lambda data: data[:10]), "cannot be read as an image"),
    "half": (KEYS, bytes_of(lambda data: data[: len(data) // 2]), "cannot be read as an image"),
    "end of gzip missing": (IMAGES, bytes_of(lambda data: data[:-6]), "cannot be read as an image"),
    "a bit turned": (IMAGES, bytes_of(lambda data: flipped(stored(data), -50)), "cannot be read as an image: CRC"),
    "not zipped": (IMAGES, bytes_of(gzip.decompress), "cannot be read as an image: Not a gzipped file"),
    "text": (KEYS, bytes_of(lambda data: gzip.compress(b"not an image")), "cannot be read as an image"),
    "voxels missing": (
        KEYS,
        bytes_of(lambda data: gzip.compress(gzip.decompress(data)[:-9])),
        "cannot be read as an image",
    ),
    "NaN": (IMAGES, with_bad(np.nan), "3 voxels are NaN or infinite"),
    "infinity": (IMAGES, with_bad(-np.inf), "3 voxels are NaN or infinite"),
    "beyond single precision": (IMAGES, image(lambda a: a.astype(np.float64) * 1e300), "are NaN or infinite"),
    "constant": (IMAGES, image(lambda a: 0 * a + 7), "every voxel is 7; a constant image cannot be registered"),
    "complex": (IMAGES, image(lambda a: a + 1j), "voxels of type complex64; expected real numbers"),
    "colours": (
        IMAGES,
        lambda path: nib.save(nib.Nifti1Image(coloured(), PAIR_AFFINE), path),
        "expected one image, found 3 channels",
    ),
    "single slice": (IMAGES, image(lambda a: a[:, :, :1]), "a single slice, size (7, 6, 1)"),
    "two axes": (IMAGES, with_header(dim={0: 2}), "expected a 3-D volume, found 2 axes"),
    "five axes": (IMAGES, with_header(dim={0: 5, 5: 1}), "expected a 3-D volume, found 5 axes"),
    "two images": (IMAGES, image(lambda a: np.stack([a, a], -1)), "expected one image, found 2 channels"),
    "negative size": (IMAGES, with_header(dim={1: -7}), "single slice, size (-7, 6, 5)"),
    "zero voxel size": (IMAGES, with_header(pixdim={1: 0}), "voxel size [0.0, 1.2, 2.0] mm in pixdim"),
    "negative voxel size": (IMAGES, with_header(pixdim={2: -1.2}), "it must be positive"),
    "NaN voxel size": (IMAGES, with_header(pixdim={3: np.nan}), "voxel size [1.5, 1.2, nan] mm in pixdim"),
    "NaN in the sform": (IMAGES, with_header(srow_y={1: np.nan}), "voxel size"),
    "an axis without length": (IMAGES, only_sform(FLAT), "voxel size [0.0, 1.2, 2.0] mm in the header"),
    "singular": (IMAGES, only_sform(DOUBLE), "the affine in the header is singular"),
    "sheared": (IMAGES, only_sform(sheared(0.1)), "its axes are 5.7° from perpendicular"),
    "sform and qform disagree": (IMAGES, with_header(qoffset_z=33), "sform and qform disagree, by up to"),
    "sform and pixdim disagree": (IMAGES, only_sform(PAIR_AFFINE, (1.5, 1.2, 1.0)), "sform and pixdim disagree"),
    "no orientation": (IMAGES, with_header(sform_code=0, qform_code=0), "neither sform nor qform"),
    "unknown form": (IMAGES, with_header(sform_code=9), "sform_code 9 in the header"),
    "half a qfac": (IMAGES, with_header(sform_code=0, pixdim={0: -0.5}), "pixdim[0] is -0.5"),
    "metres": (IMAGES, with_header(xyzt_units=1), "its unit is the metre"),
    "micrometres": (IMAGES, with_header(xyzt_units=3), "its unit is the micrometre"),
    "scaled by infinity": (IMAGES, with_header(scl_slope=np.inf), "scl_slope inf"),
    "an offset without a scale": (IMAGES, with_header(scl_slope=0, scl_inter=5), "scl_slope 0 with scl_inter 5"),
    "voxels in the header": (IMAGES, with_header(vox_offset=16), "vox_offset 16 in the header"),
    "unknown voxels": (IMAGES, with_header(datatype=511), "cannot be read as an image"),
    "label of another size": (LABELS, label(lambda a: a[:-1]), "size (6, 6, 5) differs from its image"),
    "label mirrored": (
        LABELS,
        lambda path: write(Path(path), content()[1], PAIR_AFFINE @ np.diag([-1, 1, 1, 1])),
        "headers differ",
    ),
    "fewer labels": (("moving_label",), label(lambda a: a[..., :2]), "2 labels, but"),
    "no label": (LABELS, label(lambda a: 0 * a), "the label set is empty"),
    "other label values": (LABELS, label(lambda a: 7 * a), "label values 0, 7; expected 0 and 1"),
    "soft labels": (LABELS, label(lambda a: a * np.float32(0.5)), "for example --label_values '[1,2,3]'"),
    "NaN in labels": (LABELS, label(lambda a: np.where(a, np.nan, 0)), "label values 0, nan; expected 0 and 1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name(files, name):
    keys, spoil, message = BAD_FILES[name]
    for key in keys:
        kept = Path(files[key]).read_bytes()
        spoil(files[key])
        refused(files, key, message)
        Path(files[key]).write_bytes(kept)
    LoadPaird()(files)


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
def test_text_under_the_name_of_an_image_is_refused(files, tmp_path, suffix):
    files["fixed_image"] = str(tmp_path / f"text{suffix}")
    Path(files["fixed_image"]).write_text("not an image")
    refused(files, "fixed_image", "cannot be read as an image")


def test_a_folder_without_a_series_or_with_two_or_a_gap_is_refused(files, tmp_path):
    files["moving_image"] = str(tmp_path / "series")
    folder = Path(files["moving_image"])
    folder.mkdir()
    refused(files, "moving_image", "no DICOM image in this folder")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()

    def add(z, series):
        plane = sitk.GetImageFromArray(np.arange(42, dtype=np.int16).reshape(6, 7) + z)
        tags = {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": f"1.2.3.{series}", "0020|0013": str(z)}
        tags |= {"0020|0037": "1\\0\\0\\0\\1\\0", "0020|0032": f"0\\0\\{2 * z}"}
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{z}.dcm"))
        writer.Execute(plane)

    for z in (0, 1, 2, 4):
        add(z, series=1)
    refused(files, "moving_image", "slices are unevenly spaced")
    add(3, series=1)
    LoadPaird()({key: files[key] for key in IMAGES})
    for z in range(3):
        add(z, series=2)
    refused(files, "moving_image", "2 DICOM series in one folder")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_metaimage_is_refused_where_itk_reads_on(files, tmp_path, compressed):
    path = tmp_path / "moving.mha"
    files["moving_image"] = str(path)
    sitk.WriteImage(to_itk(content()[0], PAIR_AFFINE), str(path), compressed)
    good = path.read_bytes()
    LoadPaird()(files)
    path.write_bytes(good[:-30])
    refused(files, "moving_image", "cannot be read as an image")
    path.write_bytes(re.sub(rb"(ElementSpacing = )", rb"\1-", good))
    refused(files, "moving_image", "voxel size [-1.5, 1.2, 2.0] mm in the header")
    path.write_bytes(re.sub(rb"DimSize = .*", b"DimSize = 20000 20000 20000", good))
    refused(files, "moving_image", "is beyond the cap of")
    if compressed:
        path.write_bytes(flipped(good, -60))
        refused(files, "moving_image", "cannot be read as an image")


def test_a_volume_beyond_the_cap_is_refused_before_it_is_read(files):
    edit_header(files["moving_image"], dim={1: 1000, 2: 1000, 3: 1000})
    refused(files, "moving_image", "size (1000, 1000, 1000) is beyond the cap of 134217728 voxels")


@pytest.mark.parametrize("key", LABELS)
def test_a_label_a_little_beside_its_image_is_rounding_and_farther_is_refused(files, key):
    for shift, fits in ((0.05, True), (2.05, False)):
        affine = PAIR_AFFINE.copy()
        affine[0, 3] += shift
        write(Path(files[key]), content()[1], affine)
        if fits:
            LoadPaird()(files)
    refused(files, key, f"lies up to 2.05 mm away from its image {files[key.replace('label', 'image')]}")


def test_a_pair_without_a_label_in_both_images_is_refused(files):
    for key, kept in zip(LABELS, (0, 1), strict=True):
        write(Path(files[key]), content()[1] * np.eye(3, dtype=np.uint8)[kept])
    refused(files, "moving_label", f"no label is present both here and in {files['fixed_label']}")


def test_an_undeclared_value_or_several_channels_are_no_index_map(files):
    refused(files, "moving_label", "3 channels in an index map of values [1, 2]", label_values=[1, 2])
    index = np.resize(np.array([0, 1, 5], np.uint8), PAIR_SIZE)
    for key in LABELS:
        write(Path(files[key]), index)
    refused(files, "moving_label", "value 5 in an index map of values [1, 2]", label_values=[1, 2])


def said(files):
    """The loaded pair and what was said to be mended."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loaded = LoadPaird()(files)
    return loaded, [str(one.message) for one in found if one.category is Repaired]


def test_nothing_is_said_of_a_good_pair_whatever_its_types(files):
    for kind in (np.uint8, np.int16, np.int32, np.float64):
        write(Path(files["moving_image"]), (20 * content()[0]).astype(kind))
        write(Path(files["fixed_label"]), content()[1].astype(kind))
        loaded, repairs = said(files)
        assert repairs == []
        np.testing.assert_array_equal(loaded["moving_image"][0], (20 * content()[0]).astype(kind).astype(np.float32))


def test_a_missing_sform_is_replaced_by_the_qform_aloud(files):
    edit_header(files["moving_image"], sform_code=0, srow_x=0)
    loaded, repairs = said(files)
    assert repairs == [f"{files['moving_image']}: no sform, so the qform is used"]
    np.testing.assert_allclose(loaded["moving_image"].affine, PAIR_AFFINE, atol=1e-4)


def test_axes_that_are_almost_perpendicular_are_made_so_aloud_about_the_centre(files):
    only_sform(sheared(0.01))(files["fixed_image"])
    only_sform(sheared(0.01))(files["fixed_label"])
    loaded, repairs = said(files)
    assert [text.split(": ")[0] for text in repairs] == [files["fixed_image"], files["fixed_label"]]
    assert "axes 0.57° from perpendicular made perpendicular, which moves its corners 0.0" in repairs[0]
    affine, middle = loaded["fixed_image"].affine.numpy(), [*(np.array(PAIR_SIZE) - 1) / 2, 1]
    np.testing.assert_allclose(affine @ middle, sheared(0.01) @ middle, atol=1e-5)
    gram = affine[:3, :3].T @ affine[:3, :3]
    np.testing.assert_allclose(gram, np.diag(np.square((1.5, 1.2, 2.0))), atol=1e-5)
    only_sform(sheared(5e-5))(files["fixed_image"])
    only_sform(sheared(5e-5))(files["fixed_label"])
    assert said(files)[1] == []


def test_axes_in_another_order_are_no_repair(files):
    turned = PAIR_AFFINE @ np.diag([-1.0, -1, 1, 1])
    for key in ("moving_image", "moving_label"):
        write(Path(files[key]), content()[key.endswith("label")], turned)
    loaded, repairs = said(files)
    assert repairs == []
    np.testing.assert_allclose(loaded["moving_image"].affine, turned, atol=1e-5)


def test_an_empty_label_channel_is_named(files):
    write(Path(files["fixed_label"]), content()[1] * np.array([1, 0, 1], np.uint8))
    assert said(files)[1] == [f"{files['fixed_label']}: label 1 of 0 to 2 is empty, left out of loss and TRE"]


# ---- outputs


def test_an_output_that_cannot_be_written_or_lies_in_an_input_is_refused(tmp_path):
    (tmp_path / "file").touch()
    series = tmp_path / "series"
    image, warped = tmp_path / "moving_images" / "a.nii.gz", tmp_path / "out" / "warped_moving_image.nii.gz"
    for path in (image, warped):
        path.parent.mkdir()
        path.touch()
    pair = {"case": "a", "moving_image": str(image), "fixed_image": str(tmp_path / "fixed.nii.gz")}
    for output, moving, message in (
        (tmp_path / "file", image, f"cannot be written, {tmp_path / 'file'}: Not a directory"),
        (tmp_path / "file" / "sub", image, f"cannot be written, {tmp_path / 'file'}: Not a directory"),
        (Path("/proc/results"), image, "cannot be written, /proc: "),
        (image.parent, image, f"lies in the input {image.parent}"),
        (image.parent / "results" / "new", image, f"lies in the input {image.parent}"),
        (series / "out", series, f"lies in the input {series}"),
        (warped.parent, warped, f"would replace the input {warped}"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            check_output(str(output), [pair | {"moving_image": str(moving)}])
        assert not (output / "anything").exists()
    for good in (tmp_path, tmp_path / "new" / "folder", tmp_path / "moving_images_out"):
        check_output(str(good), [pair])
    assert not (tmp_path / "new").exists()


# ---- batches, and a whole data set


@pytest.fixture
def dataset(tmp_path):
    """Six pairs in four folders, not split; the second has a NaN, the fifth a half-written label."""
    root = tmp_path / "data"
    for key, name in zip(KEYS, FOLDERS[0], strict=True):
        (root / name).mkdir(parents=True)
        for k in range(6):
            seed = k + 10 * (key == "fixed_image")
            write(root / name / f"case{k}.nii.gz", content(seed=seed)[key.endswith("label")])
    with_bad(np.nan)(root / "moving_images" / "case1.nii.gz")
    bytes_of(lambda data: data[:60])(root / "fixed_labels" / "case4.nii.gz")
    return root


def pairs_of(root):
    folders = list(zip(KEYS, FOLDERS[0], strict=True))
    return [
        {"case": f"case{k}"} | {key: str(root / name / f"case{k}.nii.gz") for key, name in folders} for k in range(6)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_keeps_going_gives_the_others_and_names_the_refused_at_the_end(dataset, workers, capfd):
    found = []
    with pytest.raises(InputError, match=r"^2 of 6 pairs refused, the other 4 are done; .*: case1, case4$"):
        for batch in PairLoader(Dataset(pairs_of(dataset), LoadPaird()), workers, keep_going=True):
            found += batch["case"]
            assert batch["moving_image"].shape == (1, 1, *PAIR_SIZE)
    assert found == ["case0", "case2", "case3", "case5"]
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("refused: case1: ") and "3 voxels are NaN" in line for line in lines) == 1
    assert sum(line.startswith("refused: case4: ") and "cannot be read" in line for line in lines) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_stops_at_the_first_refusal_with_its_own_message(dataset, workers):
    with pytest.raises(InputError, match=r"case1.nii.gz: 3 voxels are NaN or infinite; clean the image first$"):
        list(PairLoader(Dataset(pairs_of(dataset), LoadPaird()), workers))


def test_an_error_that_is_no_refusal_is_not_swallowed(dataset):
    def broken(pair):
        raise KeyError("a mistake of ours")

    with pytest.raises(RuntimeError, match="applying transform"):
        list(PairLoader(Dataset(pairs_of(dataset), broken), keep_going=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_check_lists_every_refusal_and_repair_by_case(dataset, workers, capsys):
    edit_header(dataset / "fixed_images" / "case2.nii.gz", sform_code=0)
    assert check_dataset(str(dataset), num_workers=workers) == 2
    *rows, summary = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows] == [
        ["refused", "train", "case1"],
        ["repaired", "train", "case2"],
        ["refused", "train", "case4"],
    ]
    assert "3 voxels are NaN" in rows[0] and "no sform" in rows[1] and "cannot be read" in rows[2]
    assert summary == f"{dataset}: 6 pairs, 2 refused, 4 fit for use (1 of them repaired)"


def test_check_reads_a_datalist_with_index_maps(dataset, capsys):
    for k in (0, 2):
        for name in FOLDERS[0][2:]:
            write(dataset / name / f"case{k}.nii.gz", np.resize(np.array([0, 3, 5], np.uint8), PAIR_SIZE))
    items = pairs_of(dataset)
    path = dataset / "datalist.json"
    path.write_text(json.dumps({"training": [items[0]], "validation": [items[2]]}))
    assert check_dataset(str(path), label_values=[5, 3], num_workers=0) == 0
    assert capsys.readouterr().out == f"{path}: 2 pairs, 0 refused, 2 fit for use (0 of them repaired)\n"
    assert check_dataset(str(path), label_values=[5], num_workers=0) == 2
    assert "value 3 in an index map of values [5]" in capsys.readouterr().out


# ---- the commands themselves


def one_error(result):
    """The only line that begins with error; no traceback, exit code 1."""
    assert result.returncode == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line


def test_the_check_command_ends_with_1_where_something_is_refused_and_else_with_0(dataset):
    result = run("scripts", "check", str(dataset), "--num_workers", "0")
    assert result.returncode == 1 and "6 pairs, 2 refused" in result.stdout, result.stderr[-3000:]
    for name in FOLDERS[0]:
        for k in (1, 4):
            (dataset / name / f"case{k}.nii.gz").unlink()
    result = run("scripts", "check", str(dataset), "--num_workers", "0")
    assert result.returncode == 0 and "4 pairs, 0 refused" in result.stdout, result.stderr[-3000:]


def test_a_batch_with_bad_pairs_registers_the_others_and_ends_with_1(cohort, tmp_path):
    root, output = tmp_path / "data", tmp_path / "out"
    good = [next((cohort / "test" / name).iterdir()) for name in FOLDERS[0][:2]]
    for name, path in zip(FOLDERS[0], good, strict=False):
        (root / name).mkdir(parents=True)
        for k in (0, 1, 4, 5):
            shutil.copy(path, root / name / f"case{k}.nii.gz")
    bytes_of(lambda data: data[:999])(root / "moving_images" / "case1.nii.gz")
    edit_header(root / "fixed_images" / "case4.nii.gz", xyzt_units=3)
    edit_header(root / "fixed_images" / "case5.nii.gz", sform_code=0)
    configs = str([str(ROOT / "configs" / name) for name in ("inference.json", "variant_none.yaml")])
    settings = TINY | {"dataset_dir": root, "output_dir": output, "refine_steps": 0}
    result = run("monai.bundle", "run", "--config_file", configs, *flags(settings), cwd=tmp_path)
    assert one_error(result).startswith("error: 2 of 4 pairs refused, the other 2 are done;")
    assert one_error(result).endswith(": case1, case4")
    for line in (
        "refused: case1: ",
        "refused: case4: ",
        f"repaired: {root / 'fixed_images' / 'case5.nii.gz'}: no sform",
    ):
        assert result.stderr.count(line) == 1, result.stderr[-3000:]
    assert sorted(path.name for path in output.iterdir()) == ["case0", "case5", "index.html"]
    assert all((output / case / "qc.json").exists() for case in ("case0", "case5"))


def test_training_refuses_a_bad_pair_before_its_first_step(dataset, tmp_path):
    output = tmp_path / "out"
    settings = TINY | {"dataset_dir": dataset, "output_dir": output, "iterations": 2, "num_workers": 2}
    result = run("monai.bundle", "run", "--config_file", str(ROOT / "configs" / "train.json"), *flags(settings))
    assert one_error(result).endswith("case1.nii.gz: 3 voxels are NaN or infinite; clean the image first")
    assert not output.exists()


def test_register_refuses_an_output_in_its_input(files, tmp_path):
    settings = {"moving": files["moving_image"], "fixed": files["fixed_image"], "output_dir": files["moving_image"]}
    assert "Not a directory" in one_error(run("scripts", "register", *flags(settings)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(path).name for path in files.values())
