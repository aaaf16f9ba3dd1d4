"""A surface becomes the voxels whose centres it encloses, on any grid."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from scipy.spatial.transform import Rotation
from synthetic import OBLIQUE, affine_of
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkFiltersCore import vtkCleanPolyData, vtkTriangleFilter
from vtkmodules.vtkFiltersSources import vtkCubeSource, vtkSphereSource

from scripts.cohorts.voxelise import check_closed, voxelise
from scripts.data.checks import InputError
from scripts.data.meshes import Surface, read_surface

SURFACES = ROOT.parent / "shared" / "data" / "tcia_stl"
SIZE = (41, 37, 30)
GRIDS = {
    "straight": affine_of(np.eye(3), (1.0, 1.0, 1.0), SIZE, (0, 0, 0)),
    "oblique, anisotropic": affine_of(OBLIQUE, (0.7, 1.1, 2.9), SIZE, (12, -30, 44)),
    "left-handed": affine_of(OBLIQUE @ np.diag([-1.0, 1, 1]), (1.2, 0.9, 1.7), SIZE, (-5, 3, 8)),
    "permuted": affine_of([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]], (1.3, 0.8, 1.1), SIZE, (40, 0, -9)),
}


def mesh_of(source) -> Surface:
    triangles, clean = vtkTriangleFilter(), vtkCleanPolyData()
    triangles.SetInputConnection(source.GetOutputPort())
    clean.SetInputConnection(triangles.GetOutputPort())
    clean.Update()
    found = clean.GetOutput()
    faces = vtk_to_numpy(found.GetPolys().GetConnectivityArray()).reshape(-1, 3)
    return Surface(vtk_to_numpy(found.GetPoints().GetData()).astype(float), faces.astype(np.int64))


def unit_ball() -> Surface:
    source = vtkSphereSource()
    source.SetRadius(1)
    source.SetThetaResolution(96)
    source.SetPhiResolution(96)
    source.SetOutputPointsPrecision(1)
    return mesh_of(source)


def unit_box() -> Surface:
    source = vtkCubeSource()
    source.SetOutputPointsPrecision(1)
    return mesh_of(source)


def placed(surface: Surface, axes, sides, centre) -> Surface:
    return surface._replace(vertices=(surface.vertices * sides) @ np.asarray(axes).T + centre)


def centres(affine):
    voxels = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1).reshape(-1, 3)
    return nib.affines.apply_affine(affine, voxels)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("body", ["ball", "ellipsoid", "box"])
def test_analytic_bodies_are_exact_to_less_than_half_a_voxel(body, grid):
    affine = GRIDS[grid]
    middle = nib.affines.apply_affine(affine, (np.array(SIZE) - 1) / 2) + (0.31, -0.17, 0.23)
    axes = np.eye(3) if body == "ball" else Rotation.from_euler("xyz", (31, -14, 52), degrees=True).as_matrix()
    sides = {"ball": (9, 9, 9), "ellipsoid": (12, 8, 9.5), "box": (13, 17, 15)}[body]
    surface = placed(unit_box() if body == "box" else unit_ball(), axes, sides, middle)
    label, inside = voxelise("body.stl", surface, SIZE, affine)
    assert label.dtype == np.uint8 and label.shape == SIZE and inside == 1
    local = np.abs((centres(affine) - middle) @ axes) / sides  # in units of the body
    depth = 1 - np.linalg.norm(local, axis=-1) if body != "box" else 2 * (0.5 - local).min(axis=-1)
    wrong = (label.ravel() > 0) != (depth > 0)
    half = min(sides) * (1 if body != "box" else 0.5)
    faceted = 0.001 * max(sides)  # the mesh of 96 × 96 lies that far within the body
    assert np.abs(depth[wrong] * half).max(initial=0) < faceted
    assert wrong.sum() < 0.003 * label.sum(dtype=int)


def test_faces_and_vertices_on_the_centres_of_voxels_leave_no_streaks():
    """Planes of a box, and the poles of a ball, exactly where the surface is cut."""
    affine = GRIDS["straight"]
    middle = nib.affines.apply_affine(affine, [20, 18, 15])
    label = voxelise("box.stl", placed(unit_box(), np.eye(3), (10, 10, 10), middle), SIZE, affine)[0]
    depth = 5 - np.abs(centres(affine) - middle).max(axis=-1).reshape(SIZE)
    assert (label[depth > 0.01] == 1).all() and (label[depth < -0.01] == 0).all()
    label = voxelise("ball.stl", placed(unit_ball(), np.eye(3), (9, 9, 9), middle), SIZE, affine)[0]
    depth = 9 - np.linalg.norm(centres(affine) - middle, axis=-1).reshape(SIZE)
    assert (label[depth > 0.01] == 1).all() and (label[depth < -0.01] == 0).all()


def test_what_lies_outside_the_grid_is_told():
    affine = GRIDS["straight"]
    ball = placed(unit_ball(), np.eye(3), (8, 8, 8), nib.affines.apply_affine(affine, [-0.5, 18, 15]))
    label, inside = voxelise("ball.stl", ball, SIZE, affine)
    assert inside == pytest.approx(0.5, abs=0.01) and label[0].any() and not label[9:].any()
    label, inside = voxelise("ball.stl", ball._replace(vertices=ball.vertices + 500), SIZE, affine)
    assert inside == 0 and not label.any()


def test_an_open_surface_is_refused_and_one_of_several_parts_is_not():
    ball = unit_ball()
    check_closed("ball.stl", ball)
    flat = np.vstack([ball.faces, [[5, 5, 9]]])  # no triangle
    check_closed("ball.stl", ball._replace(faces=flat))
    with pytest.raises(InputError, match="b.stl: the surface is not closed, 3 of its .* edges bound a hole"):
        check_closed("b.stl", ball._replace(faces=ball.faces[1:]))
    two = Surface(
        np.vstack([ball.vertices, ball.vertices * 0.5]), np.vstack([ball.faces, ball.faces + len(ball.vertices)])
    )
    affine = np.diag([0.1, 0.1, 0.1, 1])
    affine[:3, 3] = -1.45
    label = voxelise("shell.stl", two, (30, 30, 30), affine)[0]
    assert not label[14, 14, 14] and label[14, 14, 14 + 7]


def test_a_surface_in_metres_has_no_voxel_and_one_beyond_measure_is_refused():
    ball = placed(unit_ball(), np.eye(3), (0.02,) * 3, (0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="no voxel's centre lies inside the surface, 0.04 × 0.04 × 0.04 mm"):
        voxelise("ball.stl", ball, SIZE, GRIDS["straight"])
    with pytest.raises(InputError, match="beyond the cap"):
        voxelise("ball.stl", ball._replace(vertices=ball.vertices * 1e5), SIZE, GRIDS["straight"])


def winding(surface: Surface, points: np.ndarray) -> np.ndarray:
    """Winding number of a surface around points, by the solid angles of its triangles (van Oosterom and Strackee)."""
    corners, found = surface.vertices[surface.faces], []
    for some in np.array_split(points, max(1, len(points) // 400)):
        a, b, c = np.moveaxis(corners[None] - some[:, None, None], 2, 0)
        na, nb, nc = (np.linalg.norm(x, axis=-1) for x in (a, b, c))
        over = np.einsum("ijk,ijk->ij", a, np.cross(b, c))
        under = na * nb * nc
        for one, other, third in ((a, b, nc), (b, c, na), (c, a, nb)):
            under = under + np.einsum("ijk,ijk->ij", one, other) * third
        found.append(2 * np.arctan2(over, under).sum(1) / (4 * np.pi))
    return np.concatenate(found)


@pytest.mark.skipif(not SURFACES.is_dir(), reason="the two surfaces of TCIA are not at hand")
@pytest.mark.parametrize("path", sorted(SURFACES.glob("*.STL")), ids=lambda path: path.name[:45])
def test_the_real_surfaces_give_the_label_maps_that_slicer_made_of_them(path: Path):
    theirs = nib.load(SURFACES / "labelmaps" / f"{path.stem}.nii.gz")
    label, inside = voxelise(path, read_surface(path), theirs.shape, theirs.affine)
    there = np.asarray(theirs.dataobj) > 0
    dice = 2 * np.count_nonzero(there & (label > 0)) / (there.sum() + label.sum(dtype=int))
    assert inside == 1 and dice > 0.996


@pytest.mark.skipif(not SURFACES.is_dir(), reason="the two surfaces of TCIA are not at hand")
def test_each_voxel_of_a_real_target_is_inside_by_its_winding_number():
    path = next(SURFACES.glob("*Target1*.STL"))
    surface = read_surface(path)
    affine = nib.load(SURFACES / "labelmaps" / f"{path.stem}.nii.gz").affine
    within = nib.affines.apply_affine(np.linalg.inv(affine), surface.vertices)
    first, last = np.floor(within.min(0)).astype(int) - 1, np.ceil(within.max(0)).astype(int) + 2
    affine = affine @ nib.affines.from_matvec(np.eye(3), first)
    label = voxelise(path, surface, last - first, affine)[0]
    voxels = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), -1).reshape(-1, 3)
    inside = np.abs(winding(surface, nib.affines.apply_affine(affine, voxels))) > 0.5
    np.testing.assert_array_equal(label.ravel() > 0, inside)
