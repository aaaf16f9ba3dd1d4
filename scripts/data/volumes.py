"""Volumes on disk -> channel-first arrays with their affine: NIfTI by nibabel, MetaImage, NRRD and DICOM by ITK.

Readers disagree about headers that contradict themselves: nibabel takes the voxel size of a NIfTI file from its sform,
ITK from pixdim. What they would not read alike is refused, so that a result means the same in every tool.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import EnsureChannelFirst

from scripts.data import checks
from scripts.data.checks import InputError

SMALLEST = 2.3e-16  # scale of voxels; ITK takes one below for none
CHUNK = 2**20  # bytes read at a time
UNEVEN = "ITK_non_uniform_sampling_deviation"  # mm, which ITK finds in a DICOM series
UNITS = {1: "metre", 3: "micrometre"}  # of xyzt_units; mm is 2, and none is taken to be mm


def load_volume(path: str) -> MetaTensor:
    """A NIfTI, MetaImage or NRRD file or a folder with one DICOM series: (C, X, Y, Z), float32, affine in RAS mm.

    Axes that are almost perpendicular are made so, with a warning, see `scripts.data.checks.orthonormal`.

    Raises:
        InputError: it is not there, cannot be read whole, contradicts itself, or its grid is no volume.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: file not found")
    read = _read_nifti if path.lower().endswith((".nii", ".nii.gz")) else _read_by_itk
    try:
        with np.errstate(all="ignore"):  # what overflows float32 is infinite, and refused as that
            array, affine = read(path)
    except InputError:
        raise
    except Exception as error:  # whatever a reader raises on a damaged file is one thing to the user
        reason = str(error.__cause__ or error).strip().splitlines()
        why = reason[-1].strip() if reason else repr(error)
        raise InputError(f"{path}: cannot be read as an image: {why}") from error
    checks.check_geometry(path, array.shape[1:], affine)
    affine = checks.orthonormal(path, array.shape[1:], affine)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine).double())


def _read_nifti(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Array (C, X, Y, Z) and affine; the header as it is in the file is checked before nibabel mends it."""
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
        size = int.from_bytes(file.read(4), "little")
        kind = nib.Nifti2Image if size in (540, int.from_bytes((540).to_bytes(4, "big"), "little")) else nib.Nifti1Image
        file.seek(0)
        affine = nifti_affine(path, kind.header_class.from_fileobj(file, check=False))
        file.seek(0)
        # MONAI's NibabelReader drops the origin of a 4-D NIfTI, nibabel does not
        array = np.asarray(kind.from_stream(file).dataobj, dtype=np.float32)
        while file.read(CHUNK):  # the checksum of a gzip file is at its end
            pass
    return np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None], affine


def nifti_affine(path: str, header: nib.Nifti1Header) -> np.ndarray:
    """The affine (4, 4) of a NIfTI header, if everything that the header says of the grid and the values agrees.

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


def _read_by_itk(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Array (C, X, Y, Z) and affine in RAS of what ITK reads."""
    import itk  # a second; a NIfTI file does without

    if Path(path).is_dir():
        series = itk.GDCMSeriesFileNames.New(UseSeriesDetails=True, Directory=path).GetSeriesUIDs()
        if len(series) > 1:
            raise InputError(f"{path}: {len(series)} DICOM series in one folder; keep the one that is meant")
    else:
        header = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
        if header is None:
            raise InputError(f"{path}: cannot be read as an image: ITK does not know the format")
        header.SetFileName(path)
        header.ReadImageInformation()
        axes = range(min(3, header.GetNumberOfDimensions()))
        checks.check_size(path, [header.GetDimensions(axis) for axis in axes])
        if path.lower().endswith((".mha", ".mhd")):
            _check_metaimage(Path(path))
    reader = ITKReader()
    image = reader.read(path)
    found = image.GetMetaDataDictionary()
    uneven = float(found[UNEVEN]) if found.HasKey(UNEVEN) else 0.0  # text in NRRD
    if uneven > 0.1 * min(image.GetSpacing()):
        raise InputError(f"{path}: slices are unevenly spaced, by up to {uneven:.2f} mm; is one missing?")
    volume = EnsureChannelFirst()(MetaTensor.ensure_torch_and_prune_meta(*reader.get_data(image)))
    return volume.numpy().astype(np.float32), volume.affine.numpy()


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
