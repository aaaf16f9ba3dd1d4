"""Multiscale label losses, value and gradient: the closed form against MONAI and against filtering each scale.

python benchmarks/loss.py [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from monai.losses import DiceLoss, MultiScaleLoss  # noqa: E402
from monai.losses.multi_scale import make_gaussian_kernel  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.measure import check_same, compared, options, peak_memory, race, record, table  # noqa: E402
from scripts.network.losses import PAPER_SCALES, MultiscaleCrossEntropyLoss, MultiscaleDiceLoss, gaussian_matrix  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would round to 10 bits, and the sides are compared
TOLERANCE = 1e-4  # of the largest gradient, float32 against float32
SIZES = ((48, 48, 48), (104, 104, 88), (128, 128, 128))


def smooth(label: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of σ voxels as three 1-D convolutions, zeros outside: (B, 1, X, Y, Z) -> the same shape."""
    tail = int(3 * sigma)
    kernel = gaussian_matrix(2 * tail + 1, sigma)[tail].to(label)
    for axis in range(3 if tail else 0):
        shape, padding = [1] * 5, [0] * 3
        shape[2 + axis], padding[axis] = len(kernel), tail
        label = F.conv3d(label, kernel.view(shape), padding=padding)
    return label


def separable_dice(warped: Tensor, fixed: Tensor, scales: tuple[float, ...]) -> Tensor:
    """1 − Eq. (5), each scale filtered by convolutions."""
    total = 0
    for sigma in scales:
        a, b = smooth(fixed, sigma), smooth(warped, sigma)
        total = total + 2 * (a * b).sum((1, 2, 3, 4)) / (a.sum((1, 2, 3, 4)) + b.sum((1, 2, 3, 4)))
    return 1 - (total / len(scales)).mean()


def separable_cross_entropy(warped: Tensor, fixed: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Eq. (6), each scale filtered by convolutions."""
    total = 0
    for sigma in scales:
        p, q = (smooth(label, sigma).clamp(1e-6, 1 - 1e-6) for label in (fixed, warped))
        total = total - (p * q.log() + (1 - p) * (1 - q).log()).mean()
    return total / len(scales)


def balls(batch: int, size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """A soft warped and a binary fixed ball, off centre, (B, 1, X, Y, Z)."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n, device=device) for n in size], indexing="ij")
    distance = [
        sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)) ** 0.5 for centre in ((0.1, 0, 0.2), (0,) * 3)
    ]
    warped, fixed = (8 * (0.6 - distance[0])).clamp(0, 1), (distance[1] < 0.5).float()
    return tuple(label.expand(batch, 1, *size).contiguous() for label in (warped, fixed))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="48³ only, nothing recorded")
    arguments = parser.parse_args()
    sizes = SIZES[:1] if arguments.quick else SIZES
    rows = [row for size in sizes for batch in (1, 4) for row in compare(arguments.device, size, batch)]
    if arguments.quick:
        print(table(rows))
    else:
        record("loss", rows, device=arguments.device)


def compare(device: torch.device, size: tuple[int, ...], batch: int) -> list[dict]:
    """Rows of one size and batch."""
    warped, fixed = balls(batch, size, device)
    warped.requires_grad_()
    spacing = torch.ones(batch, 3, dtype=torch.float64)  # 1 mm: σ is whole voxels, which MONAI's kernels want
    rows = []

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            warped.grad = None
            loss().backward()
            return warped.grad

        return run

    for name, scales in (("paper's 7 scales", PAPER_SCALES), ("label-reg's 6 scales", PAPER_SCALES[:-1])):
        dice = MultiscaleDiceLoss(scales)
        fields = dice.fields(fixed, spacing[0])
        monai = MultiScaleLoss(DiceLoss(smooth_nr=0, smooth_dr=0), scales=[int(s) for s in scales])
        # MONAI's truncated kernels do not sum to 1, which scales its Dice; the same work with kernels that do
        monai.kernel_fn = lambda sigma: (kernel := make_gaussian_kernel(sigma)) / kernel.sum()
        sides = {
            "ours": step(lambda d=dice: d(warped, fixed, spacing)),
            "ours, label fields known": step(lambda d=dice, f=fields: d(warped, fixed, spacing, f)),
            "MONAI MultiScaleLoss": step(lambda m=monai: m(fixed, warped)),
            "separable convolutions": step(lambda s=scales: separable_dice(warped, fixed, s)),
        }
        if name.startswith("label-reg") and (size != SIZES[1] or batch > 1):
            continue
        what = {"device": device.type, "loss": f"Dice, {name}", "size": "×".join(map(str, size)), "batch": batch}
        print(what)
        reference = sides["ours"]()
        for other in ("ours, label fields known", "separable convolutions"):
            check_same(f"gradient, {other}", sides[other](), reference, TOLERANCE)
        last: dict[str, Tensor] = {}
        sides["MONAI MultiScaleLoss"] = lambda f=sides["MONAI MultiScaleLoss"], kept=last: kept.update(gradient=f())
        timed = race(sides, device)
        check_same("gradient, MONAI", last["gradient"], reference, TOLERANCE)
        rows += compared(what, timed)
        if batch == 1 and size == SIZES[1] and name.startswith("paper"):
            memory = {k: peak_memory(f, device) for k, f in sides.items()}
            for row in rows[-3:]:
                row["memory of ours"] = memory["ours"] / memory[row["against"]]
    entropy = MultiscaleCrossEntropyLoss()

    def scaled_entropy(w: Tensor, f: Tensor) -> Tensor:
        return separable_cross_entropy(w, f, PAPER_SCALES)

    sides = {
        "ours": step(lambda: entropy(warped, fixed, spacing)),
        "separable convolutions": step(lambda: scaled_entropy(warped, fixed)),
    }
    # where a filtered label is 1, rounding decides whether it is clipped, which has no slope: gradients in float64
    values = [f(warped.detach(), fixed) for f in (lambda w, f: entropy(w, f, spacing), scaled_entropy)]
    check_same("value of cross-entropy", values[1], values[0], TOLERANCE)
    if size == SIZES[0]:
        exact = warped.detach().double().requires_grad_()
        losses = [entropy(exact, fixed.double(), spacing), scaled_entropy(exact, fixed.double())]
        check_same("gradient of cross-entropy", *(torch.autograd.grad(x, exact)[0] for x in losses), TOLERANCE)
    what = {"device": device.type, "loss": "cross-entropy", "size": "×".join(map(str, size)), "batch": batch}
    return rows + compared(what, race(sides, device))


if __name__ == "__main__":
    main()
