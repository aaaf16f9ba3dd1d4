"""Volumes on disk -> channel-first arrays with their affine: NIfTI by nibabel, DICOM by pydicom, others by ITK.

Readers disagree about headers that contradict themselves: nibabel takes the voxel size of a NIfTI file from its sform,
ITK from pixdim. What they would not read alike is refused, so that a result means the same in every tool.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.colour import grey
from scripts.data.dicom import reader
from scripts.data.dicom.frames import by
from scripts.data.dicom.segmentation import read_segments
from scripts.data.itk_images import CHUNK, METAIMAGE, NRRD, Raster, read_by_itk

PAIRED = (".hdr", ".img", ".hdr.gz", ".img.gz")  # NIfTI in two files
NIFTI = (".nii", ".nii.gz", *PAIRED)
NAMED = (*NIFTI, *METAIMAGE, *NRRD)  # formats known by their name; DICOM files have any
SMALLEST = 2.3e-16  # scale of voxels; ITK takes one below for none
VECTOR = 1007  # intent code of a NIfTI whose fifth axis is the components of a voxel
UNITS = {1: "metre", 3: "micrometre"}  # of xyzt_units; mm is 2, and none is taken to be mm


def load_volume(
    path: str,
    spacing: float | Sequence[float] | None = None,
    series: str | int | None = None,
    side: str | None = None,
) -> MetaTensor:
    """A NIfTI, MetaImage, NRRD or DICOM file or a folder with a DICOM series: (C, X, Y, Z), float32, affine in RAS mm.

    Axes that are almost perpendicular are made so, with a warning, see `scripts.data.checks.orthonormal`.

    Args:
        spacing: voxel size (x, y, z) in mm for a file that states none; it replaces another that is stated, aloud.
        series: which of several volumes, see `scripts.data.dicom.reader.read`; of another format its number, from 1.
        side: "moving" or "fixed", whose options a refusal names.

    Raises:
        InputError: it is not there, cannot be read whole, contradicts itself, states no size, or its grid is no volume.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: file not found")
    size = checks.voxel_size(f"{side}_spacing" if side else "spacing", spacing)
    is_dicom = not path.lower().endswith(NAMED) and reader.is_dicom(path)
    if is_dicom:
        array, affine = read_or_refuse(path, reader.read, size, series, side)
    else:
        raster = read_raster(path, size, side)
        array, affine = _grey(raster) if raster.components else raster.array, raster.affine
    if series is not None and not is_dicom:
        array = _chosen(path, array, series, f"--{side}_series" if side else "the series")
    affine = affine if size is None else _resized(path, affine, size)
    checks.check_geometry(path, array.shape[1:], affine)
    affine = checks.orthonormal(path, array.shape[1:], affine)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine).double())


def read_raster(
    path: str, voxel: np.ndarray | None = None, side: str | None = None, dtype: type = np.float32
) -> Raster:
    """What a file that is not DICOM holds, as it is, `dtype` float32 or float64; see `load_volume`.

    Raises:
        InputError: it cannot be read whole, contradicts itself, or states no size.
    """
    read = _read_nifti if path.lower().endswith(NIFTI) else read_by_itk
    return read_or_refuse(path, read, voxel, side, dtype)


def read_or_refuse(path: str, reader: Callable, *told) -> Any:
    """What a reader makes of a file; whatever it raises on a damaged one is one thing to the user.

    Raises:
        InputError: the reader does, or raises anything else.
    """
    try:
        with np.errstate(all="ignore"):  # what overflows float32 is infinite, and refused as that
            return reader(path, *told)
    except InputError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        why = reason[-1].strip() if reason else repr(error)
        raise InputError(f"{path}: cannot be read as an image: {why}") from error


def _grey(raster: Raster) -> np.ndarray:
    """One channel (1, X, Y, Z) of a picture whose red, green and blue are equal everywhere; of others all channels."""
    array = raster.array
    opaque = len(array) == 3 or (len(array) == 4 and (array[3] == array[3].flat[0]).all())
    if not opaque or "Segment0_ID" in raster.header:  # layers of a segmentation, see `scripts.data.labels`
        return array
    level, coloured = grey(np.moveaxis(array, 0, -1))
    return array if coloured else level[None]


def load_segmentation(path: str, image: MetaTensor, numbers: Sequence[int] | None = None) -> MetaTensor:
    """The segments of a DICOM segmentation (M, X, Y, Z), float32, on the grid of its image (1, X, Y, Z).

    Args:
        numbers: the segments in the order of the channels; None for the file's own order.

    Raises:
        InputError: see `scripts.data.dicom.segmentation.read_segments`.
    """
    like = tuple(image.shape[1:]), image.affine.double().numpy()
    array, affine = read_segments(path, reader.read_headers(path), like, numbers)
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine).double())


def _chosen(path: str, array: np.ndarray, series: str | int, option: str) -> np.ndarray:
    """One of the channels of a file that is not DICOM, by its number from 1."""
    if not str(series).isdecimal() or not 1 <= int(series) <= len(array):
        raise InputError(f"{path}: {option} is {series}, but it holds {len(array)} volumes; give a number")
    return array[int(series) - 1 : int(series)]


def _resized(path: str, affine: np.ndarray, size: np.ndarray) -> np.ndarray:
    """An affine with another voxel size, mm, which is said; the first voxel stays."""
    stated = np.linalg.norm(affine[:3, :3], axis=0)
    if np.allclose(stated, size, rtol=1e-3):
        return affine
    checks.repaired(path, f"voxel size {by(stated)} mm replaced by the {by(size)} mm that is given")
    return _scaled(affine, size / stated)


def _scaled(affine: np.ndarray, by: np.ndarray) -> np.ndarray:
    """An affine whose voxels are larger by a factor along each axis; the first voxel stays."""
    return affine @ np.diag([*by, 1.0])


def _read_nifti(path: str, voxel: np.ndarray | None, side: str | None, dtype: type) -> Raster:
    """A NIfTI file, or the two of a pair; the header as it is in the file is checked before nibabel mends it."""
    head, body = _nifti_files(path)
    with _opened(head) as file:
        size = int.from_bytes(file.read(4), "little")
        second = size in (540, int.from_bytes((540).to_bytes(4, "big"), "little"))
        single = nib.Nifti2Image if second else nib.Nifti1Image
        kind = single if head == body else nib.Nifti2Pair if second else nib.Nifti1Pair
        file.seek(0)
        header = kind.header_class.from_fileobj(file, check=False)
        if head != body and not bytes(header["magic"]).startswith(b"ni"):
            raise InputError(f"{path}: Analyze 7.5, which does not say how its axes lie; convert it to NIfTI")
        affine = nifti_affine(path, header, voxel)
        file.seek(0)
        with contextlib.nullcontext(file) if head == body else _opened(body) as voxels:
            files = {name: nib.FileHolder(fileobj=one) for name, one in (("header", file), ("image", voxels))}
            # MONAI's NibabelReader drops the origin of a 4-D NIfTI, nibabel does not
            data = (kind.from_stream(file) if head == body else kind.from_file_map(files)).dataobj
            coloured = header.get_data_dtype().names is not None  # RGB24 and RGBA32
            array = np.asarray(data) if coloured else np.asarray(data, dtype=dtype)
            while voxels.read(CHUNK):  # the checksum of a gzip file is at its end
                pass
    array = np.stack([array[name] for name in array.dtype.names], axis=-1).astype(dtype) if coloured else array
    vector = array.ndim == 5
    array = array[:, :, :, 0] if vector else array
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    intent, _, name = header.get_intent()
    told = {"intent": intent, "name": name, "p1": float(header["intent_p1"])}
    return Raster(array, affine, coloured or vector, told)


def _opened(path: str) -> IO[bytes]:
    return (gzip.open if path.lower().endswith(".gz") else open)(path, "rb")


def _nifti_files(path: str) -> tuple[str, str]:
    """The file of the header and that of the voxels, which are one but for .hdr and .img."""
    if not path.lower().endswith(PAIRED):
        return path, path
    stem = path.removesuffix(".gz").removesuffix(".GZ")[:-4]
    both = []
    for kind in ("hdr", "img"):
        names = [f"{stem}.{ending}" for ending in (kind, f"{kind}.gz", kind.upper(), f"{kind.upper()}.GZ")]
        there = [name for name in (path, *names) if name in names and Path(name).exists()]
        if not there:
            raise InputError(f"{path}: {names[0]}, the other half of it, is not there")
        both.append(there[0])
    return both[0], both[1]


def nifti_affine(path: str, header: nib.Nifti1Header, voxel: np.ndarray | None = None) -> np.ndarray:
    """The affine (4, 4) of a NIfTI header, if everything that the header says of the grid and the values agrees.

    Args:
        voxel: size in mm to read a header by that has none in pixdim.

    Raises:
        InputError: it does not, or it says nothing; voxels that are no real numbers; a size beyond the cap.
    """
    kind = header.get_data_dtype()
    if kind.kind not in "iuf" and kind.names not in (("R", "G", "B"), ("R", "G", "B", "A")):
        raise InputError(f"{path}: voxels of type {kind}; expected real numbers")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    unscaled = slope == 0 or np.isnan(slope)
    plain = (inter == 0 or np.isnan(inter)) if unscaled else SMALLEST < abs(slope) < np.inf and np.isfinite(inter)
    if not plain:
        raise InputError(f"{path}: scl_slope {slope:g} with scl_inter {inter:g} in the header; rescale the values")
    offset, first = float(header["vox_offset"]), header.single_vox_offset if header.is_single else 0
    if not first <= offset < np.inf:
        raise InputError(f"{path}: vox_offset {offset:g} in the header; voxels begin at {first}")
    unit = int(header["xyzt_units"]) % 8
    if unit in UNITS:
        raise InputError(f"{path}: its unit is the {UNITS[unit]}; write the header in mm")
    shape = header.get_data_shape()
    vector = len(shape) == 5 and shape[3] == 1 and int(header["intent_code"]) == VECTOR
    shape = shape[:3] if len(shape) == 4 or vector else shape
    spacing = np.asarray(header["pixdim"][1:4], float)
    if voxel is not None and not (spacing > 0).all():
        by_sform = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
        spacing = by_sform if header["sform_code"] and (by_sform > 0).all() else voxel
        header["pixdim"][1:4] = spacing
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise InputError(f"{path}: voxel size {spacing.round(6).tolist()} mm in pixdim; it must be positive")
    sform, qform = (_form(path, header, name) for name in ("sform", "qform"))
    for affine in (sform, qform):
        if affine is not None:
            checks.check_geometry(path, shape, affine)
    if sform is None:
        if qform is None:
            raise InputError(f"{path}: neither sform nor qform says how its axes lie; write one of them")
        checks.repaired(path, "no sform, so the qform is used")
        return qform
    by_pixdim = sform.copy()
    by_pixdim[:3, :3] *= spacing / np.linalg.norm(sform[:3, :3], axis=0)
    for name, other in (("qform", qform), ("pixdim", by_pixdim)):
        apart = 0 if other is None else checks.distance(shape, sform, other)
        if apart > 0.1 * spacing.min():
            raise InputError(f"{path}: sform and {name} disagree, by up to {apart:.2f} mm; correct the wrong one")
    return sform


def _form(path: str, header: nib.Nifti1Header, name: str) -> np.ndarray | None:
    """The sform or qform of a header; None where its code is 0."""
    code, qfac = int(header[f"{name}_code"]), float(header["pixdim"][0])
    if code not in range(6):
        raise InputError(f"{path}: {name}_code {code} in the header; NIfTI knows 0 to 5")
    if name == "qform" and code and qfac not in (-1, 0, 1):
        raise InputError(f"{path}: pixdim[0] is {qfac:g} in the header; the qform needs 1 or -1")
    return (header.get_sform() if name == "sform" else header.get_qform()) if code else None


def save_volume(
    path: Path, volume: np.ndarray, affine: np.ndarray, dtype: type, intent: str = "none", comment: str | None = None
) -> None:
    """Write a NIfTI file in mm, sform = qform = `affine` (RAS); the first three axes of `volume` are x, y, z."""
    image = nib.Nifti1Image(np.ascontiguousarray(volume, dtype=dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    if comment is not None:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment.encode()))
    nib.save(image, path)
