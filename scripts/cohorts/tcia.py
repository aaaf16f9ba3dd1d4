"""TCIA's Prostate-MRI-US-Biopsy as it is downloaded: a tree of DICOM of any depth and its STL surfaces, in one folder.

A surface's name says in whose space it is: PATIENT-ProstateSurface-seriesUID-UID.STL, PATIENT-Target1-seriesUID-UID.STL
for a target. A pair is a patient's MR series with a prostate surface and a TRUS series with one. What is known of the
TRUS files was not checked on real ones: a file that contradicts it is left out, with what was found.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from scripts.cohorts.voxelise import voxelise
from scripts.cohorts.writing import Case, Found, LeftOut, Side, named
from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.dicom import reader
from scripts.data.dicom.frames import frame_distance, frames_of, pixel_size, pydicom
from scripts.data.dicom.pixels import decode, first_line
from scripts.data.gate import read
from scripts.data.lps import FLIP
from scripts.data.meshes import read_surface
from scripts.data.volumes import read_or_refuse

ABOUT = [
    "Prostate-MRI-US-Biopsy, The Cancer Imaging Archive, https://doi.org/10.7937/TCIA.2020.A61IOC1A",
    "Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "Cite: Natarajan, Priester, Margolis, Huang, Marks, Prostate MRI and Ultrasound With Pathology and Coordinates of",
    "Tracked Biopsy (Prostate-MRI-US-Biopsy), The Cancer Imaging Archive 2020, doi 10.7937/TCIA.2020.A61IOC1A; and",
    "Clark et al., Journal of Digital Imaging 26, 1045-1057, 2013, doi 10.1007/s10278-013-9622-7.",
    "Labels are the surfaces, voxelised: the gland first.",
]
TARGETS = (
    "Targets on the TRUS were carried there by the fusion device: they are its registration, not independent truth."
)
NAME = re.compile(
    r"(?P<patient>.+)-(?P<structure>ProstateSurface|Target\d+)-seriesUID-(?P<series>[0-9.]+)\.stl", re.IGNORECASE
)
GLAND = "prostatesurface"
TAGS = ["SOPClassUID", "Modality", "SeriesInstanceUID", "PatientID", "StudyDate", "SeriesDescription", "Rows"]
LEAST_INSIDE = 0.5  # share of a structure that its image must hold
WHOLE = 0.995  # below, it is said how much of a surface lies outside


class Entry(NamedTuple):
    """What the header of one DICOM file says; empty texts where it says nothing."""

    path: Path
    series: str
    modality: str
    patient: str
    date: str
    title: str


class Series(NamedTuple):
    """The files of one series, and its surfaces, by the names of their structures in lower case."""

    uid: str
    files: list[Path]
    entry: Entry
    surfaces: dict[str, Path]

    def __str__(self) -> str:
        said = ", ".join(text for text in (self.entry.title, self.entry.date) if text)
        return f"{self.uid}{f' ({said})' * bool(said)}"


class _Headers(Dataset):
    """The entries of files that may be DICOM; None for one that is not, or holds no image."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Entry | None:
        file = self.files[index]
        if not reader.is_dicom(file):
            return None
        try:
            header = pydicom().dcmread(file, stop_before_pixels=True, force=True, specific_tags=TAGS)
            texts = [str(header.get(name) or "").strip() for name in TAGS[1:6]]
        except Exception as error:  # pydicom raises many kinds
            raise InputError(f"cannot be read as DICOM: {first_line(error)}") from error
        if not texts[1]:
            raise InputError("as DICOM it names no series, is empty or damaged")
        modality, series, patient, date, title = texts
        return Entry(file, series, modality, patient, date, title) if header.get("Rows") else None


def find(source: Path, targets: bool = False, last_mr: bool = False, num_workers: int = 0) -> Found:
    """The pairs of a download, by the headers of its DICOM files and the names of its surfaces.

    Args:
        targets: whether targets that have a surface on both sides follow the gland.
        last_mr: of several MR series with a prostate surface take the last one on or before the day of the TRUS.
        num_workers: processes that read headers.

    Raises:
        InputError: no surfaces, or no DICOM files in it; no VTK.
    """
    if importlib.util.find_spec("vtkmodules") is None:
        raise InputError("surfaces need VTK: pip install -r requirements-surfaces.txt")
    stls, others = _files(source)
    if not stls:
        raise InputError(f"{source}: no STL surface in it; put the DICOM tree and the STL folder into one folder")
    entries, left_out = _entries(source, others, num_workers)
    if not entries:
        raise InputError(f"{source}: no DICOM image in it; put the DICOM tree and the STL folder into one folder")
    series, more = _series(source, entries, stls)
    cases = []
    patients = defaultdict(list)
    for one in series:
        patients[one.entry.patient].append(one)
    for patient in sorted(patients):
        for mr, us in _pairs(patient, patients[patient], last_mr, more):
            name = named(patient, us.uid.rpartition(".")[2][-6:])
            cases.append(Case(name, partial(load, mr, us, targets), patient))
    return Found(cases, left_out + more, [*ABOUT, *[TARGETS] * targets])


def _files(source: Path) -> tuple[list[Path], list[Path]]:
    """The STL files of a tree, and all others but hidden ones."""
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(source)
        for name in sorted(names)
        if not name.startswith(".")
    ]
    stls = [path for path in found if path.suffix.lower() == ".stl"]
    return sorted(stls), sorted(set(found) - set(stls))


def _entries(source: Path, files: Sequence[Path], num_workers: int) -> tuple[list[Entry], list[LeftOut]]:
    entries, damaged = [], []
    found = tqdm(read(_Headers(files), num_workers), desc="Reading headers", unit="file", total=len(files))
    for file, entry in zip(files, found, strict=True):
        if isinstance(entry, InputError):
            damaged.append(LeftOut(str(file.relative_to(source)), checks.one_line(entry)))
        elif entry is not None:
            entries.append(entry)
    return entries, damaged


def _series(source: Path, entries: Sequence[Entry], stls: Sequence[Path]) -> tuple[list[Series], list[LeftOut]]:
    """The series, with their surfaces; and the surfaces that are of none."""
    series: dict[str, Series] = {}
    for entry in entries:
        series.setdefault(entry.series, Series(entry.series, [], entry, {})).files.append(entry.path)
    stray = []
    for path in stls:
        name, said = NAME.fullmatch(path.name), str(path.relative_to(source))
        if name is None:
            stray.append(
                LeftOut(said, "a surface whose name does not say of which patient, structure and series it is")
            )
            continue
        owner = series.get(name["series"].rstrip("."))
        if owner is None:
            stray.append(LeftOut(said, "the DICOM files of its series are not there"))
            continue
        if owner.entry.patient != name["patient"]:
            reason = f"its name says patient {name['patient']}, its series {owner.uid} {owner.entry.patient or 'none'}"
            stray.append(LeftOut(said, reason))
            continue
        first = owner.surfaces.setdefault(name["structure"].lower(), path)
        if first is not path and first.read_bytes() != path.read_bytes():
            stray.append(LeftOut(said, f"another surface of the same name is used, {first.relative_to(source)}"))
    return list(series.values()), stray


def _pairs(
    patient: str, series: Sequence[Series], last_mr: bool, left_out: list[LeftOut]
) -> list[tuple[Series, Series]]:
    """A patient's pairs of an MR and a TRUS; why there is none is added to `left_out`."""
    glands = [one for one in series if GLAND in one.surfaces]
    mrs, uss = ([one for one in glands if one.entry.modality == kind] for kind in ("MR", "US"))
    odd = [one for one in glands if one not in mrs and one not in uss]
    left_out += [
        LeftOut(patient, f"series {one} has a prostate surface, and is neither MR nor US but {one.entry.modality!r}")
        for one in odd
    ]
    lacking = [name for name, some in (("MR", mrs), ("TRUS", uss)) if not some]
    if lacking:
        counts = {kind: sum(one.entry.modality == kind for one in series) for kind in ("MR", "US")}
        reason = f"no prostate surface of {' nor '.join(lacking)}; {counts['MR']} MR and {counts['US']} US series"
        left_out.append(LeftOut(patient or "no PatientID", reason))
        return []
    pairs = []
    for us in sorted(uss, key=lambda one: one.uid):
        chosen = _last_before(mrs, us) if last_mr else mrs
        if len(chosen) == 1:
            pairs.append((chosen[0], us))
            continue
        listed = ", ".join(map(str, sorted(mrs, key=lambda one: (one.entry.date, one.uid))))
        how = "none or several are the last before it" if last_mr else "--last_mr True takes the last before the TRUS"
        reason = f"{len(mrs)} MR series with a prostate surface, {listed}, for the TRUS {us}; {how}"
        left_out.append(LeftOut(patient, reason))
    return pairs


def _last_before(mrs: Sequence[Series], us: Series) -> list[Series]:
    """The MR series of the last day that is not after the TRUS; none where a date is missing."""
    if not all(re.fullmatch(r"\d{8}", one.entry.date) for one in (*mrs, us)):
        return []
    days = [one.entry.date for one in mrs if one.entry.date <= us.entry.date]
    return [one for one in mrs if days and one.entry.date == max(days)]


def load(mr: Series, us: Series, targets: bool) -> tuple[Side, Side, dict[str, str]]:
    """The two sides of a pair, and what cases.csv says of it: the series, the structures, what is to be noted.

    Raises:
        InputError: an image or a gland's surface cannot be used.
    """
    images = [read_or_refuse(f"MR series {mr}", read_mr, mr), read_or_refuse(f"US series {us}", read_trus, us)]
    common = sorted(set(mr.surfaces) & set(us.surfaces) - {GLAND}, key=lambda name: (len(name), name))
    structures, notes = [GLAND], []
    labels = [[label(series, GLAND, *image, notes)] for series, image in zip((mr, us), images, strict=True)]
    for target in common if targets else []:
        try:
            both = [label(series, target, *image, notes) for series, image in zip((mr, us), images, strict=True)]
        except InputError as error:
            notes.append(f"target left out: {checks.one_line(error)}")
            continue
        structures.append(target)
        for channels, one in zip(labels, both, strict=True):
            channels.append(one)
    sides = [Side(image, np.stack(own), affine) for own, (image, affine) in zip(labels, images, strict=True)]
    told = {"moving_series": mr.uid, "fixed_series": us.uid, "structures": " ".join(structures)}
    return sides[0], sides[1], told | {"notes": "; ".join(notes)}


def label(series: Series, structure: str, image: np.ndarray, affine: np.ndarray, notes: list[str]) -> np.ndarray:
    """A structure's surface on its image's grid, uint8, (X, Y, Z); how much of it lies outside is added to `notes`.

    Raises:
        InputError: it cannot be read, is not closed, or lies mostly outside.
    """
    path = series.surfaces[structure]
    found, inside = voxelise(path, read_surface(path), image.shape, affine)
    if inside < LEAST_INSIDE:
        raise InputError(f"{path}: {inside:.0%} of it lies in its image, series {series}")
    if inside < WHOLE:
        notes.append(f"{path.name}: {1 - inside:.1%} of it lies outside its image")
    return found


def read_mr(name: str, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (X, Y, Z) of an MR series and voxel -> RAS mm (4, 4), by its tags; `name` is what a message says.

    Raises:
        InputError: see `scripts.data.dicom.reader.read`.
    """
    headers = [found for file in series.files for found in reader.read_headers(file)]
    array, affine = reader.read_volume(name, headers)
    return _checked(name, array[0], affine)


def read_trus(name: str, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (X, Y, Z) of a TRUS and voxel -> RAS mm (4, 4), as `scripts.data.dicom.reader.eigen_grid` lays it.

    Raises:
        InputError: several files; positions or directions, which the files of this cohort do not state; no voxel size.
    """
    if len(series.files) != 1:
        raise InputError(f"{name}: {len(series.files)} files; one file of many frames is a volume of this cohort")
    ((file, header),) = reader.read_headers(series.files[0])
    frames = frames_of(file, header)
    if frames[0].position is not None or frames[0].axes is not None:
        raise InputError(f"{name}: states where it lies, which a TRUS of this cohort does not; look at {file.name}")
    flat, across = pixel_size(frames[0], name), frame_distance(frames[0], name)
    if flat is None or across is None:
        lacking = "a pixel is" if flat is None else "a frame is thick"
        raise InputError(
            f"{name}: nothing says how large {lacking}: no PixelSpacing with SliceThickness, no (1129,1016)"
        )
    shape = (*frames[0].shape, len(frames))
    checks.check_size(name, shape)
    affine = np.eye(4)
    affine[:3] = FLIP.numpy()[:, None] * reader.eigen_grid(name, shape, [*flat, across])
    return _checked(name, np.stack([image.T for image in decode(name, frames)], axis=-1), affine)


def _checked(name: str, image: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    checks.check_geometry(name, image.shape, affine)
    checks.check_image(name, image)
    return image, checks.orthonormal(name, image.shape, affine)
