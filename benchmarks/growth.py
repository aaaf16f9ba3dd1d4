"""How time and memory of loss, registration and training step grow with voxels and channels: docs/growth.png.

python benchmarks/growth.py [--device cuda]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402

from benchmarks.measure import ROOT, options, peak_memory, race, record  # noqa: E402
from scripts.network.fields import warp  # noqa: E402
from scripts.network.losses import BendingEnergy, LabelDrivenLoss, MultiscaleDiceLoss  # noqa: E402
from scripts.network.networks import SummedDDFNet  # noqa: E402

SIDES = (24, 32, 48, 64, 96, 128, 160)  # voxels along each axis
CHANNELS = (4, 8, 16, 32, 64)
SPACING = torch.full((1, 3), 0.8, dtype=torch.float64)


def loss_of(side: int, channels: int, device: torch.device) -> Callable:
    """Multiscale Dice, value and gradient."""
    warped, fixed = torch.rand(2, 1, 1, side, side, side, device=device)
    warped.requires_grad_()
    loss = MultiscaleDiceLoss()
    return lambda: torch.autograd.grad(loss(warped, fixed, SPACING), warped)


def registration_of(side: int, channels: int, device: torch.device) -> Callable:
    """Network, DDF and warped image of one pair."""
    image = torch.rand(1, 2, side, side, side, device=device)
    net = SummedDDFNet(channels).to(device).eval()

    @torch.inference_mode()
    def run() -> None:
        warp(image[:, :1], net(image), padding_mode="border")

    return run


def step_of(side: int, channels: int, device: torch.device) -> Callable:
    """Network, objective, backward and Adam for one pair."""
    image = torch.rand(1, 2, side, side, side, device=device)
    labels = {k: torch.rand(1, 1, side, side, side, device=device) for k in ("moving_label", "fixed_label")}
    net = SummedDDFNet(channels).to(device)
    objective = LabelDrivenLoss(MultiscaleDiceLoss(), BendingEnergy())
    adam = torch.optim.Adam(net.parameters(), 1e-5)

    def run() -> None:
        adam.zero_grad()
        objective(net(image), labels | {"spacing": SPACING}).backward()
        adam.step()

    return run


WORK = {"loss": loss_of, "registration": registration_of, "training step": step_of}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--channels", type=int, default=32, help="n0 of the growth with voxels")
    parser.add_argument("--limit", type=float, default=30, help="seconds of a call after which nothing larger is run")
    arguments = parser.parse_args()
    device = arguments.device
    rows = []
    for axis, values in (("voxels", SIDES), ("channels", CHANNELS)):
        for name, make in WORK.items():
            if axis == "channels" and name == "loss":
                continue
            points = []
            for value in values:
                side, channels = (value, arguments.channels) if axis == "voxels" else (48, value)
                run = make(side, channels, device)
                begun = time.perf_counter()
                seconds = race({"it": run}, device, budget=8, most=5)["it"]["seconds"]
                points.append((side**3 if axis == "voxels" else channels, seconds, peak_memory(run, device)))
                print(name, axis, value, points[-1], f"{time.perf_counter() - begun:.0f} s")
                if seconds > arguments.limit:
                    break
            x, seconds, memory = np.array(points).T
            # the smallest sizes are overhead; the exponent is that of the larger half
            fit = [np.polyfit(np.log(x[len(x) // 2 :]), np.log(y[len(x) // 2 :]), 1)[0] for y in (seconds, memory)]
            rows.append(
                {"device": device.type, "of": name, "against": axis, "from": int(x[0]), "to": int(x[-1])}
                | {"exponent of seconds": fit[0], "exponent of memory": fit[1]}
                | {"points": [[float(v) for v in p] for p in points]}
            )
    draw(rows, ROOT / "docs" / ("growth.png" if device.type == "cpu" else "growth_on_a_gpu.png"))
    record("growth", [{k: v for k, v in row.items() if k != "points"} for row in rows], {"points": rows}, device)


def draw(rows: list[dict], path: Path) -> None:
    """Four log-log panels: seconds and memory against voxels and channels."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    colours = dict(zip(WORK, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for row in rows:
        column = ("voxels", "channels").index(row["against"])
        x, seconds, memory = np.array(row["points"]).T
        for panel, values, unit in ((axes[0, column], seconds, "seconds"), (axes[1, column], memory / 1e9, "memory")):
            exponent = row[f"exponent of {unit}"]
            panel.loglog(x, values, "o-", color=colours[row["of"]], label=f"{row['of']}, exponent {exponent:.2f}")
    for panel, unit in zip(axes.flat, ("seconds", "seconds", "peak memory in GB", "peak memory in GB"), strict=True):
        panel.set_ylabel(unit)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for panel in axes[:, 1]:
        panel.set_xticks(CHANNELS, [str(n) for n in CHANNELS])
        panel.xaxis.set_minor_locator(NullLocator())
    axes[1, 0].set_xlabel("voxels (n0 = 32, batch 1)")
    axes[1, 1].set_xlabel("channels n0 (48³ voxels, batch 1)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
