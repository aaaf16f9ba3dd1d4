"""`apply`: images, labels and points through transform files, as SimpleITK takes them; the inverse; what is refused."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import flags, run
from scipy.spatial.transform import Rotation
from synthetic import GRIDS, SIZE, affine_of, moving_affine, moving_image, moving_labels, registration, save

from scripts.data.checks import InputError
from scripts.data.formats import Displacement, forward, save_displacement
from scripts.network import fields
from scripts.registration.apply import apply, compose
from scripts.registration.apply_points import backward

LPS = np.array([-1.0, -1.0, 1.0])


@pytest.fixture(params=GRIDS)
def found(request):
    """A registration on each grid."""
    return registration(request.param)


def saved(folder, found, name="ddf.nii.gz"):
    """The displacement of a registration in a file."""
    save_displacement(folder / name, found.displacement.numpy(), found.affine)
    return str(folder / name)


def by_sitk(path):
    """The transform of a displacement file."""
    return sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))


def columns(points):
    """Points (N, 3) as the code has them, (1, 3, N, 1, 1)."""
    return torch.as_tensor(points).T[None, :, :, None, None]


def rows(points):
    return points[0, :, :, 0, 0].T.numpy()


def step_of(found):
    return Displacement(found.displacement, torch.from_numpy(found.affine))


def write_csv(path, points, **more):
    """Points (N, 3) in a CSV, with other columns before them."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*more, "x", "y", "z"])
        for i, point in enumerate(points.tolist()):
            writer.writerow([*(v[i] for v in more.values()), *point])
    return str(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("interpolation", "by_itk"), [("linear", sitk.sitkLinear), ("cubic", sitk.sitkBSpline)])
def test_an_image_is_warped_as_simpleitk_warps_it(found, interpolation, by_itk, tmp_path):
    path, moving = saved(tmp_path, found), moving_image(tmp_path / "moving.nii.gz")
    apply([path], str(tmp_path / "out.nii.gz"), moving=str(moving), interpolation=interpolation)
    field, image = by_sitk(path), sitk.ReadImage(str(moving), sitk.sitkFloat64)
    theirs = sitk.Resample(image, field.GetDisplacementField(), field, by_itk, 0.0)
    ours = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    assert ours.GetSize() == SIZE
    np.testing.assert_allclose(ours.GetOrigin(), theirs.GetOrigin(), atol=1e-4)
    a, b = sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs)
    inside = (a != 0) & (b != 0)
    assert inside.mean() > 0.9 and ((a == 0) != (b == 0)).mean() < 1e-3
    assert np.abs(a - b)[inside].max() < 1e-3 * np.ptp(b)


def test_a_reference_grid_beyond_the_field_is_zero_where_nothing_is_known(tmp_path):
    found = registration("oblique, anisotropic")
    path, moving = saved(tmp_path, found), str(moving_image(tmp_path / "moving.nii.gz"))
    wide = affine_of(np.eye(3), (2.5, 2.5, 2.5), (40, 40, 40), (20, -30, 55))
    reference = str(save(tmp_path / "reference.nii.gz", np.zeros((40, 40, 40), np.float32), wide))
    apply([path], str(tmp_path / "out.nii.gz"), moving=moving, reference=reference)
    ours = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(ours.affine, wide, atol=1e-4)
    x = fields.transform_points(torch.from_numpy(wide), fields.identity_grid((40,) * 3, torch.float64, "cpu")[None])
    inside = fields.covers(SIZE, torch.from_numpy(found.affine), x)[0, 0].numpy()
    assert 0 < inside.mean() < 0.5 and (ours.get_fdata()[~inside] == 0).all()
    field, image = by_sitk(path), sitk.ReadImage(moving, sitk.sitkFloat64)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, sitk.ReadImage(reference), field, sitk.sitkLinear, 0.0))
    both = inside & (ours.get_fdata() != 0) & (theirs.transpose(2, 1, 0) != 0)
    assert np.abs(ours.get_fdata() - theirs.transpose(2, 1, 0))[both].max() < 0.1


def test_each_label_is_decided_on_its_own(found, tmp_path):
    path, labels = saved(tmp_path, found), str(moving_labels(tmp_path / "labels.nii.gz"))
    apply([path], str(tmp_path / "out.nii.gz"), moving=labels, label=True)
    ours = nib.load(tmp_path / "out.nii.gz")
    assert ours.get_data_dtype() == np.int16
    array = np.asarray(ours.dataobj)
    assert set(np.unique(array)) == {0, 1, 4, 300}
    field, image = by_sitk(path), sitk.ReadImage(labels)
    shares = {}
    for value in (0, 1, 4, 300):
        share = sitk.Resample(
            sitk.Cast(image == value, sitk.sitkFloat64), field.GetDisplacementField(), field, sitk.sitkLinear, 0.0
        )
        shares[value] = sitk.GetArrayFromImage(share).transpose(2, 1, 0)
    clear = np.sort(np.stack(list(shares.values())), axis=0)
    clear = clear[-1] > clear[-2] + 1e-3
    wanted = np.array(list(shares))[np.argmax(np.stack(list(shares.values())), axis=0)]
    assert clear.mean() > 0.9 and (array == wanted)[clear].all()


def test_binary_maps_one_a_channel_stay_binary_and_apart(tmp_path):
    found = registration("permuted")
    labels = np.asarray(nib.load(moving_labels(tmp_path / "index.nii.gz")).dataobj)
    maps = np.stack([labels > 0, labels == 4, labels == 300], axis=-1).astype(np.uint8)  # the first holds the others
    moving = str(save(tmp_path / "maps.nii.gz", maps, moving_affine()))
    apply([saved(tmp_path, found)], str(tmp_path / "out.nii.gz"), moving=moving, label=True)
    ours = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj)
    assert ours.shape == (*SIZE, 3) and ours.dtype == np.uint8 and set(np.unique(ours)) == {0, 1}
    assert (ours[..., 0] >= ours[..., 1]).all() and ours.reshape(-1, 3).any(axis=0).all()


def test_the_inverse_of_an_invertible_field(found):
    step, start = step_of(found), torch.from_numpy(found.points(1000))
    moving, _ = forward([step], columns(start))
    back, residual, status = backward([step], moving)
    voxels = residual.numpy() / found.voxel
    assert (voxels <= 0.1).mean() >= 0.99
    assert status.count("ok") >= 990
    ok = np.array([s == "ok" for s in status])
    assert np.linalg.norm(rows(back) - start.numpy(), axis=1)[ok].max() < 1e-3


def test_points_without_an_inverse_are_said_to_have_none():
    found = registration("oblique, anisotropic", amplitude=14.0)  # folds
    step = step_of(found)
    jacobian = fields.jacobian_determinant(step.field[None], step.affine)
    assert (jacobian <= 0).double().mean() > 0.05
    far = torch.tensor([[500.0, 0, 0]], dtype=torch.float64)
    points = torch.cat([torch.from_numpy(rows(forward([step], columns(found.points(500)))[0])), far])
    back, residual, status = backward([step], columns(points))
    again = rows(forward([step], back)[0])
    apart = np.linalg.norm(again - points.numpy(), axis=1)
    np.testing.assert_allclose(apart, residual.numpy(), atol=1e-9)
    assert status[-1] == "outside the field" and "the field folds here" in status
    assert apart[[s == "ok" for s in status]].max() <= 0.1


@pytest.mark.parametrize("coordinates", ["RAS", "LPS"])
def test_points_of_a_csv_are_where_simpleitk_takes_them(found, coordinates, tmp_path):
    path, sign = saved(tmp_path, found), LPS if coordinates == "LPS" else np.ones(3)
    points = found.points(1000)
    source = write_csv(tmp_path / "fixed.csv", points * sign, name=[f"p{i}" for i in range(1000)])
    forth, back = str(tmp_path / "moving.csv"), str(tmp_path / "back.csv")
    apply([path], forth, points=source, points_from="fixed", coordinates=coordinates)
    written = read_csv(forth)
    assert [row["name"] for row in written] == [f"p{i}" for i in range(1000)]
    assert {row["status"] for row in written} == {"ok"} and {row["residual_mm"] for row in written} == {""}
    ours = np.array([[float(row[axis]) for axis in "xyz"] for row in written]) * sign
    by_itk = by_sitk(path)
    theirs = np.array([by_itk.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    assert np.abs(ours - theirs).max() < 1e-3

    apply([path], back, points=forth, points_from="moving", coordinates=coordinates)
    ok = [row["status"] == "ok" for row in read_csv(back)]
    returned = np.array([[float(row[axis] or "nan") for axis in "xyz"] for row in read_csv(back)]) * sign
    assert np.mean(ok) > 0.99 and np.abs(returned - points)[ok].max() < 1e-3
    assert max(float(row["residual_mm"]) for row in read_csv(back)) < 0.1


@pytest.mark.parametrize("system", ["RAS", "LPS"])
def test_markups_of_3d_slicer_keep_their_own_coordinate_system(system, tmp_path):
    found = registration("flipped, left-handed")
    path, sign = saved(tmp_path, found), LPS if system == "LPS" else np.ones(3)
    points = np.concatenate([found.points(3), [[900.0, 0, 0]]])
    controls = [{"id": str(i), "label": f"F-{i}", "position": p} for i, p in enumerate((points * sign).tolist())]
    controls.append({"id": "4", "label": "F-4", "position": [0.0, 0.0, 0.0], "positionStatus": "undefined"})
    markup = {"type": "Fiducial", "coordinateSystem": system, "coordinateUnits": "mm", "controlPoints": controls}
    source = tmp_path / "fixed.mrk.json"
    source.write_text(json.dumps({"@schema": "markups-schema-v1.0.3", "markups": [markup]}))
    apply([path], str(tmp_path / "moving.mrk.json"), points=str(source), points_from="fixed")
    result = json.loads((tmp_path / "moving.mrk.json").read_text())
    assert result["markups"][0]["coordinateSystem"] == system
    moved = result["markups"][0]["controlPoints"]
    theirs = np.array([by_sitk(path).TransformPoint(p) for p in (points[:3] * LPS).tolist()]) * LPS
    assert np.abs(np.array([p["position"] for p in moved[:3]]) * sign - theirs).max() < 1e-3
    assert [p["positionStatus"] for p in moved] == ["defined"] * 3 + ["undefined"] * 2
    assert [p["label"] for p in moved] == [f"F-{i}" for i in range(5)] and "outside" in moved[3]["description"]
    with pytest.raises(InputError, match=f"its coordinate system is {system}"):
        other = "RAS" if system == "LPS" else "LPS"
        apply([path], str(tmp_path / "x.mrk.json"), points=str(source), points_from="fixed", coordinates=other)


def test_transforms_are_composed_in_the_order_the_moving_image_goes_through_them(tmp_path):
    found = registration("oblique, anisotropic")
    first = saved(tmp_path, found)  # of the moving image onto the fixed
    turn = sitk.Euler3DTransform((-20, 30, 55), 0.1, -0.05, 0.12, (1.5, -1, 2))  # of the fixed onto a third
    sitk.WriteTransform(turn, str(tmp_path / "second.tfm"))
    composite = sitk.CompositeTransform([by_sitk(first), turn])  # ITK: added last, applied first
    middle = np.random.default_rng(0).uniform(-6, 6, (200, 3)) + [20, -30, 55]
    points, known = forward(compose([first, str(tmp_path / "second.tfm")]), columns(middle))
    assert known.all()
    theirs = np.array([composite.TransformPoint(p) for p in (middle * LPS).tolist()]) * LPS
    np.testing.assert_allclose(rows(points), theirs, atol=1e-4)
    back, residual, status = backward(compose([first, str(tmp_path / "second.tfm")]), points)
    assert set(status) == {"ok"} and residual.max() < 1e-3
    np.testing.assert_allclose(rows(back), middle, atol=1e-3)

    # one interpolation: two warps after another blur more than both at once
    moving = str(moving_image(tmp_path / "moving.nii.gz"))
    reference = str(save(tmp_path / "reference.nii.gz", np.zeros(SIZE, np.float32), found.affine))
    apply([first, str(tmp_path / "second.tfm")], str(tmp_path / "once.nii.gz"), moving=moving, reference=reference)
    image, grid = sitk.ReadImage(moving, sitk.sitkFloat64), sitk.ReadImage(reference)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, grid, composite, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
    ours = nib.load(tmp_path / "once.nii.gz").get_fdata()
    both = (ours != 0) & (theirs != 0)
    assert both.mean() > 0.6 and np.abs(ours - theirs)[both].max() < 1e-3 * np.ptp(theirs)
    with pytest.raises(InputError, match="no grid of its own; name the grid to warp onto by --reference"):
        apply([first, str(tmp_path / "second.tfm")], str(tmp_path / "no.nii.gz"), moving=moving)


def test_a_folder_is_warped_whole_and_a_bad_file_in_it_is_named(tmp_path, capsys):
    found = registration("permuted")
    path, folder = saved(tmp_path, found), tmp_path / "images"
    folder.mkdir()
    for seed in (1, 2):
        moving_image(folder / f"patient{seed}.nii.gz", seed)
    apply([path], str(tmp_path / "out"), moving=str(folder))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["patient1.nii.gz", "patient2.nii.gz"]
    apply([path], str(tmp_path / "one.nii.gz"), moving=str(folder / "patient2.nii.gz"))
    alone, among = (nib.load(p).get_fdata() for p in (tmp_path / "one.nii.gz", tmp_path / "out" / "patient2.nii.gz"))
    assert np.array_equal(alone, among)
    assert "Research use only" in capsys.readouterr().out

    with pytest.raises(InputError, match="lies in the input"):
        apply([path], str(folder / "warped"), moving=str(folder))
    (folder / "patient0.nii.gz").write_text("no image")
    with pytest.raises(InputError, match="1 of 3 images refused, the others are written; first .*patient0"):
        apply([path], str(tmp_path / "again"), moving=str(folder))
    assert len(list((tmp_path / "again").iterdir())) == 2


def test_what_does_not_go_together_is_refused_and_leaves_nothing(tmp_path):
    found = registration("permuted")
    path, moving = saved(tmp_path, found), str(moving_image(tmp_path / "moving.nii.gz"))
    points = write_csv(tmp_path / "points.csv", found.points(3))
    (tmp_path / "words.csv").write_text("x,y,z\n1,2,three\n")
    (tmp_path / "bare.csv").write_text("1,2,3\n")
    (tmp_path / "bad.mrk.json").write_text("{}")
    out, points_out = str(tmp_path / "out.nii.gz"), str(tmp_path / "out.csv")
    fixed = {"points_from": "fixed", "coordinates": "RAS"}
    refused = [
        ("give either --moving", out, {}),
        ("give either --moving", out, {"moving": moving, "points": points}),
        ("ends in .nii.gz", str(tmp_path / "out.mha"), {"moving": moving}),
        ("would replace the input", moving, {"moving": moving}),
        ("interpolation sinc", out, {"moving": moving, "interpolation": "sinc"}),
        ("leave out --interpolation", out, {"moving": moving, "label": True, "interpolation": "nearest"}),
        ("expected integers", out, {"moving": moving, "label": True}),
        ("--points_from has no meaning for images", out, {"moving": moving, "points_from": "fixed"}),
        ("--reference has no meaning for points", points_out, {"points": points, "reference": moving} | fixed),
        ("say which image the points were marked in", points_out, {"points": points, "coordinates": "RAS"}),
        ("pass --coordinates RAS or LPS", points_out, {"points": points, "points_from": "fixed"}),
        ("coordinates ras", points_out, {"points": points, "points_from": "fixed", "coordinates": "ras"}),
        ("written as .csv", out, {"points": points} | fixed),
        ("no number", points_out, {"points": str(tmp_path / "words.csv")} | fixed),
        ("expected a header with x, y and z", points_out, {"points": str(tmp_path / "bare.csv")} | fixed),
        (
            "not a readable markups file",
            str(tmp_path / "o.mrk.json"),
            {"points": str(tmp_path / "bad.mrk.json")} | fixed,
        ),
        ("expected points as .csv", out, {"points": moving} | fixed),
        ("points file not found", points_out, {"points": str(tmp_path / "none.csv")} | fixed),
        ("file not found", out, {"moving": str(tmp_path / "none.nii.gz")}),
    ]
    before = sorted(tmp_path.iterdir())
    for message, output, settings in refused:
        with pytest.raises(InputError, match=message) as refusal:
            apply([path], output, **settings)
        assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_warps_by_two_transforms_and_refuses_in_one_line(tmp_path):
    found = registration("permuted")
    path, moving = saved(tmp_path, found), moving_image(tmp_path / "moving.nii.gz")
    identity = found._replace(displacement=torch.zeros(3, *SIZE, dtype=torch.float64))
    same = saved(tmp_path, identity, "same.nii.gz")
    output = tmp_path / "new" / "out.nii.gz"
    result = run("scripts", "apply", *flags({"transform": f"{path},{same}", "moving": moving, "output": output}))
    assert result.returncode == 0, result.stderr
    assert "Research use only" in result.stdout and "Traceback" not in result.stderr
    apply([path], str(tmp_path / "alone.nii.gz"), moving=str(moving))
    np.testing.assert_allclose(nib.load(output).get_fdata(), nib.load(tmp_path / "alone.nii.gz").get_fdata(), atol=1e-3)


def test_a_rotation_of_half_a_turn_is_inverted_where_a_fixed_point_iteration_diverges():
    affine = torch.from_numpy(affine_of(np.eye(3), (2, 2, 2), (20, 20, 20), (0, 0, 0)))
    x = fields.transform_points(affine, fields.identity_grid((20, 20, 20), torch.float64, "cpu")[None])
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.from_numpy(Rotation.from_euler("z", 180, degrees=True).as_matrix())
    displacement = fields.transform_points(turn, x) - x
    points = torch.tensor([[3.0, -7, 5], [10, 12, -15]], dtype=torch.float64)
    back, residual, jacobian = fields.inverse(displacement, affine, columns(points))
    np.testing.assert_allclose(rows(back), points.numpy() * [-1, -1, 1], atol=1e-5)
    assert residual.max() < 1e-5 and torch.allclose(jacobian, torch.ones(2, dtype=torch.float64))
