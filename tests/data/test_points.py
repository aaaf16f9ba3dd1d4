"""Tables of points as spreadsheets and 3D Slicer write them, and markups that are more than points."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from scripts.data.checks import InputError
from scripts.data.points import read_points

WORLD = np.array([[50.663, -37.162, 13.313], [28.419, -33.51, 3.888], [-33.038, 35.189, -1234.605]])  # RAS mm
NAN = torch.full((3,), torch.nan)


def table(points, header="name,x,y,z", delimiter=",", comma=False):
    """Points as the text of a CSV, names before them."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(header.split(","))
    for number, point in enumerate(points):
        cells = [f"{value:.3f}".replace(".", "," if comma else ".") for value in point]
        writer.writerow([f"Läsion {number}", *cells])
    return text.getvalue()


def found(path, data, coordinates=None):
    """Positions, RAS mm, of a file of this content, and the file that the same points leave."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    points = read_points(str(path), coordinates)
    target = path.with_name(f"again{path.suffix}")
    points.save(target, points.world, torch.full((len(points.world),), torch.nan), ["ok"] * len(points.world))
    again = read_points(str(target), coordinates)
    np.testing.assert_allclose(again.world, points.world, atol=1e-6)
    return points.world.numpy(), target.read_bytes()


def refusal(path, data, coordinates=None):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError) as error:
        read_points(str(path), coordinates)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("comma", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_a_table_of_any_delimiter_decimal_sign_and_encoding_is_read_and_written_back_so(
    tmp_path, delimiter, comma, encoding
):
    text = table(WORLD, delimiter=delimiter, comma=comma)  # -1234,605 is no thousands
    world, again = found(tmp_path / "p.csv", text.encode(encoding), "RAS")
    np.testing.assert_allclose(world, WORLD)
    written = again.decode(encoding)
    assert written.splitlines()[0] == delimiter.join(["name", "x", "y", "z", "residual_mm", "status"])
    assert "Läsion 1" in written and ("28,419000" in written) == comma


@pytest.mark.parametrize(
    "header",
    ["NAME,X,Y,Z", "id, x , y , z ", "name,x (mm),y (mm),z (mm)", "n,X [mm],Y [mm],Z [mm]", "n,x_mm,y_mm,z_mm"],
)
def test_columns_are_known_in_any_case_and_with_their_unit(tmp_path, header):
    np.testing.assert_allclose(found(tmp_path / "p.csv", table(WORLD, header), "LPS")[0], WORLD * [-1, -1, 1])


@pytest.mark.parametrize("header, sign", [("label,r,a,s", 1), ("label,R,A,S", 1), ("label,l,p,s", -1), ("n,L,P,S", -1)])
def test_columns_that_say_their_axes_need_not_be_told_and_refuse_others(tmp_path, header, sign):
    world, again = found(tmp_path / "p.csv", table(WORLD * [sign, sign, 1], header))
    np.testing.assert_allclose(world, WORLD)
    assert again.decode().startswith(header)
    other = "LPS" if sign == 1 else "RAS"
    assert f"not {other}" in refusal(tmp_path / "p.csv", table(WORLD, header), other)


def test_what_spreadsheets_leave_around_a_table_is_passed_over(tmp_path):
    plain = table(WORLD)
    for text in (
        plain.replace("\r\n", ",,\r\n"),
        plain + "\r\n,,,\r\n\r\n",
        plain.replace("\r\n", "\n"),
        plain.replace("-", "\u2212"),
        "sep=,\r\n" + plain,
        "sep=|\n" + table(WORLD, delimiter="|"),
    ):
        world, again = found(tmp_path / "p.csv", text, "RAS")
        np.testing.assert_allclose(world, WORLD)
        assert again.decode().startswith("sep=") == text.startswith("sep=")
    np.testing.assert_allclose(found(tmp_path / "p.tsv", table(WORLD, delimiter="\t"), "RAS")[0], WORLD)


def test_a_table_that_could_mean_two_things_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    thousands = 'x,y,z\n"1,234","-5,678","9,012"\n'
    for text, message in (
        (thousands, "could be a fraction or thousands"),
        ("x;y;z\n1.5;2,5;3\n", "write a point for the decimals"),
        ("x;y;z\n1,234,567;2;3\n", "write a point for the decimals"),
        ("x,y,z\n1,2\n", "a coordinate is no number"),
        ("x,y,z\n1,two,3\n", "a coordinate is no number"),
        ("x,y,z\n1,inf,3\n", "a coordinate is no number"),
        ("x,y,z,r,a,s,l,p\n1,2,3,1,2,3,1,2\n", "more than one set of coordinates"),
        ("x,y,z,X\n1,2,3,4\n", "more than one set of coordinates"),
        ("a,b,c\n1,2,3\n", "expected a header with x, y and z"),
        ("x,y,z\n", "found no points"),
        ("", "found nothing"),
        ("x,y,z\n,,\n", "found no points"),
        (b"x,y,z\n\x81\x8d,2,3\n", "not text in UTF-8"),
    ):
        assert message in refusal(path, text, "RAS"), text
    assert "pass --coordinates" in refusal(path, "x,y,z\n1,2,3\n")
    np.testing.assert_allclose(found(path, thousands.replace("9,012", "9,01"), "RAS")[0], [[1.234, -5.678, 9.01]])


def test_a_point_of_a_table_without_a_position_stays_without(tmp_path):
    slicer = (
        "label,r,a,s,defined,selected,visible,locked,description\np0,1,2,3,1,1,1,0,\np1,0,0,0,0,1,1,0,\np2,,,,1,1,1,0,"
    )
    path = tmp_path / "p.csv"
    path.write_text(slicer)
    points = read_points(str(path), None)
    np.testing.assert_array_equal(points.world.isnan().any(dim=1), [False, True, True])
    points.save(tmp_path / "q.csv", points.world * torch.nan, NAN, ["outside the field"] * 3)
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert [row["defined"] for row in rows] == ["0"] * 3 and {row["r"] for row in rows} == {""}
    assert "no point has a position" in refusal(path, (tmp_path / "q.csv").read_text())


def fcsv(system, points=WORLD):
    head = f"# Markups fiducial file version = 4.11\n# CoordinateSystem = {system}\n" if system else "# a list\n"
    head += "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    rows = [f'node_{k},{",".join(map(str, p))},0,0,0,1,1,1,0,"F, {k}",,\n' for k, p in enumerate(points.tolist())]
    return head + "".join(rows)


@pytest.mark.parametrize("system, sign", [("RAS", 1), ("LPS", -1), ("0", 1), ("1", -1)])
def test_a_list_of_fiducials_says_its_axes(tmp_path, system, sign):
    text = fcsv(system, WORLD * [sign, sign, 1])
    world, again = found(tmp_path / "F.fcsv", text)
    np.testing.assert_allclose(world, WORLD)
    lines = again.decode().splitlines()
    assert lines[:3] == text.splitlines()[:3] and '"F, 1"' in lines[4]
    other = "LPS" if sign == 1 else "RAS"
    assert f"not {other}" in refusal(tmp_path / "F.fcsv", text, other)


def test_a_list_of_fiducials_leaves_out_points_without_a_position_and_says_so(tmp_path):
    (tmp_path / "F.fcsv").write_text(fcsv("LPS"))
    points = read_points(str(tmp_path / "F.fcsv"), None)
    moved = points.world.clone()
    moved[1] = torch.nan
    points.save(tmp_path / "G.fcsv", moved, torch.tensor([0.01, torch.nan, 0.02]), ["ok", "outside the field", "ok"])
    assert points.lost.startswith("left out")
    lines = (tmp_path / "G.fcsv").read_text().splitlines()[3:]
    assert ["F, 0" in lines[0], "F, 2" in lines[1], len(lines)] == [True, True, 2]
    assert "inverse off by 0.0100 mm" in lines[0]
    assert "pass --coordinates" in refusal(tmp_path / "F.fcsv", fcsv(None))
    np.testing.assert_allclose(found(tmp_path / "F.fcsv", fcsv(None), "RAS")[0], WORLD)
    assert "not a .fcsv of 3D Slicer" in refusal(tmp_path / "F.fcsv", "x,y,z\n1,2,3\n", "RAS")


def markup(kind, **more):
    controls = [{"position": point, "orientation": [1, 0, 0, 0, 1, 0, 0, 0, 1]} for point in WORLD.tolist()]
    return {"type": kind, "coordinateSystem": "RAS", "coordinateUnits": "mm", "controlPoints": controls} | more


@pytest.mark.parametrize("kind", ["ROI", "Plane", "Model"])
def test_a_markup_that_is_more_than_its_points_is_refused(tmp_path, kind):
    for markups in ([markup(kind, center=[1, 2, 3], size=[4, 5, 6])], [markup("Fiducial"), markup(kind)]):
        text = refusal(tmp_path / "m.mrk.json", json.dumps({"markups": markups}))
        assert f"a markup of the type {kind}" in text and "mark what matters by points" in text


@pytest.mark.parametrize("kind", ["Fiducial", "Line", "Angle", "Curve", "ClosedCurve"])
def test_a_markup_of_points_is_moved_without_what_was_true_where_it_was(tmp_path, kind):
    content = {"markups": [markup(kind, measurements=[{"name": "length", "value": 3}])]}
    world, again = found(tmp_path / "m.mrk.json", json.dumps(content).encode("utf-8-sig"))
    np.testing.assert_allclose(world, WORLD)
    (written,) = json.loads(again)["markups"]
    assert "measurements" not in written and not any("orientation" in point for point in written["controlPoints"])


def test_a_file_that_holds_no_points_is_refused_by_its_name(tmp_path):
    for name in ("p.xlsx", "p.txt", "p.acsv"):
        assert "expected points as .csv" in refusal(tmp_path / name, "x,y,z\n1,2,3\n", "RAS")
