"""Figures of one registered case and of one training run, written as PNG files.

Everything is drawn through `Figure` and `FigureCanvasAgg`, never pyplot: no display, no state shared with the caller.
"""

import os
import textwrap
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from contourpy import contour_generator
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import median_filter
from torch.nn import functional as F

__all__ = ["centre_voxel", "deformed_grid", "draw_image", "draw_letters", "draw_outline", "draw_scale_bar", "drawing"]
__all__ += ["edges", "gland_found", "loss_curve", "overview", "windowed"]

FOOTER = "Research use only. Not for clinical decisions."
WIDTH, DPI = 15.0, 100  # inches, pixels per inch
BACKGROUND, INK, FAINT = "#101418", "#f2f4f6", "#9aa5b1"
FIXED, MOVING = ("#2fd6e6", "solid"), ("#ff9f1c", (0, (4, 1.5)))  # colour and dash: one of the two is always seen
PLANES = {"Axial": (0, 1), "Coronal": (0, 2), "Sagittal": (1, 2)}
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # low and high end of each array axis
MOTION = LinearSegmentedColormap.from_list("motion", ("#52708f", "#f3e79b", "#ff4b33"))  # no motion is still seen
COLUMNS = ("TRUS (fixed)", "MR, centres aligned", "MR, registered", "TRUS / MR registered", "Deformation")

drawing = threading.Lock()  # matplotlib's font and text caches are shared between figures and not thread safe


def overview(
    path: str | os.PathLike,
    fixed: ArrayLike,
    moving_before: ArrayLike,
    moving_after: ArrayLike,
    ddf: ArrayLike,
    spacing: Sequence[float],
    fixed_gland: ArrayLike | None = None,
    gland_before: ArrayLike | None = None,
    gland_after: ArrayLike | None = None,
    facts: Sequence[str] = (),
    gland_name: str = "gland",
    slices: Sequence[int] | None = None,
) -> None:
    """Write one PNG, 1500 pixels wide, that shows one registered case in three planes.

    The planes pass through the centroid of the fixed gland, else of the warped gland, else the centre of the volume,
    with the patient's right (axial, coronal) or front (sagittal) on the left. All panels share one scale in mm.

    Args:
        path: the `.png` file, in a folder that exists; replaced as a whole if it exists.
        fixed, moving_before, moving_after: images on the fixed grid, shape (X, Y, Z), axes towards R, A, S.
        ddf: displacement in voxels of the fixed grid, pull-back, shape (3, X, Y, Z), order x, y, z.
        spacing: voxel size (x, y, z) in mm.
        fixed_gland, gland_before, gland_after: glands in [0, 1], shape (X, Y, Z), outlined at 0.5.
        facts: short phrases for the title, e.g. "gland DSC 0.64 → 0.91".
        gland_name: what the legend calls the outlines.
        slices: of the image along each axis, where only every so-manieth is given.
    Raises:
        ValueError: an argument has the wrong shape or holds a value that is not finite.
    """
    fixed = _checked("fixed", fixed)
    shape = fixed.shape
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"fixed: expected (X, Y, Z) with at least 2 voxels along each axis, got shape {shape}")
    before = _checked("moving_before", moving_before, shape)
    after = _checked("moving_after", moving_after, shape)
    ddf = _checked("ddf", ddf, (3, *shape))
    spacing = _checked("spacing", spacing, (3,))
    if spacing.min() <= 0:
        raise ValueError(f"spacing: expected three sizes above 0 mm, got {spacing.tolist()}")
    fixed_gland = None if fixed_gland is None else _checked("fixed_gland", fixed_gland, shape)
    gland_before = None if gland_before is None else _checked("gland_before", gland_before, shape)
    gland_after = None if gland_after is None else _checked("gland_after", gland_after, shape)

    of_fixed, of_moving = _window(fixed), _window(np.stack((before, after)))
    cubes = _checkerboard(shape, spacing)
    centre = centre_voxel(shape, fixed_gland, gland_after)
    magnitudes = [
        np.linalg.norm(np.take(ddf, index, axis + 1) * spacing[:, None, None], axis=0)
        for axis, index in enumerate(centre)
    ]
    # The scale ends at 1 mm or more, so that a field of rounding errors does not look like motion.
    colours = ScalarMappable(Normalize(0, max(1.0, *(m.max() for m in magnitudes))), MOTION)

    slices = shape if slices is None else slices
    every = [-(-n // given) for n, given in zip(slices, shape, strict=True)]
    # In inches, except `extent` and `heights` in mm: every panel is `extent` wide, and each row as tall as its plane.
    left, right, top, bottom, gap = 0.8, 0.8, 1.42, 0.55, 0.1
    size = np.array(shape) * spacing
    extent = size[:2].max()
    heights = np.maximum(size[[1, 2, 2]], 0.45 * extent)
    column_width = (WIDTH - left - right - 4 * gap) / 5
    scale = min(column_width / extent, 9 / heights.sum())
    height = scale * heights.sum() + 2 * gap + top + bottom
    with _written(path, height) as figure:
        grid = figure.add_gridspec(
            3,
            5,
            height_ratios=heights,
            left=left / WIDTH,
            right=1 - right / WIDTH,
            top=1 - top / height,
            bottom=bottom / height,
            wspace=gap / column_width,
            hspace=3 * gap / (scale * heights.sum()),
        )
        volumes = (fixed, before, after, fixed_gland, gland_before, gland_after, cubes)
        for row, (name, axes) in enumerate(PLANES.items()):
            (normal,) = {0, 1, 2} - set(axes)
            index, mm = centre[normal], spacing[list(axes)]
            limits = (size[list(axes)] - mm)[:, None] / 2 + np.outer((extent, heights[row]), (-0.5, 0.5))
            cut = [None if v is None else np.take(v, index, normal) for v in volumes]
            trus, first, last, outline, outline_before, outline_after, board = cut
            trus, first, last = _shaded(trus, *of_fixed), _shaded(first, *of_moving), _shaded(last, *of_moving)
            panels = (
                (trus, outline, None),
                (first, outline, outline_before),
                (last, outline, outline_after),
                (np.where(board, last, trus), outline, outline_after),
                (0.5 * trus, outline, None),
            )
            for column, (image, *glands) in enumerate(panels):
                ax = _panel(figure, grid[row, column], limits)
                draw_image(ax, image, mm)
                if column == 4:
                    _draw_field(ax, deformed_grid(ddf, axes, index), magnitudes[normal], mm, colours)
                for gland, style in zip(glands, (FIXED, MOVING), strict=True):
                    if gland is not None:
                        draw_outline(ax, gland, mm, style)
                draw_letters(ax, axes, size, spacing)
                if row == 0:
                    ax.set_title(COLUMNS[column], color=INK, size=13, pad=8)
                if column == 0:
                    label = f"{name}\nslice {index * every[normal] + 1} of {slices[normal]}"
                    ax.yaxis.set_visible(True)
                    ax.set_ylabel(label, color=INK, size=11.5, labelpad=10, linespacing=1.4)
                    if row == 0:
                        draw_scale_bar(ax, extent, limits)
                if column == 4 and row == 0:
                    _draw_colour_bar(ax, colours)
        _draw_title(figure, "MR to TRUS registration", facts)
        names = ((FIXED, "TRUS", [fixed_gland]), (MOVING, "MR", [gland_before, gland_after]))
        handles = [
            Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=f"{gland_name} on {name}")
            for (colour, dash), name, glands in names
            if any(gland is not None for gland in glands)
        ]
        _draw_legend(figure, handles)
        _draw_note(
            figure,
            "Deformation u, beyond the initial transform: the fixed grid x drawn at x + u(x), where the MR is sampled;"
            " colour: length of u in 3D",
        )


def gland_found(
    path: str | os.PathLike,
    image: ArrayLike,
    gland: ArrayLike,
    spacing: Sequence[float],
    facts: Sequence[str] = (),
    label: ArrayLike | None = None,
) -> None:
    """Write one PNG, 1500 pixels wide, that shows a gland found in one image, from base to apex.

    The whole axial plane through its centroid, five axial planes near the gland, and a sagittal and a coronal one.

    Args:
        path: the `.png` file, in a folder that exists; replaced as a whole if it exists.
        image, gland: shape (X, Y, Z), axes towards R, A, S; the gland is outlined at 0.5.
        spacing: voxel size (x, y, z) in mm.
        facts: short phrases for the title.
        label: the gland as a reader outlined it, likewise.
    Raises:
        ValueError: an argument has the wrong shape or holds a value that is not finite.
    """
    image = _checked("image", image)
    shape = image.shape
    gland, spacing = _checked("gland", gland, shape), _checked("spacing", spacing, (3,))
    label = None if label is None else _checked("label", label, shape)
    window, size = _window(image), np.array(shape) * spacing
    centre, where = centre_voxel(shape, gland), np.argwhere(gland > 0.5)
    low, high = (where.min(0), where.max(0)) if len(where) else (np.zeros(3, int), np.array(shape) - 1)
    half = 0.8 * ((high - low + 1) * spacing).max()
    levels = np.rint(low[2] + (high[2] - low[2]) * np.array((0.95, 0.72, 0.5, 0.28, 0.05))).astype(int)
    names = ("base", "", "middle", "", "apex")
    panels = [("Axial, whole", (0, 1), centre[2], False)]
    panels += [(f"Axial {name}".strip(), (0, 1), k, True) for name, k in zip(names, levels, strict=True)]
    panels += [(name, PLANES[name], centre[3 - sum(PLANES[name])], True) for name in ("Sagittal", "Coronal")]
    height, gap = 8.9, 0.1
    with _written(path, height) as figure:
        place = {"left": 0.3 / WIDTH, "right": 1 - 0.3 / WIDTH, "top": 1 - 1.45 / height, "bottom": 0.55 / height}
        grid = figure.add_gridspec(2, 4, wspace=gap / 4, hspace=gap, **place)
        for number, (name, axes, index, close) in enumerate(panels):
            (normal,) = {0, 1, 2} - set(axes)
            mm = spacing[list(axes)]
            middle = (np.array(centre) * spacing)[list(axes)] if close else (size[list(axes)] - mm) / 2
            reach = half if close else size[list(axes)].max() / 2
            limits = middle[:, None] + np.outer((reach, reach), (-1, 1))
            ax = _panel(figure, grid[divmod(number, 4)], limits)
            draw_image(ax, _shaded(np.take(image, index, normal), *window), mm)
            for one, style in ((label, MOVING), (gland, FIXED)):
                if one is not None:
                    draw_outline(ax, np.take(one, index, normal), mm, style)
            ax.set_title(f"{name}, slice {index + 1} of {shape[normal]}", color=INK, size=12, pad=6)
            if not close:
                draw_letters(ax, axes, size, spacing)
        _draw_title(figure, "Gland found", facts)
        names = [(FIXED, "gland found")] + [(MOVING, "label")] * (label is not None)
        handles = [Line2D([], [], color=c, linestyle=dash, linewidth=2, label=name) for (c, dash), name in names]
        _draw_legend(figure, handles)
        _draw_note(figure, "Seen from the feet: the patient's right is on the left; sagittal: front on the left")


def loss_curve(
    path: str | os.PathLike,
    steps: ArrayLike,
    losses: ArrayLike,
    validation: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> None:
    """Write one PNG with the training loss and, beside it, one panel for each validation measure.

    Values that are not finite are left out and counted under the title: a diverged run is looked at too.

    Args:
        path: the `.png` file, in a folder that exists; replaced as a whole if it exists.
        steps, losses: iteration and training loss (no unit), both of shape (N,), N > 0.
        validation: axis label with its unit, e.g. "median TRE (mm)" -> (iterations, values), both of shape (M,).
    Raises:
        ValueError: an argument has the wrong shape, or `steps` holds a value that is not finite.
    """
    steps, losses = _series("losses", steps, losses)
    points = {name: _series(f"validation[{name!r}]", *pair) for name, pair in (validation or {}).items()}
    finite = np.isfinite(losses)
    steps, losses, lost = steps[finite], losses[finite], int((~finite).sum())
    window = min(201, len(losses) // 25) | 1  # odd
    with _written(path, 7.5) as figure:
        place = {"left": 0.9 / WIDTH, "right": 1 - 0.4 / WIDTH, "top": 1 - 0.95 / 7.5, "bottom": 1.15 / 7.5}
        columns = {"ncols": 2, "width_ratios": (2, 1), "wspace": 0.2} if points else {"ncols": 1}
        grid = figure.add_gridspec(max(1, len(points)), hspace=0.15, **columns, **place)
        ax = figure.add_subplot(grid[:, 0])
        look = {"alpha": 0.35} if window > 1 else {"marker": "o", "markersize": 4}  # one point alone is seen too
        ax.plot(steps, losses, color=MOVING[0], linewidth=0.8, label="each iteration", **look)
        if window > 1:
            whole = slice(window // 2, -(window // 2))  # where the window does not reach past an end
            smooth = median_filter(losses, window)[whole]
            ax.plot(steps[whole], smooth, color=MOVING[0], linewidth=2.2, label=f"running median of {window} values")
        ax.legend(labelcolor=INK, frameon=False, fontsize=12)
        _style(ax, "training loss (no unit)")
        ax.set_xlabel("iteration", color=INK, size=13)
        for row, (name, (at, values)) in enumerate(points.items()):
            panel = figure.add_subplot(grid[row, 1], sharex=ax)
            seen = np.isfinite(values)
            lost += int((~seen).sum())
            panel.plot(at[seen], values[seen], "o-", color=FIXED[0], markersize=4.5, linewidth=1.6)
            _style(panel, name)
            panel.tick_params(labelbottom=row == len(points) - 1)
        if points:
            panel.set_xlabel("iteration", color=INK, size=13)
            figure.align_ylabels(figure.axes[1:])
        _draw_title(figure, "Training", [f"left out as not finite: {lost}"] if lost else [])


def deformed_grid(ddf: NDArray, axes: tuple[int, int], index: int) -> NDArray:
    """In-plane positions x + u(x) in voxels of every grid point of one plane.

    Args:
        ddf: displacement in voxels, shape (3, X, Y, Z), order x, y, z.
        axes: the two array axes of the plane, ascending.
        index: the slice along the third axis.
    Returns:
        Shape (2, A, B): positions along `axes`; A and B are the sizes of `axes`.
    """
    (normal,) = {0, 1, 2} - set(axes)
    u = np.take(ddf[list(axes)], index, normal + 1)
    return np.indices(u.shape[1:]) + u


def _checked(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> NDArray:
    """`values` in float32 if they are, else in float64; a wrong shape or a value that is not finite is refused."""
    values = np.asarray(values)
    values = values if values.dtype == np.float32 else values.astype(np.float64, copy=False)
    if shape is not None and values.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: holds values that are not finite")
    return values


def _series(name: str, steps: ArrayLike, values: ArrayLike) -> tuple[NDArray, NDArray]:
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if steps.ndim != 1 or not steps.size or steps.shape != values.shape:
        raise ValueError(f"{name}: expected one value for each step, got shapes {steps.shape} and {values.shape}")
    return _checked(f"steps of {name}", steps), values


def windowed(image: NDArray, reference: NDArray) -> NDArray:
    """`image` in [0, 1] between the 1st and 99th percentile of `reference`; mid-grey if these are equal."""
    return _shaded(image, *_window(reference))


def _window(reference: NDArray) -> NDArray:
    """The 1st and 99th percentile."""
    return np.percentile(reference, (1, 99))


def _shaded(image: NDArray, low: float, high: float) -> NDArray:
    """`image` in [0, 1] between `low` and `high`; mid-grey if these are equal."""
    return np.clip((image - low) / (high - low), 0, 1) if high > low else np.full(image.shape, 0.5)


def _checkerboard(shape: tuple[int, ...], spacing: NDArray) -> NDArray[np.bool_]:
    """True on every other cube, seven cubes along the longest side of the volume in mm."""
    tile = (np.array(shape) * spacing).max() / 7
    cubes = [((np.arange(n) + 0.5) * mm // tile).astype(int) for n, mm in zip(shape, spacing, strict=True)]
    return np.add.outer(np.add.outer(cubes[0], cubes[1]), cubes[2]) % 2 == 1


def centre_voxel(shape: tuple[int, ...], *glands: NDArray | None) -> tuple[int, ...]:
    """Voxel nearest to the centroid of the first gland that is given and not empty, else the middle voxel."""
    for gland in glands:
        if gland is not None and (gland > 0.5).any():
            return tuple(int(i) for i in np.rint(np.argwhere(gland > 0.5).mean(0)))
    return tuple(n // 2 for n in shape)


def edges(shape: tuple[int, int], mm: NDArray) -> list[float]:
    """Left, right, bottom and top of a plane in mm whose voxel centres are at index × `mm`."""
    return [edge for n, step in zip(shape, mm, strict=True) for edge in (-0.5 * step, (n - 0.5) * step)]


def _panel(figure: Figure, place: SubplotSpec, limits: NDArray) -> Axes:
    """An empty panel with these `limits` in mm, shape (2, 2), x from right to left."""
    ax = figure.add_subplot(place)
    ax.set(xlim=limits[0][::-1], ylim=limits[1], yticks=[], facecolor=BACKGROUND)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_visible(False)  # an axis takes as long as an image
    ax.yaxis.set_visible(False)
    return ax


def draw_image(ax: Axes, plane: NDArray, mm: NDArray) -> None:
    """A plane in [0, 1], shape (A, B), at its place in mm: voxel centres at index × `mm`.

    It is made as fine as the pixels that the limits of `ax` give it, where they are set before.
    """
    where = edges(plane.shape, mm)
    if ax.get_autoscale_on():
        ax.set(xlim=where[:2], ylim=where[2:])
    ax.set_aspect("equal")
    ax.apply_aspect()
    corners = ax.transData.transform(np.reshape(where, (2, 2)).T)
    size = np.rint(np.abs(corners[1] - corners[0])).astype(int).clip(1)
    # by matplotlib it takes ten times as long, and leaves voxels out where a plane has more of them than pixels
    fine = torch.from_numpy(plane.T.astype(np.float32))[None, None]
    fine = F.interpolate(fine, size[::-1].tolist(), mode="bicubic", antialias=True)[0, 0].clamp(0, 1).numpy()
    ax.imshow(fine, "gray", vmin=0, vmax=1, origin="lower", extent=where, interpolation="nearest")


def _draw_field(ax: Axes, positions: NDArray, magnitude: NDArray, mm: NDArray, colours: ScalarMappable) -> None:
    """Lines of the deformed grid, about 16 along the longer side, coloured by `magnitude` in mm."""
    positions = positions * mm[:, None, None]
    pitch = (np.array(magnitude.shape) * mm).max() / 16
    for axis, step in enumerate(mm):
        every = max(1, round(pitch / step))
        count = magnitude.shape[1 - axis]
        along = np.rint(np.linspace(0, count - 1, min(count, 41))).astype(int)  # a piece has six pixels or more
        lines = np.moveaxis(positions, (axis + 1, 0), (0, 2))[every // 2 :: every, along]  # (line, point, 2)
        values = np.moveaxis(magnitude, axis, 0)[every // 2 :: every, along]
        pieces = np.stack((lines[:, :-1], lines[:, 1:]), axis=2).reshape(-1, 2, 2)
        shades = colours.to_rgba(((values[:, :-1] + values[:, 1:]) / 2).ravel())
        ax.add_collection(LineCollection(pieces, colors=shades, linewidths=1.2, capstyle="round"))


def draw_outline(ax: Axes, gland: NDArray, mm: NDArray, style: tuple) -> None:
    """The outline at 0.5 of a gland's plane, shape (A, B); `style` is a colour and a dash, none of an empty plane."""
    colour, dash = style
    if gland.max() > 0.5:
        gland = np.pad(gland, 1)  # closes an outline that meets the edge of the volume
        x, y = ((np.arange(n) - 1) * step for n, step in zip(gland.shape, mm, strict=True))
        for line in contour_generator(x, y, gland.T).lines(0.5):  # ax.contour takes ten times as long
            ax.add_line(Line2D(*line.T, color=colour, linestyle=dash, linewidth=1.6))


def draw_letters(ax: Axes, axes: tuple[int, int], size: NDArray, spacing: NDArray) -> None:
    """The patient's directions, just inside the edges of the volume."""
    low, high = -spacing / 2, size - spacing / 2
    for axis, sign in zip(axes, (-1, 1), strict=True):  # x runs from right to left on the picture, y upwards
        for edge, letter, inwards in ((low, ENDS[axis][0], sign), (high, ENDS[axis][1], -sign)):
            place = (low + high) / 2
            place[axis] = edge[axis]
            offset = (9 * inwards, 0) if axis == axes[0] else (0, 9 * inwards)
            text = {"color": "white", "size": 11, "weight": "bold", "ha": "center", "va": "center"}
            halo = [withStroke(linewidth=2.5, foreground="black")]
            where = {"xytext": offset, "textcoords": "offset points", "path_effects": halo}
            ax.annotate(letter, place[list(axes)], **where, **text)


def draw_scale_bar(ax: Axes, extent: float, limits: NDArray) -> None:
    """A white bar of 1, 10, … mm at the lower left of a panel `extent` mm wide with these `limits`, shape (2, 2)."""
    length = 10.0 ** np.floor(np.log10(extent / 3))
    x, y = limits[0][1] - 0.05 * extent, limits[1][0] + 0.05 * extent
    halo = [withStroke(linewidth=4, foreground="black")]
    ax.plot((x, x - length), (y, y), color="white", linewidth=2.5, solid_capstyle="butt", path_effects=halo)
    where = {"ha": "left", "va": "bottom", "path_effects": halo}
    ax.text(x, y + 0.02 * extent, f"{length:g} mm", color="white", size=10, **where)


def _draw_colour_bar(ax: Axes, colours: ScalarMappable) -> None:
    bar = ax.figure.colorbar(colours, cax=ax.inset_axes((1.04, 0.0, 0.045, 0.9)))
    bar.ax.set_title("mm", color=INK, size=11)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.tick_params(colors=INK, labelsize=10.5)
    bar.outline.set_visible(False)


def _draw_title(figure: Figure, title: str, facts: Sequence[str]) -> None:
    height = figure.get_figheight()
    figure.text(0.3 / WIDTH, 1 - 0.32 / height, title, color=INK, size=18, weight="bold", va="center")
    facts = (facts,) if isinstance(facts, str) else facts
    # Spaces inside one fact do not break, so that a line ends between facts.
    line = "   •   ".join(str(fact).replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)
    lines = textwrap.wrap(line, 125, max_lines=2, placeholder=" …", break_on_hyphens=False)
    text = {"size": 13, "va": "top", "linespacing": 1.35, "parse_math": False}
    figure.text(0.3 / WIDTH, 1 - 0.56 / height, "\n".join(part.strip(" •") for part in lines), color=INK, **text)


def _draw_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """At the upper right, two columns; nothing without handles."""
    if handles:
        place = {"bbox_to_anchor": (1 - 0.2 / WIDTH, 1 - 0.12 / figure.get_figheight()), "ncols": 2}
        figure.legend(handles=handles, loc="upper right", labelcolor=INK, frameon=False, fontsize=12, **place)


def _draw_note(figure: Figure, note: str) -> None:
    """At the lower right."""
    place = {"ha": "right", "va": "center"}
    figure.text(1 - 0.3 / WIDTH, 0.25 / figure.get_figheight(), note, color=FAINT, size=10.5, **place)


def _style(ax: Axes, label: str) -> None:
    ax.set_facecolor(BACKGROUND)
    ax.set_ylabel(label, color=INK, size=13, parse_math=False)
    ax.tick_params(colors=INK, labelsize=11)
    ax.grid(color=FAINT, alpha=0.2)
    ax.spines[:].set_color(FAINT)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


@contextmanager
def _written(path: str | os.PathLike, height: float) -> Iterator[Figure]:
    """A dark figure, `height` in inches, that becomes the PNG at `path` in one step when the block ends well."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {path.name!r}")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # in the same folder: a rename cannot cross disks
    with drawing:
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=BACKGROUND)
        canvas = FigureCanvasAgg(figure)
        yield figure
        figure.text(0.3 / WIDTH, 0.25 / height, FOOTER, color=INK, size=12, weight="bold", va="center")
        try:
            with part.open("xb") as file:
                canvas.print_png(file, pil_kwargs={"compress_level": 3})  # half the time of 6
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
