"""A cohort on disk: batches are those of memory bit for bit, files are made once, and none that is wrong is used."""

import os
import resource
import shutil

import nibabel as nib
import pytest
import torch
from conftest import QUICK, ROOT
from monai.bundle import ConfigWorkflow
from monai.data import Dataset
from monai.transforms import Compose, Lambda

from scripts.data.checks import InputError
from scripts.data.datalist import datalist, single_images
from scripts.data.pairs import LoadPaird, LoadSingled
from scripts.registration.transforms import PlanFixedGridd
from scripts.training import on_disk
from scripts.training.cohort import CohortLoader, SimulatedPairs
from scripts.training.gland_cubes import GlandLoader
from scripts.training.pair_cubes import PairCubeLoader

LOADERS = pytest.mark.parametrize("kind", [CohortLoader, GlandLoader, PairCubeLoader])


@pytest.fixture
def data(cohort, tmp_path):
    """A copy of the cohort's three pairs to train on."""
    return shutil.copytree(cohort / "train", tmp_path / "data")


def loader(kind, data, folder=None, spacing=4.0, **settings):
    items = (single_images if kind is GlandLoader else datalist)(str(data), "train")
    load = LoadSingled() if kind is GlandLoader else LoadPaird()
    plan = [PlanFixedGridd(spacing)] if kind is CohortLoader else []
    settings = {"seed": 3} | settings
    return kind(Dataset(items, Compose([load, *plan])), 3, 1, "cpu", folder=folder, **settings)


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            assert value.dtype == other[key].dtype and torch.equal(value.nan_to_num(), other[key].nan_to_num())
        else:
            assert value == other[key]


def files(folder):
    """Each file and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@LOADERS
def test_batches_from_disk_are_those_from_memory_bit_for_bit_at_the_first_start_and_at_the_next(kind, data, tmp_path):
    phantom = SimulatedPairs("randomised", 5)[0]
    phantoms = [PlanFixedGridd(4.0)(phantom) if kind is CohortLoader else phantom]
    settings = {"simulated": phantoms, "share": 0.3, "pool": 1, "renewal": 100}
    memory = loader(kind, data, **settings)
    first, second = (loader(kind, data, tmp_path / "kept", **settings) for _ in range(2))
    for _ in range(2):
        for batches in zip(memory, first, second, strict=True):
            same(*batches[:2])
            same(*batches[1:])
    assert str(memory.state_dict()) == str(second.state_dict())


@LOADERS
def test_large_tensors_are_not_in_memory(kind, data, tmp_path):
    def tensors(kept):
        if torch.is_tensor(kept):
            yield kept
        elif isinstance(kept, dict | list):
            for part in kept.values() if isinstance(kept, dict) else kept:
                yield from tensors(part)

    pairs = loader(kind, data, tmp_path / "kept").pool.pairs
    assert all(tensor.nbytes <= on_disk.SMALL for tensor in tensors(pairs))
    assert "InFile" in str(pairs)


@LOADERS
def test_a_second_start_makes_nothing_anew_and_reads_no_image(kind, data, tmp_path, monkeypatch):
    loader(kind, data, tmp_path / "kept")
    before = files(tmp_path / "kept")
    monkeypatch.setattr(on_disk, "kept", None)
    loader(kind, data, tmp_path / "kept")
    assert files(tmp_path / "kept") == before and len(before) == (6 if kind is GlandLoader else 3)


def test_a_training_of_other_pairs_of_the_cohort_makes_only_those_that_are_not_there(data, tmp_path):
    for fold in range(3):
        items = datalist(str(data), "train", fold=fold, fold_count=3)
        PairCubeLoader(Dataset(items, LoadPaird()), 2, 1, "cpu", folder=tmp_path / "kept")
        assert len(files(tmp_path / "kept")) == (2 if fold == 0 else 3)


def test_a_changed_image_label_setting_or_code_is_made_anew(data, tmp_path, monkeypatch):
    folder, made = tmp_path / "kept", []

    def start(spacing=4.0, kind=CohortLoader, **settings):
        before = len(files(folder))
        found = loader(kind, data, folder, spacing, **settings)
        made.append(len(files(folder)) - before)
        for one, other in zip(found, loader(kind, data, None, spacing, **settings), strict=True):
            same(one, other)

    start()
    image = min((data / "fixed_images").iterdir())
    brighter = nib.load(image)
    nib.save(nib.Nifti1Image(brighter.get_fdata(dtype="float32") + brighter.get_fdata() ** 2, brighter.affine), image)
    start()
    label = sorted((data / "moving_labels").iterdir())[1]
    os.utime(label)
    start()
    start(5.0)
    start(5.0, seed=8)
    start(kind=PairCubeLoader, side=32)
    start(kind=PairCubeLoader, side=24)
    monkeypatch.setattr(torch, "__version__", "another")
    start()
    assert made == [3, 1, 1, 3, 0, 3, 3, 3]


def test_a_file_that_is_cut_short_or_has_a_flipped_bit_is_made_anew(data, tmp_path):
    loader(PairCubeLoader, data, tmp_path / "kept")
    whole = {path: path.read_bytes() for path in files(tmp_path / "kept")}
    first, second, third = whole
    first.write_bytes(whole[first][:-1000])
    second.write_bytes(b"")
    third.write_bytes(whole[third][:500] + bytes([whole[third][500] ^ 1]) + whole[third][501:])
    again = loader(PairCubeLoader, data, tmp_path / "kept")
    assert {path: path.read_bytes() for path in files(tmp_path / "kept")} == whole
    for one, other in zip(again, loader(PairCubeLoader, data), strict=True):
        same(one, other)


def test_a_file_that_is_cut_short_while_it_is_in_use_ends_the_training_in_one_line(data, tmp_path):
    batches = iter(loader(PairCubeLoader, data, tmp_path / "kept"))
    for path in files(tmp_path / "kept"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"\.bin: was cut short while it was in use; run again"):
        next(batches)


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(data, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file can be larger
    try:
        with pytest.raises(InputError, match=r"\.bin: cannot be written .*; mend that and run again") as error:
            loader(PairCubeLoader, data, tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and not files(tmp_path / "kept")


def test_voxels_beside_their_header_and_slices_of_a_series_count_too(tmp_path):
    (tmp_path / "series").mkdir()
    names = ["a.mhd", "a.raw", "series/1", "series/2", "b.nii"]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    item = {"moving_image": str(tmp_path / "a.mhd"), "fixed_image": str(tmp_path / "series")}

    def key():
        on_disk._folder.cache_clear()
        return on_disk._item_key(item)

    keys = [key()]
    for name in names[:4]:
        (tmp_path / name).write_bytes(b"22")
        keys.append(key())
    assert len(set(keys)) == 5 and key() == keys[-1]


def test_the_bundle_trains_from_disk_to_the_same_weights_and_shares_the_files(cohort, tmp_path):
    weights, made = [], {}
    for name, device in (("memory", "cpu"), ("disk", "disk"), ("again", "disk")):
        folders = {"output_dir": str(tmp_path / name), "ckpt_dir": str(tmp_path / name)}
        folders |= {"cohort_dir": str(tmp_path / "disk" / "cohort")} if name == "again" else {}
        settings = QUICK | folders | {"dataset_dir": str(cohort), "val_interval": 9, "cohort_device": device}
        workflow = ConfigWorkflow(str(ROOT / "configs" / "train.json"), logging_file=False, **settings)
        workflow.initialize()
        workflow.run()
        weights.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
        before, made = made, files(tmp_path / "disk" / "cohort")
    assert before == made and len(made) == 3
    assert not (tmp_path / "memory" / "cohort").exists() and not (tmp_path / "again" / "cohort").exists()
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


def test_a_transform_that_cannot_be_told_from_another_is_refused(data, tmp_path):
    dataset = Dataset(datalist(str(data), "train"), Compose([LoadPaird(), Lambda(lambda pair: pair)]))
    with pytest.raises(InputError, match="cohort_device disk: a transform of this training cannot be told") as error:
        PairCubeLoader(dataset, 2, 1, "cpu", folder=tmp_path / "kept")
    assert "\n" not in str(error.value)
