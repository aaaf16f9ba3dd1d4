"""One training step: draw, augmentation, network, loss, backward, Adam; against the same step from MONAI's stock parts.

python benchmarks/training.py [--device cuda]
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from monai.data import CacheDataset, DataLoader, Dataset  # noqa: E402
from monai.losses import BendingEnergyLoss, DiceLoss, MultiScaleLoss  # noqa: E402
from monai.networks.blocks import Warp  # noqa: E402
from monai.networks.nets import LocalNet  # noqa: E402
from monai.transforms import Compose, NormalizeIntensityd, RandAffined, Randomizable, Transform  # noqa: E402
from monai.utils import set_determinism  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import check_same, options, peak_memory, record, table  # noqa: E402
from scripts.data.datalist import datalist  # noqa: E402
from scripts.data.pairs import LoadPaird  # noqa: E402
from scripts.network.losses import BendingEnergy, LabelDrivenLoss, MultiscaleDiceLoss  # noqa: E402
from scripts.network.networks import SummedDDFNet  # noqa: E402
from scripts.network.wrapped import Padded  # noqa: E402
from scripts.phantoms.phantom import write_cohort  # noqa: E402
from scripts.registration.precision import PrecisionInferer  # noqa: E402
from scripts.registration.transforms import OntoFixedGridd, PlanFixedGridd  # noqa: E402
from scripts.training.cohort import CohortLoader  # noqa: E402
from scripts.training.engine import prepare_batch  # noqa: E402

warnings.filterwarnings("ignore", "Using a non-tuple sequence")  # inside MONAI
SMALL, FULL = (48, 64, 48), (81, 118, 88)  # voxels of 0.8 mm
SCALES = (0, 1, 2, 4, 8, 16, 32)  # whole voxels, which MONAI's kernels want
BATCH = 4


class DrawLabel(Randomizable, Transform):
    """What MONAI has no part for: one random label of a pair, and channels as RandAffined wants them."""

    def __call__(self, data: dict) -> dict:
        m = self.R.randint(len(data["moving_label"]))
        picked = {k: data[k][m : m + 1] for k in ("moving_label", "fixed_label")}
        return picked | {"moving_image": data["image"][:1], "fixed_image": data["image"][1:]}


def files(size: tuple[int, ...], folder: Path, pairs: int) -> list[dict]:
    """A cohort of phantoms whose fixed images have `size` voxels of 0.8 mm."""
    room = tuple(n + 8 for n in size)
    write_cohort(
        folder,
        pairs,
        split=(1, 0, 0),
        fixed_shape=size,
        fixed_spacing=0.8,
        moving_shape=room,
        moving_spacing=0.8,
    )
    return datalist(str(folder), "train")


def our_step(pairs: list[dict], device: torch.device, precision: str, channels: int, **options) -> tuple:
    """(batches, step) of this bundle."""
    read = [LoadPaird(), NormalizeIntensityd(["moving_image", "fixed_image"]), PlanFixedGridd(0.8)]
    loader = CohortLoader(Dataset(pairs, Compose(read)), BATCH, 10**6, device)
    net = SummedDDFNet(channels, **options).to(device)
    loss = LabelDrivenLoss(MultiscaleDiceLoss([0.8 * s for s in SCALES]), BendingEnergy())
    adam = torch.optim.Adam(net.parameters(), 1e-5)
    inferer = PrecisionInferer(precision)

    def step(batch: dict) -> Tensor:
        image, targets = prepare_batch(batch, device)
        value = loss(inferer(image, net), targets)
        adam.zero_grad()
        value.backward()
        adam.step()
        return value

    return iter(loader), step


def stock_step(pairs: list[dict], device: torch.device, half: bool, channels: int) -> tuple:
    """(batches, step) assembled from MONAI's parts; two workers augment."""
    fixed_part = [LoadPaird(), NormalizeIntensityd(["moving_image", "fixed_image"]), OntoFixedGridd(0.8), DrawLabel()]
    affine = {"prob": 1, "rotate_range": 0.05, "translate_range": 4, "scale_range": 0.05, "shear_range": 0.05}
    random_part = [
        RandAffined([f"{side}_image", f"{side}_label"], mode="bilinear", padding_mode=("border", "zeros"), **affine)
        for side in ("moving", "fixed")
    ]
    dataset = CacheDataset(pairs, Compose(fixed_part + random_part), progress=False)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=2, pin_memory=device.type == "cuda")
    net = Padded(LocalNet(3, 2, channels, (0, 1, 2, 3, 4), out_kernel_initializer="zeros")).to(device)
    similarity, regulariser = MultiScaleLoss(DiceLoss(), scales=list(SCALES)), BendingEnergyLoss()
    pull = Warp(mode="bilinear", padding_mode="zeros")
    adam = torch.optim.Adam(net.parameters(), 1e-5)

    def step(batch: dict) -> Tensor:
        on = {k: torch.as_tensor(batch[k]).to(device, non_blocking=True) for k in ("moving_image", "fixed_image")}
        labels = [torch.as_tensor(batch[k]).to(device, non_blocking=True) for k in ("moving_label", "fixed_label")]
        image = torch.cat([on["moving_image"], on["fixed_image"]], dim=1)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            ddf = net(image).float()
        value = similarity(labels[1], pull(labels[0], ddf)) + 0.5 * regulariser(ddf)
        adam.zero_grad()
        value.backward()
        adam.step()
        return value

    return iter(loader), step


def timed(batches: Iterator, step: Callable, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds a step, without the first, and the share of it spent waiting for the next batch."""
    step(next(batches))
    seconds, waiting = [], []
    for _ in range(steps):
        begun = time.perf_counter()
        batch = next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        waiting.append(time.perf_counter() - begun)
        step(batch).item()
        seconds.append(time.perf_counter() - begun)
    middle = sorted(seconds)[len(seconds) // 2]
    return {"seconds": middle, "fastest": min(seconds), "slowest": max(seconds), "waiting": sum(waiting) / sum(seconds)}


def check_losses(device: torch.device) -> None:
    """MONAI's losses and ours agree on the same DDF and labels, with the same stencil and normalised kernels."""
    torch.manual_seed(0)
    ddf, fixed = torch.randn(1, 3, *SMALL, device=device), torch.rand(1, 1, *SMALL, device=device)
    warped = torch.rand(1, 1, *SMALL, device=device)
    stock = MultiScaleLoss(DiceLoss(smooth_nr=0, smooth_dr=0), scales=list(SCALES))
    kernel = stock.kernel_fn
    stock.kernel_fn = lambda sigma: kernel(sigma) / kernel(sigma).sum()
    ours = MultiscaleDiceLoss(SCALES)(warped, fixed, torch.ones(1, 3, dtype=torch.float64))
    check_same("multiscale Dice", ours, stock(fixed, warped), 1e-4)
    check_same("bending energy", BendingEnergy("compact")(ddf), BendingEnergyLoss()(ddf), 1e-4)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--channels", type=int, default=32, help="n0; another than 32 is not recorded")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each side")
    arguments = parser.parse_args()
    device = arguments.device
    set_determinism(0)
    check_losses(device)
    size = FULL if device.type == "cuda" else SMALL
    with tempfile.TemporaryDirectory() as folder:
        pairs = files(size, Path(folder) / "cohort", pairs=8)
        rows = compare(pairs, size, device, arguments.channels, arguments.steps)
    if arguments.channels == 32:
        with tempfile.TemporaryDirectory() as folder:
            rows += full_size_memory(files(FULL, Path(folder) / "cohort", pairs=2), device)
        record("training", rows, device=device)
    else:
        print(table(rows))


def compare(pairs: list[dict], size: tuple[int, ...], device: torch.device, channels: int, steps: int) -> list[dict]:
    """Rows of both sides, in each precision."""
    rows = []
    for precision in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        steps_of = {
            "ours": our_step(pairs, device, precision, channels),
            "MONAI's parts": stock_step(pairs, device, precision == "bfloat16", channels),
        }
        what = {"device": device.type, "size": "×".join(map(str, size)), "batch": BATCH, "precision": precision}
        found = {name: timed(*side, device, steps) for name, side in steps_of.items()}
        for name, figures in found.items():
            ratio = {"times faster": found["MONAI's parts"]["seconds"] / figures["seconds"]} if name == "ours" else {}
            rows.append({**what, "side": name, **figures, "pairs/s": BATCH / figures["seconds"], **ratio})
            print(rows[-1])
    return rows


def full_size_memory(pairs: list[dict], device: torch.device) -> list[dict]:
    """Peak memory of a full-size step beyond network and cohort, with and without checkpointing."""
    rows = []
    for precision in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        for checkpointing in (False, True):
            batches, step = our_step(pairs, device, precision, 32, checkpointing=checkpointing)
            gigabytes = peak_memory(lambda s=step, b=batches: s(next(b)), device) / 1e9
            what = {"device": device.type, "size": "×".join(map(str, FULL)), "batch": BATCH, "precision": precision}
            side = "ours, checkpointing" if checkpointing else "ours"
            rows.append({**what, "side": side, "peak memory, GB": gigabytes})
            print(rows[-1])
    return rows


if __name__ == "__main__":
    main()
