"""Figures are whole PNG files that show what they were given, or nothing is written."""

import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.image import imread

from scripts.registration import figures
from scripts.registration.figures import deformed_grid, loss_curve, overview


def ball(shape, centre, radius):
    offsets = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return ((offsets**2).sum(0) <= radius**2).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    """A ball 3 voxels to the right of where the fixed grid has it, with the field that brings it back."""
    shape = (24, 20, 16)
    fixed_gland, gland_before = ball(shape, (10, 9, 8), 5), ball(shape, (13, 9, 8), 5)
    noise = np.random.default_rng(0).normal(size=shape)
    ddf = np.zeros((3, *shape))
    ddf[0] = 3
    return {
        "fixed": 100 * fixed_gland + noise,
        "moving_before": 100 * gland_before + noise,
        "moving_after": 100 * fixed_gland + noise,
        "ddf": ddf,
        "spacing": (0.8, 0.8, 0.8),
        "fixed_gland": fixed_gland,
        "gland_before": gland_before,
        "gland_after": fixed_gland,
        "facts": ("gland DSC 0.64 → 0.91", "TRE 6.1 → 2.4 mm", "cost $1 of case_01 $"),
    }


@contextmanager
def recorded():
    """The figures that are made meanwhile, as matplotlib objects."""
    made = []

    class Canvas(figures.FigureCanvasAgg):
        def __init__(self, figure):
            super().__init__(figure)
            made.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FigureCanvasAgg", Canvas)
        yield made


@pytest.fixture
def drawn():
    with recorded() as made:
        yield made


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with no_warnings():
        yield


@pytest.fixture(scope="module")
def picture(case, tmp_path_factory):
    """The overview of the case: its file, alone in a folder, and its figure."""
    path = tmp_path_factory.mktemp("picture") / "case.png"
    with recorded() as made, no_warnings():
        overview(path, **case)
    return path, made[0]


@pytest.fixture(scope="module")
def bare(case, tmp_path_factory):
    """The figure of the case at rest, without glands and facts."""
    with recorded() as made, no_warnings():
        still = without_glands(case) | {"facts": (), "ddf": 0 * case["ddf"]}
        overview(tmp_path_factory.mktemp("bare") / "case.png", **still)
    return made[0]


def without_glands(case):
    return {name: value for name, value in case.items() if "gland" not in name}


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_overview_is_one_picture_and_leaves_no_other_file(picture):
    path, _ = picture
    assert [file.name for file in path.parent.iterdir()] == ["case.png"]
    pixels = imread(path)
    assert pixels.shape[1] == 1500 and 700 <= pixels.shape[0] <= 1200
    assert np.isfinite(pixels).all() and pixels[..., :3].std() > 0.1


def test_overview_replaces_an_existing_file_and_its_legend_says_whose_glands_are_outlined(tmp_path, case, drawn):
    (tmp_path / "case.png").write_bytes(b"old")
    overview(str(tmp_path / "case.png"), **case, gland_name="gland found")
    assert imread(tmp_path / "case.png").size
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["gland found on TRUS", "gland found on MR"]


def test_overview_without_glands_has_no_legend(picture, bare):
    assert [len(figure.legends) for figure in (picture[1], bare)] == [1, 0]


def test_overview_shows_the_facts_and_always_the_footer(picture, bare):
    assert "6.1 → 2.4 mm" in texts(picture[1])[1].replace("\N{NO-BREAK SPACE}", " ")
    assert all(figures.FOOTER in texts(figure) for figure in (picture[1], bare))


@pytest.mark.parametrize("shift", range(3))
def test_overview_takes_a_gland_beside_an_empty_one_and_a_missing_one(tmp_path, case, shift):
    full, empty, _ = np.roll(["fixed_gland", "gland_before", "gland_after"], shift)
    overview(tmp_path / "case.png", **without_glands(case), **{full: case[full], empty: 0 * case[empty]})


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((2, 2, 2), (0.5, 0.5, 3.0)),
        ((7, 5, 3), (1, 1, 1)),
        ((3, 40, 9), (0.5, 0.5, 3.0)),
        ((3, 40, 9), (1, 1, 1)),
        ((31, 8, 45), (0.5, 0.5, 3.0)),
    ],
)
def test_overview_takes_odd_sizes_and_anisotropic_voxels(tmp_path, shape, spacing):
    random = np.random.default_rng(0)
    image = random.random(shape)
    overview(tmp_path / "case.png", image, image, image, random.normal(size=(3, *shape)), spacing, image > 0.3)
    assert imread(tmp_path / "case.png").shape[1] == 1500


def test_overview_takes_constant_images_and_no_motion(tmp_path):
    flat = np.full((9, 8, 7), 3, dtype=np.uint8)
    no_gland = 0 * flat
    overview(tmp_path / "case.png", flat, 0 * flat, 0 * flat, np.zeros((3, *flat.shape)), (1, 1, 1), no_gland)
    assert np.isfinite(imread(tmp_path / "case.png")).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fixed", np.zeros((24, 20))),
        ("fixed", np.zeros((24, 20, 1))),
        ("moving_before", np.zeros((24, 20, 15))),
        ("moving_after", np.zeros((1, 24, 20, 16))),
        ("moving_after", np.full((24, 20, 16), np.nan)),
        ("ddf", np.zeros((24, 20, 16, 3))),
        ("ddf", np.full((3, 24, 20, 16), np.inf)),
        ("spacing", (1, 1)),
        ("spacing", (1, 1, 0)),
        ("fixed_gland", np.zeros((20, 24, 16))),
        ("gland_before", np.zeros((3, 3, 3))),
        ("gland_after", np.zeros(7)),
    ],
)
def test_overview_refuses_a_wrong_argument_by_name_and_writes_nothing(tmp_path, case, name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        overview(tmp_path / "case.png", **{**case, name: value})
    assert not list(tmp_path.iterdir())


def test_overview_writes_png_only(tmp_path, case):
    with pytest.raises(ValueError, match="^path: "):
        overview(tmp_path / "case.jpg", **case)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, case, monkeypatch):
    def full(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "case.png").write_bytes(b"old")
    monkeypatch.setattr(figures.FigureCanvasAgg, "print_png", full)
    with pytest.raises(OSError, match="disk full"):
        overview(tmp_path / "case.png", **case)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_threads_write_the_same_picture(tmp_path, case, picture):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    threads = [threading.Thread(target=overview, args=(path,), kwargs=case) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in (*paths, picture[0])}) == 1


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_deformed_grid_is_identity_plus_ddf(axes):
    ddf = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    (normal,) = {0, 1, 2} - set(axes)
    at = [0, 0, 0]
    at[normal], at[axes[0]], at[axes[1]] = 2, 3, 4
    grid = deformed_grid(ddf, axes, 2)
    assert grid.shape == (2, *(ddf.shape[1 + axis] for axis in axes))
    np.testing.assert_allclose(grid[:, 3, 4], [at[axis] + ddf[(axis, *at)] for axis in axes])
    np.testing.assert_array_equal(deformed_grid(0 * ddf, axes, 2), np.indices(grid.shape[1:]))


def test_grid_of_a_shift_is_drawn_shifted_in_mm_along_that_axis_only(picture, bare):
    for panel, step in ((4, (2.4, 0)), (9, (2.4, 0)), (14, (0, 0))):  # x is not in the sagittal plane
        shift, rest = (
            np.concatenate([s for line in field_lines(figure.axes[panel]) for s in line.get_segments()])
            for figure in (picture[1], bare)
        )
        np.testing.assert_allclose(shift - rest, np.broadcast_to(step, rest.shape), atol=1e-9)


def field_lines(ax):
    """The grid lines of a panel; the outlines there are contour sets."""
    return [item for item in ax.collections if type(item) is LineCollection]


def test_letters_stand_where_their_ends_of_the_image_are(picture):
    axial, coronal, sagittal = (picture[1].axes[panel] for panel in (0, 5, 10))
    for ax, horizontal, vertical in ((axial, "LR", "PA"), (coronal, "LR", "IS"), (sagittal, "PA", "IS")):
        place = {text.get_text(): ax.transData.transform(text.xy) for text in ax.texts if hasattr(text, "xy")}
        origin, far = ax.transData.transform([(0, 0), (5, 5)])  # mm along the two array axes
        (low, high), (bottom, top) = (place[end] for end in horizontal), (place[end] for end in vertical)
        assert low[0] > high[0] and origin[0] > far[0]
        assert bottom[1] < top[1] and origin[1] < far[1]


def test_planes_pass_through_the_centroid_of_the_fixed_gland(picture):
    labels = [picture[1].axes[panel].get_ylabel() for panel in (0, 5, 10)]
    assert labels == ["Axial\nslice 9 of 16", "Coronal\nslice 10 of 20", "Sagittal\nslice 11 of 24"]


def test_panels_share_one_scale_with_true_proportions(tmp_path, drawn):
    image = np.random.default_rng(0).random((20, 30, 8))
    overview(tmp_path / "case.png", image, image, image, np.zeros((3, 20, 30, 8)), (1.0, 0.5, 4.0))
    for panel in range(15):
        ax = drawn[0].axes[panel]
        (x0, y0), (x1, y1) = ax.transData.transform([(0, 0), (1, 1)])
        first = drawn[0].axes[0].transData.transform([(0, 0), (1, 1)])[:, 0]
        np.testing.assert_allclose([x0 - x1, y1 - y0], first[0] - first[1], rtol=0.01)


def test_loss_curve_is_one_picture_with_a_panel_for_each_measure(tmp_path, drawn):
    random = np.random.default_rng(0)
    steps = np.arange(1, 301)
    points = {"median DSC (no unit)": ([100, 200], [0.7, 0.8]), "median TRE (mm)": ([100, 200], [6.0, np.nan])}
    loss_curve(tmp_path / "loss.png", steps, 1 / steps + random.normal(size=300), points)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert imread(tmp_path / "loss.png").shape[:2] == (750, 1500)
    assert [ax.get_ylabel() for ax in drawn[0].axes] == ["training loss (no unit)", *points]
    assert drawn[0].axes[0].get_xlabel() == drawn[0].axes[2].get_xlabel() == "iteration"
    assert figures.FOOTER in texts(drawn[0])


def test_running_median_of_a_line_is_the_line(tmp_path, drawn):
    steps = np.arange(500)
    loss_curve(tmp_path / "loss.png", steps, 3 - 0.001 * steps)
    raw, median = drawn[0].axes[0].lines
    assert len(raw.get_xdata()) == 500
    np.testing.assert_allclose(median.get_ydata(), 3 - 0.001 * median.get_xdata())


@pytest.mark.parametrize("losses", [[1.0], [np.nan], [2.0, np.inf, 1.0], np.full(120, np.nan)])
def test_loss_curve_takes_short_and_diverged_runs(tmp_path, drawn, losses):
    loss_curve(tmp_path / "loss.png", range(len(losses)), losses)
    missing = int((~np.isfinite(losses)).sum())
    assert any(text.endswith(f"finite:\N{NO-BREAK SPACE}{missing}") for text in texts(drawn[0])) == (missing > 0)


@pytest.mark.parametrize(
    ("steps", "losses", "validation", "name"),
    [
        ([], [], None, "losses"),
        ([1, 2], [1.0], None, "losses"),
        ([[1, 2]], [[1.0, 2.0]], None, "losses"),
        ([1, np.nan], [1.0, 2.0], None, "steps of losses"),
        ([1], [1.0], {"TRE (mm)": ([1, 2], [3.0])}, r"validation\['TRE \(mm\)'\]"),
    ],
)
def test_loss_curve_refuses_wrong_shapes_by_name(tmp_path, steps, losses, validation, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        loss_curve(tmp_path / "loss.png", steps, losses, validation)
    assert not list(tmp_path.iterdir())


def shown(plane, mm, limits, pixels=200):
    """What the pixels of a panel of `pixels` show, from the top; x runs from left to right."""
    figure = figures.Figure(figsize=(pixels / 100,) * 2, dpi=100, facecolor="black")
    canvas = figures.FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    if limits is not None:
        ax.set(xlim=limits[0], ylim=limits[1])
    figures.draw_image(ax, plane, np.array(mm))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0] / 255


@pytest.mark.parametrize("limits", [None, ((-0.25, 199.75), (-0.25, 199.75))])
def test_a_plane_with_more_voxels_than_pixels_is_shown_by_their_means(limits):
    board = (np.arange(400)[:, None] // 2 + np.arange(400) // 2) % 2  # of squares of two voxels, one pixel
    fine = (np.arange(400)[:, None] + np.arange(400)) % 2  # two to a pixel
    for plane, spread in ((fine, 0.02), (board, 0.6)):
        seen = shown(plane.astype(float), (0.5, 0.5), limits)
        assert seen.mean() == pytest.approx(0.5, abs=0.01) and np.abs(seen - 0.5).max() < spread


def test_a_voxel_is_shown_at_its_place_in_mm():
    plane = np.zeros((20, 10))
    plane[4, 7] = 1  # 8 mm from the left, 28 mm from below
    seen = shown(plane, (2.0, 4.0), ((-1, 39), (-1, 39)))
    rows, columns = (np.average(np.arange(200) + 0.5, weights=seen.sum(axis)) for axis in (1, 0))
    assert columns == pytest.approx(200 * (8 + 1) / 40, abs=1) and rows == pytest.approx(200 * (39 - 28) / 40, abs=1)
