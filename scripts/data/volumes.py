"""Volumes on disk -> channel-first arrays with their affine: NIfTI by nibabel, DICOM by pydicom, others by ITK.

Readers disagree about headers that contradict themselves: nibabel takes the voxel size of a NIfTI file from its sform,
ITK from pixdim. What they would not read alike is refused, so that a result means the same in every tool.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import EnsureChannelFirst

from scripts.data import checks, dicom
from scripts.data.checks import InputError
from scripts.data.dicom_frames import by
from scripts.data.dicom_segmentation import read_segments

NAMED = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")  # formats known by their name; DICOM files have any
PICTURES = (".tif", ".tiff", ".lsm", ".png", ".jpg", ".jpeg", ".bmp")
SMALLEST = 2.3e-16  # scale of voxels; ITK takes one below for none
CHUNK = 2**20  # bytes read at a time
UNEVEN = "ITK_non_uniform_sampling_deviation"  # mm, of a DICOM series that ITK wrote as another format
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
        series: which of several volumes, see `scripts.data.dicom.read`; of another format its number, from 1.
        side: "moving" or "fixed", whose options a refusal names.

    Raises:
        InputError: it is not there, cannot be read whole, contradicts itself, states no size, or its grid is no volume.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: file not found")
    size = checks.voxel_size(f"{side}_spacing" if side else "spacing", spacing)
    known = path.lower().endswith(NAMED)
    is_dicom = not known and dicom.is_dicom(path)
    try:
        with np.errstate(all="ignore"):  # what overflows float32 is infinite, and refused as that
            if is_dicom:
                array, affine = dicom.read(path, size, series, side)
            elif path.lower().endswith((".nii", ".nii.gz")):
                array, affine = _read_nifti(path, size)
            else:
                array, affine = _read_by_itk(path, size, side)
    except InputError:
        raise
    except Exception as error:  # whatever a reader raises on a damaged file is one thing to the user
        reason = str(error.__cause__ or error).strip().splitlines()
        why = reason[-1].strip() if reason else repr(error)
        raise InputError(f"{path}: cannot be read as an image: {why}") from error
    if series is not None and not is_dicom:
        array = _chosen(path, array, series, f"--{side}_series" if side else "the series")
    affine = affine if size is None else _resized(path, affine, size)
    checks.check_geometry(path, array.shape[1:], affine)
    affine = checks.orthonormal(path, array.shape[1:], affine)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine).double())


def load_segmentation(path: str, image: MetaTensor, numbers: Sequence[int] | None = None) -> MetaTensor:
    """The segments of a DICOM segmentation (M, X, Y, Z), float32, on the grid of its image (1, X, Y, Z).

    Args:
        numbers: the segments in the order of the channels; None for the file's own order.

    Raises:
        InputError: see `scripts.data.dicom_segmentation.read_segments`.
    """
    like = tuple(image.shape[1:]), image.affine.double().numpy()
    array, affine = read_segments(path, dicom.read_headers(path), like, numbers)
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


def _read_nifti(path: str, voxel: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Array (C, X, Y, Z) and affine; the header as it is in the file is checked before nibabel mends it."""
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
        size = int.from_bytes(file.read(4), "little")
        kind = nib.Nifti2Image if size in (540, int.from_bytes((540).to_bytes(4, "big"), "little")) else nib.Nifti1Image
        file.seek(0)
        affine = nifti_affine(path, kind.header_class.from_fileobj(file, check=False), voxel)
        file.seek(0)
        # MONAI's NibabelReader drops the origin of a 4-D NIfTI, nibabel does not
        array = np.asarray(kind.from_stream(file).dataobj, dtype=np.float32)
        while file.read(CHUNK):  # the checksum of a gzip file is at its end
            pass
    return np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None], affine


def nifti_affine(path: str, header: nib.Nifti1Header, voxel: np.ndarray | None = None) -> np.ndarray:
    """The affine (4, 4) of a NIfTI header, if everything that the header says of the grid and the values agrees.

    Args:
        voxel: size in mm to read a header by that has none in pixdim.

    Raises:
        InputError: it does not, or it says nothing; voxels that are no real numbers; a size beyond the cap.
    """
    kind = header.get_data_dtype()
    if kind.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {kind}; expected real numbers")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    unscaled = slope == 0 or np.isnan(slope)
    plain = (inter == 0 or np.isnan(inter)) if unscaled else SMALLEST < abs(slope) < np.inf and np.isfinite(inter)
    if not plain:
        raise InputError(f"{path}: scl_slope {slope:g} with scl_inter {inter:g} in the header; rescale the values")
    offset = float(header["vox_offset"])
    if not header.single_vox_offset <= offset < np.inf:
        raise InputError(f"{path}: vox_offset {offset:g} in the header; voxels begin at {header.single_vox_offset}")
    unit = int(header["xyzt_units"]) % 8
    if unit in UNITS:
        raise InputError(f"{path}: its unit is the {UNITS[unit]}; write the header in mm")
    shape = header.get_data_shape()
    shape = shape[:3] if len(shape) == 4 else shape
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


def _read_by_itk(path: str, voxel: np.ndarray | None = None, side: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Array (C, X, Y, Z) and affine in RAS of what ITK reads, which takes 1 mm where a file states no size."""
    import itk  # a second; a NIfTI file does without

    header = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise InputError(f"{path}: cannot be read as an image: ITK does not know the format")
    header.SetFileName(path)
    header.ReadImageInformation()
    axes = range(min(3, header.GetNumberOfDimensions()))
    checks.check_size(path, [header.GetDimensions(axis) for axis in axes])
    if path.lower().endswith((".mha", ".mhd")):
        _check_metaimage(Path(path))
    sized = _states_size(Path(path))
    if voxel is None and not sized:
        option = f"by --{side}_spacing '[x,y,z]', in mm" if side else "in its header"
        raise InputError(f"{path}: nothing says how large a voxel is; state the voxel size {option}")
    reader = ITKReader()
    image = reader.read(path)
    found = image.GetMetaDataDictionary()
    uneven = float(found[UNEVEN]) if found.HasKey(UNEVEN) else 0.0  # text in NRRD
    if uneven > 0.1 * min(image.GetSpacing()):
        raise InputError(f"{path}: slices are unevenly spaced, by up to {uneven:.2f} mm; is one missing?")
    volume = EnsureChannelFirst()(MetaTensor.ensure_torch_and_prune_meta(*reader.get_data(image)))
    affine = volume.affine.numpy()
    if not sized:
        affine = _scaled(affine, voxel / np.linalg.norm(affine[:3, :3], axis=0))
    return volume.numpy().astype(np.float32), affine


def _states_size(path: Path) -> bool:
    """Whether a file that ITK reads says how large its voxels are; a picture says it of a print at most."""
    name = path.name.lower()
    if not name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return not name.endswith(PICTURES)
    with path.open("rb") as file:
        for line in file:
            key, _, value = line.decode("latin-1").partition("=" if name.endswith((".mha", ".mhd")) else ":")
            key, value = key.strip().lower(), value.lower()
            if key in ("elementspacing", "elementsize", "spacings", "space directions"):
                if sum(part not in ("nan", "none") for part in value.split()) >= 3:
                    return True
            if not line.strip() or key == "elementdatafile":
                break
    return False


def _check_metaimage(path: Path) -> None:
    """What ITK passes over in a MetaImage: a negative voxel size, and compressed voxels that are damaged."""
    with path.open("rb") as file:
        header = {}
        for line in file:
            key, _, value = line.decode("latin-1").partition("=")
            header[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
        spacing = [round(float(size), 6) for size in header.get("ElementSpacing", "").split()]
        if not all(size > 0 for size in spacing):
            raise InputError(f"{path}: voxel size {spacing} mm in the header; it must be positive")
        if header.get("CompressedData", "").lower() != "true":
            return
        name = header["ElementDataFile"]
        with contextlib.nullcontext(file) if name.upper() == "LOCAL" else (path.parent / name).open("rb") as voxels:
            stream = zlib.decompressobj(wbits=47)  # zlib or gzip
            while chunk := voxels.read(CHUNK):
                stream.decompress(chunk)
        if not stream.eof:
            raise InputError(f"{path}: cannot be read as an image: its compressed voxels end too early")


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray, dtype: type, intent: str = "none") -> None:
    """Write a NIfTI file in mm, sform = qform = `affine` (RAS); the first three axes of `volume` are x, y, z."""
    image = nib.Nifti1Image(np.ascontiguousarray(volume, dtype=dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    nib.save(image, path)
