"""Registrations made directly, between worlds far apart and on any grid, and a tiny pair as files."""

import gzip
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from scipy.spatial.transform import Rotation

from scripts.phantoms.phantom import simulate_pair

OBLIQUE = Rotation.from_euler("xyz", (14, -9, 21), degrees=True).as_matrix()
GRIDS = {  # axes of the fixed grid, voxel size in mm
    "oblique, anisotropic": (OBLIQUE, (1.1, 1.9, 2.6)),
    "flipped, left-handed": (OBLIQUE @ np.diag([-1.0, 1.0, 1.0]), (1.5, 1.2, 2.1)),
    "permuted": (np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]), (2.2, 1.3, 1.7)),
}
SIZE = (29, 23, 19)
START = np.eye(4)  # fixed world -> moving world: turned by 50 degrees, sheared, stretched, 90 mm away
START[:3, :3] = Rotation.from_euler("zyx", (50, -8, 5), degrees=True).as_matrix() @ [
    [1.15, 0.05, 0],
    [0, 0.9, 0],
    [0, 0, 1],
]
START[:3, 3] = (-70, 45, 33)


class Registration(NamedTuple):
    """A transform of fixed points, T(x) = START (x + bumps(x)), as its displacement T(x) − x.

    Attributes:
        displacement: shape (3, X, Y, Z), float64, RAS mm.
        affine: voxel -> RAS mm of the fixed grid.
    """

    displacement: torch.Tensor
    affine: np.ndarray

    def points(self, count: int, seed: int = 0) -> np.ndarray:
        """Points within the voxel centres of the fixed grid, (count, 3), RAS mm."""
        voxels = np.random.default_rng(seed).uniform(0, np.array(self.displacement.shape[1:]) - 1, (count, 3))
        return voxels @ self.affine[:3, :3].T + self.affine[:3, 3]

    @property
    def voxel(self) -> float:
        """The shortest side of a fixed voxel, mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0).min()


def affine_of(rotation, spacing, size, centre) -> np.ndarray:
    """voxel -> RAS mm of a grid whose middle is at `centre`."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(rotation) * spacing
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


def registration(grid: str, amplitude: float = 2.0) -> Registration:
    """Bumps of up to `amplitude` mm, invertible at 2 mm; the fixed centre is at (20, -30, 55) mm."""
    affine = affine_of(*GRIDS[grid], SIZE, (20, -30, 55))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij")).reshape(3, -1)
    x = affine[:3, :3] @ voxels + affine[:3, 3:]
    bumps = amplitude * np.sin(x[[1, 2, 0]] / np.array([[7.0], [9.0], [8.0]]) + [[0.3], [1.0], [2.0]])
    moved = START[:3, :3] @ (x + bumps) + START[:3, 3:]
    return Registration(torch.from_numpy((moved - x).reshape(3, *SIZE)), affine)


def moving_affine() -> np.ndarray:
    """voxel -> RAS mm of a moving volume of 34 × 36 × 30 voxels that holds what the fixed grid shows."""
    centre = START[:3, :3] @ [20, -30, 55] + START[:3, 3]
    axes = Rotation.from_euler("xyz", (-20, 12, 35), degrees=True).as_matrix()
    return affine_of(axes, (1.7, 1.6, 2.0), (34, 36, 30), centre)


def save(path, array: np.ndarray, affine: np.ndarray):
    """A NIfTI file, sform = qform."""
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


def moving_image(path, seed: int = 1):
    """A smooth moving image in a file, float32."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (34, 36, 30)), indexing="ij"), -1)
    bumps = [np.exp(-((grid - rng.uniform(9, 24, 3)) ** 2).sum(-1) / rng.uniform(30, 90)) for _ in range(6)]
    return save(path, (100 * sum(bumps) + 20).astype(np.float32), moving_affine())


def moving_labels(path):
    """An index map of three touching structures, 1, 4 and 300, in a file, int16."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (34, 36, 30)), indexing="ij"), -1)
    ball = np.linalg.norm((grid - [17, 18, 15]) / [9, 8, 10], axis=-1) < 1
    labels = np.where(ball, np.where(grid[..., 0] < 16, 1, np.where(grid[..., 1] < 19, 4, 300)), 0)
    return save(path, labels.astype(np.int16), moving_affine())


def write_series(folder, volume: np.ndarray, affine: np.ndarray, modality: str = "MR", **elements):
    """A DICOM series, a file per slice, with a study and a frame of reference of its own; the folder is returned.

    Args:
        volume: shape (X, Y, Z), rounded to int16; a slice is along x and y.
        affine: voxel -> RAS mm, any orthogonal axes.
        modality: "MR" or "US".
        elements: of DICOM, by keyword, for every file, for example PatientID.
    """
    folder.mkdir(parents=True)
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    shared = Dataset()
    shared.SOPClassUID = {"MR": pydicom.uid.MRImageStorage, "US": pydicom.uid.UltrasoundImageStorage}[modality]
    shared.Modality = modality
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(shared, name, pydicom.uid.generate_uid())
    shared.PatientID, shared.PatientName, shared.SeriesDescription = "P7", "Doe^J", f"{modality} phantom"
    shared.ImageOrientationPatient = [f"{v:.12f}" for v in (lps[:, :2] / spacing[:2]).T.ravel()]
    shared.PixelSpacing = [f"{v:.9f}" for v in spacing[1::-1]]  # between rows, between columns
    shared.SliceThickness = f"{spacing[2]:.9f}"
    shared.Columns, shared.Rows = volume.shape[:2]
    shared.SamplesPerPixel, shared.PhotometricInterpretation = 1, "MONOCHROME2"
    shared.BitsAllocated, shared.BitsStored, shared.HighBit, shared.PixelRepresentation = 16, 16, 15, 1
    for name, value in elements.items():
        setattr(shared, name, value)
    for k in range(volume.shape[2]):
        image = Dataset(shared)
        image.SOPInstanceUID = pydicom.uid.generate_uid()
        image.InstanceNumber = k + 1
        image.ImagePositionPatient = [f"{v:.9f}" for v in lps @ [0, 0, k, 1]]
        image.PixelData = volume[:, :, k].T.round().astype("<i2").tobytes()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.save_as(folder / f"{image.SOPInstanceUID}.dcm", enforce_file_format=True)
    return folder


def multi_frame(volume: np.ndarray, affine: np.ndarray, modality: str = "MR", order=None, **elements) -> Dataset:
    """A multi-frame data set, see `write_series`: enhanced MR, every frame with its place; plain US, without any.

    Args:
        order: of the frames; along the third axis of `volume` by default.
    """
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    order = range(volume.shape[2]) if order is None else order
    data = Dataset()
    data.SOPClassUID = {
        "MR": pydicom.uid.EnhancedMRImageStorage,
        "US": pydicom.uid.UltrasoundMultiFrameImageStorage,
    }[modality]
    data.Modality = modality
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(data, name, pydicom.uid.generate_uid())
    data.PatientID, data.PatientName, data.SeriesDescription = "P7", "Doe^J", f"{modality} phantom"
    data.Columns, data.Rows = volume.shape[:2]
    data.NumberOfFrames = len(order)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelData = np.stack([volume[:, :, k].T.round() for k in order]).astype("<i2").tobytes()
    if modality == "MR":
        shared = functional(PlaneOrientationSequence={"ImageOrientationPatient": decimals(lps[:, :2] / spacing[:2])})
        shared.update(functional(PixelMeasuresSequence={"PixelSpacing": [f"{v:.9f}" for v in spacing[1::-1]]}))
        data.SharedFunctionalGroupsSequence = [shared]
        data.PerFrameFunctionalGroupsSequence = [
            functional(PlanePositionSequence={"ImagePositionPatient": decimals(lps @ [0, 0, k, 1])}) for k in order
        ]
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def functional(**groups) -> Dataset:
    """Functional groups: the name of each and its elements."""
    found = Dataset()
    for name, elements in groups.items():
        item = Dataset()
        for keyword, value in elements.items():
            setattr(item, keyword, value)
        setattr(found, name, [item])
    return found


def decimals(values) -> list[str]:
    """Numbers as DICOM's decimal strings; of a matrix, column by column."""
    return [f"{v:.9f}" for v in np.asarray(values, float).T.ravel()]


def write_dicom(path, data: Dataset, syntax=pydicom.uid.ExplicitVRLittleEndian) -> str:
    """A data set as a DICOM file; its path is returned."""
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, enforce_file_format=True)
    return str(path)


def write_dicom_pair(folder):
    """A phantom's MR and TRUS as the DICOM series `folder`/mr and `folder`/trus: oblique, anisotropic, two worlds."""
    pair = simulate_pair(np.random.default_rng(4), (56, 52, 48), (1.3, 1.1, 1.5), (56, 58, 30), (1.3, 1.4, 2.8))
    tilts = Rotation.from_euler("xyz", [(-12, 7, 9), (9, -5, 14)], degrees=True).as_matrix()
    for kind, modality, tilt in zip(("moving", "fixed"), ("MR", "US"), tilts, strict=True):
        affine = getattr(pair, f"{kind}_affine").copy()
        affine[:3] = tilt @ affine[:3]
        name = {"MR": "mr", "US": "trus"}[modality]
        write_series(folder / name, getattr(pair, f"{kind}_image").numpy(), affine, modality)
    return folder


PAIR_SIZE = (7, 6, 5)
PAIR_AFFINE = affine_of(OBLIQUE, (1.5, 1.2, 2.0), PAIR_SIZE, (10, -20, 30))


def content(labels=3, seed=0):
    """Image and labels (…, label) of one side of a tiny pair."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=PAIR_SIZE).astype(np.float32), (rng.random((*PAIR_SIZE, labels)) > 0.5).astype(np.uint8)


def to_itk(array, affine):
    """A volume (X, Y, Z) of RAS affine as SimpleITK's."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(array).transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1, 1, 1]) @ np.asarray(affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def write(path, array, affine=PAIR_AFFINE):
    """NIfTI by nibabel; else by SimpleITK, a fourth axis last as a fourth dimension."""
    if path.name.endswith((".nii", ".nii.gz")):
        save(path, array, affine)
    elif array.ndim == 3:
        sitk.WriteImage(to_itk(array, affine), str(path))
    else:
        sitk.WriteImage(sitk.JoinSeries([to_itk(a, affine) for a in np.moveaxis(array, -1, 0)]), str(path))
    return str(path)


def edit_header(path, **fields):
    """Write fields into the 348 bytes of a NIfTI-1 header, past every check: a value, or a dictionary of elements."""
    path = Path(path)
    zipped = path.suffix == ".gz"
    data = bytearray(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    header = np.ndarray((), nib.nifti1.header_dtype, buffer=data)
    for name, value in fields.items():
        for index, element in value.items() if isinstance(value, dict) else [(..., value)]:
            header[name][index] = element
    path.write_bytes(gzip.compress(data) if zipped else data)
