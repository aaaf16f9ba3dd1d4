"""Seconds of `python -m scripts --help`, and of `python -m scripts register` stage by stage, each from a new process.

The pair is a phantom of a clinical size, TRUS 81 x 118 x 88 and MR 120 x 128 x 128 voxels of 0.8 mm; the weights are
random. The stages are timed in a process of their own, in which the bundle's functions are wrapped in clocks; a stage
does not count the stages inside it, so they add up. The files are in the page cache, as after a first use.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python benchmarks/startup.py`

HELP_TARGET = 1.0  # seconds
EXPLAINED = 0.8  # of the wall time that the stages have to add up to
IMPORTS = {  # stage -> modules, in this order
    "import torch": ["torch"],
    "import monai and ignite": ["monai.bundle"],
    "import scripts": [
        "scripts.network.networks",
        "scripts.training.engine",
        "scripts.registration.outputs",
        "scripts.__main__",
    ],
}
STAGES = {  # stage -> functions, module:name
    "read the config, build what it names": [
        "monai.bundle:ConfigWorkflow.__init__",
        "monai.bundle:ConfigWorkflow.initialize",
    ],
    "build the network": ["scripts.network.networks:SummedDDFNet.__init__"],
    "check, hash and load the weights": [
        "scripts.data.weights:check_weights",
        "scripts.registration.outputs:SaveRegistrations.__init__",
        "monai.handlers:CheckpointLoader.__call__",
    ],
    "read the two files": ["scripts.data.pairs:LoadPaird.__call__"],
    "normalise": ["monai.transforms:NormalizeIntensityd.__call__"],
    "onto the working grid": ["scripts.registration.transforms:OntoFixedGridd.__call__"],
    "network and self-check": ["scripts.registration.precision:PrecisionInferer.__call__"],
    "onto the original grid": ["scripts.registration.transforms:ToOriginalGridd.__call__"],
    "QC: initial transform alone": [
        "scripts.registration.outputs:to_original_grid",
        "scripts.registration.outputs:qc.deformation",
    ],
    "QC: folding, coverage, displacement": ["scripts.registration.outputs:qc.quality"],
    "write the overview": ["scripts.registration.outputs:save_overview"],
    "write ddf.nii.gz": ["scripts.registration.outputs:save_displacement"],
    "write the warped image and qc.json": ["scripts.registration.outputs:save_registration"],
}


def instrumented() -> None:
    """`python -m scripts` with sys.argv[2:], its stages' seconds written to the JSON file sys.argv[1]."""
    began = time.time()
    seconds: dict[str, float] = dict.fromkeys([*IMPORTS, *STAGES], 0.0)
    inside = [0.0]

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        inside.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - started
            seconds[name] += took - inside.pop()
            inside[-1] += took

    for name, modules in IMPORTS.items():
        with stage(name):
            for module in modules:
                importlib.import_module(module)
    for name, functions in STAGES.items():
        for module, _, path in (function.partition(":") for function in functions):
            owner, _, attribute = path.rpartition(".")
            owner = attrgetter(owner)(sys.modules[module]) if owner else sys.modules[module]
            setattr(owner, attribute, stage(name)(getattr(owner, attribute)))
    out, sys.argv = sys.argv[1], ["scripts", *sys.argv[2:]]
    sys.modules["scripts.__main__"].main()
    Path(out).write_text(json.dumps({"began": began, "ended": time.time(), "seconds": seconds}))


def wall(command: list[str]) -> float:
    """Seconds of a Python process, from the repository's root."""
    started = time.time()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.time() - started


def staged(arguments: list[str], out: Path) -> dict[str, float]:
    """Seconds of each stage of `python -m scripts` with these arguments, and of the `whole process`."""
    started = time.time()
    whole = wall(["-c", "from benchmarks import startup; startup.instrumented()", str(out), *arguments])
    found = json.loads(out.read_text())
    stages = {"Python starts": found["began"] - started, **found["seconds"]}
    stages["Python ends"] = started + whole - found["ended"]
    return stages | {"other": whole - sum(stages.values()), "whole process": whole}


def prepare(folder: Path, channels: int) -> list[str]:
    """Write a phantom pair and random weights; returns the arguments that register the pair."""
    import torch

    from scripts.network.networks import SummedDDFNet
    from scripts.phantoms.phantom import write_cohort

    sizes = {"fixed_shape": (81, 118, 88), "moving_shape": (120, 128, 128), "fixed_spacing": 0.8, "moving_spacing": 0.8}
    cohort = write_cohort(folder / "cohort", patients=1, split=(0, 0, 1), **sizes) / "test"
    torch.manual_seed(0)
    network = SummedDDFNet(initial_channels=channels)
    for summand in network.summands:
        torch.nn.init.normal_(summand.conv.weight, std=1e-2)  # a field of about 2 mm
    torch.save(network.state_dict(), folder / "model.pt")
    return [
        "register",
        "--overlay",
        str(ROOT / "configs" / "baseline.yaml"),
        "--initial_channels",
        str(channels),
        "--ckpt_path",
        str(folder / "model.pt"),
    ] + [f"--{side}={cohort / f'{side}_images' / 'case000000.nii.gz'}" for side in ("moving", "fixed")]


def rows(channels: int, rounds: int) -> list[dict[str, Any]]:
    """One row per command, then one per stage of `register`; after a warm-up each, the median of `rounds` processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        register = [*prepare(folder, channels), "--output_dir", str(folder / "out")]
        commands = {"--help": ["-m", "scripts", "--help"], "register": ["-m", "scripts", *register]}
        made = []
        for verb, command in commands.items():
            wall(command)
            times = sorted(wall(command) for _ in range(rounds))
            made.append(
                {"stage": f"python -m scripts {verb}", "seconds": times[rounds // 2], "share": None}
                | {"fastest": times[0], "slowest": times[-1]}
            )
        runs = [staged(register, folder / "stages.json") for _ in range(rounds)]
    runs.sort(key=lambda run: run["whole process"])
    stages = runs[rounds // 2]
    whole = stages.pop("whole process")
    if stages["other"] > (1 - EXPLAINED) * whole:
        sys.exit(f"the stages explain less than {EXPLAINED:.0%} of {whole:.1f} s; are their functions still called?")
    made += [{"stage": k, "seconds": v, "share": f"{v / whole:.1%}"} for k, v in stages.items()]
    return [*made, {"stage": "register, the sum of its stages", "seconds": whole, "share": "100%"}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds of `python -m scripts --help`, and of each stage of `python -m scripts register`.",
        epilog="Example: python -m benchmarks.startup --channels 8 --rounds 1",
    )
    parser.add_argument("--channels", type=int, help="n0 of the network; if given, nothing is recorded (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default 3)")
    arguments = parser.parse_args()
    made = rows(arguments.channels or 32, arguments.rounds)

    from benchmarks import measure  # only now: it imports torch, which a process in which torch is timed must not

    if arguments.channels is None:
        measure.record("startup", made)
    else:
        for row in made:
            print(", ".join(f"{k}: {measure.shown(v)}" for k, v in row.items() if v is not None))
    if made[0]["seconds"] > HELP_TARGET:
        sys.exit(f"--help takes {made[0]['seconds']:.2f} s, more than {HELP_TARGET} s")


if __name__ == "__main__":
    main()
