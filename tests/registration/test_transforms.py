"""From files to the network's input and back: the grid is ITK's, bad input refused by name."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from synthetic import PAIR_AFFINE, PAIR_SIZE, content, to_itk, write

from scripts.data.checks import InputError
from scripts.data.datalist import KEYS
from scripts.data.formats import Grid, on_grid
from scripts.data.pairs import LoadPaird
from scripts.network.fields import covers, transform_points, warp, world_grid
from scripts.phantoms.phantom import simulate_pair
from scripts.registration.metrics import dice
from scripts.registration.transforms import KeepOriginalsd, OntoFixedGridd, ToOriginalGridd
from scripts.training.cohort import as_loaded

LPS = np.diag([-1.0, -1, 1, 1])  # RAS <-> LPS


def rotation(axis, degrees):
    transform = sitk.VersorTransform(axis, np.deg2rad(degrees))
    return np.array(transform.GetMatrix()).reshape(3, 3)


def affine_of(linear, spacing, origin):
    """Voxel -> RAS mm."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear * np.asarray(spacing), origin
    return affine


TILT = rotation((1, 2, 3), 12)
FIXED_AXES = {
    "RAS": np.eye(3),
    "oblique": TILT,
    "LPS": np.diag([-1.0, -1, 1]),
    "permuted": TILT @ np.eye(3)[:, [2, 0, 1]],
    "flipped and permuted": TILT @ (np.eye(3)[:, [1, 2, 0]] * (1, -1, -1)),
}


def resample(array, affine, grid_size, grid_affine, transform=None):
    """What SimpleITK.Resample gives on a grid, and where that lies inside the volume."""
    image, grid = to_itk(np.asarray(array, np.float64), affine), to_itk(np.zeros(grid_size), grid_affine)
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    values = [
        sitk.GetArrayFromImage(sitk.Resample(i, grid, transform, sitk.sitkLinear, 0.0)) for i in (image, 0 * image + 1)
    ]
    return values[0].transpose(2, 1, 0), values[1].transpose(2, 1, 0) > 0


def pair(axes="RAS", labels=2, seed=0):
    """Four random volumes: a moving grid far away and oblique, a fixed grid of the named axes."""
    rng = np.random.default_rng(seed)
    moving = affine_of(rotation((3, 1, -1), 25), (1.1, 0.9, 1.7), (30, -50, 70))
    fixed = affine_of(FIXED_AXES[axes], (1.3, 0.9, 1.1), (-12, 40, 5))
    data = {}
    for side, size, affine in (("moving", (12, 14, 9), moving), ("fixed", (11, 13, 16), fixed)):
        image, label = rng.normal(size=(1, *size)), rng.random((labels, *size)) > 0.5
        data[f"{side}_image"] = MetaTensor(torch.from_numpy(image).float(), affine=torch.from_numpy(affine))
        data[f"{side}_label"] = MetaTensor(torch.from_numpy(label).float(), affine=torch.from_numpy(affine))
    return data


def start_transform(kind):
    """A start as ITK writes it, fixed -> moving, LPS."""
    if kind == "euler":
        return sitk.Euler3DTransform((3, -20, 8), 0.2, -0.1, 0.3, (-40, 90, 60))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((rotation((2, -1, 1), 15) @ np.diag([1.1, 0.9, 1])).ravel().tolist())
    transform.SetCenter((5, -6, 7))
    transform.SetTranslation((-35, 95, 50))
    return transform


def centre_transform(data):
    """The translation between the volumes' centres, by SimpleITK."""
    centres = []
    for side in ("fixed", "moving"):
        image = to_itk(data[f"{side}_image"][0].numpy(), data[f"{side}_image"].affine)
        middle = [(n - 1) / 2 for n in image.GetSize()]
        centres.append(np.array(image.TransformContinuousIndexToPhysicalPoint(middle)))
    return sitk.TranslationTransform(3, (centres[1] - centres[0]).tolist())


def check_against_itk(data, result, transform):
    """Every volume on the working grid is what SimpleITK.Resample gives there; returns the share of moving inside."""
    size, affine = tuple(result["image"].shape[1:]), result["grid_affine"].numpy()
    for channel, side in enumerate(("moving", "fixed")):
        used = transform if side == "moving" else None
        image, label = data[f"{side}_image"], data[f"{side}_label"]
        expected, inside = resample(image[0], image.affine, size, affine, used)
        assert inside.mean() > 0.2
        np.testing.assert_allclose(result["image"][channel].numpy()[inside], expected[inside], atol=1e-4)
        for m in range(len(label)):
            expected, _ = resample(label[m], label.affine, size, affine, used)
            np.testing.assert_allclose(result[f"{side}_label"][m].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("spacing", [0.8, 1.5, "none"])
@pytest.mark.parametrize("axes", FIXED_AXES)
def test_from_centre_to_centre_both_volumes_are_what_simpleitk_resamples(axes, spacing):
    data = pair(axes)
    result = OntoFixedGridd(spacing, "centre")(data)
    check_against_itk(data, result, centre_transform(data))


@pytest.mark.parametrize("axes", FIXED_AXES)
def test_by_the_headers_the_worlds_are_one(axes):
    data = pair(axes)
    for key in ("moving_image", "moving_label"):  # bring the moving scan into the fixed world, tilted
        affine = data[key].affine.clone()
        affine[:3, 3] = data["fixed_image"].affine[:3] @ torch.tensor([2.0, 3, 1, 1], dtype=torch.float64) - 4
        data[key] = MetaTensor(data[key].as_tensor(), affine=affine)
    result = OntoFixedGridd(0.8, "header")(data)
    assert torch.equal(result["initial_transform"], torch.eye(4, dtype=torch.float64))
    affine = result["grid_affine"].numpy()
    size = tuple(result["image"].shape[1:])
    for key in ("moving_label", "fixed_label"):
        for m in range(2):
            expected, inside = resample(data[key][m], data[key].affine, size, affine)
            assert inside.any()
            np.testing.assert_allclose(result[key][m].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("suffix", ["tfm", "txt", "mat"])
@pytest.mark.parametrize("kind", ["euler", "affine"])
def test_a_transform_file_of_itk_is_the_start(kind, suffix, tmp_path):
    transform = start_transform(kind)
    # aim at the moving volume's centre, so that the two overlap
    data = pair("oblique")
    aim = centre_transform(data)
    fixed = to_itk(data["fixed_image"][0], data["fixed_image"].affine)
    middle = np.array(fixed.TransformContinuousIndexToPhysicalPoint((5, 6, 7.5)))
    off = np.array(aim.TransformPoint(middle.tolist())) - transform.TransformPoint(middle.tolist())
    transform.SetTranslation((np.array(transform.GetTranslation()) + off).tolist())
    path = str(tmp_path / f"start.{suffix}")
    sitk.WriteTransform(transform, path)
    result = OntoFixedGridd(0.8, path)(data)
    check_against_itk(data, result, transform)
    point = np.array([3.0, -7, 11])
    ras = LPS[:3, :3] @ transform.TransformPoint((LPS[:3, :3] @ point).tolist())
    np.testing.assert_allclose((result["initial_transform"].numpy() @ [*point, 1])[:3], ras, atol=1e-9)


@pytest.mark.parametrize("spacing", [0.8, 1.5, None, "none", "0.8"])
@pytest.mark.parametrize("axes", FIXED_AXES)
def test_the_working_grid_is_the_fixed_field_of_view_in_its_own_axes_reordered_to_ras(axes, spacing):
    data = pair(axes)
    result = OntoFixedGridd(spacing)(data)
    fixed, grid = data["fixed_image"].affine.numpy(), result["grid_affine"].numpy()
    size, old = np.array(result["image"].shape[1:]), np.array(data["fixed_image"].shape[1:])
    assert nib.aff2axcodes(grid) == ("R", "A", "S")
    own = np.linalg.norm(fixed[:3, :3], axis=0)
    order = np.abs(grid[:3, :3].T @ fixed[:3, :3]).argmax(1)  # which fixed axis each working axis is
    np.testing.assert_allclose(
        np.abs((grid[:3, :3] / np.linalg.norm(grid[:3, :3], axis=0)).T @ fixed[:3, :3][:, order] / own[order]),
        np.eye(3),
        atol=1e-9,
    )
    wanted = own[order] if spacing in (None, "none") else np.full(3, float(spacing))
    np.testing.assert_allclose(result["spacing"].numpy(), wanted, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), wanted, rtol=1e-9)
    # as few voxels as cover the field of view, about the same centre
    assert (size == np.ceil((old * own)[order] / wanted - 1e-3)).all()
    np.testing.assert_allclose(grid @ [*(size - 1) / 2, 1], fixed @ [*(old - 1) / 2, 1], atol=1e-9)


def test_the_file_spacing_of_an_upright_fixed_image_keeps_its_voxels():
    data = pair("RAS")
    result = OntoFixedGridd(None)(data)
    torch.testing.assert_close(result["image"][1:], data["fixed_image"].as_tensor(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["fixed_label"], data["fixed_label"].as_tensor(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["grid_affine"], data["fixed_image"].affine)


def test_the_same_anatomy_stored_in_other_axes_gives_the_same_working_grid():
    data = pair("RAS")
    turned = dict(data)
    for key in ("fixed_image", "fixed_label"):
        volume = nib.Nifti1Image(data[key].numpy().transpose(1, 2, 3, 0), data[key].affine.numpy())
        turn = nib.orientations.axcodes2ornt(("I", "L", "P"))
        volume = volume.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(volume.affine), turn))
        array = np.moveaxis(volume.get_fdata(), -1, 0)
        turned[key] = MetaTensor(torch.from_numpy(array.copy()).float(), affine=torch.from_numpy(volume.affine))
    a, b = OntoFixedGridd(0.8)(data), OntoFixedGridd(0.8)(turned)
    for key in ("image", "moving_label", "fixed_label", "grid_affine", "initial_transform"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)


def test_the_image_is_moving_then_fixed_in_float32_and_labels_are_optional():
    data = pair()
    full = OntoFixedGridd()(data)
    bare = OntoFixedGridd()({key: data[key] for key in KEYS[:2]})
    assert full["image"].shape[0] == 2 and full["image"].dtype == torch.float32
    assert torch.equal(full["image"], bare["image"])
    assert not {"moving_image", "fixed_image"} & set(full)
    assert not {"moving_label", "fixed_label"} & set(bare)


def test_a_start_that_is_no_single_linear_3d_transform_is_refused(tmp_path):
    data = pair()
    with pytest.raises(InputError, match='none.tfm: not found; an initial transform is "centre", "header"'):
        OntoFixedGridd(initial_transform=str(tmp_path / "none.tfm"))(data)
    (tmp_path / "text.tfm").write_text("no transform")
    with pytest.raises(InputError, match="text.tfm: ITK cannot read this transform"):
        OntoFixedGridd(initial_transform=str(tmp_path / "text.tfm"))(data)
    bad = {
        "bspline": (sitk.BSplineTransform(3, 3), "a BSplineTransform; expected linear"),
        "two_d": (sitk.Euler2DTransform(), "expected a 3-D transform, found 2-D"),
    }
    for name, (transform, message) in bad.items():
        sitk.WriteTransform(transform, str(tmp_path / f"{name}.tfm"))
        with pytest.raises(InputError, match=f"{name}.tfm: {message}"):
            OntoFixedGridd(initial_transform=str(tmp_path / f"{name}.tfm"))(data)


def test_a_translation_and_a_composite_of_linear_transforms_are_starts_as_well(tmp_path):
    rotation = sitk.Euler3DTransform((1, 2, 3), 0.1, -0.2, 0.3, (4, 5, 6))
    for transform in (sitk.TranslationTransform(3, (3, -2, 5)), sitk.CompositeTransform([rotation, rotation])):
        sitk.WriteTransform(transform, str(tmp_path / "start.tfm"))
        matrix = OntoFixedGridd(initial_transform=str(tmp_path / "start.tfm"))(pair())["initial_transform"].numpy()
        for point in np.random.default_rng(0).uniform(-50, 50, (5, 3)):
            lps = np.array(transform.TransformPoint(tuple(point * [-1, -1, 1])))
            np.testing.assert_allclose((matrix @ [*point, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


def as_field(transform, fixed):
    """An ITK transform as a displacement on a fixed image's grid."""
    grid = to_itk(fixed[0], fixed.affine)
    place = (grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection())
    return sitk.DisplacementFieldTransform(sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, *place))


@pytest.mark.parametrize("axes", FIXED_AXES)
def test_a_start_is_the_same_as_a_matrix_and_as_a_displacement(axes, tmp_path):
    data = pair(axes)
    transform = sitk.CompositeTransform([centre_transform(data), sitk.Euler3DTransform((1, 2, 3), 0.1, -0.05, 0.08)])
    sitk.WriteTransform(transform, str(tmp_path / "matrix.tfm"))
    sitk.WriteTransform(as_field(transform, data["fixed_image"]), str(tmp_path / "field.h5"))
    results = []
    for name in ("matrix.tfm", "field.h5"):
        found = OntoFixedGridd(0.8, str(tmp_path / name))(KeepOriginalsd()(data))
        ddf = torch.randn(3, *found["image"].shape[1:], generator=torch.Generator().manual_seed(0))
        results.append(ToOriginalGridd()(found | {"pred": ddf}))
    by_matrix, by_field = (result["displacement"] for result in results)
    inner = (..., *[slice(3, -3)] * 3)  # beyond its border a field has that border's values, a matrix has none
    torch.testing.assert_close(by_field[inner], by_matrix[inner], rtol=0, atol=1e-6)
    assert "initial_displacement" in results[1] and torch.equal(
        results[1]["initial_transform"], torch.eye(4, dtype=torch.float64)
    )
    assert (results[0]["image"] - results[1]["image"]).abs().median() < 0.05 * results[0]["image"].std()


def test_a_start_that_does_not_cover_the_fixed_image_is_refused(tmp_path):
    data = pair()
    part = MetaTensor(data["fixed_image"].as_tensor()[..., :-4], affine=data["fixed_image"].affine)
    sitk.WriteTransform(as_field(centre_transform(data), part), str(tmp_path / "part.h5"))
    with pytest.raises(InputError, match=r"part.h5: covers \d\d % of the fixed image; it must cover all"):
        OntoFixedGridd(initial_transform=str(tmp_path / "part.h5"))(data)


# ---- the way back


@pytest.mark.parametrize("axes", FIXED_AXES)
def test_without_a_ddf_the_moving_volumes_come_onto_the_original_fixed_grid_as_simpleitk_brings_them(axes):
    data = pair(axes)
    result = OntoFixedGridd(0.8)(KeepOriginalsd()(data))
    back = ToOriginalGridd()(result | {"pred": torch.zeros(3, *result["image"].shape[1:])})
    fixed, transform = data["fixed_image"], centre_transform(data)
    for key in ("moving_image", "moving_label"):
        for found, volume in zip(back[f"warped_{key}"], data[key], strict=True):
            expected, _ = resample(volume, data[key].affine, tuple(fixed.shape[1:]), fixed.affine, transform)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    shift = (LPS[:3, :3] @ transform.GetOffset()).reshape(3, 1, 1, 1)
    assert back["displacement"].shape == (3, *fixed.shape[1:])
    np.testing.assert_allclose(
        back["displacement"].numpy(), np.broadcast_to(shift, back["displacement"].shape), atol=1e-6
    )


@pytest.mark.parametrize("axes", ["RAS", "flipped and permuted"])
def test_a_constant_ddf_is_a_translation_along_the_working_axes(axes):
    data = pair(axes)
    result = OntoFixedGridd(0.8)(KeepOriginalsd()(data))
    voxels = torch.tensor([2.0, -1, 3])
    back = ToOriginalGridd()(result | {"pred": voxels.view(3, 1, 1, 1).expand(3, *result["image"].shape[1:])})
    expected = result["grid_affine"][:3, :3] @ voxels.double() + result["initial_transform"][:3, 3]
    torch.testing.assert_close(
        back["displacement"], expected.view(3, 1, 1, 1).expand_as(back["displacement"]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("axes", FIXED_AXES)
@pytest.mark.parametrize("spacing", [2.5, None])
def test_a_displacement_on_a_grid_of_its_own_is_the_same_transform_and_covers_the_fixed_image(axes, spacing):
    data = pair(axes)
    result = OntoFixedGridd(spacing)(KeepOriginalsd()(data))
    ddf = 2 * torch.randn(3, *result["image"].shape[1:], generator=torch.Generator().manual_seed(0))
    whole, own = (ToOriginalGridd(on_fixed_grid=on)(result | {"pred": ddf}) for on in (True, False))
    fixed = Grid(data["fixed_image"].affine.double().numpy(), tuple(data["fixed_image"].shape[1:]))
    x = world_grid(fixed.size, data["fixed_image"].affine)
    ends = torch.tensor([[[-0.5, n - 0.5] for n in fixed.size]], dtype=torch.float64)[..., None, None]
    corners = transform_points(data["fixed_image"].affine, ends)  # beyond its field ITK moves nothing
    assert covers(own["displacement"].shape[1:], own["field_affine"], x).all()
    assert covers(own["displacement"].shape[1:], own["field_affine"], corners).all()
    found = on_grid(own["displacement"], own["field_affine"].numpy(), fixed)
    np.testing.assert_allclose(found, whole["displacement"].numpy(), atol=1e-3)
    for key in ("warped_moving_image", "warped_moving_label"):
        scale = whole[key].abs().max()
        assert (own[key] - whole[key]).abs().max() < 1e-3 * scale


def test_the_true_displacement_of_a_phantom_lays_its_labels_on_each_other():
    phantom = simulate_pair(np.random.default_rng(0))
    data = as_loaded(phantom)
    result = OntoFixedGridd(None, "centre")(KeepOriginalsd()(data))
    truth = phantom.true_displacement.movedim(-1, 0).double()
    shift = result["initial_transform"][:3, 3].view(3, 1, 1, 1)  # the start is a translation: T(x) = x + A u + shift
    ddf = torch.einsum("ij,jxyz->ixyz", torch.linalg.inv(result["grid_affine"][:3, :3]), truth - shift).float()
    back = ToOriginalGridd()(result | {"pred": ddf})
    torch.testing.assert_close(back["displacement"], truth, rtol=1e-4, atol=1e-3)
    fixed = data["fixed_label"].as_tensor()
    on_working_grid = warp(result["moving_label"][None], ddf[None])[0]
    for warped in (back["warped_moving_label"], on_working_grid):
        scores = dice(warped[:, None], fixed[:, None])
        assert scores[0] > 0.95 and scores.min() > 0.6
    assert dice(back["warped_moving_label"][:1, None], fixed[:1, None]) > dice(
        result["moving_label"][:1, None], fixed[:1, None]
    )


# ---- the files


def test_a_pair_is_loaded_channel_first_with_the_affine_of_each_file(files):
    label = np.moveaxis(content()[1], -1, 0)
    images = {"moving_image": content()[0][None], "fixed_image": content(seed=1)[0][None]}
    loaded = LoadPaird()(files | {"case": "a"})
    assert loaded["case"] == "a"
    for key in KEYS:
        expected = images.get(key, label)
        assert loaded[key].dtype == torch.float32
        np.testing.assert_array_equal(loaded[key].numpy(), expected)
        np.testing.assert_allclose(loaded[key].affine.numpy(), PAIR_AFFINE, atol=1e-5)


def test_a_4d_nifti_label_keeps_its_origin(tmp_path, files):
    affine = affine_of(np.eye(3), (1, 2, 3), (-40, 55, 66))
    for seed, side in enumerate(("moving", "fixed")):  # one image twice is refused
        for kind, array in zip(("image", "label"), content(labels=4, seed=seed), strict=True):
            write(tmp_path / f"{side}_{kind}.nii.gz", array, affine)
    loaded = LoadPaird()(files)
    for key in ("moving_label", "fixed_label"):
        np.testing.assert_allclose(loaded[key].affine.numpy(), affine, atol=1e-5)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr", ".nii"])
@pytest.mark.parametrize("label_axes", [3, 4])
def test_metaimage_and_nrrd_are_read_as_nifti_is(tmp_path, suffix, label_axes):
    label = content()[1]
    label = label[..., 0] if label_axes == 3 else label
    images = {"moving_image": content()[0], "fixed_image": content(seed=1)[0]}
    loaded = {}
    for s in (".nii.gz", suffix):
        paths = {k: write(tmp_path / f"{k}{s}", images.get(k, label)) for k in KEYS}
        loaded[s] = LoadPaird()(paths)
    for key in KEYS:
        a, b = loaded[".nii.gz"][key], loaded[suffix][key]
        assert a.dtype == b.dtype and torch.equal(a.as_tensor(), b.as_tensor())
        torch.testing.assert_close(a.affine, b.affine, rtol=1e-5, atol=1e-4)


def test_a_folder_with_a_dicom_series_is_a_volume(tmp_path, files):
    values = np.random.default_rng(0).integers(0, 1000, PAIR_SIZE).astype(np.int16)
    volume = to_itk(values, PAIR_AFFINE)
    direction = np.array(volume.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    (tmp_path / "series").mkdir()
    for i in range(PAIR_SIZE[2]):
        slice_ = volume[:, :, i]
        tags = {
            "0008|0060": "MR",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0037": "\\".join(map(str, direction[:, :2].T.ravel())),
            "0020|0032": "\\".join(map(str, volume.TransformIndexToPhysicalPoint((0, 0, i)))),
            "0020|0013": str(i),
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / "series" / f"{i}.dcm"))
        writer.Execute(slice_)
    loaded = LoadPaird()({"moving_image": str(tmp_path / "series"), "fixed_image": files["fixed_image"]})
    np.testing.assert_array_equal(loaded["moving_image"][0].numpy(), values)
    np.testing.assert_allclose(loaded["moving_image"].affine.numpy(), PAIR_AFFINE, atol=1e-3)


def test_a_3d_label_is_one_channel(tmp_path, files):
    for key in ("moving_label", "fixed_label"):
        write(tmp_path / f"{key}.nii.gz", content()[1][..., 0])
    loaded = LoadPaird()(files)
    assert loaded["moving_label"].shape == (1, *PAIR_SIZE)
    np.testing.assert_array_equal(loaded["moving_label"][0].numpy(), content()[1][..., 0])


def test_a_pair_without_labels_is_loaded_alone(files):
    loaded = LoadPaird()({key: files[key] for key in KEYS[:2]})
    assert not {"moving_label", "fixed_label"} & set(loaded)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_an_index_map_becomes_one_channel_per_value_in_the_order_they_are_declared(tmp_path, files, suffix):
    index = np.random.default_rng(0).choice([0, 1, 2, 4], PAIR_SIZE).astype(np.uint8)
    for key in ("moving_label", "fixed_label"):
        files[key] = write(tmp_path / f"{key}_index{suffix}", index)
    loaded = LoadPaird(label_values=[4, 1, 2, 3])(files)
    for key in ("moving_label", "fixed_label"):
        expected = np.stack([index == v for v in (4, 1, 2, 3)])
        np.testing.assert_array_equal(loaded[key].numpy(), expected)
        np.testing.assert_allclose(loaded[key].affine.numpy(), PAIR_AFFINE, atol=1e-5)
