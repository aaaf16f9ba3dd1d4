"""How well a rotational sweep gives back what it was taken of: the table of docs/sweep.md.

python benchmarks/sweep.py

Simulated TRUS volumes of 0.8 mm are swept about the voxel centre nearest to their probe and reconstructed on their own
voxels, so the image needs no interpolation to be compared. Their glands are implicit functions, known at any pixel of a
frame and at any voxel. What the sweep does not cover is left out. Means over the patients, and the worst of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import table  # noqa: E402
from scripts.phantoms.phantom import PhantomPair, simulate_pair  # noqa: E402
from scripts.phantoms.sweep import acquire, reconstruct  # noqa: E402

SHAPE, SPACING = (112, 80, 80), 0.8  # of the TRUS, mm
PIXEL, FRAME = (0.4, 0.4), (190, 159)  # mm (depth, axial); rows and columns: from the probe through the whole volume
COUNTS = (57, 84, 112)  # the fewest, some and the most frames of the paper


def in_gland(pair: PhantomPair, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Whether points of the fixed world are in the gland, exactly; x, y, z in mm broadcast, as does the result."""
    points = pair.true_map(x, y, z)
    relative = (p - centre for p, centre in zip(points, pair.true_map.moving_centre, strict=True))
    return pair.anatomy.gland(*relative)[0] > 0


def errors(pair: PhantomPair, count: int, span: float) -> tuple[float, float, float]:
    """RMS error in per cent of the image's range, distance of the glands' centroids in mm, DSC of the glands."""
    affine, image = torch.from_numpy(pair.fixed_affine), pair.fixed_image.double()
    origin = affine[:3, 3]
    probe = torch.tensor([*pair.probe.position[:2], origin[2]], dtype=torch.float64)
    axis = (origin + ((probe - origin) / SPACING).round() * SPACING).tolist()
    offset = pair.probe.radius
    angles = torch.linspace(-span / 2, span / 2, count, dtype=torch.float64)

    r = offset + PIXEL[0] * torch.arange(FRAME[0], dtype=torch.float64)[:, None]
    z = axis[2] + PIXEL[1] * torch.arange(FRAME[1], dtype=torch.float64)
    turn = torch.deg2rad(angles).view(-1, 1, 1)
    seen = in_gland(pair, axis[0] + r * turn.sin(), axis[1] + r * turn.cos(), z).double()
    frames = acquire(image, affine, angles, PIXEL, FRAME, axis, offset)
    swept, gland = (reconstruct(f, angles, PIXEL, offset, SPACING, axis_point=axis) for f in (frames, seen))

    start = ((swept.affine[:3, 3] - origin) / SPACING).round().long()
    i, j, k = (torch.arange(n) + first for n, first in zip(swept.volume.shape, start.tolist(), strict=True))
    i, j, k = i[:, None, None], j[:, None], k
    inside = swept.inside.clone()
    for index, n in zip((i, j, k), SHAPE, strict=True):
        inside &= (index >= 0) & (index < n)
    true = image[tuple(index.clamp(0, n - 1) for index, n in zip((i, j, k), SHAPE, strict=True))]
    rms = (swept.volume - true)[inside].square().mean().sqrt() / (image.max() - image.min())

    x, y, z = (low + SPACING * index for low, index in zip(origin, (i, j, k), strict=True))
    found, wanted = (gland.volume >= 0.5) & inside, in_gland(pair, x, y, z) & inside
    apart = SPACING * (torch.nonzero(found).double().mean(0) - torch.nonzero(wanted).double().mean(0)).norm()
    overlap = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    return 100 * rms.item(), apart.item(), overlap.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=12)
    parser.add_argument("--span", type=float, default=140, help="degrees")
    arguments = parser.parse_args()
    pairs = [simulate_pair(np.random.default_rng(k), SHAPE, SPACING) for k in range(arguments.patients)]
    rows = []
    for count in COUNTS:
        each = np.array([errors(pair, count, arguments.span) for pair in pairs])
        rms, centroid, overlap = each.mean(0)
        rows.append(
            {"frames": count, "degrees apart": f"{arguments.span / (count - 1):.2f}"}
            | {"RMS, % of range": f"{rms:.2f}", "largest": f"{each[:, 0].max():.2f}"}
            | {"gland centroid, mm": f"{centroid:.3f}", "farthest": f"{each[:, 1].max():.3f}"}
            | {"gland DSC": f"{overlap:.4f}", "lowest": f"{each[:, 2].min():.4f}"}
        )
    print(table(rows))


if __name__ == "__main__":
    main()
