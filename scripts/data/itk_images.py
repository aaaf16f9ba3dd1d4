"""MetaImage, NRRD and what else ITK reads: any type of voxel, as float32 or float64, and what ITK passes over."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.lps import FLIP

READ = "NIfTI (.nii, .nii.gz, .hdr with .img), MetaImage, NRRD and DICOM"
METAIMAGE, NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
PICTURES = (".tif", ".tiff", ".lsm", ".png", ".jpg", ".jpeg", ".bmp")
CHUNK = 2**20  # bytes read at a time
UNEVEN = "ITK_non_uniform_sampling_deviation"  # mm, of a DICOM series that ITK wrote as another format
SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las")


class Raster(NamedTuple):
    """What a file of voxels holds.

    Attributes:
        array: shape (C, X, Y, Z).
        affine: voxel -> RAS mm, shape (4, 4).
        components: whether the channels are components of a voxel (a vector, a colour), rather than volumes.
        header: key -> text of an NRRD or MetaImage; what NIfTI says of its vectors.
    """

    array: np.ndarray
    affine: np.ndarray
    components: bool
    header: dict[str, str]


def read_by_itk(
    path: str, voxel: np.ndarray | None = None, side: str | None = None, dtype: type = np.float32
) -> Raster:
    """What ITK reads, any type of voxel converted to `dtype`, float32 or float64.

    Args:
        voxel: size in mm that is given for a file that states none, for which ITK takes 1 mm.
        side: "moving" or "fixed", whose options a refusal names.

    Raises:
        InputError: no format that ITK reads; no voxel size; complex voxels; what ITK passes over.
    """
    import itk  # a second; a NIfTI file does without

    io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    # NIfTI and DICOM under another name would evade their checks
    if io is None or io.GetNameOfClass() in ("NiftiImageIO", "GDCMImageIO"):
        known = path.lower().endswith((*METAIMAGE, *NRRD))
        why = "it is damaged, or another format under this name" if known else f"expected {READ}"
        raise InputError(f"{path}: cannot be read as an image: {why}")
    header, begin = read_header(Path(path))
    sized = _states_size(path, header)
    if not sized and voxel is None:
        option = f"by --{side}_spacing '[x,y,z]', in mm" if side else "in its header"
        raise InputError(f"{path}: nothing says how large a voxel is; state the voxel size {option}")
    _check_header(path, header)
    io.SetFileName(path)
    io.ReadImageInformation()
    dimensions = io.GetNumberOfDimensions()
    checks.check_size(path, [io.GetDimensions(axis) for axis in range(min(3, dimensions))])
    kind = itk.ImageIOBase.GetPixelTypeAsString(io.GetPixelType())
    if kind == "complex" or "tensor" in kind or kind == "matrix":
        raise InputError(f"{path}: voxels of type {kind}; expected real numbers")
    if dimensions not in (3, 4):
        shape = tuple(io.GetDimensions(axis) for axis in range(dimensions))
        raise InputError(f"{path}: expected a 3-D volume, found {dimensions} axes {shape}")
    if path.lower().endswith(METAIMAGE):
        _check_metaimage(Path(path), header, begin)
    found = _vectors(path, io, dtype)
    told = found.GetMetaDataDictionary()
    uneven = float(told[UNEVEN]) if told.HasKey(UNEVEN) else 0.0  # text in NRRD
    if uneven > 0.1 * min(list(found.GetSpacing())[:3]):
        raise InputError(f"{path}: slices are unevenly spaced, by up to {uneven:.2f} mm; is one missing?")
    array = itk.array_from_image(found)  # Z, Y, X, C; a fourth axis first
    components = array.shape[-1] > 1
    if components and dimensions == 4:
        raise InputError(f"{path}: {array.shape[0]} volumes of {array.shape[-1]} components; expected one volume")
    array = array[..., 0].transpose(0, 3, 2, 1) if dimensions == 4 else array.transpose(3, 2, 1, 0)
    direction = itk.array_from_matrix(found.GetDirection())[:3, :3]
    spacing, origin = (np.array(list(values)[:3]) for values in (found.GetSpacing(), found.GetOrigin()))
    affine = np.eye(4)
    affine[:3] = FLIP.numpy()[:, None] * np.column_stack([direction * (spacing if sized else voxel), origin])
    return Raster(array, affine, components, header)


def _vectors(path: str, io: Any, dtype: type = np.float32) -> Any:
    """An ITK image of any type of voxel, converted: vectors of `dtype`, of one component too.

    `itk.imread` and MONAI's reader know some types only.
    """
    import itk

    kind = itk.VectorImage[itk.F if dtype == np.float32 else itk.D, io.GetNumberOfDimensions()]
    reader = itk.ImageFileReader[kind].New(FileName=path, ImageIO=io)
    reader.Update()
    return reader.GetOutput()


def read_frames(path: str) -> tuple[np.ndarray, list[float]]:
    """A picture or a stack of them, float32, shape (frame,) row, column, component, and its spacing (x, y, …) in mm.

    It is no volume yet, so nothing is asked of its header; ITK takes 1 mm where it states no size.
    """
    import itk

    io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    io.SetFileName(path)
    io.ReadImageInformation()
    image = _vectors(path, io)
    return itk.array_from_image(image), [float(size) for size in image.GetSpacing()]


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """The header of a MetaImage or NRRD, nothing of other formats, and where it ends, bytes.

    Its fields are in lower case, the keys of NRRD (`:=`) as they are.
    """
    name, header = path.name.lower(), {}
    if not name.endswith((*METAIMAGE, *NRRD)):
        return header, 0
    with path.open("rb") as file:
        while text := file.readline().decode("utf-8", "replace").rstrip("\r\n"):
            key, own, value = text.partition(":=")
            if name.endswith(NRRD) and own:
                header[key] = value
                continue
            key, _, value = text.partition("=" if name.endswith(METAIMAGE) else ":")
            header[key.strip().lower()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
        return header, file.tell()


def _states_size(path: str, header: dict[str, str]) -> bool:
    """Whether a file says how large its voxels are; a picture says it of a print at most."""
    if not path.lower().endswith((*METAIMAGE, *NRRD)):
        return not path.lower().endswith(PICTURES)
    sizes = [header.get(key, "") for key in ("elementspacing", "elementsize", "spacings", "space directions")]
    return any(sum(part.lower() not in ("nan", "none") for part in size.split()) >= 3 for size in sizes)


def _check_header(path: str, header: dict[str, str]) -> None:
    """Refuse a header that says something ITK passes over."""
    units = {unit.strip('"') for unit in header.get("space units", header.get("distanceunits", "mm")).lower().split()}
    odd = sorted(units - {"mm", "millimeter", "millimetre", "", "none", "???"})
    if odd:
        raise InputError(f"{path}: its unit is {odd[0]}; write the header in mm")
    if not path.lower().endswith(NRRD):
        return
    if "space" in header and header["space"].lower() not in SPACES:
        raise InputError(f"{path}: its space {header['space']} does not say where right, front and head are")
    if "space" not in header:
        checks.repaired(path, "nothing says which way its axes point, so they are taken to be ITK's, LPS")
    if any(float(size) <= 0 for size in header.get("spacings", "").split() if size.lower() not in ("nan", "none")):
        raise InputError(f"{path}: voxel size {header['spacings']} mm in the header; it must be positive")


def _check_metaimage(path: Path, header: dict[str, str], begin: int) -> None:
    """What ITK passes over in a MetaImage: a negative voxel size, and compressed voxels that are damaged.

    Args:
        begin: where its header ends, bytes.
    """
    spacing = [round(float(size), 6) for size in header.get("elementspacing", "").split()]
    if not all(size > 0 for size in spacing):
        raise InputError(f"{path}: voxel size {spacing} mm in the header; it must be positive")
    if header.get("compresseddata", "").lower() != "true":
        return
    name = header["elementdatafile"]
    with (path if name.upper() == "LOCAL" else path.parent / name).open("rb") as voxels:
        voxels.seek(begin if name.upper() == "LOCAL" else 0)
        stream = zlib.decompressobj(wbits=47)  # zlib or gzip
        while chunk := voxels.read(CHUNK):
            stream.decompress(chunk)
    if not stream.eof:
        raise InputError(f"{path}: cannot be read as an image: its compressed voxels end too early")
