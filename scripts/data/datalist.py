"""Pairs or single images on disk -> datalist, and patient-level folds.

A data set of pairs is a folder with four sub-folders of equal file names, split into train/val/test sub-folders or not,
or a MONAI datalist JSON. Each item of the datalist is a dictionary of paths: `case`, `patient`, `moving_image`,
`fixed_image`, where there are labels `moving_label`, `fixed_label`, and for phantoms `true_ddf`; of a JSON also what
`OPTIONS` names. A data set of single images has the sub-folders `images` and `labels`, or these keys in a JSON: `image`
and `label`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.data.checks import InputError, check_case_name
from scripts.data.files import listed, readable
from scripts.data.kept import refuse_overlap

FOLDERS = (  # (moving_image, fixed_image, moving_label, fixed_label)
    ("moving_images", "fixed_images", "moving_labels", "fixed_labels"),
    ("mr_images", "us_images", "mr_labels", "us_labels"),
)
KEYS = ("moving_image", "fixed_image", "moving_label", "fixed_label")
IMAGES, LABELS = KEYS[:2], KEYS[2:]
SINGLE = ("image", "label")  # keys of a single image
SINGLE_FOLDERS = ("images", "labels")
TRUTH = "true_ddf"  # folder and key of the true displacement, which phantoms have
OPTIONS = tuple(
    f"{side}_{what}" for what in ("spacing", "series", "axes") for side in ("moving", "fixed")
)  # of LoadPaird
SUFFIXES = (".nii.gz", ".nii", ".hdr", ".mha", ".mhd", ".seg.nrrd", ".nrrd", ".nhdr", ".dcm", ".dicom", ".ima")
RESULTS = (  # what a registration leaves in its folder, or removes there because it is of an earlier one
    *("warped_moving_image.nii.gz", "warped_moving_label.nii.gz", "ddf.nii.gz", "overview.png", "qc.json", "qa.json"),
    *("moving_gland.nii.gz", "fixed_gland.nii.gz", "spread.nii.gz", "view.html"),
    # those of `scripts.data.formats`, whose imports take seconds; a test compares them
    *("ddf.h5", "niftyreg.nii.gz", "transformix.txt", "registration.dcm", "warped_moving_image"),
)
SPLITS = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}


class Layout(NamedTuple):
    """What the items of a data set hold, and the names of the folders of each key, in one or several namings."""

    keys: tuple[str, ...]
    folders: tuple[tuple[str, ...], ...]
    options: tuple[str, ...]
    item: str

    @property
    def items(self) -> str:
        return self.item.split()[1] + "s"

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if key.endswith("image"))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if key.endswith("label"))


PAIRS = Layout(KEYS, FOLDERS, OPTIONS, "a pair")
SINGLES = Layout(SINGLE, (SINGLE_FOLDERS,), ("spacing", "series", "axes"), "an image")


def case_name(path: str | Path) -> str:
    """File name without its image suffix; a DICOM folder's name as it is."""
    name = Path(path).name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), name)


def image_files(folder: Path) -> dict[str, Path]:
    """Case name -> image file or DICOM folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: folder not found")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        known = readable(path)  # of a link without a suffix, what it leads to
        if path.name.startswith(".") or not (path.is_dir() or known.lower().endswith(SUFFIXES)):
            continue
        case = case_name(path)
        if case in found:
            raise InputError(f"{folder}: more than one file for case {case}: {found[case].name} and {path.name}")
        found[case] = path
    return {case: Path(readable(path)) for case, path in found.items()}


def _items_in_folder(folder: Path, labels: bool, layout: Layout) -> list[dict[str, str]]:
    """The items of one folder; label folders and labels may be missing where they are not needed."""
    found = [names for names in layout.folders if any((folder / n).is_dir() for n in names[: len(layout.images)])]
    if len(found) != 1:
        expected = ", or ".join(", ".join(names) for names in layout.folders)
        raise InputError(f"{folder}: expected the sub-folders {expected}" + ("; found both" if found else ""))
    wanted = dict(zip(layout.keys, found[0], strict=True))
    wanted = {key: name for key, name in wanted.items() if labels or key in layout.images or (folder / name).is_dir()}
    wanted |= {TRUTH: TRUTH} if layout is PAIRS and (folder / TRUTH).is_dir() else {}
    files = {key: image_files(folder / name) for key, name in wanted.items()}
    first = layout.keys[0]
    for key, name in wanted.items():
        missing = sorted(set(files[first]) ^ set(files[key]))
        if key in layout.labels and not labels:
            missing = [case for case in missing if case in files[key]]  # a label of no image
        if missing:
            raise InputError(
                f"{folder / name}: unpaired case {missing[0]}: it must have the same name in"
                + f" {wanted[first]} and {name}"
                + (f" ({len(missing)} such cases)" if len(missing) > 1 else "")
            )
    if not files[first]:
        raise InputError(
            f"{folder / wanted[first]}: no images; expected files ending in {', '.join(SUFFIXES)}, or folders"
        )
    cases = files[first]
    return [{"case": case} | {k: str(there[case]) for k, there in files.items() if case in there} for case in cases]


def _json(path: Path) -> dict:
    """What a datalist JSON holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable JSON file: {error}") from error
    return content if isinstance(content, dict) else {}


def _items_in_json(path: Path, labels: bool, layout: Layout) -> dict[str, list[dict[str, str]]]:
    """Split -> items of a MONAI datalist JSON; relative paths are relative to the file."""
    content, splits = _json(path), {}
    for split, names in SPLITS.items():
        items = next((content[n] for n in names if n in content), None)
        if items is not None and not isinstance(items, list):
            raise InputError(f"{path}: {split} is not a list of {layout.items}")
        for i, item in enumerate(items or []):
            known = item if isinstance(item, dict) else {}
            missing = [k for k in (layout.keys if labels else layout.images) if not isinstance(known.get(k), str)]
            if missing:
                raise InputError(
                    f"{path}: {split} item {i} lacks {missing[0]}; {layout.item} needs {', '.join(layout.keys)}"
                )
            pair = {k: str(path.parent / item[k]) for k in (*layout.keys, TRUTH) if isinstance(item.get(k), str)}
            absent = next((p for p in pair.values() if not Path(p).exists()), None)
            if absent:
                raise InputError(f"{absent}: named in {path} but not found")
            case = str(item.get("case", case_name(pair[layout.images[-1]])))
            pair = {k: readable(p) for k, p in pair.items()} | {"case": case}
            pair |= {k: item[k] for k in layout.options if k in item}
            if "patient" in item:
                pair["patient"] = str(item["patient"])
            if pair["case"] in (p["case"] for p in splits.get(split, [])):
                raise InputError(
                    f'{path}: more than one {layout.items[:-1]} is called case {pair["case"]}; name each by its "case"'
                )
            splits.setdefault(split, []).append(pair)
    if not splits:
        raise InputError(f'{path}: no {layout.items}; expected lists named "training", "validation" or "test"')
    return splits


def layout_of(root: Path) -> Layout:
    """Whether a data set holds pairs or single images."""
    if root.is_file():
        items = [item for names in SPLITS.values() for name in names for item in _json(root).get(name) or []]
        return SINGLES if any(isinstance(item, dict) and "image" in item for item in items) else PAIRS
    places = [root, *(root / split for split in SPLITS)]
    return SINGLES if any((place / SINGLE_FOLDERS[0]).is_dir() for place in places) else PAIRS


def folds(patients: list[str], count: int, seed: int = 0) -> list[list[str]]:
    """Patients dealt at random into folds whose sizes differ by at most one (§3.3: 76 patients, 12 folds -> 8×6 + 4×7).

    Args:
        patients: one id per case; a patient's cases stay together.
        count: number of folds, 2 or more.

    Raises:
        InputError: fewer patients than folds, or fewer than two folds.
    """
    unique = sorted(set(patients))
    if count < 2 or count > len(unique):
        raise InputError(f"{count} folds need at least 2 folds and as many patients; found {len(unique)} patients")
    order = np.random.default_rng(seed).permutation(len(unique))
    return [sorted(unique[i] for i in order[k::count]) for k in range(count)]


def datalist(
    dataset_dir: str,
    split: str,
    labels: bool = True,
    fold: int | None = None,
    fold_count: int = 0,
    fold_seed: int = 0,
    patient_pattern: str | None = None,
    layout: Layout = PAIRS,
) -> list[dict[str, str]]:
    """The pairs of one split.

    With train/val/test sub-folders (or lists of a JSON) those are the splits. Without, every pair is in "train" and in
    "test" and none in "val", unless a fold is named: then its patients are "val" and "test", the others "train".

    Args:
        dataset_dir: the data set's folder, or a datalist JSON.
        split: "train", "val" or "test".
        labels: whether labels are required.
        fold, fold_count, fold_seed: patient-level cross-validation over a data set that is not split.
        patient_pattern: regular expression whose first group, in the case name, is the patient; else each case is its
            own patient.
        layout: `SINGLES` for a data set of single images.

    Raises:
        InputError: a missing folder, unpaired names, a repeated case, no pairs, a patient in two splits, a bad fold.

    Example:
        ``datalist("data", "train", fold=0, fold_count=4)``
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise InputError(f"{root}: folder not found; pass --dataset_dir DIR")
    present = [name for name in SPLITS if (root / name).is_dir()]
    if root.is_file():
        splits = _items_in_json(root, labels, layout)
    elif present:
        splits = {name: _items_in_folder(root / name, labels, layout) for name in present}
    else:
        splits = {"train": _items_in_folder(root, labels, layout)}
    for pairs in splits.values():
        for pair in pairs:
            check_case_name(pair["case"])
            match = re.search(patient_pattern, pair["case"]) if patient_pattern else None
            if patient_pattern and not match:
                raise InputError(f"{pair['case']}: the patient pattern {patient_pattern!r} does not match this case")
            pair.setdefault("patient", match[1] if match and match.groups() else match[0] if match else pair["case"])
    if fold is not None:
        if len(splits) > 1:
            raise InputError(f"{root}: is already split into {', '.join(splits)}; folds are for a data set that is not")
        pairs = next(iter(splits.values()))
        if not 0 <= fold < fold_count:
            raise InputError(f"fold {fold} of {fold_count}: count from 0 to {fold_count - 1}")
        held_out = folds([p["patient"] for p in pairs], fold_count, fold_seed)[fold]
        test = [p for p in pairs if p["patient"] in held_out]
        splits = {"train": [p for p in pairs if p["patient"] not in held_out], "val": test, "test": test}
    elif set(splits) == {"train"}:
        splits["test"] = splits["train"]
    else:
        _refuse_shared_patients(root, splits)
    return splits.get(split, [])


def single_images(
    dataset_dir: str | Sequence[str] | None,
    split: str,
    axes: str | Sequence[str | None] | None = None,
    moving_axes: str | None = None,
    fixed_axes: str | None = None,
    **options,
) -> list[dict[str, str]]:
    """The single images of one split of one or several data sets; a pair of a data set of pairs is two of them.

    Each has `case`, `patient`, `image`, where there is one `label`, and `group`: its data set, and its side of a pair.

    Args:
        dataset_dir: one or several, each as of `datalist`, of pairs or of single images; None for none.
        split, options: of `datalist`.
        axes: directions of the voxel axes, see `scripts.data.axes`, of all data sets, or of each; None for those of
            the headers. What a datalist JSON says of an image goes before.
        moving_axes, fixed_axes: those of the two sides of pairs where `axes` says nothing.

    Raises:
        InputError: as of `datalist`; another number of axes than of data sets.

    Example:
        ``single_images(["promise12", "pairs"], "train", axes=[None, "PRS"], fold=0, fold_count=5)``
    """
    found, roots = [], [] if dataset_dir is None else listed(dataset_dir)
    told = [axes] * len(roots) if axes is None or isinstance(axes, str) else list(axes)
    if len(told) != len(roots):
        raise InputError(
            f"axes {axes}: {len(told)} for {len(roots)} data sets; give one for each, null for its header's"
        )
    for root, letters in zip(roots, told, strict=True):
        layout = layout_of(Path(root))
        for item in datalist(root, split, layout=layout, **options):
            if layout is SINGLES:
                known = {} if letters is None else {"axes": letters}
                found.append(known | item | {"group": str(root)})
                continue
            for side, told_of_side in (("moving", moving_axes), ("fixed", fixed_axes)):
                known = {"axes": letters or told_of_side} if letters or told_of_side else {}
                own = {k.removeprefix(f"{side}_"): v for k, v in item.items() if k.startswith(f"{side}_")}
                found.append(known | own | {k: item[k] for k in ("case", "patient")} | {"group": f"{root} {side}"})
    return found


def check_output(
    output_dir: str,
    pairs: Sequence[dict[str, str]] = (),
    inputs: Sequence[str | Sequence[str] | None] = (),
    names: Sequence[str] = RESULTS,
    case_folders: bool | None = None,
    others: Sequence[str] = (),
) -> None:
    """Refuse a folder for results that cannot be written, or in which they would replace, remove or join inputs.

    Args:
        output_dir: need not exist.
        pairs: of the datalist.
        inputs: other files that are read: weights, a transform, a datalist. What is no file is passed over, such as
            the names of initial transforms.
        names: of what is written, patterns (*) among them.
        case_folders: whether it is written into a folder for each pair; None for there and into `output_dir`.
        others: more files that are written.

    Raises:
        InputError: see above, and `scripts.data.kept.refuse_overlap`.
    """
    folder = Path(output_dir)
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # asking for permissions tells root and full disks nothing
    except OSError as error:
        raise InputError(f"{output_dir}: cannot be written, {there}: {error.strerror}") from error
    reads = [Path(pair[key]) for pair in pairs for key in (*KEYS, TRUTH, *SINGLE) if key in pair]
    reads += [
        path.parent for path in reads if path.absolute().parent.name in (*sum(FOLDERS, ()), TRUTH, *SINGLE_FOLDERS)
    ]
    given = [path for one in inputs if one for path in ([one] if isinstance(one, str | Path) else one)]
    reads += [Path(path) for path in given if Path(path).is_file()]
    places = [folder] * (not case_folders) + [folder / pair["case"] for pair in pairs if case_folders is not False]
    written = [
        path for place in places for name in names for path in (place.glob(name) if "*" in name else [place / name])
    ]
    refuse_overlap(reads, [*written, *others], "--output_dir")


def _refuse_shared_patients(root: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    owner: dict[str, str] = {}
    for split, pairs in splits.items():
        for patient in {p["patient"] for p in pairs}:
            if owner.setdefault(patient, split) != split:
                raise InputError(f"{root}: patient {patient} is in {owner[patient]} and in {split}")
