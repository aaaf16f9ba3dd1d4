"""Accuracy of elastix (B-spline) and ANTs (SyN) on a data set of labelled pairs, scored as this bundle scores itself.

Every pair is brought onto the fixed image's grid by the centre start; the tools see the images, never the labels, and
their settings are those of benchmarks/classical.py, not tuned to the data. The moving labels, soft maps by then, are
warped linearly and binarised at 0.5. TRE is the root mean square over a pair's labels, gland included, in voxels. A
pair on which a tool gives up with an error keeps its centre start, and is counted. Of phantoms the true error is added.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.classical import ants_sides, elastix_sides  # noqa: E402
from benchmarks.measure import table  # noqa: E402
from benchmarks.summary import summarise  # noqa: E402
from scripts.data.checks import InputError  # noqa: E402
from scripts.data.datalist import TRUTH, datalist  # noqa: E402
from scripts.data.files import write_csv  # noqa: E402
from scripts.data.pairs import LoadPaird  # noqa: E402
from scripts.network.fields import identity_grid  # noqa: E402
from scripts.registration.metrics import score_case, true_error, warped_away  # noqa: E402
from scripts.registration.transforms import KeepOriginalsd, OntoFixedGridd, to_original_grid  # noqa: E402

TOOLS = {
    "centre start": None,
    "elastix B-spline": lambda *pair: elastix_sides(*pair[:3]),
    "ANTs SyN": ants_sides,
    "ANTs affine, then SyN": partial(ants_sides, kind="SyN"),
}


def warped_by(tool: str, images: Tensor, volumes: Tensor, spacing: float) -> Tensor | None:
    """Volumes (C, X, Y, Z) warped by a tool that registers `images` (2, X, Y, Z), moving first; None: it gave up."""
    if TOOLS[tool] is None:
        return volumes
    moving, fixed = images[:, None, None]
    with tempfile.TemporaryDirectory() as folder:  # ANTs takes whatever is in its folder for its own
        align, warp = TOOLS[tool](moving, fixed, spacing, folder)
        try:
            transform = align()
        except RuntimeError:  # elastix: "too many samples map outside moving image buffer", for one
            return None
        return torch.stack([torch.from_numpy(warp(transform, channel[None, None]).copy()) for channel in volumes])


def rows(pairs: list[dict[str, str]], voxel_size: float | None) -> list[dict]:
    """One row per pair and tool. `voxel_size` in mm replaces the headers'."""
    made = []
    for pair in tqdm(pairs, unit="pair"):
        data = OntoFixedGridd(None, "centre")(KeepOriginalsd()(LoadPaird()(pair)))
        images, moving, fixed = (torch.as_tensor(data[k]) for k in ("image", "moving_label", "fixed_label"))
        spacing = data["spacing"].tolist()
        if voxel_size is None and not math.isclose(min(spacing), max(spacing), rel_tol=1e-3):
            raise InputError(f"{pair['fixed_image']}: voxels of {spacing} mm are not cubes; pass --voxel_size")
        at = identity_grid(images.shape[1:], torch.float32, "cpu")
        volumes = torch.cat([moving, at])
        for tool in TOOLS:
            warped = warped_by(tool, images, volumes, voxel_size or spacing[0])
            label, to = (volumes if warped is None else warped).split([len(moving), 3])
            scores, labels = score_case(label, fixed, (1, 1, 1))
            scores = {k.replace("_mm", "_voxels"): v for k, v in scores.items()}
            if TRUTH in data:
                displacement = to_original_grid(data, to - at)["displacement"]
                gland = data["original_fixed_label"].as_tensor()[0]
                scores["true_error_mm"] = true_error(displacement, data[TRUTH].as_tensor(), gland)
                scores["tre_with_gland_mm"] = scores["tre_with_gland_voxels"] * (voxel_size or spacing[0])
            empty = sum(map(warped_away, labels))
            row = {"case": pair["case"], "tool": tool} | scores | {"empty_warped": empty, "gave_up": warped is None}
            made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="folder or datalist JSON of the data set")
    parser.add_argument("--voxel_size", type=float, help="mm, of all volumes, where the headers are nominal")
    parser.add_argument("--output", type=Path, help="CSV to write, one row per pair and tool")
    arguments = parser.parse_args()
    os.environ["ANTS_RANDOM_SEED"] = "1"
    made = rows(datalist(arguments.pairs, "test"), arguments.voxel_size)
    if arguments.output:
        write_csv(arguments.output, made)
    columns = [("gland DSC", "dsc", 2), ("TRE with gland, voxels", "tre_with_gland_voxels", 1)]
    columns += [("TRE with gland, mm", "tre_with_gland_mm", 1), ("true error, mm", "true_error_mm", 1)]
    lines = []
    for tool in TOOLS:
        its = [row for row in made if row["tool"] == tool]
        line = {"tool": tool}
        for name, key, n in columns:
            if key not in its[0]:
                continue
            s = summarise([row[key] for row in its], higher_is_better=key == "dsc")
            line |= {name: f"{s.median:.{n}f} [{s.low:.{n}f}, {s.high:.{n}f}]", f"worst {name}": f"{s.worst:.{n}f}"}
        line["with a TRE"] = f"{sum(math.isfinite(r['tre_with_gland_voxels']) for r in its)} of {len(its)}"
        line |= {
            name: sum(r[k] > 0 for r in its) for name, k in (("empty labels", "empty_warped"), ("gave up", "gave_up"))
        }
        lines.append(line)
    print(f"{table(lines)}\n\nMedian over the pairs [95 % bootstrap interval of the median].")


if __name__ == "__main__":
    main()
