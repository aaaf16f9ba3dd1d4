"""Seconds to register one pair: the network, elastix (B-spline) and ANTs (SyN), on the same two arrays.

The pair is a phantom of a clinical size, TRUS 81 x 118 x 88 and MR 120 x 128 x 128 voxels of 0.8 mm, brought onto the
TRUS grid by the centre start beforehand. Each side takes the two arrays and returns the warped MR. The tools optimise
different things, so there is no check that they compute the same. The network's weights are random, seeded: its time
does not depend on their values, its accuracy is not measured here. All sides may use as many threads as PyTorch does.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import measure  # noqa: E402
from scripts.network import fields  # noqa: E402
from scripts.network.networks import SummedDDFNet  # noqa: E402
from scripts.phantoms.phantom import simulate_pair  # noqa: E402
from scripts.registration import metrics  # noqa: E402
from scripts.registration.transforms import OntoFixedGridd  # noqa: E402
from scripts.training.cohort import as_loaded  # noqa: E402

SPACING = 0.8  # mm, of every volume


def phantom_pair(scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Moving and fixed image, moving and fixed gland, each (1, 1, X, Y, Z) on the fixed grid, and its spacing in mm.

    Args:
        scale: of the number of voxels along each axis; the field of view stays.
    """
    fixed, moving = ([round(n * scale) for n in size] for size in ((81, 118, 88), (120, 128, 128)))
    spacing = SPACING / scale
    data = as_loaded(simulate_pair(np.random.default_rng(0), fixed, spacing, moving, spacing))
    for key in ("moving_label", "fixed_label"):
        data[key] = data[key][:1]
    data = OntoFixedGridd(spacing, "centre")(data)
    moving_image, fixed_image = torch.as_tensor(data["image"])[:, None, None]
    labels = (torch.as_tensor(data[f"{side}_label"])[None] for side in ("moving", "fixed"))
    return moving_image, fixed_image, *labels, spacing


def register(network: torch.nn.Module, moving: Tensor, fixed: Tensor) -> Tensor:
    """The moving image warped by the network's field; images (1, 1, X, Y, Z) on one grid, as they were read."""
    with torch.inference_mode():
        normalised = torch.cat([(image - image.mean()) / image.std() for image in (moving, fixed)], dim=1)
        return fields.warp(moving, network(normalised))


def dice(label: np.ndarray, fixed_label: Tensor) -> float:
    """DSC of the gland, without unit."""
    return metrics.dice(torch.from_numpy(np.ascontiguousarray(label))[None, None], fixed_label).item()


def elastix_sides(moving: Tensor, fixed: Tensor, spacing: float) -> tuple[Callable, Callable]:
    """elastix: registers and returns the transform; warps a label (1, 1, X, Y, Z) to (X, Y, Z) by it. Spacing in mm."""
    import itk

    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())

    def image(volume: Tensor) -> Any:
        made = itk.image_from_array(np.ascontiguousarray(volume[0, 0].numpy().transpose(2, 1, 0)))
        made.SetSpacing([spacing] * 3)
        return made

    settings = {
        "Registration": "MultiResolutionRegistration",
        "Metric": "AdvancedMattesMutualInformation",
        "Transform": "BSplineTransform",
        "BSplineTransformSplineOrder": "3",
        "FinalGridSpacingInPhysicalUnits": "10",  # mm
        "NumberOfResolutions": "3",
        "GridSpacingSchedule": ("4", "2", "1"),
        "FixedImagePyramid": "FixedSmoothingImagePyramid",
        "MovingImagePyramid": "MovingSmoothingImagePyramid",
        "Optimizer": "AdaptiveStochasticGradientDescent",
        "AutomaticParameterEstimation": "true",
        "MaximumNumberOfIterations": "500",  # at each resolution
        "ImageSampler": "RandomCoordinate",
        "NumberOfSpatialSamples": "2048",
        "NewSamplesEveryIteration": "true",
        "Interpolator": "LinearInterpolator",
        "ResampleInterpolator": "FinalLinearInterpolator",
        "RandomSeed": "1",
    }
    parameters = itk.ParameterObject.New()
    parameters.AddParameterMap({k: [v] if isinstance(v, str) else [*v] for k, v in settings.items()})
    moving_image, fixed_image = image(moving), image(fixed)

    def align() -> Any:
        threads = torch.get_num_threads()  # has to be said: left out, one thread does most of the work
        return itk.elastix_registration_method(
            fixed_image, moving_image, parameter_object=parameters, number_of_threads=threads
        )[1]

    def warp(transform: Any, label: Tensor) -> np.ndarray:
        warped = itk.transformix_filter(image(label), transform_parameter_object=transform)
        return itk.array_from_image(warped).transpose(2, 1, 0)

    return align, warp


def ants_sides(
    moving: Tensor, fixed: Tensor, spacing: float, folder: str, kind: str = "SyNOnly"
) -> tuple[Callable, Callable]:
    """ANTs: registers and returns the transform's files, written to `folder`; warps a label by them. Spacing in mm.

    Args:
        kind: ANTs' name of the transform: "SyNOnly", or "SyN" for an affine registration before it.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(torch.get_num_threads())  # read when ants is imported
    import ants

    moving_image, fixed_image = (ants.from_numpy(v[0, 0].numpy(), spacing=(spacing,) * 3) for v in (moving, fixed))

    def align() -> list[str]:
        done = ants.registration(fixed_image, moving_image, kind, "Identity", outprefix=f"{folder}/")
        return done["fwdtransforms"]

    def warp(transforms: list[str], label: Tensor) -> np.ndarray:
        image = ants.from_numpy(label[0, 0].numpy(), spacing=(spacing,) * 3)
        return ants.apply_transforms(fixed_image, image, transforms, interpolator="linear").numpy()

    return align, warp


def rows(scale: float, budget: float, folder: str) -> list[dict[str, Any]]:
    """One row per tool; `budget` in seconds for the rounds on the CPU, after a warm-up. ANTs writes to `folder`."""
    moving, fixed, moving_label, fixed_label, spacing = phantom_pair(scale)
    torch.manual_seed(0)
    network = SummedDDFNet(initial_channels=32).eval()
    tools = {
        "elastix B-spline": elastix_sides(moving, fixed, spacing),
        "ANTs SyN": ants_sides(moving, fixed, spacing, folder),
    }
    transforms: dict[str, Any] = {}
    sides: dict[str, Callable] = {"ours, CPU": lambda: register(network, moving, fixed)}
    for name, (align, _) in tools.items():
        sides[name] = lambda name=name, align=align: transforms.update({name: align()})
    times = measure.race(sides, budget=budget)
    if torch.cuda.is_available():
        on_gpu, pair = network.cuda(), (moving.cuda(), fixed.cuda())
        times |= measure.race({"ours, GPU": lambda: register(on_gpu, *pair)}, "cuda", budget=budget)
    notes = {
        "elastix B-spline": "mutual information, not regularised; 3 levels of 500 iterations, 2048 samples, 10 mm grid",
        "ANTs SyN": "mutual information, 40, 20 and 0 iterations",
    }
    made = []
    for name, time in times.items():
        after = dice(tools[name][1](transforms[name], moving_label), fixed_label) if name in tools else None
        made.append(
            {"tool": name, **time, "times ours": time["seconds"] / times["ours, CPU"]["seconds"]}
            | {"gland DSC before": dice(moving_label[0, 0].numpy(), fixed_label), "gland DSC after": after}
            | {"note": notes.get(name, "random weights: accuracy is not measured here")}
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds to register one pair: the network, elastix and ANTs.",
        epilog="Example: python -m benchmarks.classical --scale 0.5 --budget 30",
    )
    parser.add_argument("--scale", type=float, default=1, help="of the sizes; other than 1 records nothing (default 1)")
    parser.add_argument("--budget", type=float, default=120, help="seconds for the rounds on the CPU (default 120)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = rows(arguments.scale, arguments.budget, folder)
    if arguments.scale == 1:
        measure.record("classical", made)
        return
    for row in made:
        print(", ".join(f"{k}: {measure.shown(v)}" for k, v in row.items() if v is not None))


if __name__ == "__main__":
    main()
