"""A training step un-filtered and pre-filtered (Baseline-preFilt, Hu et al. 2018, §3.2.2), as the paper and as we do.

The paper measured preFilt some 25 % faster. A step is network, loss, backward and Adam on one batch of phantoms.
The sides:

    un-filtered, closed form       configs/train.json
    un-filtered, convolutions      both labels filtered at each scale, the warped one in the graph, as the paper does
    pre-filtered as drawn          configs/variant_prefilt.yaml
    pre-filtered beforehand        the filtered labels are ready, as the paper had them on disk

python benchmarks/prefilt.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.loss import separable_dice  # noqa: E402
from benchmarks.measure import check_same, compared, options, race, record, table  # noqa: E402
from benchmarks.training import SCALES, SMALL, files, our_step  # noqa: E402
from scripts.network.fields import warp  # noqa: E402
from scripts.network.losses import BendingEnergy, LabelDrivenLoss, MultiscaleDiceLoss, PrefilteredLoss  # noqa: E402
from scripts.network.networks import SummedDDFNet  # noqa: E402

MM = [0.8 * s for s in SCALES]


class Beforehand(PrefilteredLoss):
    """`PrefilteredLoss` whose filtered labels are ready; `known` holds them by the labels' storage."""

    known: dict[int, Tensor]

    def filtered(self, label: Tensor, spacing: Tensor) -> Tensor:
        return self.known[label.data_ptr()]


def by_convolutions(ddf: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """The objective of `LabelDrivenLoss`, every scale filtered by convolutions within the graph."""
    return separable_dice(warp(targets["moving_label"], ddf), targets["fixed_label"], SCALES) + 0.5 * BendingEnergy()(
        ddf
    )


def rows(size: tuple[int, ...], channels: int, device: torch.device, budget: float) -> list[dict]:
    """One row per other side; the closed form is what they are compared with."""
    with tempfile.TemporaryDirectory() as folder:
        batches, _ = our_step(files(size, Path(folder) / "cohort", 4), device, "float32", channels)
        batch = next(batches)
    image, targets = batch["image"], {k: batch[k] for k in ("moving_label", "fixed_label", "spacing")}
    plain, filtered = (
        LabelDrivenLoss(MultiscaleDiceLoss(MM), BendingEnergy()),
        PrefilteredLoss(BendingEnergy(), 0.5, MM),
    )
    ready = Beforehand(BendingEnergy(), 0.5, MM)
    ready.known = {targets[k].data_ptr(): filtered.filtered(targets[k], targets["spacing"]) for k in list(targets)[:2]}
    losses = {
        "un-filtered, closed form": plain,
        "un-filtered, convolutions": by_convolutions,
        "pre-filtered as drawn": filtered,
        "pre-filtered beforehand": ready,
    }
    ddf = torch.randn(image.shape[0], 3, *image.shape[2:], device=device)
    for one, other in (list(losses)[:2], list(losses)[2:]):
        check_same(f"value, {other}", losses[other](ddf, targets), losses[one](ddf, targets), 1e-4)

    def step(loss: Callable[[Tensor, dict], Tensor]) -> Callable[[], None]:
        torch.manual_seed(0)
        net: nn.Module = SummedDDFNet(channels).to(device)
        adam = torch.optim.Adam(net.parameters(), 1e-5)

        def run() -> None:
            value = loss(net(image), targets)
            adam.zero_grad()
            value.backward()
            adam.step()

        return run

    timed = race({name: step(loss) for name, loss in losses.items()}, device, budget)
    what = {"device": device.type, "size": "×".join(map(str, size)), "n0": channels, "batch": image.shape[0]}
    return compared(what, timed, "un-filtered, closed form")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="8 channels only, nothing recorded")
    arguments = parser.parse_args()
    made = rows(SMALL, 8, arguments.device, 40)
    if arguments.quick:
        print(table(made))
    else:
        record("prefilt", made + rows(SMALL, 32, arguments.device, 100), device=arguments.device)


if __name__ == "__main__":
    main()
