"""The picture of README.md, a pair before and after `register`: a held-out phantom; writes docs/registration.png.

python benchmarks/registration_page.py

Of the 40 held-out phantoms of docs/results.md it is the one of median true error, neither the best nor the worst.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.measure import ROOT  # noqa: E402
from scripts.bundle.workflow import register, run_config  # noqa: E402
from scripts.phantoms.phantom import simulate_pair, write_pair  # noqa: E402
from scripts.registration import figures  # noqa: E402

SEED, PATIENTS = 2026, range(160, 200)  # the test split of `phantom --patients 200 --seed 2026`
PLANES = {"axial": (0, 1), "sagittal": (1, 2)}
SHOWN = ("TRUS (fixed)", "MR, volume centres aligned", "MR, registered", "TRUS / MR, registered")
MARGIN = 8.0  # mm between the gland and the edge of a panel
ALONE = str(ROOT / "configs" / "initial_transform_only.yaml")
CENTRE = {"overlay": ALONE, "initial_transform": "centre", "spacing": "none"}


def middle_case(folder: Path) -> str:
    """The case of an evaluation with the median true error, the lower of two."""
    with (folder / "cases.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["true_error_mm"]))
    return rows[(len(rows) - 1) // 2]["case"]


def volume(path: Path) -> tuple[NDArray, NDArray]:
    """A volume with axes towards R, A, S (of labels the first, the gland), and its voxel size in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    array = image.get_fdata(dtype=np.float32)
    return array[..., 0] if array.ndim > 3 else array, np.array(image.header.get_zooms()[:3], dtype=float)


def facts(before: Path, after: Path) -> str:
    """Overlap and landmark error of two registrations that had labels."""
    first, last = (json.loads((folder / "qc.json").read_text(encoding="utf-8")) for folder in (before, after))
    dsc = f"gland DSC {first['gland_dsc']:.2f} → {last['gland_dsc']:.2f}"
    return f"{dsc}, TRE {first['tre_mm']:.1f} → {last['tre_mm']:.1f} mm"


def checkerboard(shape: tuple[int, ...], mm: NDArray) -> NDArray[np.bool_]:
    """True on every other square of 12 mm of a plane."""
    first, second = ((np.arange(n) * step // 12).astype(int) for n, step in zip(shape, mm, strict=True))
    return np.add.outer(first, second) % 2 == 1


def draw(path: Path, pair: Path, case: str, before: Path, after: Path) -> None:
    """Write the picture of a case of `pair` (a split of a cohort) and its two registrations."""
    fixed, spacing = volume(pair / "fixed_images" / f"{case}.nii.gz")
    gland, _ = volume(pair / "fixed_labels" / f"{case}.nii.gz")
    moved = [volume(folder / "warped_moving_image.nii.gz")[0] for folder in (before, after)]
    glands = [volume(folder / "warped_moving_label.nii.gz")[0] for folder in (before, after)]
    fixed, *moved = figures.windowed(fixed, fixed), *(figures.windowed(v, moved[1]) for v in moved)
    centre = figures.centre_voxel(fixed.shape, gland)
    half = MARGIN + (np.ptp(np.argwhere(gland), axis=0) * spacing).max() / 2
    figure = Figure(figsize=(12, 6.9), dpi=80, facecolor=figures.BACKGROUND)
    for row, (name, axes) in enumerate(PLANES.items()):
        (normal,) = {0, 1, 2} - set(axes)
        cut = [np.take(v, centre[normal], normal) for v in (fixed, gland, *moved, *glands)]
        trus, outline, first, last, first_gland, last_gland = cut
        mm, middle = spacing[list(axes)], np.array(centre)[list(axes)] * spacing[list(axes)]
        board = np.where(checkerboard(trus.shape, mm), last, trus)
        panels = ((trus, None), (first, first_gland), (last, last_gland), (board, last_gland))
        for column, (image, other) in enumerate(panels):
            ax = figure.add_axes((0.035 + 0.242 * column, 0.495 - 0.42 * row, 0.232, 0.4035))
            figures.draw_image(ax, image, mm)
            figures.draw_outline(ax, outline, mm, figures.FIXED)
            if other is not None:
                figures.draw_outline(ax, other, mm, figures.MOVING)
            x, y = middle
            ax.set(xlim=(x + half, x - half), ylim=(y - half, y + half), xticks=[], yticks=[], facecolor="black")
            ax.spines[:].set_visible(False)
            if row == 0:
                ax.set_title(SHOWN[column], color=figures.INK, size=12.5, pad=6)
            if column == 0:
                ax.set_ylabel(name, color=figures.INK, size=12.5)
    title = f"A held-out phantom of median error: {facts(before, after)}"
    figure.text(0.035, 0.965, title, color=figures.INK, size=13.5, va="center")
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=f"gland on {name}")
        for (colour, dash), name in ((figures.FIXED, "TRUS"), (figures.MOVING, "MR"))
    ]
    style = {"labelcolor": figures.INK, "frameon": False, "fontsize": 12, "ncols": 2}
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.995, 1.0), **style)
    note = (
        "A simulated pair; outlines are its true glands. Axial: front up, the patient's right on the left."
        " Sagittal: head up, front on the left. Research use only."
    )
    figure.text(0.035, 0.035, note, color=figures.FAINT, size=10, va="center")
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "registration.png")
    parser.add_argument("--folder", type=Path, help="where phantoms and tables stay for a second call; default none")
    arguments = parser.parse_args()
    output = arguments.output
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        pairs = folder / "cohort" / "test"
        if not (folder / "eval" / "cases.csv").exists():
            for patient in tqdm(PATIENTS, desc="phantom"):
                pair = simulate_pair(np.random.default_rng([SEED, patient]), mode="realistic")
                write_pair(pairs, f"case{patient:06d}", pair)
            run_config("evaluate.json", dataset_dir=str(pairs.parent), output_dir=str(folder / "eval"))
        case = middle_case(folder / "eval")
        files = {
            f"{side}{suffix}": str(pairs / f"{side}_{kind}" / f"{case}.nii.gz")
            for side in ("moving", "fixed")
            for suffix, kind in (("", "images"), ("_labels", "labels"))
        }
        before, after = folder / "before", folder / "after"
        register(output_dir=str(before), **files, **CENTRE)
        register(output_dir=str(after), **files)
        draw(output, pairs, case, before, after)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB, {case}")


if __name__ == "__main__":
    main()
