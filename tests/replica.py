"""A replica of TCIA's Prostate-MRI-US-Biopsy as it is downloaded, made of one phantom: layout, DICOM and surfaces.

An oblique MR series, a file a slice; a TRUS in one file of many frames that states no position; surfaces as STL in LPS
mm, binary or text, made by flying edges of the phantom's labels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from scipy.spatial.transform import Rotation
from synthetic import multi_frame, write_dicom, write_series
from vtkmodules.util.numpy_support import numpy_to_vtk
from vtkmodules.vtkCommonDataModel import vtkImageData
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkCommonTransforms import vtkTransform
from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D
from vtkmodules.vtkFiltersGeneral import vtkTransformPolyDataFilter
from vtkmodules.vtkIOGeometry import vtkSTLWriter

from scripts.phantoms.phantom import simulate_pair

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = 1.4  # of the TRUS, mm


class Truth(NamedTuple):
    """What one side of the replica shows: voxels (X, Y, Z), labels (X, Y, Z, M), voxel -> RAS mm."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def phantom() -> tuple[Truth, Truth]:
    """An MR whose axes are oblique, and a TRUS around 0, as the cohort's lie."""
    pair = simulate_pair(np.random.default_rng(4), (48, 50, 46), SPACING, (56, 64, 30), (1.4, 1.3, 2.4))
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", (-12, 7, 9), degrees=True).as_matrix()
    mr = Truth(pair.moving_image.numpy().round(), pair.moving_label.numpy(), tilt @ pair.moving_affine)
    size = np.array(pair.fixed_image.shape)
    cube = LPS @ np.array([[SPACING, 0, 0, 0], [0, SPACING, 0, 0], [0, 0, SPACING, 0], [0, 0, 0, 1.0]])
    cube[:3, 3] = LPS[:3, :3] @ (-SPACING * size / 2)  # LPS voxels from −spacing · n / 2 on
    image, label = (np.flip(v.numpy(), (0, 1)) for v in (pair.fixed_image.round(), pair.fixed_label))  # RAS -> LPS
    return mr, Truth(image.copy(), label.copy(), cube)


def frames_of(trus: Truth) -> np.ndarray:
    """What a TRUS file stores, (frame, row, column): x by rows, y by frames backwards, z by columns backwards."""
    return trus.image[:, ::-1, ::-1].transpose(1, 0, 2)


def surface_of(truth: Truth, structure: int = 0, opened: bool = False, moved=(0, 0, 0)):
    """The surface of a label in LPS mm, as VTK's mesh; without some triangles if opened."""
    label = np.pad(truth.label[..., structure].astype(np.float32), 1)
    grid = vtkImageData()
    grid.SetDimensions(label.shape)
    grid.SetOrigin(-1, -1, -1)
    grid.GetPointData().SetScalars(numpy_to_vtk(label.ravel(order="F"), deep=True))
    edges = vtkFlyingEdges3D()
    edges.SetInputData(grid)
    edges.SetValue(0, 0.5)
    edges.ComputeNormalsOff()
    matrix, transform, moving = vtkMatrix4x4(), vtkTransform(), vtkTransformPolyDataFilter()
    matrix.DeepCopy((LPS @ truth.affine).ravel().tolist())
    transform.PostMultiply()
    transform.Concatenate(matrix)
    transform.Translate(moved)
    moving.SetTransform(transform)
    moving.SetInputConnection(edges.GetOutputPort())
    moving.Update()
    mesh = moving.GetOutput()
    if opened:
        mesh.BuildCells()
        for cell in range(9):
            mesh.DeleteCell(cell)
        mesh.RemoveDeletedCells()
    return mesh


def write_stl(path: Path, mesh, text: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = vtkSTLWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(mesh)
    writer.SetFileTypeToASCII() if text else writer.SetFileTypeToBinary()
    writer.Write()
    return path


class Replica:
    """A download in a folder, to which patients are added; `mr` and `trus` are what all of them show."""

    def __init__(self, root: Path, sides: tuple[Truth, Truth]) -> None:
        self.root, (self.mr, self.trus) = root, sides

    def patient(self, number: int) -> str:
        return f"Prostate-MRI-US-Biopsy-{number:04d}"

    def surface(self, number: int, uid: str, name: str, mesh, text: bool = False) -> Path:
        return write_stl(self.root / "STLs" / f"{self.patient(number)}-{name}-seriesUID-{uid}.STL", mesh, text)

    def add_mr(self, number: int, date: str = "20100301", surface=True, text=False, **elements) -> str:
        """An MR series with its surface (False: none; else a mesh); its series UID is returned."""
        uid = pydicom.uid.generate_uid()
        folder = (
            self.root / "manifest" / self.patient(number) / f"03-01-2010-MRI {uid[-5:]}" / f"3.000000-t2 {uid[-4:]}"
        )
        told = {"PatientID": self.patient(number), "StudyDate": date, "SeriesInstanceUID": uid}
        write_series(folder, self.mr.image, self.mr.affine, "MR", **told | {"SeriesDescription": "t2 spc"} | elements)
        self._own_surface(number, uid, surface, self.mr, text)
        return uid

    def add_trus(self, number: int, date="20100405", surface=True, text=False, sized="private", files=1, **elements):
        """A TRUS with its surface; sized by the "private" element, by "spacing", or by None."""
        uid = pydicom.uid.generate_uid()
        folder = self.root / "manifest" / self.patient(number) / f"04-05-2010-US {uid[-5:]}" / "a" / "b"
        folder.mkdir(parents=True)
        stored = frames_of(self.trus)
        told = {"PatientID": self.patient(number), "StudyDate": date, "SeriesInstanceUID": uid}
        if sized == "spacing":
            told |= {"PixelSpacing": [str(SPACING)] * 2, "SliceThickness": str(SPACING)}
        for k in range(files):
            data = multi_frame(stored.transpose(2, 1, 0), np.eye(4), "US", **told | elements)
            del data.FrameOfReferenceUID
            if sized == "private":
                data.add_new((0x1129, 0x0010), "LO", "Eigen, Inc")
                data.add_new((0x1129, 0x1016), "DS", str(SPACING))
            write_dicom(folder / f"1-{k + 1:02d}.dcm", data)
        self._own_surface(number, uid, surface, self.trus, text)
        return uid

    def _own_surface(self, number: int, uid: str, surface, truth: Truth, text: bool) -> None:
        if surface is not False:
            self.surface(number, uid, "ProstateSurface", surface_of(truth) if surface is True else surface, text)
