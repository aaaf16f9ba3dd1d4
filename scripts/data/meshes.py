"""Triangle meshes in mm, as 3D Slicer, fusion devices and TCIA write them: STL, OBJ, PLY and VTP, by VTK.

A file is in LPS mm unless it says "SPACE=RAS", as 3D Slicer has written since 4.11. STL and PLY hold single precision,
which at 128 mm from the origin rounds to 0.000004 mm; OBJ is written with 17 digits, VTP in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.data import checks
from scripts.data.checks import InputError
from scripts.data.files import written_together
from scripts.data.lps import FLIP
from scripts.data.ply import read_ply

SUFFIXES = (".stl", ".obj", ".ply", ".vtp")


class Surface(NamedTuple):
    """A mesh of triangles.

    Attributes:
        vertices: shape (N, 3), float64, RAS mm.
        faces: shape (M, 3), int64, the vertices of each triangle.
        system: "LPS" or "RAS", in which its file is written.
    """

    vertices: np.ndarray
    faces: np.ndarray
    system: str = "LPS"


def read_surface(path: str | Path, coordinates: str | None = None) -> Surface:
    """The surface of a .stl (binary or text), .obj, .ply or .vtp file in mm; of STL, equal corners are one vertex.

    Args:
        coordinates: "RAS" or "LPS", which overrules what the file says, aloud; None goes by that, or LPS.

    Raises:
        InputError: no such file, another kind, damaged, no triangles or other than those, NaN or infinite vertices; no
            VTK.
    """
    path = Path(path)
    if coordinates not in (None, "RAS", "LPS"):
        raise InputError(f"coordinates {coordinates}: expected RAS or LPS")
    if not path.is_file():
        raise InputError(f"{path}: surface file not found")
    _check_kind(path)
    vertices, faces, told = read_ply(path) if path.suffix.lower() == ".ply" else _read_by_vtk(path)
    _check_mesh(path, vertices, faces)
    stated = next((system for system in ("RAS", "LPS") if f"SPACE={system}" in told), None)
    if None not in (coordinates, stated) and stated != coordinates:
        checks.repaired(path, f"says SPACE={stated}, and is taken as {coordinates}, as it was told")
    system = coordinates or stated or "LPS"
    return Surface(vertices * _signs(system), faces, system)


def write_surface(path: str | Path, surface: Surface) -> None:
    """Write a surface as the kind of file that the name says, STL in binary, with the space in its header.

    Raises:
        InputError: a name of another kind; vertices that are NaN or infinite; a folder that cannot be written; no VTK.
    """
    path = Path(path)
    _check_vertices(path, surface.vertices)
    _check_kind(path)
    _, writer = _vtk(path)
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import vtkPoints, vtkStringArray
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData

    space = f"SPACE={surface.system}"
    points, cells, mesh = vtkPoints(), vtkCellArray(), vtkPolyData()
    points.SetData(numpy_to_vtk(np.ascontiguousarray(surface.vertices * _signs(surface.system)), deep=True))
    offsets = np.arange(0, 3 * len(surface.faces) + 1, 3, dtype=np.int64)
    flat = np.ascontiguousarray(surface.faces.reshape(-1), dtype=np.int64)
    cells.SetData(numpy_to_vtkIdTypeArray(offsets, deep=True), numpy_to_vtkIdTypeArray(flat, deep=True))
    mesh.SetPoints(points)
    mesh.SetPolys(cells)
    suffix, writer = path.suffix.lower(), writer()
    if suffix == ".stl":
        writer.SetFileTypeToBinary()
        # a binary header has 80 bytes, and one that begins with "solid" would be taken for text
        writer.SetHeader(f"Binary STL. {space}")
    elif suffix == ".ply":
        writer.AddComment(space)
    elif suffix == ".vtp":
        named = vtkStringArray()
        named.SetName("SPACE")
        named.InsertNextValue(surface.system)
        mesh.GetFieldData().AddArray(named)
    writer.SetInputData(mesh)
    with written_together(path.parent) as partial:
        target = partial / path.name
        writer.SetFileName(str(target))
        with _said() as said:
            writer.Write()
        if said() or writer.GetErrorCode() or not target.exists():
            raise InputError(f"{path}: cannot be written: {said() or 'by VTK'}")
        if suffix == ".obj":  # VTK's writer takes no comment
            target.write_bytes(f"# {space}\n".encode() + target.read_bytes())


def _signs(system: str) -> np.ndarray:
    return FLIP.numpy() if system == "LPS" else np.ones(3)


def _vtk(path: Path) -> tuple[Any, Any]:
    """VTK's reader and writer of a file's kind.

    Raises:
        InputError: VTK is not installed.
    """
    try:
        from vtkmodules.vtkIOGeometry import vtkOBJReader, vtkOBJWriter, vtkSTLReader, vtkSTLWriter
        from vtkmodules.vtkIOPLY import vtkPLYWriter
        from vtkmodules.vtkIOXML import vtkXMLPolyDataReader, vtkXMLPolyDataWriter
    except ImportError as error:
        raise InputError(f"{path}: surfaces need VTK: pip install -r requirements-surfaces.txt") from error
    return {
        ".stl": (vtkSTLReader, vtkSTLWriter),
        ".obj": (vtkOBJReader, vtkOBJWriter),
        ".ply": (None, vtkPLYWriter),  # read by scripts.data.ply
        ".vtp": (vtkXMLPolyDataReader, vtkXMLPolyDataWriter),
    }[path.suffix.lower()]


def _check_kind(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a surface as {', '.join(SUFFIXES)}")


@contextmanager
def _said() -> Iterator[Callable[[], str]]:
    """What VTK says first of what went wrong in the block, in one line; it would log that on stderr, and go on."""
    from vtkmodules.vtkCommonCore import vtkLogger, vtkOutputWindow, vtkStringOutputWindow

    before, window = vtkOutputWindow.GetInstance(), vtkStringOutputWindow()
    logged = vtkLogger.GetCurrentVerbosityCutoff()
    vtkOutputWindow.SetInstance(window)
    vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)
    try:
        yield lambda: window.GetOutput().partition("): ")[2].partition("\n")[0].strip()
    finally:
        vtkLogger.SetStderrVerbosity(logged)
        vtkOutputWindow.SetInstance(before)


def _read_by_vtk(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Vertices (N, 3), float64, as they are in the file, faces (M, 3), int64, and its header or comments.

    Raises:
        InputError: it cannot be read, or holds other than triangles.
    """
    reader, _ = _vtk(path)
    reader = reader()
    reader.SetFileName(str(path))
    with _said() as said:
        reader.Update()
    if said() or reader.GetErrorCode():
        raise InputError(f"{path}: cannot be read as a surface: {said() or 'it is damaged'}")
    from vtkmodules.util.numpy_support import vtk_to_numpy

    mesh = reader.GetOutput()
    others = {"lines": mesh.GetNumberOfLines(), "strips": mesh.GetNumberOfStrips(), "points": mesh.GetNumberOfVerts()}
    other = next((f"{count} {kind}" for kind, count in others.items() if count), None)
    if other:
        raise InputError(f"{path}: holds {other}; expected a surface of triangles, so triangulate it first")
    if not mesh.GetNumberOfPolys() or not mesh.GetNumberOfPoints():
        return np.empty((0, 3)), np.empty((0, 3), np.int64), ""
    corners = np.diff(vtk_to_numpy(mesh.GetPolys().GetOffsetsArray()))
    odd = corners[corners != 3]
    if len(odd):
        raise InputError(f"{path}: a face has {odd[0]} corners; triangulate it first")
    vertices = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    faces = vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).astype(np.int64).reshape(-1, 3)
    # of a binary STL, which VTK does not count
    if path.suffix.lower() == ".stl" and path.stat().st_size == 84 + 50 * len(faces):
        with path.open("rb") as file:
            stated = int.from_bytes(file.read(84)[80:], "little")
        if stated > len(faces):
            raise InputError(f"{path}: {len(faces)} of the {stated} triangles that it states; it is cut short")
    return vertices, faces, _header(reader, mesh)


def _header(reader: Any, mesh: Any) -> str:
    if hasattr(reader, "GetHeader") or hasattr(reader, "GetComment"):  # of STL, of OBJ
        told = reader.GetHeader() if hasattr(reader, "GetHeader") else reader.GetComment()
        return told.decode("latin-1") if isinstance(told, bytes) else told or ""  # bytes if it is not UTF-8
    named = mesh.GetFieldData().GetAbstractArray("SPACE")
    return f"SPACE={named.GetValue(0)}" if named is not None and named.GetNumberOfValues() else ""


def _check_mesh(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    if not len(faces):
        raise InputError(f"{path}: no triangles in it; expected a surface in mm")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(f"{path}: a face names a vertex that is not among its {len(vertices)}; export it anew")
    _check_vertices(path, vertices)


def _check_vertices(path: Path, vertices: np.ndarray) -> None:
    bad = int((~np.isfinite(vertices)).any(axis=1).sum())
    if bad:
        raise InputError(f"{path}: {bad} vertices are NaN or infinite; export it anew")
    if len(vertices) and np.abs(vertices).max() > checks.MAX_MM:
        raise InputError(f"{path}: vertices {np.abs(vertices).max():g} mm from the origin; is it in mm?")
