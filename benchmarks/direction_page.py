"""The picture of docs/transforms.md, "which way does it point": a phantom's true transform; writes docs/direction.png.

python benchmarks/direction_page.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import ConnectionPatch  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402

from benchmarks.measure import ROOT  # noqa: E402
from scripts.network.fields import pull  # noqa: E402
from scripts.phantoms.phantom import simulate_pair  # noqa: E402
from scripts.registration.figures import BACKGROUND, FAINT, FIXED, INK, MOVING, draw_image, draw_outline, windowed  # noqa: E402

SEED, EVERY, SHOWN = 6, 6, 80.0  # of the phantom; voxels between grid lines; mm of a panel
HALO = [withStroke(linewidth=4, foreground="black")]
USES = (  # what you have, how it travels, the command
    ("a point marked on TRUS", "forward through T, to the MR", "apply --points_from fixed"),
    ("a point marked on MR", "through the inverse of T, to the TRUS", "apply --points_from moving"),
    ("the MR, or labels drawn on it", "pulled onto the TRUS grid: T says where to look", "apply --moving mr.nii.gz"),
)


def panel(figure: Figure, column: int, title: str, image: np.ndarray, mm: np.ndarray, centre: np.ndarray) -> Axes:
    """An axial plane (A, B), front up and the patient's right on the left, with `centre` (mm) in the middle."""
    ax = figure.add_axes((0.02 + 0.325 * column, 0.31, 0.31, 0.56))
    draw_image(ax, image, mm)
    (x, y), half = centre, SHOWN / 2
    ax.set(xlim=(x + half, x - half), ylim=(y - half, y + half), xticks=[], yticks=[], facecolor="black")
    ax.set_aspect("equal")
    ax.spines[:].set(color=FAINT, linewidth=0.5)
    ax.set_title(title, color=INK, size=14, pad=8)
    return ax


def draw_grid(ax: Axes, places: np.ndarray) -> None:
    """Lines through points (2, A, B) in mm."""
    for lines in (places, places.swapaxes(1, 2)):
        for line in np.moveaxis(lines, 1, 0):
            ax.plot(*line, color=INK, linewidth=0.8, alpha=0.65)


def draw_point(ax: Axes, place: np.ndarray, colour: str, text: str, offset: tuple[int, int]) -> None:
    """A dot at a place in mm, and what it is, so many points beside it."""
    ax.plot(*place, "o", color=colour, markersize=9, markeredgecolor="black", zorder=10)
    style = {"color": colour, "size": 13, "weight": "bold", "ha": "center", "path_effects": HALO, "zorder": 11}
    ax.annotate(text, place, offset, textcoords="offset points", **style)


def draw_arrow(start: Axes, x: np.ndarray, end: Axes, y: np.ndarray, colour: str) -> None:
    """From a place of one panel to a place of another, in mm."""
    shape = {"arrowstyle": "-|>,head_length=1,head_width=0.5", "connectionstyle": "arc3,rad=-0.25"}
    style = {"color": colour, "linewidth": 2.6, "mutation_scale": 14, "shrinkA": 8, "shrinkB": 8, "path_effects": HALO}
    start.figure.add_artist(ConnectionPatch(x, y, start.transData, end.transData, zorder=9, **shape, **style))


def draw(path: Path) -> None:
    """Write the picture."""
    pair = simulate_pair(np.random.default_rng(SEED), (72, 60, 50), 1.25, (80, 80, 56), (1.2, 1.2, 1.5))
    displacement = pair.true_displacement.movedim(-1, 0)
    fixed_mm, moving_mm = (np.linalg.norm(a[:3, :3], axis=0)[:2] for a in (pair.fixed_affine, pair.moving_affine))
    glands = pair.fixed_label[..., 0].numpy(), pair.moving_label[..., 0].numpy()
    middles = [np.argwhere(gland).mean(0) for gland in glands]
    i, j, k = middles[0].round().astype(int) + (9, 5, 0)  # in the gland, off its middle

    def on_mr(voxels: np.ndarray) -> np.ndarray:
        """Voxels of the TRUS (3, …) -> where they are in the MR, in its voxels (3, …)."""
        world = np.tensordot(pair.fixed_affine[:3, :3], voxels, 1).T + pair.fixed_affine[:3, 3]
        world = world + displacement.numpy()[:, *voxels].T - pair.moving_affine[:3, 3]
        return np.tensordot(np.linalg.inv(pair.moving_affine[:3, :3]), world.T, 1)

    # two of the lines go through the point
    grid = np.stack(np.meshgrid(np.arange(i % EVERY, 72, EVERY), np.arange(j % EVERY, 60, EVERY), [k], indexing="ij"))
    grid, there = grid[..., 0], on_mr(np.array([i, j, k]))
    x, y, slice_of_mr = np.array([i, j]) * fixed_mm, there[:2] * moving_mm, round(there[2])
    affines = torch.from_numpy(pair.moving_affine), torch.from_numpy(pair.fixed_affine)
    warped = pull(pair.moving_image[None, None].double(), affines[0], displacement[None].double(), affines[1])
    fixed, moving, warped = (
        windowed(v.numpy(), v.numpy()) for v in (pair.fixed_image, pair.moving_image, warped[0, 0])
    )

    figure = Figure(figsize=(15, 7.3), dpi=80, facecolor=BACKGROUND)
    middles = [middle[:2] * mm for middle, mm in zip(middles, (fixed_mm, moving_mm), strict=True)]
    trus = panel(figure, 0, "TRUS (fixed)", fixed[..., k], fixed_mm, middles[0])
    mr = panel(figure, 1, "MR (moving)", moving[..., slice_of_mr], moving_mm, middles[1])
    title = "warped_moving_image: MR on the TRUS grid"
    result = panel(figure, 2, title, warped[..., k], fixed_mm, middles[0])
    for ax in (trus, result):
        draw_grid(ax, grid[:2] * fixed_mm[:, None, None])
        draw_outline(ax, glands[0][..., k], fixed_mm, FIXED)
    draw_grid(mr, on_mr(grid)[:2] * moving_mm[:, None, None])
    draw_outline(mr, glands[1][..., slice_of_mr], moving_mm, MOVING)
    draw_arrow(trus, x, mr, y, FIXED[0])
    draw_arrow(mr, y, result, x, MOVING[0])
    draw_point(trus, x, FIXED[0], "x", (-14, 6))
    draw_point(mr, y, FIXED[0], "T(x): the same anatomy", (0, -26))
    draw_point(result, x, MOVING[0], "its grey value is put at x", (0, -26))

    head = (
        "The transform T, ddf.nii.gz, takes a TRUS point x to the MR point T(x); the MR image is pulled back along it."
    )
    figure.text(0.02, 0.945, head, color=INK, size=17, va="center")
    for row, (have, way, command) in enumerate(USES):
        y = 0.23 - 0.055 * row
        figure.text(0.02, y, have, color=INK, size=14, va="center")
        figure.text(0.27, y, way, color=INK, size=14, va="center")
        figure.text(0.68, y, command, color=FAINT, size=14, va="center", family="monospace")
    note = (
        "A phantom, axial, front up, the patient's right on the left; lines: a regular grid of TRUS points, and where T"
        " takes them. Research use only."
    )
    figure.text(0.02, 0.04, note, color=FAINT, size=11, va="center")
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "direction.png")
    output = parser.parse_args().output
    draw(output)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
