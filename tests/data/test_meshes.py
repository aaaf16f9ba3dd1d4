"""Surfaces as VTK, 3D Slicer and TCIA write them: read in RAS mm, written with their space, refused when damaged."""

import numpy as np
import pytest
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkFiltersSources import vtkCubeSource, vtkSphereSource
from vtkmodules.vtkIOGeometry import vtkOBJReader, vtkSTLReader, vtkSTLWriter
from vtkmodules.vtkIOPLY import vtkPLYReader, vtkPLYWriter
from vtkmodules.vtkIOXML import vtkXMLPolyDataReader, vtkXMLPolyDataWriter

from scripts.data.checks import InputError, Repaired
from scripts.data.meshes import SUFFIXES, Surface, read_surface, write_surface

READERS = dict(zip(SUFFIXES, (vtkSTLReader, vtkOBJReader, vtkPLYReader, vtkXMLPolyDataReader), strict=True))
SINGLE = 4e-6  # mm, half a unit in the last place of float32 at 128 mm


def sphere(system="LPS"):
    """A sphere of 20 mm around (100, -30, 40) mm, RAS."""
    source = vtkSphereSource()
    source.SetRadius(20)
    source.SetCenter(100, -30, 40)
    source.Update()
    mesh = source.GetOutput()
    vertices = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    return Surface(vertices, vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3), system)


def by_vtk(path, reader):
    """VTK's own reading of a file: corners of its triangles, (M, 3, 3)."""
    reader.SetFileName(str(path))
    reader.Update()
    mesh = reader.GetOutput()
    faces = vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3)
    return vtk_to_numpy(mesh.GetPoints().GetData())[faces]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("system, signs", [("LPS", (-1, -1, 1)), ("RAS", (1, 1, 1))])
def test_a_surface_is_written_in_its_system_and_read_back_by_vtk_and_by_us(tmp_path, suffix, system, signs):
    told, path = sphere(system), tmp_path / f"a{suffix}"
    write_surface(path, told)
    np.testing.assert_allclose(by_vtk(path, READERS[suffix]()), (told.vertices * signs)[told.faces], atol=SINGLE)
    again = read_surface(path)  # the file says its space
    assert again.system == system and len(again.vertices) == len(told.vertices)
    np.testing.assert_allclose(again.vertices[again.faces], told.vertices[told.faces], atol=SINGLE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_obj_and_vtp_keep_double_precision(tmp_path):
    told = sphere()
    told.vertices[:] += 1 / 3e5
    for suffix in (".obj", ".vtp"):
        write_surface(tmp_path / f"a{suffix}", told)
        assert np.abs(read_surface(tmp_path / f"a{suffix}").vertices - told.vertices).max() < 1e-13


def test_a_ply_of_text_or_of_the_other_byte_order_with_normals_and_colours_is_read(tmp_path):
    told, path = sphere(), tmp_path / "a.ply"
    vertices, faces = told.vertices * (-1, -1, 1), told.faces
    head = f"element vertex {len(vertices)}\n" + "".join(f"property float64 {axis}\n" for axis in "xyz")
    head += "property uchar red\n"
    head += f"element face {len(faces)}\nproperty list uint8 int32 vertex_index\nend_header\n"
    text = [*(" ".join(f"{x:.17g}" for x in v) + " 255" for v in vertices), *(f"3 {a} {b} {c}" for a, b, c in faces)]
    path.write_text("ply\nformat ascii 1.0\n" + head + "\n".join(text) + "\n")
    np.testing.assert_array_equal(read_surface(path).vertices, told.vertices)
    big = np.zeros(len(vertices), [("v", ">f8", (3,)), ("red", "u1")])
    big["v"] = vertices
    cells = np.zeros(len(faces), [("n", "u1"), ("f", ">i4", (3,))])
    cells["n"], cells["f"] = 3, faces
    path.write_bytes(b"ply\nformat binary_big_endian 1.0\n" + head.encode() + big.tobytes() + cells.tobytes())
    np.testing.assert_array_equal(read_surface(path).vertices, told.vertices)
    np.testing.assert_array_equal(read_surface(path).faces, faces)


def test_a_file_that_does_not_say_its_space_is_lps_and_one_that_does_is_overruled_aloud(tmp_path):
    source, path = vtkSphereSource(), tmp_path / "text.STL"
    writer = vtkSTLWriter()  # text
    writer.SetInputConnection(source.GetOutputPort())
    writer.SetFileName(str(path))
    writer.Write()
    assert path.read_bytes().startswith(b"solid")
    lps = by_vtk(path, vtkSTLReader()).reshape(-1, 3)
    np.testing.assert_allclose(read_surface(path).vertices.min(0), lps.max(0) * (-1, -1, 1) - (0, 0, np.ptp(lps, 0)[2]))
    told = read_surface(path, "RAS")
    assert told.system == "RAS" and set(map(tuple, told.vertices)) == set(map(tuple, lps.astype(float)))
    path.write_bytes(path.read_bytes().replace(b"Visualization Toolkit generated SLA File", b"3D Slicer. SPACE=RAS", 1))
    assert read_surface(path).system == "RAS"
    with pytest.warns(Repaired, match="says SPACE=RAS"):
        assert read_surface(path, "LPS").system == "LPS"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_or_empty_file_is_refused_in_one_line(tmp_path, suffix, capfd):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"a{suffix}"
    write_surface(whole, sphere())
    data = whole.read_bytes()
    for content in (b"", b"solid", b"<html>not found</html>", bytes(200), data[: len(data) // 3]):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_surface(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # VTK would print its own


def test_an_stl_cut_after_a_whole_triangle_is_refused(tmp_path):
    path = tmp_path / "a.stl"
    write_surface(path, sphere())
    path.write_bytes(path.read_bytes()[: 84 + 50 * 28])
    with pytest.raises(InputError, match="28 of the 96 triangles"):
        read_surface(path)


def test_what_is_no_surface_of_triangles_is_refused(tmp_path):
    with pytest.raises(InputError, match="surface file not found"):
        read_surface(tmp_path / "a.stl")
    (tmp_path / "a.vtk").write_text("")
    with pytest.raises(InputError, match="expected a surface as .stl, .obj, .ply, .vtp"):
        read_surface(tmp_path / "a.vtk")
    cube = vtkCubeSource()
    for writer, suffix in ((vtkPLYWriter(), ".ply"), (vtkXMLPolyDataWriter(), ".vtp")):
        writer.SetInputConnection(cube.GetOutputPort())
        writer.SetFileName(str(tmp_path / f"cube{suffix}"))
        writer.Write()
        with pytest.raises(InputError, match="a face has 4 corners"):
            read_surface(tmp_path / f"cube{suffix}")
    obj = tmp_path / "a.obj"
    for text, what in (
        ("v 0 0 0\nv 1 0 0\nl 1 2\n", "holds 1 lines"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read|not among"),
        ("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN|cannot be read"),
        ("v 0 0 0\nv 1e9 0 0\nv 0 1 0\nf 1 2 3\n", "is it in mm"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no triangles|holds 3 points"),
    ):
        obj.write_text(text)
        with pytest.raises(InputError, match=what):
            read_surface(obj)
    told = sphere()
    told.vertices[3] = np.nan
    with pytest.raises(InputError, match="1 vertices are NaN"):
        write_surface(tmp_path / "b.stl", told)
    assert not (tmp_path / "b.stl").exists()
