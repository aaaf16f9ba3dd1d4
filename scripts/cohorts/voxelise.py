"""A closed surface as a label: the voxels whose centres lie inside it, by VTK."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.data.checks import InputError, check_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.data.meshes import Surface


def check_closed(path: str | Path, surface: Surface) -> None:
    """Refuse a surface that has no inside: each edge must belong to an even number of triangles.

    Triangles of which two corners are one vertex are no triangles, and do not count.

    Raises:
        InputError: it has holes.
    """
    faces = surface.faces
    first, second, third = faces.T
    faces = faces[(first != second) & (second != third) & (third != first)]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    counts = np.unique(edges, axis=0, return_counts=True)[1]
    odd = int((counts % 2).sum())
    if odd or not len(faces):
        raise InputError(f"{path}: the surface is not closed, {odd} of its {len(counts)} edges bound a hole")


def voxelise(path: str | Path, surface: Surface, shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray, float]:
    """The inside of a closed surface on a grid.

    A voxel is inside if its centre is. The grid's axes may be oblique, of any handedness and any voxel size: vertices
    are taken to voxel coordinates, where the surface is cut.

    Args:
        path: what a refusal names.
        shape: voxels along x, y, z.
        affine: voxel -> RAS mm, shape (4, 4).

    Returns:
        uint8 in {0, 1}, shape (X, Y, Z); and which share of the inside lies within the grid, 0 to 1.

    Raises:
        InputError: it is not closed; it is so large or so thin that it has no voxel, or too many.
    """
    check_closed(path, surface)
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
    from vtkmodules.vtkCommonCore import VTK_UNSIGNED_CHAR, vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
    from vtkmodules.vtkImagingStencil import vtkImageStencilToImage, vtkPolyDataToImageStencil

    onto = np.linalg.inv(np.asarray(affine, float))
    voxels = surface.vertices @ onto[:3, :3].T + onto[:3, 3]
    first, last = np.floor(voxels.min(axis=0)).astype(int), np.ceil(voxels.max(axis=0)).astype(int)
    check_size(path, last - first + 1)
    points, cells, mesh = vtkPoints(), vtkCellArray(), vtkPolyData()
    points.SetData(numpy_to_vtk(np.ascontiguousarray(voxels), deep=True))
    cells.SetData(3, numpy_to_vtkIdTypeArray(np.ascontiguousarray(surface.faces, np.int64).ravel(), deep=True))
    mesh.SetPoints(points)
    mesh.SetPolys(cells)
    stencil, image = vtkPolyDataToImageStencil(), vtkImageStencilToImage()
    stencil.SetInputData(mesh)
    stencil.SetTolerance(0)
    stencil.SetOutputWholeExtent([int(one) for one in np.stack([first, last], axis=1).ravel()])
    image.SetInputConnection(stencil.GetOutputPort())
    image.SetInsideValue(1)
    image.SetOutsideValue(0)
    image.SetOutputScalarType(VTK_UNSIGNED_CHAR)
    image.Update()
    inside = vtk_to_numpy(image.GetOutput().GetPointData().GetScalars())
    inside = inside.reshape(*(last - first + 1)[::-1]).transpose(2, 1, 0)
    if not inside.any():
        raise InputError(f"{path}: no voxel's centre lies inside the surface, {_sides(surface)} mm; is it in mm?")
    label = np.zeros(tuple(shape), np.uint8)
    begin, end = np.maximum(first, 0), np.minimum(last + 1, shape)
    if (begin < end).all():
        there = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
        label[there] = inside[tuple(slice(a, b) for a, b in zip(begin - first, end - first, strict=True))]
    return label, float(label.sum(dtype=np.int64) / inside.sum(dtype=np.int64))


def _sides(surface: Surface) -> str:
    return " × ".join(f"{side:.3g}" for side in np.ptp(surface.vertices, axis=0))
