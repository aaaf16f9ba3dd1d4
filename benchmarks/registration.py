"""Registration of one full-size pair: normalise, network, DDF, warped image; against the same with MONAI's LocalNet.

python benchmarks/registration.py [--device cuda]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from monai.networks.blocks import Warp  # noqa: E402
from monai.networks.nets import LocalNet  # noqa: E402
from monai.transforms import NormalizeIntensity  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    check_same,
    clock,
    compared,
    matrix_rate,
    options,
    race,
    record,
    table,
)
from scripts.network.fields import resample, warp  # noqa: E402
from scripts.network.networks import ConvBN, SummedDDFNet  # noqa: E402
from scripts.registration.precision import PrecisionInferer, computes_bfloat16  # noqa: E402

FIXED, MOVING = (81, 118, 88), (120, 128, 128)  # voxels of 0.8 mm
PADDED = (96, 128, 96)  # LocalNet takes multiples of 16 only; ours pads to the same inside


def network(channels: int) -> SummedDDFNet:
    """In eval mode, with random heads that give displacements of some voxels."""
    torch.manual_seed(0)
    net = SummedDDFNet(channels)
    for summand in net.summands:
        nn.init.normal_(summand.conv.weight, std=0.05 / channels)
    return net.eval()


def unfolded(net: SummedDDFNet) -> SummedDDFNet:
    """The same weights, where they are, in the default layout, batch normalisation as a step of its own."""
    plain = SummedDDFNet(net.down[0].conv.conv.out_channels).to(next(net.parameters()).device).eval()
    for p in plain.parameters():
        p.data = p.data.contiguous()
    plain.load_state_dict(net.state_dict())
    for module in plain.modules():
        if isinstance(module, ConvBN):
            module.train()
            module.norm.eval()
    return plain


def normalise(image: Tensor) -> Tensor:
    """Zero mean and unit variance of each item."""
    variance, mean = torch.var_mean(image, dim=(1, 2, 3, 4), correction=0, keepdim=True)
    return (image - mean) * torch.rsqrt(variance)


def register(inferer: PrecisionInferer, net: nn.Module, moving: Tensor, fixed: Tensor, to_moving: Tensor) -> Tensor:
    """DDF and warped image of pairs (B, 1, …), together (B, 4, *FIXED)."""
    onto = torch.cat([resample(m, to_moving, fixed.shape[2:]) for m in normalise(moving).split(1)])
    ddf = inferer(torch.cat([onto, normalise(fixed)], dim=1), net)
    return torch.cat([ddf, warp(onto, ddf, padding_mode="border")], dim=1)


def stock(net: nn.Module, moving: Tensor, fixed: Tensor, to_moving: Tensor, half: bool) -> Tensor:
    """The same from MONAI's parts, with LocalNet on the padded grid."""
    z_score, pull = NormalizeIntensity(), Warp(mode="bilinear", padding_mode="border")
    onto = torch.stack([resample(z_score(m)[None], to_moving, fixed.shape[2:])[0] for m in moving])
    image = torch.cat([onto, torch.stack([z_score(f) for f in fixed])], dim=1)
    missing = [p - n for p, n in zip(PADDED, FIXED, strict=True)]
    padding = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    with torch.autocast(fixed.device.type, torch.bfloat16, enabled=half):
        ddf = net(nn.functional.pad(image, padding)).float()
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, FIXED, strict=True))
    ddf = ddf[(..., *inside)]
    return torch.cat([ddf, pull(onto, ddf)], dim=1)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--channels", type=int, default=32, help="n0; another than 32 is not recorded")
    arguments = parser.parse_args()
    rows = measure(arguments.device, arguments.channels)
    if arguments.channels == 32:
        record("registration", rows, device=arguments.device)
    else:
        print(table(rows))


@torch.inference_mode()
def measure(device: torch.device, channels: int) -> list[dict]:
    """Rows of one device."""
    torch.manual_seed(1)
    moving, fixed = torch.rand(1, 1, *MOVING, device=device), torch.rand(1, 1, *FIXED, device=device)
    to_moving = torch.eye(4, dtype=torch.float64)
    to_moving[:3, 3] = (torch.tensor(MOVING) - torch.tensor(FIXED)) / 2  # centre on centre
    net = network(channels).to(device)
    local = LocalNet(3, 2, channels, (0, 1, 2, 3, 4), out_kernel_initializer="zeros").to(device).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.cat([fixed, fixed], dim=1))
    work = counter.get_total_flops()
    plain = PrecisionInferer("float32")
    apart = unfolded(net)
    reference = register(plain, apart, moving, fixed, to_moving)
    print(f"{device.type}: {work / 1e9:.0f} GFLOP, largest displacement {reference[:, :3].abs().max():.1f} voxels")
    rows = []
    for precision, half in (("float32", False), ("bfloat16", True)):
        if half and not computes_bfloat16(device):
            print("no bfloat16 units here: precision auto is float32")
            continue
        inferer = PrecisionInferer(precision)
        found = register(inferer, net, moving, fixed, to_moving)
        check_same(f"DDF in voxels, {precision}", found[:, :3], reference[:, :3], 0.05, relative=False)
        theirs = Warp(mode="bilinear", padding_mode="border")(moving, moving.new_zeros(1, 3, *MOVING))
        check_same("warp", warp(moving, moving.new_zeros(1, 3, *MOVING), padding_mode="border"), theirs, 1e-4)
        sides = {
            "ours": lambda i=inferer: register(i, net, moving, fixed, to_moving),
            "LocalNet, float32": lambda: stock(local, moving, fixed, to_moving, False),
        }
        if half:
            sides["LocalNet, bfloat16"] = lambda: stock(local, moving, fixed, to_moving, True)
        else:
            name = "ours, batch norm apart, default layout"
            sides[name] = lambda: register(plain, apart, moving, fixed, to_moving)
        timed = race(sides, device, budget=90, most=5)
        rate = matrix_rate(torch.bfloat16 if half else torch.float32, device)
        what = {"device": device.type, "precision": inferer.used, "pairs/s": 1 / timed["ours"]["seconds"]}
        what["share of the matrix rate"] = work / timed["ours"]["seconds"] / rate
        rows += compared(what, timed)
        if device.type == "cuda":
            rows += throughput(inferer, net, moving, fixed, to_moving)
    return rows


def throughput(
    inferer: PrecisionInferer, net: nn.Module, moving: Tensor, fixed: Tensor, to_moving: Tensor
) -> list[dict]:
    """Pairs a second in batches, and the latency of single pairs."""
    single = sorted(clock(lambda: register(inferer, net, moving, fixed, to_moving), "cuda") for _ in range(200))
    rows = [
        {
            "device": "cuda",
            "precision": inferer.used,
            "against": "latency at batch 1",
            "p50 ms": 1e3 * statistics.median(single),
            "p95 ms": 1e3 * single[int(0.95 * len(single))],
        }
    ]
    for batch in (4, 8, 16):
        many = moving.expand(batch, -1, -1, -1, -1), fixed.expand(batch, -1, -1, -1, -1)
        seconds = race({"ours": lambda m=many: register(inferer, net, *m, to_moving)}, "cuda", budget=10)["ours"]
        what = {"device": "cuda", "precision": inferer.used, "against": f"batch of {batch}"}
        rows.append(what | {"pairs/s": batch / seconds["seconds"], "rounds": seconds["rounds"]})
    return rows


if __name__ == "__main__":
    main()
