"""Figures of a report, after Figs. 8, 9 and 10 of Hu et al. 2018: box plots, example slices, maps of the displacement.

Each function returns a `Figure`, light, for a page and for print; `png` makes the bytes of a picture of it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from scripts.registration.figures import (
    FIXED,
    FOOTER,
    MOVING,
    centre_voxel,
    draw_image,
    draw_letters,
    draw_outline,
    draw_scale_bar,
    drawing,
    edges,
    windowed,
)
from scripts.study.report_cases import Example

WIDTH, DPI = 6.0, 220  # inches, pixels per inch: sharp on a large screen, and letters still read on a small one
INK, FAINT, TRAINED, UNTRAINED = "#1c2530", "#66717e", "#0b7f8c", "#8a8f96"
FOLDED = "#ff2bd6"
HALO = [withStroke(linewidth=3.2, foreground="black")]
SLICES = ("TRUS (fixed)", "MR, initial transform", "MR, registered")
MAPS = (
    "J: determinant of\nthe Jacobian (no unit)",
    "D: length of the\ndisplacement (mm)",
    "G: L2 norm of its\ngradients (no unit)",
)
LEFT, GAP, HEAD, LINE, TITLE, FOOT = 0.08, 0.08, 0.09, 0.18, 0.5, 0.55  # inches; LINE is one of a row's heading
HEADING = 72  # characters that fit on such a line


def box_plot(values: Mapping[str, Sequence[float]], label: str, untrained: Sequence[str] = ()) -> Figure:
    """Boxes from quartile to quartile with the median, one a method, and every case as a dot; NaN is left out.

    Args:
        values: method -> its cases, the first on top.
        label: of the axis, with its unit.
        untrained: methods in grey.
    """
    known = {name: np.array([v for v in cases if not np.isnan(v)]) for name, cases in values.items()}
    with drawing:
        figure = Figure((WIDTH, 1.0 + 0.45 * len(known)), DPI, layout="constrained")
        ax = figure.add_subplot()
        for row, (name, cases) in enumerate(known.items()):
            colour = UNTRAINED if name in untrained else TRAINED
            if len(cases):
                line, box = {"color": INK, "linewidth": 1.2}, {"facecolor": colour, "alpha": 0.25, "edgecolor": INK}
                look = {"boxprops": box, "whiskerprops": line, "capprops": line, "patch_artist": True, "widths": 0.6}
                look |= {"medianprops": line | {"linewidth": 2.4}, "showfliers": False}  # every case is a dot
                ax.boxplot(cases, positions=[row], orientation="horizontal", **look)
            shift = 0.22 * np.sin(2.4 * np.arange(len(cases)))  # dots of equal value are seen apart
            ax.plot(cases, row + shift, "o", color=colour, markersize=4, alpha=0.75, markeredgewidth=0)
        names = [textwrap.fill(f"{name} ({len(cases)})", 26) for name, cases in known.items()]
        ax.set_yticks(range(len(known)), names, parse_math=False)
        ax.set_ylim(len(known) - 0.5, -0.5)
        ax.set_xlabel(label, color=INK, size=12)
        ax.tick_params(colors=INK, labelsize=11)
        ax.grid(axis="x", color=FAINT, alpha=0.25)
        ax.spines[:].set_color(FAINT)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def slices(examples: Mapping[str, Example]) -> Figure:
    """Fixed image, moving image before and after, glands outlined, landmarks marked: a row for each heading."""

    def draw(row: Sequence[Axes], example: Example, index: int) -> None:
        mm = example.spacing[:2]
        before, after = (windowed(image, np.stack(example.images[1:])) for image in example.images[1:])
        for k, image in enumerate((windowed(example.images[0], example.images[0]), before, after)):
            draw_image(row[k], image[..., index], mm)
            draw_outline(row[k], example.glands[0][..., index], mm, FIXED)
            aims, found = example.landmarks[0], example.landmarks[k]
            if k:
                draw_outline(row[k], example.glands[k][..., index], mm, MOVING)
                for aim, end in zip(aims, found, strict=True):
                    row[k].plot(*np.stack((aim, end), 1)[:2], color="white", linewidth=1.2, path_effects=HALO)
                _draw_points(row[k], found, "x", MOVING[0])
            _draw_points(row[k], aims, "o", FIXED[0])
        size = np.array(example.images[0].shape) * example.spacing
        draw_letters(row[0], (0, 1), size, example.spacing)
        draw_scale_bar(row[0], size[0], np.stack((-mm / 2, size[:2] - mm / 2), 1))

    return _rows(examples, SLICES, draw)


def maps(examples: Mapping[str, Example]) -> Figure:
    """J, D and G on one slice, a row for each heading, one scale a column; where J ≤ 0 it is marked."""
    planes = {e: [m[..., _middle(x)] for m in (x.jacobian, x.magnitude, x.gradient)] for e, x in examples.items()}
    ends = [[max(np.nanmax(p[0]) - 1, 1 - np.nanmin(p[0])), p[1].max(), p[2].max()] for p in planes.values()]
    ends = np.minimum(np.max(ends, 0), 2 * np.median(ends, 0))  # one wild case leaves the others seen
    ends = np.maximum(ends, (0.05, 0.1, 0.01))  # rounding errors do not look like motion
    span = min(1, ends[0])
    scales = Normalize(1 - span, 1 + span), Normalize(0, ends[1]), Normalize(0, ends[2])
    colours = [ScalarMappable(scale, name) for scale, name in zip(scales, ("RdBu", "viridis", "magma"), strict=True)]

    def draw(row: Sequence[Axes], example: Example, index: int) -> None:
        mm = example.spacing[:2]
        place = {"origin": "lower", "extent": edges(example.images[0].shape[:2], mm), "interpolation": "nearest"}
        volumes = (example.jacobian, example.magnitude, example.gradient)
        for ax, volume, colour in zip(row, volumes, colours, strict=True):
            ax.imshow(volume[..., index].T, colour.cmap, colour.norm, **place)
            draw_outline(ax, example.glands[0][..., index], mm, ("black", "solid"))
            draw_outline(ax, example.glands[0][..., index], mm, ("white", (0, (3, 3))))
        folded = np.ma.masked_not_equal(example.jacobian[..., index].T <= 0, True)
        row[0].imshow(folded, vmin=0, vmax=1, cmap=ListedColormap([FOLDED]), **place)

    return _rows(examples, MAPS, draw, colours)


def png(figure: Figure) -> bytes:
    """The figure as a PNG picture."""
    with drawing, io.BytesIO() as file:
        FigureCanvasAgg(figure).print_png(file)
        return file.getvalue()


def write_pdf(file: IO, figures: Mapping[str, Figure]) -> None:
    """A PDF document with a page for each caption -> figure, the caption below it."""
    with drawing, PdfPages(file, metadata={"Title": "Cross-validation report", "CreationDate": None}) as pages:
        for caption, figure in figures.items():
            text = {"color": INK, "size": 9, "va": "top", "linespacing": 1.4, "parse_math": False}
            figure.text(0.02, -0.1 / figure.get_figheight(), textwrap.fill(f"{caption} {FOOTER}", 88), **text)
            pages.savefig(figure, bbox_inches="tight", pad_inches=0.4)


def _middle(example: Example) -> int:
    return centre_voxel(example.images[0].shape, example.glands[0])[2]


def _draw_points(ax: Axes, points: NDArray, marker: str, colour: str) -> None:
    look = {"color": colour, "markersize": 7, "markeredgewidth": 1.8, "fillstyle": "none", "linestyle": ""}
    ax.plot(*points.T[:2], marker, path_effects=HALO, **look)


def _panel(figure: Figure, *inches: float) -> Axes:
    """Axes at x, y, width, height."""
    return figure.add_axes([a / b for a, b in zip(inches, figure.get_size_inches().tolist() * 2, strict=True)])


def _rows(
    examples: Mapping[str, Example],
    titles: Sequence[str],
    draw: Callable[[Sequence[Axes], Example, int], None],
    colours: Sequence[ScalarMappable] = (),
) -> Figure:
    """Three panels a row, the axial slice through the middle of the gland, the heading over each row."""
    sizes = [(np.array(e.images[0].shape) * e.spacing)[:2] for e in examples.values()]
    width = (WIDTH - 2 * LEFT - 2 * GAP) / 3
    tall = [width * float(np.clip(size[1] / size[0], 0.4, 1.6)) for size in sizes]
    headings = ["\n".join(textwrap.fill(line, HEADING) for line in heading.splitlines()) for heading in examples]
    heads = [HEAD + LINE * len(heading.splitlines()) for heading in headings]
    height = TITLE + sum(tall) + sum(heads) + GAP * len(tall) + (FOOT if colours else 0)
    with drawing:
        figure = Figure((WIDTH, height), DPI)
        y = height - TITLE
        for k, title in enumerate(titles):
            x = LEFT + k * (width + GAP) + width / 2
            text = {"color": INK, "size": 11, "weight": "bold", "ha": "center", "va": "center"}
            figure.text(x / WIDTH, 1 - TITLE / 2 / height, title, **text)
        for heading, head, example, high, size in zip(headings, heads, examples.values(), tall, sizes, strict=True):
            y -= head
            figure.text(LEFT / WIDTH, (y + 0.07) / height, heading, color=INK, size=10.5, parse_math=False)
            y -= high
            row = [_panel(figure, LEFT + k * (width + GAP), y, width, high) for k in range(3)]
            draw(row, example, _middle(example))
            half = example.spacing[:2] / 2
            for ax in row:
                ax.set(xlim=(size[0] - half[0], -half[0]), ylim=(-half[1], size[1] - half[1]), xticks=[], yticks=[])
                ax.set(aspect="equal", facecolor="black" if not colours else "#c9ced4")
                ax.spines[:].set_visible(False)
            y -= GAP
        for k, colour in enumerate(colours):
            cax = _panel(figure, LEFT + k * (width + GAP) + 0.06 * width, y - 0.14, 0.88 * width, 0.14)
            bar = figure.colorbar(colour, cax=cax, orientation="horizontal", extend="max" if k else "both")
            bar.ax.xaxis.set_major_locator(MaxNLocator(5))
            bar.ax.tick_params(colors=INK, labelsize=10)
            bar.outline.set_visible(False)
    return figure
