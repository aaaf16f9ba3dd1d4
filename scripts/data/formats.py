"""Transform files of other tools: read any of them as points are mapped, write a displacement as each tool reads it.

A transform maps points of the fixed world to points of the moving world: it pulls, whichever tool wrote it. Here it is
a list of steps in the order a fixed point goes through them; a step is a 4×4 matrix or a `Displacement`, both RAS mm.
ITK, ANTs, 3D Slicer, elastix and DICOM count millimetres in LPS, NiftyReg in RAS.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.utils import ensure_tuple
from torch import Tensor

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.lps import FLIP, itk_grid
from scripts.data.volumes import NAMED, read_raster, save_volume
from scripts.network import fields

FILES = {  # what each tool reads in the folder of a registration; ddf.nii.gz is always there
    "itk": "ddf.h5",
    "slicer": "ddf.h5",
    "ants": "ddf.nii.gz",
    "niftyreg": "niftyreg.nii.gz",
    "elastix": "transformix.txt",
    "dicom": "registration.dcm",
}
WARPED_SERIES = "warped_moving_image"  # the folder that "dicom" leaves as well
MEASURED = "(1,0,0)(0,1,0)(0,0,1)"  # the frame of an NRRD's vectors that is the axes of its space
FIXED_GRID = "fixed_grid"  # in a comment in the header of ddf.nii.gz
NIFTYREG, NIFTYREG_DISPLACEMENT = "NREG_TRANS", 1  # intent_name and intent_p1 of NiftyReg's NREG_TRANS_TYPE DISP_FIELD


class Grid(NamedTuple):
    """Where the voxels of an image lie.

    Attributes:
        affine: voxel -> RAS mm, shape (4, 4), float64.
        size: voxels along each axis.
    """

    affine: np.ndarray
    size: tuple[int, ...]


class Displacement(NamedTuple):
    """A displacement on a grid.

    Attributes:
        field: shape (3, X, Y, Z), float64, RAS mm: what is added to a point.
        affine: voxel -> RAS mm of the grid, shape (4, 4), float64.
        fixed: the grid of the fixed image, where the file tells one, see `save_displacement`.
    """

    field: Tensor
    affine: Tensor
    fixed: Grid | None = None


Step = Tensor | Displacement


def read_transform(path: str | Path) -> list[Step]:
    """The steps of a transform file, in the order a fixed point goes through them.

    ITK's .tfm, .txt, .h5 and ANTs' .mat, linear, displacement fields and composites of them; a displacement image as
    ITK, ANTs and 3D Slicer write it (NIfTI, MetaImage, NRRD), or as NiftyReg does.

    Raises:
        InputError: no such file; it cannot be read, or holds another kind of transform.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: transform file not found")
    return [_read_image(path)] if path.name.lower().endswith(NAMED) else _read_itk(path)


def _read_image(path: Path) -> Displacement:
    """A displacement that is an image, through the gate of images."""
    raster = read_raster(str(path), dtype=np.float64)
    array, told = raster.array, raster.header
    size = "size (X, Y, Z, 1, 3) and intent 1007, vector" if "intent" in told else "three components a voxel"
    if not raster.components or len(array) != 3 or told.get("intent", "vector") != "vector":
        found = f"{len(array)} {'components' if raster.components else 'volumes'} of {array.shape[1:]}"
        raise InputError(f"{path}: no displacement: expected {size}; found {found}")
    if told.get("space", "lps").lower() not in ("lps", "left-posterior-superior"):
        raise InputError(f"{path}: a displacement in {told['space']}; ITK's are in left-posterior-superior")
    if told.get("measurement frame", MEASURED).replace(" ", "") != MEASURED:
        raise InputError(f"{path}: a displacement in a measurement frame of its own; save it by ITK")
    by_niftyreg = told.get("name", "").startswith(NIFTYREG)
    if by_niftyreg and told["p1"] != NIFTYREG_DISPLACEMENT:
        raise InputError(f"{path}: not a displacement to NiftyReg; convert it by reg_transform -disp")
    field = torch.from_numpy(array)
    step = _checked(path, field if by_niftyreg else field * FLIP.view(3, 1, 1, 1), raster.affine)
    return step._replace(fixed=_fixed_grid(path))


def _fixed_grid(path: Path) -> Grid | None:
    """The grid that `save_displacement` kept beside a displacement."""
    header = nib.load(path).header if path.name.lower().endswith((".nii", ".nii.gz")) else None
    for extension in [] if header is None else header.extensions:
        try:
            affine, size = json.loads(extension.get_content())[FIXED_GRID]
            return Grid(np.array(affine, dtype=np.float64), tuple(size))
        except (ValueError, TypeError, KeyError):  # another program's comment
            continue
    return None


def _checked(path: Path, field: Tensor, affine: np.ndarray) -> Displacement:
    checks.check_geometry(path, tuple(field.shape[1:]), affine)
    checks.check_finite(path, field.numpy())
    return Displacement(field.contiguous(), torch.from_numpy(np.asarray(affine, dtype=np.float64)))


def _read_itk(path: Path) -> list[Step]:
    import itk  # slow to import, and few need it

    try:
        transforms = itk.transformread(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: ITK cannot read this transform") from error
    if len(transforms) != 1:
        raise InputError(f"{path}: {len(transforms)} transforms; expected one, or one composite")
    return _steps_of(itk, path, transforms[0])


def _steps_of(itk: Any, path: Path, transform: Any) -> list[Step]:
    """The steps of an ITK transform; a composite applies the one that was added last first."""
    name = transform.GetNameOfClass()
    if transform.GetInputSpaceDimension() != 3:
        raise InputError(f"{path}: expected a 3-D transform, found {transform.GetInputSpaceDimension()}-D")
    if name == "CompositeTransform":
        composite = itk.down_cast(transform)
        parts = [composite.GetNthTransform(n) for n in range(composite.GetNumberOfTransforms())]
        return [step for part in reversed(parts) for step in _steps_of(itk, path, part)]
    if transform.IsLinear():
        return [matrix_of(transform)]
    if name != "DisplacementFieldTransform":
        raise InputError(f"{path}: a {name}; expected linear transforms, displacement fields and composites of them")
    grid = np.array([float(v) for v in itk.array_from_vnl_vector(transform.GetFixedParameters())])
    values = itk.array_from_vnl_vector(transform.GetParameters())
    size, origin, spacing, direction = grid[:3].astype(int), grid[3:6], grid[6:9], grid[9:].reshape(3, 3)
    field = torch.from_numpy(np.array(values, dtype=np.float64).reshape(*size[::-1], 3)).permute(3, 2, 1, 0)
    affine = np.eye(4)
    affine[:3] = FLIP.numpy()[:, None] * np.column_stack([direction * spacing, origin])
    return [_checked(path, field * FLIP.view(3, 1, 1, 1), affine)]


def matrix_of(transform: Any) -> Tensor:
    """A linear ITK transform as a 4×4 matrix, RAS mm."""
    points = np.array([list(transform.TransformPoint(p)) for p in ([0.0] * 3, *np.eye(3).tolist())])
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.from_numpy((points[1:] - points[0]).T)
    matrix[:3, 3] = torch.from_numpy(points[0])
    flip = torch.diag(torch.cat([FLIP, torch.ones(1, dtype=torch.float64)]))
    return flip @ matrix @ flip


def forward(steps: Sequence[Step], points: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed points to moving points.

    Args:
        points: shape (1, 3, X, Y, Z), float64, RAS mm.

    Returns:
        The same shape, and (1, 1, X, Y, Z) bool: whether a point met every displacement inside its grid. Beyond it
        nothing is known of a displacement, least of all zero where a initial transform is composed in.
    """
    known = torch.ones_like(points[:, :1], dtype=torch.bool)
    for step in steps:
        if isinstance(step, Displacement):
            known &= fields.covers(step.field.shape[1:], step.affine, points)
            points = fields.displaced(step.field[None], step.affine, points)
        else:
            points = fields.transform_points(step, points)
    return points, known


def checked_formats(formats: str | Sequence[str] | None, pairs: Iterable[Mapping[str, str]] = ()) -> list[str]:
    """The names of the tools to write for, each once; `formats` is a list or has commas.

    Args:
        pairs: the datalist; "dicom" needs both images of each to be DICOM series.

    Raises:
        InputError: an unknown name; with "dicom", see `scripts.data.dicom.registration.read_series`.
    """
    names = formats.split(",") if isinstance(formats, str) else ensure_tuple(formats or ())
    names = list(dict.fromkeys(str(name).strip() for name in names if str(name).strip()))
    unknown = [name for name in names if name not in FILES]
    if unknown:
        raise InputError(f"formats: {unknown[0]} is none of {', '.join(FILES)}")
    if "dicom" in names:
        from scripts.data.dicom.registration import check_pair

        for pair in pairs:
            check_pair(pair["moving_image"], pair["fixed_image"])
    return names


def save_formats(
    folder: Path, formats: Sequence[str], item: Mapping[str, Any], affine: np.ndarray, fixed: Grid, final: Path
) -> None:
    """Write the files of `FILES` for some tools, except ddf.nii.gz, see `save_displacement`.

    Args:
        folder: where to write.
        item: `displacement`, (3, X, Y, Z), RAS mm, fixed -> moving; for DICOM `warped_moving_image` (1, X, Y, Z),
            `moving_file` and `fixed_file`.
        affine: voxel -> RAS mm of its grid, shape (4, 4).
        fixed: the fixed image's grid, on which NiftyReg wants the displacement and the warped series is.
        final: the folder that the files will be moved to.
    """
    displacement = item["displacement"].cpu().numpy()
    writers = {
        FILES["itk"]: lambda path: save_itk(path, displacement, affine),
        FILES["niftyreg"]: lambda path: save_niftyreg(path, on_grid(item["displacement"], affine, fixed), fixed.affine),
        FILES["elastix"]: lambda path: save_elastix(path, final / FILES["ants"], displacement.shape[1:], affine),
        FILES["dicom"]: lambda path: _save_dicom(path, displacement, affine, fixed.affine, item),
    }
    for name in dict.fromkeys(FILES[tool] for tool in formats):
        if name in writers:
            writers[name](folder / name)


def on_grid(displacement: Tensor, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """A displacement (3, X, Y, Z) on another grid, its border beyond it: (3, *grid.size), float64."""
    to_field = torch.linalg.inv(torch.as_tensor(affine)) @ torch.as_tensor(grid.affine)
    return fields.resample(displacement[None].cpu().double(), to_field, grid.size)[0].numpy()


def _save_dicom(
    path: Path, displacement: np.ndarray, affine: np.ndarray, fixed: np.ndarray, item: Mapping[str, Any]
) -> None:
    from scripts.data.dicom.registration import save_dicom, save_warped_series

    series, warped = (item["moving_file"], item["fixed_file"]), item["warped_moving_image"]
    save_dicom(path, displacement, affine, *series)
    save_warped_series(path.parent / WARPED_SERIES, warped[0].cpu().numpy(), fixed, *series)


def save_itk(path: Path, displacement: np.ndarray, affine: np.ndarray) -> None:
    """Write an ITK DisplacementFieldTransform (HDF5, float64, compressed), which 3D Slicer loads as a transform.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm.
        affine: voxel -> RAS mm, shape (4, 4).
    """
    import itk

    origin, spacing, direction = itk_grid(affine)
    grid = [*displacement.shape[1:], *origin, *spacing, *direction.ravel()]
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetFixedParameters(itk.OptimizerParameters[itk.D]([float(v) for v in grid]))
    lps = displacement.transpose(3, 2, 1, 0) * FLIP.numpy()
    itk.array_view_from_image(transform.GetModifiableDisplacementField())[:] = lps
    itk.transformwrite([transform], str(path), compression=True)


def save_niftyreg(path: Path, displacement: np.ndarray, affine: np.ndarray) -> None:
    """Write a displacement as NiftyReg's reg_transform -disp does, float32, for reg_resample -trans; see `save_itk`."""
    image = nib.Nifti1Image(np.moveaxis(displacement, 0, -1)[..., None, :].astype(np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent("vector", name=NIFTYREG)
    image.header["intent_p1"] = NIFTYREG_DISPLACEMENT
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([1, 0], image.header["scl_slope"].dtype).tobytes()  # NiBabel writes NaN, "no scaling"
    path.write_bytes(gzip.compress(content, mtime=0))


def save_elastix(path: Path, field: Path, size: Sequence[int], affine: np.ndarray) -> None:
    """Write a transform parameter file of elastix that takes its field from the ITK displacement at `field`.

    transformix looks for `field` as it is written, so the folder's place is in it.

    Args:
        size: voxels of the fixed grid.
        affine: its voxel -> RAS mm, shape (4, 4).
    """
    origin, spacing, direction = itk_grid(affine)
    parameters = {
        "Transform": "DeformationFieldTransform",
        "DeformationFieldFileName": str(field.resolve()),
        "DeformationFieldInterpolationOrder": [1],
        "NumberOfParameters": [0],
        "InitialTransformParametersFileName": "NoInitialTransform",
        "HowToCombineTransforms": "Compose",
        "FixedImageDimension": [3],
        "MovingImageDimension": [3],
        "FixedInternalImagePixelType": "float",
        "MovingInternalImagePixelType": "float",
        "Size": size,
        "Index": [0, 0, 0],
        "Spacing": spacing,
        "Origin": origin,
        "Direction": direction.T.ravel(),  # elastix lists it by columns
        "UseDirectionCosines": "true",
        "ResampleInterpolator": "FinalLinearInterpolator",
        "Resampler": "DefaultResampler",
        "DefaultPixelValue": [0],
        "ResultImagePixelType": "float",
        "ResultImageFormat": "nii.gz",
    }
    lines = []
    for name, value in parameters.items():
        written = f'"{value}"' if isinstance(value, str) else " ".join(f"{float(v):.17g}" for v in value)
        lines.append(f"({name} {written})\n")
    path.write_text("".join(lines), encoding="utf-8")


def save_displacement(
    path: Path, displacement: np.ndarray, affine: np.ndarray, dtype: type = np.float64, fixed: Grid | None = None
) -> None:
    """Write a displacement as ITK, SimpleITK, 3D Slicer and ANTs read it: 5-D (X, Y, Z, 1, 3), intent 1007, LPS mm.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, fixed world -> moving world minus identity.
        affine: voxel -> world of its grid, RAS mm.
        fixed: the fixed image's grid, if it is another: kept as a comment in the header, for what is warped by it.
    """
    lps = displacement * np.array([-1, -1, 1], displacement.dtype).reshape(3, 1, 1, 1)
    told = None if fixed is None else json.dumps({FIXED_GRID: [np.asarray(fixed.affine).tolist(), [*fixed.size]]})
    save_volume(path, np.moveaxis(lps, 0, -1)[..., None, :], affine, dtype=dtype, intent="vector", comment=told)
