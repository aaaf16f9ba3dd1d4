"""The example cases of a report: registered once more by configs/inference.json, and what is drawn of them.

A held-out case is registered with the weights of its own fold and the settings its evaluation had, which the log of the
run holds. OUT/report/cases/CASE keeps the registration, and `before` in it the initial transform alone.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from scripts.bundle.workflow import absolute, run_config
from scripts.data.checks import InputError, check_case_name, sha256
from scripts.data.datalist import KEYS, OPTIONS, datalist
from scripts.data.files import written_whole
from scripts.data.formats import forward, read_transform
from scripts.data.pairs import LoadPaird
from scripts.data.root import CONFIGS
from scripts.network import fields
from scripts.registration.metrics import centroid
from scripts.registration.outputs import PAGE
from scripts.registration.view import view, viewer_is_installed
from scripts.study.plan import LOG, WEIGHTS

MADE = "made.json"  # of what a kept registration was made; written last
SPLIT = ("dataset_dir", "fold", "fold_count", "fold_seed", "patient_pattern")


class Example(NamedTuple):
    """One case on its fixed grid, axes towards R, A, S; volumes (X, Y, Z), `spacing` in mm.

    `images` are fixed, moving before and after; `glands` likewise; `landmarks` are their centroids in mm from the first
    voxel, each (N, 3), NaN where a label is empty. `jacobian` (no unit, NaN at the border), `magnitude` (mm) and
    `gradient` (no unit) are of the displacement without the initial transform.
    """

    images: tuple[NDArray, NDArray, NDArray]
    glands: tuple[NDArray, NDArray, NDArray]
    landmarks: tuple[NDArray, NDArray, NDArray]
    jacobian: NDArray
    magnitude: NDArray
    gradient: NDArray
    spacing: NDArray


def choose(cases: Mapping[str, Mapping[str, str]], metric: str = "tre_with_gland_mm") -> dict[str, str]:
    """ "best", "median" and "worst" -> case, fewer names of fewer than three; a case without a value is the worst."""

    def error(case: str) -> float:
        value = float(cases[case][metric] or "nan")
        return math.inf if math.isnan(value) else value

    order = sorted(cases, key=lambda case: (error(case), case))
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    found = {place: name for name, place in reversed(places.items())}  # of two names for one place, the first
    return {name: order[place] for place, name in sorted(found.items())}


def example_cases(
    output: Path, variant: str, cases: Mapping[str, Mapping[str, str]], dataset_dir: str | None = None
) -> dict[str, tuple[Mapping[str, str], Example]]:
    """ "best", "median" and "worst" -> row and example of a case; those not kept already are registered.

    Args:
        output: the folder of a cross-validation.
        variant: which weights.
        cases: the variant's rows of cases.csv.
        dataset_dir: where the data set is now, if not where it was.
    """
    jobs, found = [], {}
    for name, case in choose(cases).items():
        run = output / "runs" / variant / f"fold{cases[case]['fold']}"
        overlays, settings = evaluation_of(run)
        settings |= {"dataset_dir": absolute(dataset_dir)} if dataset_dir else {}
        folder = kept_in(output, case)
        wanted = ingredients(case, run, settings, overlays)
        jobs.append((name, case, run, overlays, folder, wanted))
    todo = [job for job in jobs if not is_kept(job[-1], job[-2])]
    for _, _, run, overlays, folder, wanted in tqdm(todo, "Registering", unit="case", disable=not todo):
        register_case(wanted, run, overlays, folder)
    for name, case, *_, folder, wanted in jobs:
        found[name] = cases[case], read_example(folder, wanted["pair"], wanted["settings"])
    return found


def kept_in(output: Path, case: str) -> Path:
    """The folder of an example case's registration, `output` that of the cross-validation."""
    return output / "report" / "cases" / check_case_name(case)


def pages(output: Path, examples: Mapping[str, tuple[Mapping[str, str], Example]]) -> dict[str, Path]:
    """ "best", "median" and "worst" -> the page of the case's registration; none where no viewer is installed."""
    folders = {name: kept_in(output, row["case"]) for name, (row, _) in examples.items()}
    if not viewer_is_installed():
        return {}
    return {name: folder / PAGE if (folder / PAGE).is_file() else view(folder) for name, folder in folders.items()}


def evaluation_of(run: Path) -> tuple[list[Path], dict[str, Any]]:
    """The overlays and settings of a run's evaluation, read from its log, paths of configs/ those of this bundle.

    Raises:
        InputError: the log has no such command, or an overlay is gone.
    """
    log = run / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    found = [line for line in lines if line.startswith("$ python -m monai.bundle run") and "evaluate.json" in line]
    if not found:
        raise InputError(f"{log}: holds no evaluation; crossval writes its command there")
    words = shlex.split(found[-1])
    files = [Path(name) for name in ast.literal_eval(words[words.index("--config_file") + 1])]
    settings = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    overlays = []
    for file in files[1:]:
        here = CONFIGS / file.name if file.parent.name == CONFIGS.name else file
        here = here if here.is_file() else file
        if not here.is_file():
            raise InputError(f"{file}: not found; {run.parent.name} was evaluated with it")
        overlays.append(here)
    return overlays, {name: ast.literal_eval(value) for name, value in settings.items()}


def pair_of(case: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The files of a held-out case, by the settings of its evaluation."""
    split = {name: settings[name] for name in SPLIT if name in settings}
    found = [pair for pair in datalist(split=settings.get("split", "test"), **split) if pair["case"] == case]
    if not found:
        raise InputError(f"{settings['dataset_dir']}: case {case} is not among its fold's; is it the same data set?")
    return found[0]


def ingredients(case: str, run: Path, settings: Mapping[str, Any], overlays: Sequence[Path]) -> dict[str, Any]:
    """What a registration of a case is made of: files, weights, settings."""
    made = {"pair": pair_of(case, settings), "weights": sha256(str(run / WEIGHTS)), "settings": dict(settings)}
    return made | {"overlays": [overlay.read_text(encoding="utf-8") for overlay in overlays]}


def is_kept(wanted: Mapping[str, Any], folder: Path) -> bool:
    """Whether `folder` holds a registration that was made of the same."""
    made = folder / MADE
    return made.is_file() and json.loads(made.read_text(encoding="utf-8")) == json.loads(json.dumps(wanted))


def register_case(wanted: Mapping[str, Any], run: Path, overlays: Sequence[Path], folder: Path) -> None:
    """Register one case as its evaluation did, and by the initial transform alone, into `folder`."""
    (folder / MADE).unlink(missing_ok=True)
    known = set(json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8")))
    settings = {k: v for k, v in wanted["settings"].items() if k.split("#")[0] in known}
    settings |= {"datalist": [wanted["pair"]], "case_folders": False, "ckpt_path": str((run / WEIGHTS).absolute())}
    with quiet():
        for where, more in ((folder, {}), (folder / "before", {"use_network": False, "refine_steps": 0})):
            run_config("inference.json", *overlays, **settings | more | {"output_dir": str(where.absolute())})
    with written_whole(folder / MADE) as file:
        file.write(json.dumps(wanted, indent=1) + "\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed or logged but errors: a line would break the progress bar."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def read_example(folder: Path, case: Mapping[str, Any], settings: Mapping[str, Any]) -> Example:
    """What is drawn of a registration that `register_case` kept, `case` the files of its pair."""
    load = LoadPaird(**{name: settings[name] for name in ("label_values", *OPTIONS) if name in settings})
    pair = load({key: case[key] for key in (*KEYS, *OPTIONS) if key in case})
    affine = pair["fixed_image"].affine.double()
    reorient = Orientation(axcodes="RAS", labels=None)

    def ras(volume: Tensor) -> MetaTensor:
        return reorient(MetaTensor(torch.as_tensor(volume), affine=affine))

    spacing = ras(torch.zeros(1, *pair["fixed_image"].shape[1:])).affine[:3, :3].norm(dim=0)
    images, labels, moves = [pair["fixed_image"].as_tensor()], [pair["fixed_label"].as_tensor()], []
    for where in (folder / "before", folder):
        image, label = (
            torch.from_numpy(nib.load(where / f"{name}.nii.gz").get_fdata())
            for name in ("warped_moving_image", "warped_moving_label")
        )
        images.append(image[None])
        labels.append(label.movedim(-1, 0) if label.ndim == 4 else label[None])
        x = fields.world_grid(pair["fixed_image"].shape[1:], affine)
        moves.append((forward(read_transform(where / "ddf.nii.gz"), x)[0] - x)[0])
    labels = [ras(label.float()).as_tensor() for label in labels]
    present = labels[0][1:].flatten(1).any(1)
    maps = (ras(volume)[0].numpy() for volume in maps_of(moves[1], moves[0], affine))
    return Example(
        tuple(ras(image)[0].numpy() for image in images),
        tuple(label[0].numpy() for label in labels),
        tuple(centroid(label[1:][present][:, None], spacing).numpy() for label in labels),
        *maps,
        spacing.numpy(),
    )


def maps_of(displacement: Tensor, initial: Tensor, affine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps J, D and G (Hu et al. 2018, Fig. 10) of a displacement without its initial transform, each (1, X, Y, Z).

    J is the determinant of the Jacobian, NaN at the border; D the length of the displacement in mm; G the L2 norm of
    its nine derivatives, without unit.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, the initial transform composed in.
        initial: the displacement of the initial transform alone, likewise; an affine map.
        affine: voxel -> world of their grid, shape (4, 4).
    """
    size = displacement.shape[1:]
    x = fields.world_grid(size, affine)
    corners = x[0, :, :: size[0] - 1, :: size[1] - 1, :: size[2] - 1].flatten(1).T
    ends = corners + initial[:, :: size[0] - 1, :: size[1] - 1, :: size[2] - 1].flatten(1).T
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3] = torch.linalg.lstsq(torch.cat([corners, torch.ones(8, 1, dtype=torch.float64)], 1), ends).solution.T
    u = fields.transform_points(torch.linalg.inv(matrix), x + displacement[None]) - x
    jacobian = torch.full((1, *size), torch.nan, dtype=torch.float64)
    jacobian[:, 1:-1, 1:-1, 1:-1] = fields.jacobian_determinant(u, affine)
    derivatives = torch.stack(torch.gradient(u[0], dim=(1, 2, 3)), -1) @ torch.linalg.inv(affine[:3, :3])
    return jacobian, u.norm(dim=1), derivatives.square().sum((0, -1)).sqrt()[None]
