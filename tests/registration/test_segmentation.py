"""The learned initial transform: moments of two glands give the map between them, however the images lie."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from scripts.data.axes import declared
from scripts.data.checks import InputError
from scripts.network import fields
from scripts.network.segmentation import GlandNetwork
from scripts.registration import segmentation
from scripts.registration.initial_transform import align_moments, maximum_a_posteriori
from scripts.registration.orientation import turned as stored
from scripts.registration.orientation import upright
from scripts.registration.outputs import glands_found
from scripts.registration.segmentation import (
    SIDE,
    WHOLE,
    SegmentGlandsd,
    close_up,
    cube_affine,
    frame,
    largest_component,
    look,
    moments,
    on_cube,
    on_image,
)
from scripts.registration.transforms import (
    GRID,
    KeepOriginalsd,
    OntoFixedGridd,
    PlanFixedGridd,
    ToOriginalGridd,
)
from scripts.training.cohort import CohortLoader, SimulatedPairs
from scripts.training.gland_cubes import GlandLoader


def turned(spacing, angle, origin=(0, 0, 0), flips=(1, 1, 1)):
    """An oblique affine, voxel -> world mm."""
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(np.multiply(spacing, flips))
    affine[:3, 3] = origin
    return torch.from_numpy(affine)


def ellipsoid(size, affine, centre, axes):
    """1 inside an ellipsoid given in world mm, 0 outside: (1, *size) with its affine."""
    x = fields.transform_points(affine, fields.identity_grid(size, torch.float64, "cpu")[None])[0]
    away = torch.stack([(x[i] - centre[i]) / axes[i] for i in range(3)]).square().sum(0)
    return MetaTensor((away <= 1).float()[None], affine=affine)


def middle(size, affine):
    return (affine[:3, :3] @ torch.tensor([(n - 1) / 2 for n in size], dtype=torch.float64) + affine[:3, 3]).tolist()


class Bright(nn.Module):
    """A network that calls gland what is bright, and cannot tell which way round it is."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(8.0))

    def gland(self, x):
        return self.gain * (x - 0.5)

    def ways(self, x):
        return torch.zeros(len(x), 8)

    def forward(self, x):
        return torch.cat([self.gland(x), self.ways(x)[..., None, None, None].expand(-1, -1, *x.shape[2:])], dim=1)


def initial_transform_of(moving, fixed, weights):
    """The learned initial transform of a pair, fixed world -> moving world."""
    found = SegmentGlandsd(Bright(), weights)({"moving_image": moving, "fixed_image": fixed})
    return PlanFixedGridd(None, "learned")(found)["initial_transform"]


@pytest.fixture
def weights(tmp_path):
    torch.save(Bright().state_dict(), tmp_path / "segmentation.pt")
    return str(tmp_path / "segmentation.pt")


def test_moments_of_an_ellipsoid_are_its_centre_and_a_fifth_of_its_squared_axes():
    affine, size = turned((0.7, 0.9, 1.1), 0.0, (5, -3, 2)), (60, 50, 40)
    centre, covariance = moments(ellipsoid(size, affine, middle(size, affine), (15, 12, 10)))
    assert torch.allclose(centre, torch.tensor(middle(size, affine), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(
        covariance, torch.diag(torch.tensor([45, 28.8, 20], dtype=torch.float64)), rtol=0.03, atol=0.1
    )


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 2, 3)])
def test_moments_of_voxels_are_those_of_the_body_they_make(size):
    affine = turned((0.7, 0.9, 2.5), 0.4, (5, -3, 2), flips=(-1, 1, 1))
    box = torch.zeros(1, 9, 9, 9)
    box[0, 2 : 2 + size[0], 3 : 3 + size[1], 5 : 5 + size[2]] = 1
    _, covariance = moments(MetaTensor(box, affine=affine))
    edges = affine[:3, :3] * torch.tensor(size, dtype=torch.float64)
    assert torch.allclose(covariance, edges @ edges.T / 12, atol=1e-9)  # a box of uniform density


@pytest.mark.parametrize("kind", ["translation", "scaling", "affine"])
def test_the_start_takes_centroid_to_centroid_and_the_affine_one_covariance_to_covariance(kind):
    rng = torch.Generator().manual_seed(0)
    sides = [(torch.randn(3, generator=rng).double(), torch.randn(3, 5, generator=rng).double()) for _ in range(2)]
    (cf, sf), (cm, sm) = [(c, m @ m.T) for c, m in sides]
    start = align_moments((cf, sf), (cm, sm), kind)
    linear = start[:3, :3]
    assert torch.allclose(linear @ cf + start[:3, 3], cm)
    assert torch.allclose(linear, linear.T) and (torch.linalg.eigvalsh(linear) > 0).all()  # never turns or mirrors
    if kind == "scaling":
        assert torch.allclose(linear.det() ** 2, sm.det() / sf.det())
    if kind == "affine":
        assert torch.allclose(linear @ sf @ linear.T, sm)


def test_equal_glands_leave_the_start_at_the_identity():
    same = torch.tensor([1.0, 2, 3]).double(), torch.diag(torch.tensor([4.0, 5, 6]).double())
    assert torch.allclose(align_moments(same, same), torch.eye(4, dtype=torch.float64))


def soft_ellipsoid(centre, axes, size=(32, 32, 32), mm=2.2, softness=1.0):
    """Probability of a gland on a cube that is 1, -1 and 0.5 mm off it, falling off over `softness` mm."""
    affine = torch.diag(torch.tensor([mm, mm, mm, 1], dtype=torch.float64))
    affine[:3, 3] = torch.tensor(centre) + torch.tensor([1, -1, 0.5]) - mm * (torch.tensor(size) - 1) / 2
    points = affine[:3, :3] @ torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).flatten(1).double()
    points = points + affine[:3, 3:] - torch.tensor(centre, dtype=torch.float64)[:, None]
    out = (points / torch.tensor(axes, dtype=torch.float64)[:, None]).norm(dim=0) - 1
    return MetaTensor((-out * min(axes) / softness).sigmoid().float().view(1, *size), affine=affine)


def test_the_likeliest_start_finds_a_shift_and_part_of_a_stretch():
    fixed = soft_ellipsoid((0, 0, 0), (22, 18, 16))
    shifted = maximum_a_posteriori(fixed, soft_ellipsoid((7, -5, 3), (22, 18, 16)))
    assert torch.allclose(shifted[:3, 3], torch.tensor([7.0, -5, 3]).double(), atol=0.2)
    assert torch.allclose(shifted[:3, :3], torch.eye(3).double(), atol=0.02)
    stretched = maximum_a_posteriori(fixed, soft_ellipsoid((7, -5, 3), (22 * 1.3, 18, 16)))
    assert torch.allclose(stretched[:3, 3], torch.tensor([7.0, -5, 3]).double(), atol=0.3)
    assert 1.04 < stretched[0, 0] < 1.25 and torch.allclose(stretched[1:3, 1:3], torch.eye(2).double(), atol=0.05)


def test_an_end_that_is_seen_without_confidence_does_not_move_the_likeliest_start():
    fixed, moving = soft_ellipsoid((0, 0, 0), (22, 18, 16)), soft_ellipsoid((7, -5, 3), (22, 18, 16))
    values = moving.as_tensor().clone()
    height = torch.arange(32).expand_as(values[0])
    unsure = MetaTensor(torch.where(height > 19, values.clamp_max(0.45), values), affine=moving.affine)
    starts = [maximum_a_posteriori(fixed, unsure), align_moments(moments(fixed), moments(unsure))]
    likeliest, by_moments = (abs(start[2, 3].item() - 3) for start in starts)
    assert likeliest < 0.3 and by_moments > 1


def test_the_likeliest_start_is_found_to_a_fraction_of_a_voxel_wherever_the_voxels_lie():
    for offset in (0, 0.5, 1.1, 1.9):  # a lattice of every second plane would be voxels off
        fixed, moving = soft_ellipsoid((offset, 0, 0), (22, 18, 16)), soft_ellipsoid((7, -5 + offset, 3), (22, 18, 16))
        start = maximum_a_posteriori(fixed, moving)
        assert torch.allclose(start[:3, 3], torch.tensor([7 - offset, -5 + offset, 3]).double(), atol=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_where_everything_is_gland_the_likeliest_start_keeps_near_the_centroids(seed):
    generator = torch.Generator().manual_seed(seed)
    whole = []
    for mm, offset in ((2.0, 0.0), (2.5, 9.0)):
        affine = torch.diag(torch.tensor([mm, mm, mm, 1], dtype=torch.float64))
        affine[:3, 3] = offset
        logits = 5 + torch.nn.functional.interpolate(
            torch.randn(1, 1, 3, 3, 3, generator=generator), size=(32, 32, 32), mode="trilinear"
        )
        whole.append(MetaTensor(logits[0].sigmoid(), affine=affine))
    fixed, moving = whole
    (centre, covariance), (target, _) = moments(fixed), moments(moving)
    start = maximum_a_posteriori(fixed, moving)
    off = start[:3, :3] @ centre + start[:3, 3] - target
    assert off.abs().max() <= torch.linalg.det(covariance) ** (1 / 6) * (1 + 1e-9)


def test_the_plan_says_how_much_the_glands_differ_not_what_the_start_takes_of_it():
    moving, fixed = soft_ellipsoid((7, -5, 3), (22 * 1.3, 18, 16 / 1.2)), soft_ellipsoid((0, 0, 0), (22, 18, 16))
    pair = {
        f"{side}_{what}": gland for side, gland in (("moving", moving), ("fixed", fixed)) for what in ("image", "gland")
    }
    for kind in ("likelihood", "translation"):
        plan = PlanFixedGridd(2.0, "learned", kind)(pair)
        assert plan["initial_stretch"].max() == pytest.approx(1.3, abs=0.02)
        assert plan["initial_stretch"].min() == pytest.approx(1 / 1.2, abs=0.02)
        assert torch.linalg.svdvals(plan["initial_transform"][:3, :3]).max() < 1.2
    centred = PlanFixedGridd(2.0, "centre")(pair)
    assert torch.allclose(centred["initial_stretch"], torch.ones(3).double())


def test_the_likeliest_start_turns_with_the_world():
    fixed, moving = soft_ellipsoid((0, 0, 0), (22, 18, 16)), soft_ellipsoid((7, -5, 3), (25, 18, 15))
    turn = turned((1, 1, 1), 0.3, (40, -7, 3))
    turn = torch.as_tensor(turn, dtype=torch.float64)
    there = [MetaTensor(volume.as_tensor(), affine=turn @ volume.affine) for volume in (fixed, moving)]
    expected = turn @ maximum_a_posteriori(fixed, moving) @ torch.linalg.inv(turn)
    assert torch.allclose(maximum_a_posteriori(*there), expected, atol=0.01)


def test_an_unknown_kind_is_refused():
    same = torch.zeros(3).double(), torch.eye(3).double()
    with pytest.raises(ValueError, match="rigid"):
        align_moments(same, same, "rigid")


def test_a_look_where_the_labels_are_finds_the_gland_that_three_looks_find(weights):
    affine = turned((1.1, 0.9, 1.6), 0.3, flips=(-1, -1, 1))
    gland = ellipsoid((50, 54, 34), affine, (-25, -27, 22), (12, 9, 8))
    pair = {"moving_image": gland, "fixed_image": gland, "moving_label": gland, "fixed_label": gland}
    whole, there = (SegmentGlandsd(Bright(), weights, at_labels=at)(pair) for at in (False, True))
    for side in ("moving", "fixed"):
        a, b = (on_image(found[f"{side}_gland"], gland) > 0.5 for found in (whole, there))
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.97
        assert f"{side}_confidence" not in there
    empty = SegmentGlandsd(Bright(), weights, at_labels=True)(pair | {"moving_label": 0 * gland})
    assert "moving_gland" not in empty  # whoever draws the pair refuses it


@pytest.mark.parametrize(
    ("moving_affine", "fixed_affine"),
    [
        (turned((1, 1, 1), 0.0), turned((1, 1, 1), 0.0, (40, -7, 3))),
        (turned((0.6, 0.6, 2.5), 0.3, (9, 1, 2)), turned((0.8, 1.2, 0.9), -0.2, (1, 2, 3))),
        (turned((1, 1, 1.5), 0.2, flips=(-1, -1, 1)), turned((1, 1, 1), 0.1, flips=(1, -1, -1))),
    ],
)
def test_the_start_finds_bright_glands_in_oblique_anisotropic_and_flipped_volumes(moving_affine, fixed_affine, weights):
    sizes = [(64, 60, 30), (60, 50, 56)]
    volumes, centres = [], []
    for size, affine, shift in zip(sizes, (moving_affine, fixed_affine), ((4, -3, 2), (-2, 5, -4)), strict=True):
        centres.append([m + d for m, d in zip(middle(size, affine), shift, strict=True)])
        volumes.append(ellipsoid(size, affine, centres[-1], (12, 10, 9)))
    start = initial_transform_of(*volumes, weights)
    mapped = start[:3, :3] @ torch.tensor(centres[1], dtype=torch.float64) + start[:3, 3]
    assert torch.allclose(mapped, torch.tensor(centres[0], dtype=torch.float64), atol=0.4)
    assert torch.allclose(start[:3, :3], torch.eye(3, dtype=torch.float64), atol=0.1)


def test_a_wrong_voxel_size_in_both_headers_does_not_change_the_start_in_voxels(weights):
    starts = []
    for mm in (1.0, 0.25):
        affine = turned((mm, mm, mm), 0.0)
        moving = ellipsoid((48, 48, 40), affine, [mm * v for v in (20, 25, 22)], (10 * mm, 9 * mm, 8 * mm))
        fixed = ellipsoid((40, 50, 40), affine, [mm * v for v in (22, 22, 18)], (11 * mm, 9 * mm, 7 * mm))
        start = initial_transform_of(moving, fixed, weights)
        start[:3, 3] /= mm
        starts.append(start)
    assert torch.allclose(*starts, atol=1e-4)


class KnowsTheWay(Bright):
    """A network that sees a gland, surer on one side, in what is upright: brighter below than above, in front than
    behind, and more from side to side than from front to back; and that says which way round a cube is."""

    def gland(self, x):
        side = torch.linspace(-1, 1, x.shape[2]).view(-1, 1, 1)
        right_way = (self.ways(x).argmax(1) == 0)[:, None, None, None, None]
        return torch.where(right_way, 8 * (x - 1.2) * (2 + side), -8.0)

    def ways(self, x):
        return torch.stack(
            [-80 * (upright(x, way) - body(x.shape[2])).square().mean((1, 2, 3, 4)) for way in range(8)], 1
        )


def body(side):
    """A patient in a cube, the same from left to right."""
    x, y, z = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij")
    return (x.square() / 2 + y.square() + z.square() < 0.3).float() + 0.2 * y - 0.3 * z


@pytest.mark.parametrize("way", range(8))
def test_networks_see_a_cube_upright_and_in_the_mirror_however_it_is_stored(way):
    network, cube = KnowsTheWay(), body(16)[None, None]
    shown = stored(cube, way)
    gland, said, found = look(network, shown)
    assert found == way and said.argmax() == way and said.exp().sum() == pytest.approx(1)
    straight, mirrored = (network(c)[:, :1].sigmoid() for c in (cube, cube.flip(2)))
    assert not torch.allclose(straight, mirrored.flip(2))
    torch.testing.assert_close(gland, stored(torch.cat([straight, mirrored.flip(2)]), way))
    again, unasked, _ = look(network, shown, way)
    assert unasked is None and torch.allclose(again, gland, atol=1e-6)


@pytest.mark.parametrize("way", range(8))
def test_a_volume_whose_header_lies_has_its_gland_found_where_it_is_and_the_letters_that_mend_it(way, tmp_path):
    torch.save(KnowsTheWay().state_dict(), tmp_path / "knows.pt")
    image = stored(body(40)[None], way)
    found = SegmentGlandsd(KnowsTheWay(), str(tmp_path / "knows.pt"))({"image": MetaTensor(image, affine=torch.eye(4))})
    gland = on_cube(MetaTensor((image > 0.5).float(), affine=torch.eye(4)), found["gland"].affine)
    both = ((gland[0] > 0.5) & (found["gland"] > 0.5)).sum()
    assert 2 * both / ((gland > 0.5).sum() + (found["gland"] > 0.5).sum()) > 0.7
    confidence = found["confidence"]
    assert (confidence["orientation"] > 0) == (way > 0)
    mended = torch.from_numpy(declared(np.eye(4), image.shape[1:], confidence["axes"]))
    again = SegmentGlandsd(KnowsTheWay(), str(tmp_path / "knows.pt"))({"image": MetaTensor(image, affine=mended)})
    assert again["confidence"]["orientation"] < 0 and again["confidence"]["axes"] == confidence["axes"]


@pytest.fixture
def gains(tmp_path):
    """Weights of `Bright` networks that see differently."""
    paths = []
    for k, gain in enumerate((4.0, 16.0, 9.0)):
        network = Bright()
        nn.init.constant_(network.gain, gain)
        paths.append(str(tmp_path / f"start_{k}.pt"))
        torch.save(network.state_dict(), paths[-1])
    return paths


def last_pass(paths, way=0):
    """What networks see last around a gland that is not the same on both sides."""
    finder, volume = SegmentGlandsd(Bright(), paths), single()["image"]
    finder.networks = finder._loaded()
    centre, axes, length = frame(volume)
    with torch.inference_mode():
        return finder._last_pass(volume, centre, axes, length, way)


@pytest.mark.parametrize("way", [0, 3])
def test_every_network_counts_in_the_last_pass_and_a_network_twice_as_once(gains, way):
    alone = [last_pass([path], way) for path in gains]
    for predictions, mean in alone:  # it sees brightness, in the mirror as straight
        assert predictions.shape == (2, *mean.shape)
        torch.testing.assert_close(predictions[0], predictions[1])
    for count in (2, 3):
        predictions, mean = last_pass(gains[:count], way)
        assert len(predictions) == count
        for own, (seen, _) in zip(predictions, alone, strict=False):
            torch.testing.assert_close(own, seen[0])
        assert all((mean - other).abs().max() > 0.01 for _, other in alone)
    for twice, once in zip(last_pass([gains[0]] * 2, way), alone[0], strict=True):
        torch.testing.assert_close(twice, once)


def test_an_image_without_a_gland_is_refused_by_name(weights):
    gland = ellipsoid((30, 30, 30), turned((1, 1, 1), 0.0), (15, 15, 15), (8, 8, 8))
    empty = MetaTensor(torch.linspace(0, 1e-3, 27000).view(1, 30, 30, 30) * 0 + 1, affine=gland.affine)
    with pytest.raises(InputError, match="the moving image: no prostate found"):
        initial_transform_of(empty, gland, weights)
    with pytest.raises(InputError, match="mr.nii: no prostate found"):
        SegmentGlandsd(Bright(), weights)({"moving_image": empty, "fixed_image": gland, "moving_file": "mr.nii"})


def test_a_gland_of_one_voxel_is_no_crash(tmp_path):
    class Brightest(Bright):
        def gland(self, x):
            return self.gain * (2.0 * (x == x.amax((2, 3, 4), keepdim=True)) - 1)

    torch.save(Brightest().state_dict(), tmp_path / "segmentation.pt")
    volume = MetaTensor(torch.rand((1, 40, 40, 40), generator=torch.Generator().manual_seed(0)), affine=torch.eye(4))
    found = SegmentGlandsd(Brightest(), str(tmp_path / "segmentation.pt"))(
        {"moving_image": volume, "fixed_image": volume}
    )
    confidence = found["fixed_confidence"]
    assert (found["fixed_gland"] > 0.5).sum() == 1 and all(np.isfinite(v) for k, v in confidence.items() if k != "axes")


@pytest.mark.parametrize(("precision", "hardware"), [("auto", True), ("bfloat16", True), ("bfloat16", False)])
def test_the_gland_networks_run_in_bfloat16_only_where_that_is_asked_for(precision, hardware, weights, monkeypatch):
    half = set()

    class Watched(Bright):
        def gland(self, x):
            half.add(torch.is_autocast_enabled("cpu"))
            return super().gland(x)

    monkeypatch.setattr(segmentation, "computes_bfloat16", lambda device: hardware)
    volume = ellipsoid((40, 40, 40), turned((1, 1, 1), 0.1), (15, 20, 22), (10, 9, 8))
    found = SegmentGlandsd(Watched(), weights, precision=precision)({"moving_image": volume, "fixed_image": volume})
    assert half == {precision == "bfloat16" and hardware}
    assert found["fixed_gland"].dtype == torch.float32
    gland = on_image(found["fixed_gland"], volume) > 0.5
    assert 2 * (gland & (volume > 0.5)).sum() / (gland.sum() + (volume > 0.5).sum()) > 0.97


def test_the_glands_become_channels_of_the_networks_input_on_the_fixed_grid(weights):
    affine = turned((1, 1, 1), 0.1)
    pair = {"moving_image": ellipsoid((40, 40, 40), affine, (15, 20, 22), (10, 9, 8))}
    pair["fixed_image"] = ellipsoid((40, 40, 40), affine, (13, 22, 18), (10, 9, 8))
    image = OntoFixedGridd(None, "learned")(SegmentGlandsd(Bright(), weights)(pair))["image"]
    assert image.shape == (4, 40, 40, 40)
    for channel in (0, 2, 3):  # moving, its gland and the fixed gland, all where the fixed image is
        a, b = image[channel] > 0.5, image[1] > 0.5
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9


@pytest.mark.parametrize("spacing", ["gland", 1.7])
def test_the_outlines_of_the_overview_are_the_glands_found_where_the_written_field_takes_them(spacing, weights):
    moving, fixed = turned((1.1, 0.9, 1.6), 0.3, flips=(-1, -1, 1)), turned((1.2, 0.8, 1), -0.2, (60, 5, 9))
    pair = {"moving_image": ellipsoid((50, 54, 34), moving, (-25, -27, 22), (12, 9, 8))}
    pair["fixed_image"] = ellipsoid((40, 56, 44), fixed, (93, 24, 32), (11, 10, 8))
    d = OntoFixedGridd(spacing, "learned")(KeepOriginalsd()(SegmentGlandsd(Bright(), weights)(pair)))
    x = torch.linspace(0, 3, d["image"].shape[1])[:, None, None].expand(d["image"].shape[1:])
    d = ToOriginalGridd()(d | {"pred": torch.stack([x.sin(), 0 * x, x.cos()])})
    drawn = glands_found(d, d["original_fixed_image"].affine.double(), d["original_fixed_image"].shape[1:])
    true = {"fixed_gland": d["original_fixed_image"], "gland_after": d["warped_moving_image"]}
    for name, gland in drawn.items():
        a, b = gland > 0.5, torch.as_tensor(true[name]) > 0.5
        assert a.shape == b.shape == (1, 40, 56, 44)
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.93, name


def test_training_batches_hold_the_same_input_as_registration(weights):
    affine = turned((1.2, 1, 1), 0.1)
    pair = {"case": "a", "moving_image": ellipsoid((30, 40, 40), affine, (15, 20, 22), (10, 9, 8))}
    pair["fixed_image"] = ellipsoid((30, 40, 40), affine, (13, 22, 18), (10, 9, 8))
    pair |= {f"{side}_label": pair[f"{side}_image"].clone() for side in ("moving", "fixed")}
    found = SegmentGlandsd(Bright(), weights)(pair)
    (batch,) = CohortLoader([PlanFixedGridd(1.5, "learned")(found)], 1, 1, "cpu", augmentation=0)
    image = OntoFixedGridd(1.5, "learned")(found)["image"]
    torch.testing.assert_close(batch["image"][0, :2], image[:2], atol=1e-4, rtol=0)
    assert (batch["image"][0, 2:] - image[2:]).abs().mean() < 0.01  # glands went through the image's grid


class Says(torch.nn.Module):
    """A network that sees the image as the gland, and says `first` the logits of the ways, and then others."""

    def __init__(self, first, then):
        super().__init__()
        self.seen, self.first, self.then = [], torch.tensor(first), torch.tensor(then)

    def forward(self, image):
        ways = self.then if self.seen else self.first
        self.seen.append(len(image))
        return torch.cat([image, ways.view(1, 8, 1, 1, 1).expand(len(image), -1, *image.shape[2:])], dim=1)


UPRIGHT, FIFTH, UNSURE = ([9.0, *[0.0] * 7], [*[0.0] * 5, 9.0, 0.0, 0.0], [1.0, *[0.0] * 7])


@pytest.mark.parametrize(
    ("first", "then", "looks", "way"),
    [
        (UPRIGHT, None, [2], 0),
        (UNSURE, UNSURE, [2, 7], 0),
        (FIFTH, UPRIGHT, [2, 2], 5),  # sure of another way, and, made upright from it, that it is upright
        (FIFTH, UNSURE, [2, 2, 6, 2], 0),  # not sure any more: from all eight, and then it is seen as it is again
    ],
)
def test_networks_that_are_sure_which_way_round_a_cube_is_are_not_asked_from_all_eight(first, then, looks, way):
    network, cube = Says(first, then or first), torch.rand(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    predictions, said, found = look(network, cube)
    assert network.seen == looks and found == way and said.exp().sum() == pytest.approx(1)
    assert torch.allclose(predictions, torch.stack([cube[0]] * 2).sigmoid())


def test_instance_normalisation_is_the_same_in_eval_mode():
    network, cubes = GlandNetwork(), torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    norms = [module for module in network.modules() if isinstance(module, torch.nn.InstanceNorm3d)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        plain, fast = network.train()(cubes), network.eval()(cubes)
    assert len(norms) > 10
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_a_network_never_sees_a_cube_alone_which_a_cpu_would_convolve_at_half_the_speed(weights):
    counts = []

    class Counting(Bright):
        def forward(self, cubes):
            counts.append(len(cubes))
            return super().forward(cubes)

    SegmentGlandsd(Counting(), weights)(pair_of(1.0))
    assert len(counts) >= 8 and min(counts) >= 2


def test_another_start_looks_for_no_gland(tmp_path):
    pair = {"moving_image": 1, "fixed_image": 2}
    assert SegmentGlandsd(Bright(), str(tmp_path / "none.pt"), wanted=False)(pair) == pair


def test_the_largest_component_keeps_its_soft_rim_and_loses_the_others():
    probability = torch.zeros(12, 12, 12)
    probability[2:7, 2:7, 2:7] = 0.9
    probability[1, 4, 4] = 0.3
    probability[10, 10, 10] = 0.8
    kept = largest_component(probability)
    assert kept[4, 4, 4] == 0.9 and kept[1, 4, 4] == pytest.approx(0.3) and kept[10, 10, 10] == 0
    assert not largest_component(probability * 0.5).any()


def test_a_cube_of_a_fine_volume_holds_means_not_samples():
    affine = turned((0.25, 0.25, 0.25), 0.0)
    board = torch.arange(256).view(-1, 1, 1) % 2 * torch.ones(1, 256, 256)  # every second plane
    volume = MetaTensor(board[None], affine=affine)
    cube = on_cube(volume, cube_affine(*frame(volume), WHOLE), WHOLE)
    assert cube.shape == (1, 1, WHOLE, WHOLE, WHOLE)
    assert torch.allclose(cube, torch.full_like(cube, 0.5), atol=1e-6)


def single(case="a", group="one"):
    """A volume that is its own gland."""
    gland = ellipsoid((40, 36, 30), turned((1, 1, 1), 0.1), (20, 16, 14), (11, 9, 8))
    return {"case": case, "group": group, "image": gland, "label": torch.cat([gland, torch.zeros_like(gland)])}


def phantom():
    """A pair whose images are their own glands."""
    pair = {"case": "a"}
    for side, shift in (("moving", 3), ("fixed", -2)):
        gland = ellipsoid((40, 36, 30), turned((1, 1, 1), 0.1), (18 + shift, 16, 14), (11, 9, 8))
        pair |= {f"{side}_image": gland, f"{side}_label": torch.cat([gland, torch.zeros_like(gland)])}
    return pair


def test_without_augmentation_cubes_are_the_whole_volume_or_close_to_the_gland():
    item, met = single(), set()
    volume = item["image"]
    centre, turned_axes, length = frame(volume)
    near = close_up(volume)
    looks = ((WHOLE, (centre, turned_axes, length)), (WHOLE, (near[0], turned_axes, near[1])))
    looks += ((SIDE, (near[0], turned_axes, near[1])),)
    wanted = [on_cube(volume, cube_affine(*place, side), side)[0] for side, place in looks]
    for batch in GlandLoader([item], 2, 20, "cpu", augmentation=0):
        assert batch["image"].shape == batch["label"].shape and (batch["orientation"] == 0).all()
        for label in batch["label"]:
            same = [one.shape == label.shape and torch.allclose(one, label, atol=1e-5) for one in wanted]
            met.add(same.index(True))
    assert met == {0, 1, 2}


def test_an_image_without_a_gland_is_refused_by_its_case():
    item = single()
    item["label"] = item["label"].flip(0)
    with pytest.raises(InputError, match="a: label 0, the gland, is empty"):
        GlandLoader([item], 2, 1, "cpu")


@pytest.mark.parametrize("items", [{"dataset": [single()]}, {"dataset": [], "simulated": [phantom()] * 9, "pool": 1}])
def test_augmentation_moves_image_and_gland_alike(items):
    for batch in GlandLoader(**items, batch_size=4, epoch_length=5, device="cpu", seed=1, misoriented_share=0.5):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            assert abs(torch.corrcoef(torch.stack([image.flatten(), label.flatten()]))[0, 1]) > 0.6


def test_cubes_are_stored_in_every_way_and_say_in_which():
    noise = MetaTensor(torch.rand((1, 9, 9, 9), generator=torch.Generator().manual_seed(0)), affine=torch.eye(4))
    item = {"case": "a", "group": "one", "image": noise, "label": (noise > 0.5).float()}
    settings = {"batch_size": 2, "epoch_length": 60, "device": "cpu", "augmentation": 0}
    plain = {b["image"].shape: b["label"][:1] for b in GlandLoader([item], **settings) if b["image"].shape[-1] == WHOLE}
    met = set()
    for batch in GlandLoader([item], misoriented_share=1, **settings):
        for label, way in zip(batch["label"], batch["orientation"].tolist(), strict=True):
            met.add(way)
            if label.shape[-1] == WHOLE:
                found = upright(label, way)
                assert any(torch.allclose(found, one[0], atol=1e-5) for one in plain.values()) or label.any()
    assert met == set(range(8))
    some = GlandLoader([item], 4, 60, "cpu", misoriented_share=0.25)
    assert 0.12 < np.mean([(batch["orientation"] > 0).float().mean() for batch in some]) < 0.32  # 0.25 × 7/8


def test_groups_are_drawn_by_the_square_root_of_their_size():
    items = [single(f"many{k}", "many") for k in range(9)] + [single("few", "few")]
    drawn = [case for batch in GlandLoader(items, 40, 5, "cpu", augmentation=0) for case in batch["case"]]
    assert 0.15 < np.mean([case == "few" for case in drawn]) < 0.35


def test_the_same_seed_gives_the_same_batches():
    loaders = [GlandLoader([single()], 2, 3, "cpu", seed=5, misoriented_share=0.5) for _ in range(2)]
    for one, two in zip(*loaders, strict=True):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
        assert torch.equal(one["orientation"], two["orientation"])


class Shifted(torch.utils.data.Dataset):
    """Simulated pairs, the index in their name."""

    def __len__(self):
        return 2**31

    def __getitem__(self, index):
        return phantom() | {"case": f"phantom{index}"}


def test_simulated_pairs_are_renewed_and_drawn_with_their_share():
    loader = GlandLoader([single("real")], 8, 19, "cpu", simulated=Shifted(), share=0.5, pool=3, renewal=6)
    before = list(loader.pool.phantoms)
    draws = [case for batch in loader for case in batch["case"]]
    assert loader.pool.made == 6 and not any(p is q for p in loader.pool.phantoms for q in before)
    assert 0.3 < np.mean([case != "real" for case in draws]) < 0.7
    assert GlandLoader([], 2, 1, "cpu", simulated=Shifted(), share=0.1, pool=1).pool.share == 1
    with pytest.raises(InputError, match="no pair"):
        GlandLoader([], 2, 1, "cpu")


def test_phantoms_without_end_fit_both_loaders_and_item_k_depends_on_seed_and_k_alone():
    one, two = SimulatedPairs("realistic", seed=4)[7], SimulatedPairs("realistic", seed=4)[7]
    assert torch.equal(one["fixed_image"], two["fixed_image"])
    assert not torch.equal(one["fixed_image"], SimulatedPairs("realistic", seed=5)[7]["fixed_image"])
    (batch,) = GlandLoader([], 2, 1, "cpu", simulated=SimulatedPairs(), pool=1)
    assert 0.01 < batch["label"].mean() < 0.6
    planned_pairs = SimulatedPairs(transform=PlanFixedGridd(4.0))
    (batch,) = CohortLoader([], 2, 1, "cpu", simulated=planned_pairs, share=1, pool=2)
    assert batch["image"].shape[:2] == (2, 2) and batch["fixed_label"].amax() > 0


def pair_of(spacing):
    """Two glands in volumes whose voxels are `spacing` mm in both headers, whatever they are in truth."""
    made = {}
    for side, size, axes in (("moving", (40, 44, 36), (9, 7, 8)), ("fixed", (44, 40, 38), (8, 8, 6))):
        affine = turned((spacing,) * 3, 0.2)
        centre, axes = middle(size, affine), [a * spacing for a in axes]
        made[f"{side}_image"] = ellipsoid(size, affine, centre, axes)
        made[f"{side}_label"] = made[f"{side}_image"].clone()
    return made


def test_a_grid_measured_by_the_gland_does_not_depend_on_the_voxel_size_in_the_headers(weights):
    plan = OntoFixedGridd("gland", "learned")
    fine, coarse = (plan(SegmentGlandsd(Bright(), weights)(pair_of(spacing))) for spacing in (0.4, 1.6))
    assert fine["image"].shape == (4, GRID, GRID, GRID)
    torch.testing.assert_close(fine["image"], coarse["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(fine["spacing"], coarse["spacing"])
    assert 0.05 < fine["fixed_label"].mean() < 0.3  # the gland is in the cube, and in it whole
    border = fine["fixed_label"].clone()
    border[:, 1:-1, 1:-1, 1:-1] = 0
    assert not border.any()


def test_a_fine_volume_is_averaged_onto_a_grid_measured_by_the_gland(weights):
    made = pair_of(0.4)
    noise = torch.Generator().manual_seed(0)
    fine = {}
    for key, volume in made.items():
        affine = volume.affine.clone()
        affine[:3, 3] -= affine[:3, :3] @ torch.full((3,), 0.375, dtype=torch.float64)
        affine[:3, :3] /= 4  # the same volume in voxels of a quarter of the size
        data = volume.as_tensor().repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        if key.endswith("image"):
            data = data + 0.5 * torch.randn(data.shape, generator=noise)
        fine[key] = MetaTensor(data, affine=affine)
    found = SegmentGlandsd(Bright(), weights)(made)
    glands = {k: v for k, v in found.items() if k.endswith("gland")}
    plan = OntoFixedGridd("gland", "learned")
    plain, averaged = plan(found)["image"], plan(fine | glands)["image"]
    assert (averaged[:2] - plain[:2]).std() < 0.2  # of noise of 0.5


def test_a_grid_measured_by_the_gland_needs_a_gland():
    with pytest.raises(InputError, match="learned"):
        PlanFixedGridd("gland", "centre")(pair_of(1.6))
