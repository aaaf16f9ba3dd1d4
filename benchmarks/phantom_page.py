"""The picture of docs/phantom.md and its table: phantoms of every mode, with real pairs above on request.

python benchmarks/phantom_page.py                                                    # writes docs/phantom.png
python benchmarks/phantom_page.py --pairs DIR --left_right 1 --voxel_size 1.6        # label-reg's sample on top

The phantoms are the first pairs of the training's own stream (`cohort.SimulatedPairs`, seed 0), unpicked; the pairs of
DIR (see the README for its layout) are the first by name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from scipy.ndimage import affine_transform  # noqa: E402

from benchmarks.measure import ROOT, clock, table  # noqa: E402
from scripts.data.datalist import datalist  # noqa: E402
from scripts.data.pairs import LoadPaird  # noqa: E402
from scripts.phantoms.phantom import MODES, simulate_pair  # noqa: E402
from scripts.registration.figures import BACKGROUND, FAINT, FIXED, INK  # noqa: E402
from scripts.training.cohort import SIDES, SimulatedPairs, as_loaded  # noqa: E402

PLANES = {"axial": (0, 1), "sagittal": (1, 2)}
ROWS, BESIDE = 2, 2  # rows of each kind, pairs beside each other
MEASURED = 60  # phantoms of each mode in the table
CLINICAL = ((81, 118, 88), 0.8, (120, 128, 128), 0.8)  # voxels and mm of TRUS and MR
BAR = 20.0  # mm


class Scan(NamedTuple):
    """One image with its gland, shape (X, Y, Z), axes towards the patient's right, front and head; spacing in mm."""

    image: np.ndarray
    gland: np.ndarray
    spacing: np.ndarray

    def extent(self) -> np.ndarray:
        """Of the gland along each axis, mm."""
        return (np.ptp(np.argwhere(self.gland > 0.5), axis=0) + 1) * self.spacing


def scans(data: dict[str, Any], left_right: int = 0, voxel_size: float | None = None) -> list[Scan]:
    """MR and TRUS of a pair as `LoadPaird` leaves it.

    Args:
        data: the pair.
        left_right: which axis runs from left to right; 1: the first one runs from front to back, as in label-reg's
            public sample.
        voxel_size: in mm, in place of the header's.
    """
    made = []
    for side in SIDES:
        image, gland = (np.asarray(data[f"{side}_{what}"])[0] for what in ("image", "label"))
        spacing = np.linalg.norm(np.asarray(data[f"{side}_image"].affine)[:3, :3], axis=0)
        if left_right:
            image, gland = (volume.swapaxes(0, 1)[:, ::-1] for volume in (image, gland))
            spacing = spacing[[1, 0, 2]]
        made.append(Scan(image, gland, spacing if voxel_size is None else np.full(3, voxel_size)))
    return made


def centre_start_dice(moving: Scan, fixed: Scan) -> float:
    """DSC of the glands where the centres of the two volumes coincide."""
    scale = fixed.spacing / moving.spacing
    offset = (np.array(moving.gland.shape) - 1) / 2 - scale * (np.array(fixed.gland.shape) - 1) / 2
    warped = affine_transform(moving.gland.astype(float), scale, offset, fixed.gland.shape, order=1) >= 0.5
    return 2 * (warped & (fixed.gland > 0.5)).sum() / (warped.sum() + (fixed.gland > 0.5).sum())


def row(kind: str, pairs: Iterator[list[Scan]]) -> dict[str, Any]:
    """Medians over pairs: extent of the glands (right-left, front-back, head-foot) and overlap before registration."""
    extents, overlaps = [], []
    for moving, fixed in pairs:
        extents.append([moving.extent(), fixed.extent()])
        overlaps.append(centre_start_dice(moving, fixed))
    shown = {
        f"gland in {name}, mm": " × ".join(f"{mm:.1f}" for mm in median)
        for name, median in zip(("MR", "TRUS"), np.median(extents, axis=0), strict=True)
    }
    return {"pairs": kind, "number": len(overlaps), **shown, "gland DSC, centre start": float(np.median(overlaps))}


def draw(rows: list[tuple[str, list[list[Scan]]]], path: Path) -> None:
    """Write the page: a row per entry, its title and its pairs beside each other, four panels a pair.

    Axial: front up, the patient's right on the left. Sagittal: head up, front on the left. Both pass through the
    centroid of the gland of their own image.
    """
    panel, left, gap, top, bottom = 1.7, 0.42, 0.14, 0.4, 0.4  # inches
    width, height = left + 4 * BESIDE * panel + (BESIDE - 1) * gap, top + len(rows) * panel + bottom
    figure = Figure(figsize=(width, height), dpi=100, facecolor=BACKGROUND)
    titles = [f"{name} {plane}" for name in ("MR", "TRUS") for plane in PLANES]
    for r, (title, pairs) in enumerate(rows):
        y = height - top - (r + 1) * panel
        if r == 0 or rows[r - 1][0] != title:
            count = sum(other == title for other, _ in rows)
            middle = (y + panel - count * panel / 2) / height
            figure.text(0.21 / width, middle, title, color=INK, size=12, rotation=90, ha="center", va="center")
        for column in range(4 * len(pairs)):
            pair, within = divmod(column, 4)
            x = left + column * panel + pair * gap
            ax = figure.add_axes((x / width, y / height, 0.97 * panel / width, 0.97 * panel / height))
            draw_plane(ax, pairs[pair][within // 2], list(PLANES.values())[within % 2])
            if r == 0:
                ax.set_title(titles[within], color=INK, size=12, pad=6)
    note = (
        f"Cyan: the gland. Bar: {BAR:g} mm. Axial: front up; sagittal: head up, front on the left. Research use only."
    )
    figure.text(left / width, 0.2 / height, note, color=INK, size=11, va="center")
    FigureCanvasAgg(figure).print_png(path)


def draw_plane(ax: Axes, scan: Scan, axes: tuple[int, int]) -> None:
    """The plane through the gland's centroid, grey levels from the volume's 1st to its 99.5th percentile."""
    (normal,) = {0, 1, 2} - set(axes)
    index = round(np.argwhere(scan.gland > 0.5)[:, normal].mean())
    image, gland = (np.take(volume, index, normal) for volume in (scan.image, scan.gland))
    mm = scan.spacing[list(axes)]
    size = mm * image.shape
    extent = [-mm[0] / 2, size[0] - mm[0] / 2, -mm[1] / 2, size[1] - mm[1] / 2]
    low, high = np.percentile(scan.image, (1, 99.5))
    ax.imshow(image.T, "gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bicubic")
    x, y = (np.arange(-1, n + 1) * step for n, step in zip(gland.shape, mm, strict=True))
    ax.contour(x, y, np.pad(gland, 1).T, [0.5], colors=FIXED[0], linewidths=0.7)
    centre, half = (size - mm) / 2, size.max() / 2
    # the first axis of either plane runs from right to left on the page
    ax.set(xlim=(centre[0] + half, centre[0] - half), ylim=(centre[1] - half, centre[1] + half), facecolor=BACKGROUND)
    right, low = centre[0] - 0.93 * half, centre[1] - 0.92 * half
    halo = [withStroke(linewidth=3.5, foreground="black")]
    ax.plot((right, right + BAR), (low, low), color=INK, linewidth=1.5, solid_capstyle="butt", path_effects=halo)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=FAINT, linewidth=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="a data set's folder; its pairs get the first rows and the first line")
    parser.add_argument("--left_right", type=int, choices=(0, 1), default=0, help="its left-right axis; 1: label-reg")
    parser.add_argument("--voxel_size", type=float, help="mm, where its headers are nominal")
    parser.add_argument("--output", type=Path, help="default docs/phantom.png, with --pairs phantom_and_real.png")
    arguments = parser.parse_args()
    rows, lines = [], []
    if arguments.pairs:
        load, options = LoadPaird(), (arguments.left_right, arguments.voxel_size)
        real = [scans(load(files), *options) for files in datalist(arguments.pairs, "train")]
        shown = [real[k : k + BESIDE] for k in range(0, ROWS * BESIDE, BESIDE)]
        rows += [("real pairs", pairs) for pairs in shown if pairs]
        lines.append(row("real pairs", iter(real)))
    for mode in MODES:  # the same patients in the first two
        stream = SimulatedPairs(mode)
        rows += [(f"{mode} phantoms", [scans(stream[r * BESIDE + k]) for k in range(BESIDE)]) for r in range(ROWS)]
        started = time.perf_counter()
        phantoms = [simulate_pair(np.random.default_rng([0, k]), mode=mode) for k in range(MEASURED)]
        small = (time.perf_counter() - started) / MEASURED
        large = clock(lambda mode=mode: simulate_pair(np.random.default_rng(0), *CLINICAL, mode))
        print(f"{mode}: {small:.3f} s a pair, {large:.2f} s of a clinical size")
        lines.append(row(f"{mode} phantoms", (scans(as_loaded(phantom)) for phantom in phantoms)))
    output = arguments.output or (Path("phantom_and_real.png") if arguments.pairs else ROOT / "docs" / "phantom.png")
    draw(rows, output)
    print(f"{table(lines)}\n\n{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
