"""The folder a registration leaves: warped image, field, warped labels, a picture and a QA record."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from monai.utils import ensure_tuple
from torch import Tensor

from scripts import fields, figures, formats, metrics
from scripts.checks import InputError
from scripts.transforms import to_original_grid

NOTICE = "Research use only. Not for clinical decisions."
PLAUSIBLE = (0.6, 1.65)  # stretch of a start alignment; between true glands it was 0.72 to 1.48 in 20 real pairs


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A folder to write in, whose content moves to `folder`, in the order it was written, when the block ends well.

    Raises:
        InputError: `folder` cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield partial
        for path in sorted(partial.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)  # a folder replaces only an empty one
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray, dtype: type, intent: str = "none") -> None:
    """Write a NIfTI file in mm, sform = qform = `affine` (RAS); the first three axes of `volume` are x, y, z."""
    image = nib.Nifti1Image(np.ascontiguousarray(volume, dtype=dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    nib.save(image, path)


def save_displacement(path: Path, displacement: np.ndarray, affine: np.ndarray) -> None:
    """Write a displacement as ITK, SimpleITK, 3D Slicer and ANTs read it: 5-D (X, Y, Z, 1, 3), intent 1007, LPS mm.

    Args:
        displacement: shape (3, X, Y, Z), RAS mm, fixed world -> moving world minus identity.
        affine: voxel -> world of the fixed grid, RAS mm.
    """
    lps = displacement * np.array([-1, -1, 1]).reshape(3, 1, 1, 1)
    save_volume(path, np.moveaxis(lps, 0, -1)[..., None, :], affine, dtype=np.float64, intent="vector")


def deformation(item: Mapping[str, Any]) -> Tensor:
    """The displacement without the start alignment, (1, 3, X, Y, Z), mm in the fixed world: S⁻¹(T(x)) − x."""
    affine, size = item["original_fixed_image"].affine.double(), item["displacement"].shape[1:]
    x = fields.transform_points(affine, fields.identity_grid(size, torch.float64, "cpu")[None])
    start = torch.linalg.inv(item["start"].double().cpu())
    return fields.transform_points(start, x + item["displacement"][None]) - x


def quality(item: Mapping[str, Any], before: Mapping[str, Tensor], moved: Tensor) -> dict[str, Any]:
    """The QA figures of one registration: folding, Jacobian, displacement, coverage, start; with labels, DSC and TRE.

    Args:
        item: what `scripts.transforms.ToOriginalGridd` leaves.
        before: `scripts.transforms.to_original_grid` of the start alignment alone.
        moved: its `deformation`.
    """
    affine = item["original_fixed_image"].affine
    displacement = item["displacement"][None]
    covered = torch.ones_like(item["original_moving_image"].as_tensor())[None]
    covered = fields.pull(covered, item["original_moving_image"].affine, displacement, affine)
    stretch = torch.linalg.svdvals(item["start"][:3, :3].double())
    record = metrics.jacobian_statistics(displacement[0], affine) | {
        "max_displacement_mm": moved.norm(dim=1).max().item(),
        "covered_percent": 100 * (covered > 0).double().mean().item(),
        "start_stretch_min": stretch.min().item(),
        "start_stretch_max": stretch.max().item(),
    }
    if "original_fixed_label" in item and "warped_moving_label" in item:
        fixed = item["original_fixed_label"].as_tensor()
        for suffix, warped in (("_before", before["moving_label"]), ("", item["warped_moving_label"])):
            scores, _ = metrics.score_case(warped, fixed, affine[:3, :3].norm(dim=0))
            record[f"gland_dsc{suffix}"] = scores["dsc"]
            record[f"tre{suffix}_mm"] = scores["tre_mm"]
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


def flags(record: Mapping[str, Any]) -> list[str]:
    """What about a registration should make its reader doubt it, in words; see `quality`."""
    found = []
    low, high = PLAUSIBLE
    if record["start_stretch_min"] < low or record["start_stretch_max"] > high:
        found.append("implausible start, the glands found differ too much")
    if record["folded_percent"] > 0:
        found.append("the field folds")
    return found


def save_overview(
    path: Path, item: Mapping[str, Any], before: Mapping[str, Tensor], moved: Tensor, record: Mapping[str, Any]
) -> None:
    """Draw `scripts.figures.overview` for one case on the original fixed grid, axes reordered to RAS; see `quality`."""
    affine = item["original_fixed_image"].affine.double()
    reorient = Orientation(axcodes="RAS", labels=None)

    def ras(volume: Tensor) -> MetaTensor:
        plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
        return reorient(MetaTensor(plain, affine=affine))

    world = ras(moved[0])
    ddf = torch.einsum("ij,j...->i...", torch.linalg.inv(world.affine[:3, :3].double()), world.as_tensor())
    glands = {
        "fixed_gland": item.get("original_fixed_label"),
        "gland_before": before.get("moving_label"),
        "gland_after": item.get("warped_moving_label"),
    }
    facts = [
        f"folded voxels {record['folded_percent']:.2f} %",
        f"largest displacement {record['max_displacement_mm']:.1f} mm",
    ]
    if record.get("tre_mm") is not None:
        facts.insert(0, f"TRE {record['tre_before_mm']:.1f} → {record['tre_mm']:.1f} mm")
    if record.get("gland_dsc") is not None:
        facts.insert(0, f"gland DSC {record['gland_dsc_before']:.2f} → {record['gland_dsc']:.2f}")
    facts[:0] = [f"CHECK: {flag}" for flag in record["flags"]]
    figures.overview(
        path,
        ras(item["original_fixed_image"].as_tensor())[0].numpy(),
        ras(before["moving_image"])[0].numpy(),
        ras(item["warped_moving_image"])[0].numpy(),
        ddf.numpy(),
        world.affine[:3, :3].norm(dim=0).tolist(),
        facts=facts,
        **{k: ras(torch.as_tensor(v)[:1].float())[0].numpy() for k, v in glands.items() if v is not None},
    )


def save_registration(
    folder: Path, item: Mapping[str, Any], provenance: Mapping[str, Any], tools: Sequence[str] = ()
) -> list[str]:
    """Write everything one registration leaves into `folder`, or nothing: files appear when all of them are complete.

    Args:
        item: what `scripts.transforms.ToOriginalGridd` leaves.
        provenance: for the QA record.
        tools: whose transform files to write beside ddf.nii.gz, see `scripts.formats.FILES`.

    Returns:
        What is to be checked, see `flags`.

    Raises:
        InputError: the folder cannot be written.
    """
    with written_together(folder) as partial:
        affine = item["original_fixed_image"].affine.numpy()
        save_volume(
            partial / "warped_moving_image.nii.gz", item["warped_moving_image"][0].numpy(), affine, dtype=np.float32
        )
        save_displacement(partial / "ddf.nii.gz", item["displacement"].numpy(), affine)
        formats.save_formats(partial, tools, item, affine, final=folder)
        if "warped_moving_label" in item:
            binary = (item["warped_moving_label"] >= 0.5).movedim(0, -1).numpy()
            binary = binary[..., 0] if binary.shape[-1] == 1 else binary
            save_volume(partial / "warped_moving_label.nii.gz", binary, affine, dtype=np.uint8)
        before = to_original_grid(item, torch.zeros_like(item["pred"]))
        moved = deformation(item)
        record = quality(item, before, moved)
        record["flags"] = flags(record)
        save_overview(partial / "overview.png", item, before, moved, record)
        known = {k: item[k] for k in ("case", "moving_file", "fixed_file")}
        record = {"notice": NOTICE} | known | record | dict(provenance)
        (partial / "qa.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record["flags"]


def sha256(path: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class SaveRegistrations:
    """Ignite handler that writes each registered case, see `save_registration`.

    Args:
        output_dir: one folder per case is made in it.
        weights: the weights file, for its SHA-256 in the QA record; None without one.
        start: the start alignment's name, for the QA record.
        start_weights: the weights file of a learned start, or several, likewise.
        case_folders: False writes straight into `output_dir`; for a single case.
        tools: whose transform files to write, a list or separated by commas, see `scripts.formats.checked_formats`.
        pairs: the datalist, for what some tools need of the inputs.

    Raises:
        InputError: an unknown tool, or inputs that its file cannot be written for.
    """

    def __init__(
        self,
        output_dir: str,
        weights: str | None,
        start: str,
        start_weights: str | Sequence[str] | None = None,
        case_folders: bool = True,
        tools: str | Sequence[str] | None = None,
        pairs: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.output_dir = Path(output_dir)
        self.case_folders = case_folders
        self.tools = formats.checked_formats(tools, pairs)
        self.provenance: dict[str, Any] = {"start": start}
        self.provenance |= {"weights": weights, "weights_sha256": weights and sha256(weights)}
        starts = ensure_tuple(start_weights) if start_weights else ()
        self.provenance |= {"start_weights": list(starts), "start_weights_sha256": [sha256(path) for path in starts]}
        self.provenance |= {"torch": torch.__version__, "monai": monai.__version__}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            item = {**batch, **output}
            folder = self.output_dir / item["case"] if self.case_folders else self.output_dir
            found = save_registration(folder, item, self.provenance | {"precision": engine.inferer.used}, self.tools)
            print("; ".join([f"{item['case']}: {folder}", *(f"CHECK: {flag}" for flag in found)]))
