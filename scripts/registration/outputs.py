"""The folder a registration leaves: warped image, field, warped labels, a picture and a QC record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from monai.utils import ensure_tuple
from torch import Tensor

from scripts.data import formats, renamed
from scripts.data.checks import InputError, check_case_name, sha256
from scripts.data.files import written_together
from scripts.data.formats import Grid, save_displacement
from scripts.data.root import VERSION
from scripts.data.volumes import save_volume
from scripts.network import fields
from scripts.registration import figures, qc
from scripts.registration.initial_transform import read_initial_transform
from scripts.registration.segmentation import on_image
from scripts.registration.transforms import as_headers_say, to_original_grid

LABEL = "warped_moving_label.nii.gz"
DRAWN = 2_500_000  # voxels of the volumes that a picture is drawn of: its panels have 260 pixels
GLANDS = ("moving_gland.nii.gz", "fixed_gland.nii.gz")
SPREAD = "spread.nii.gz"
PAGE = "view.html"  # which `scripts.registration.view` writes
NOTICE = "Research use only. Not for clinical decisions."


def save_overview(path: Path, item: Mapping[str, Any], moved: Tensor, record: Mapping[str, Any]) -> None:
    """Draw `figures.overview` for one case in axes RAS, on every so-manieth voxel of the fixed image, at most `DRAWN`.

    Without labels its outlines are those of the glands that a learned initial transform found.
    """
    fixed = item["original_fixed_image"]
    reorient = Orientation(axcodes="RAS", labels=None)
    upright = reorient(MetaTensor(fixed.as_tensor(), affine=fixed.affine.double()))
    every = drawn_every(upright.shape[1:])
    shown = (slice(None), *(slice(None, None, k) for k in every))
    affine = upright.affine.double() @ torch.diag(torch.tensor([*every, 1], dtype=torch.float64))
    size = upright[shown].shape[1:]

    def ras(volume: Tensor) -> np.ndarray:
        plain = volume.as_tensor() if isinstance(volume, MetaTensor) else torch.as_tensor(volume)
        return reorient(MetaTensor(plain[:1].float(), affine=fixed.affine.double())).as_tensor()[shown][0].numpy()

    (centred,) = read_initial_transform("centre", item["original_moving_image"], fixed)

    def before(volume: MetaTensor) -> np.ndarray:  # on its way nowhere: the centres of the two images coincide
        to_volume = torch.linalg.inv(volume.affine.double().cpu()) @ centred @ affine
        there = fields.resample(volume.as_tensor()[None, :1].cpu().float(), to_volume, size, padding_mode="outside")
        return there[0, 0].numpy()

    world = fields.resample(moved, torch.linalg.inv(item["field_affine"]) @ affine, size)[0]
    ddf = torch.einsum("ij,j...->i...", torch.linalg.inv(affine[:3, :3]), world)
    labels = {"fixed_gland": "original_fixed_label", "gland_after": "warped_moving_label"}
    glands = {name: ras(item[key]) for name, key in labels.items() if key in item}
    if "original_moving_label" in item:
        glands["gland_before"] = before(item["original_moving_label"])
    found = len(item["image"]) == 4 and not glands
    if found:
        glands = {name: gland[0].numpy() for name, gland in glands_found(item, affine, size).items()}
        glands["gland_before"] = before(item["original_moving_gland"])
    facts = [qc.motion(record), f"folded voxels {record['folded_percent']:.2f} %"]
    if record.get("gland_dsc") is not None:
        facts.append(f"gland DSC {record['gland_dsc_before']:.2f} → {record['gland_dsc']:.2f} by the deformation")
    if record.get("tre_mm") is not None:
        facts.append(f"TRE {record['tre_before_mm']:.1f} → {record['tre_mm']:.1f} mm")
    flags = [f"CHECK: {flag.split(' (')[0]}" for flag in record["flags"]]  # two fit; their figures are in the record
    facts[:0] = flags if len(flags) < 3 else [f"CHECK: {len(flags)} flags in qc.json", *flags[:1]]
    figures.overview(
        path,
        upright.as_tensor()[shown][0].numpy(),
        before(item["original_moving_image"]),
        ras(item["warped_moving_image"]),
        ddf.numpy(),
        affine[:3, :3].norm(dim=0).tolist(),
        facts=facts,
        gland_name="gland found" if found else "gland",
        slices=upright.shape[1:],
        **glands,
    )


def drawn_every(size: Sequence[int]) -> list[int]:
    """Of how many voxels along each axis one is drawn: where there are most of them, more are left out."""
    every = [1] * len(size)
    while math.prod(-(-n // k) for n, k in zip(size, every, strict=True)) > DRAWN:
        every[max(range(len(size)), key=lambda i: size[i] / every[i])] += 1
    return every


def glands_found(item: Mapping[str, Any], affine: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
    """The glands in the network's input on a grid of the fixed world, the moving one registered, (1, X, Y, Z)."""
    image, ddf = (torch.as_tensor(item[key])[None].cpu().float() for key in ("image", "pred"))
    moving, fixed = image[:, 2:3], image[:, 3:4]
    on_grid = torch.cat([fixed, fields.warp(moving, ddf)], dim=1)
    to_grid = torch.linalg.inv(item["grid_affine"].cpu().double()) @ affine
    there = fields.resample(on_grid, to_grid, size, padding_mode="outside")[0]
    return dict(zip(("fixed_gland", "gland_after"), there.split(1), strict=True))


def segmented_by(weights: str | Sequence[str] | None) -> dict[str, Any]:
    """Of a QC record: the weights files that found the gland, with their SHA-256, and the versions of the software."""
    paths = list(ensure_tuple(weights)) if weights else []
    return {
        "segmentation_weights": paths,
        "segmentation_weights_sha256": [sha256(path) for path in paths],
        "version": VERSION,
        "torch": torch.__version__,
        "monai": monai.__version__,
    }


def save_registration(
    folder: Path,
    item: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tools: Sequence[str] = (),
    limits: Mapping[str, Any] | None = None,
    doubts: Mapping[str, float | None] | None = None,
    write_glands: bool = False,
    apart: Tensor | None = None,
) -> list[str]:
    """Write everything one registration leaves into `folder`, or nothing: files appear when all of them are complete.

    Args:
        item: what `scripts.registration.transforms.ToOriginalGridd` leaves.
        provenance: for the QC record.
        tools: whose transform files to write beside ddf.nii.gz, see `scripts.data.formats.FILES`.
        limits: see `scripts.registration.qc.flags`.
        doubts: see `scripts.registration.qc.quality`.
        write_glands: whether to write the glands that were found, each on its image's grid.
        apart: how far the fields of several networks are from their mean, (X, Y, Z), voxels of the working grid; it is
            written in mm on the grid of the field, beyond the working grid as at its border.

    Returns:
        What is to be checked, see `scripts.registration.qc.flags`.

    Raises:
        InputError: the folder cannot be written.
    """
    with written_together(
        folder, stale={LABEL, SPREAD, *GLANDS, PAGE, formats.WARPED_SERIES, *formats.FILES.values()}
    ) as partial:
        told = as_headers_say(item)
        affine = told["original_fixed_image"].affine.numpy()
        save_volume(
            partial / "warped_moving_image.nii.gz", item["warped_moving_image"][0].numpy(), affine, dtype=np.float32
        )
        field_affine = told["field_affine"].numpy()
        fixed = Grid(affine, tuple(told["original_fixed_image"].shape[1:]))
        save_displacement(partial / "ddf.nii.gz", told["displacement"].numpy(), field_affine, np.float32, fixed)
        formats.save_formats(partial, tools, told, field_affine, fixed, final=folder)
        for side, name in zip(("moving", "fixed"), GLANDS, strict=True) if write_glands else ():
            image = told[f"original_{side}_image"]
            gland = on_image(item[f"original_{side}_gland"], item[f"original_{side}_image"])[0] > 0.5
            save_volume(partial / name, gland.numpy(), image.affine.numpy(), dtype=np.uint8)
        if apart is not None:
            grid_affine, size = torch.as_tensor(item["grid_affine"]).cpu(), item["displacement"].shape[1:]
            to_grid = torch.linalg.inv(grid_affine.double()) @ item["field_affine"]
            spread = fields.resample(apart[None, None].cpu().double(), to_grid, size)[0, 0]
            spread *= grid_affine[:3, :3].norm(dim=0).mean()
            save_volume(partial / SPREAD, spread.numpy(), field_affine, dtype=np.float32)
        if "warped_moving_label" in item:
            binary = (item["warped_moving_label"] >= 0.5).movedim(0, -1).numpy()
            binary = binary[..., 0] if binary.shape[-1] == 1 else binary
            save_volume(partial / LABEL, binary, affine, dtype=np.uint8)
        moved = qc.deformation(item)
        labelled = {"original_fixed_label", "warped_moving_label"} <= set(item)
        before = to_original_grid(item, torch.zeros_like(item["pred"])) if labelled else {}
        record = qc.quality(item, before, moved, doubts)
        matrix = None if "initial_displacement" in item else item["initial_transform"].tolist()
        record |= {"initial_matrix": matrix}
        record |= {"flags": qc.flags(record, limits or {}), "limits": dict(limits or {})}
        save_overview(partial / "overview.png", item, moved, record)
        known = {k: item[k] for k in ("case", "moving_file", "fixed_file")}
        known |= {"read_as": json.loads(item["read_as"])} if "read_as" in item else {}  # of files
        known["fingerprints"] = {side: fingerprint(item, side) for side in ("moving", "fixed")}
        record = {"notice": NOTICE} | known | record | dict(provenance)
        for name, written in (("qc.json", record), ("qa.json", renamed.former(record))):  # the latter until 0.6
            (partial / name).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return record["flags"]


def fingerprint(item: Mapping[str, Any], side: str) -> str:
    """SHA-256 of an image's voxels and of the affine that its header says: another image has another.

    Args:
        item: with `original_…_image`, or `…_image` as `scripts.data.pairs.LoadPaird` leaves it, and `…_header`.
        side: "moving" or "fixed".
    """
    image = item[f"original_{side}_image"] if f"original_{side}_image" in item else item[f"{side}_image"]
    affine = torch.as_tensor(item.get(f"{side}_header", image.affine)).cpu().numpy().astype("<f8")
    voxels = image.as_tensor().cpu().numpy().astype("<f4")
    return hashlib.sha256(affine.tobytes() + voxels.tobytes()).hexdigest()


class SaveRegistrations:
    """Ignite handler that writes each registered case, see `save_registration`.

    Args:
        output_dir: one folder per case is made in it.
        weights: the weights file, or several, for its SHA-256 in the QC record; None without one.
        initial_transform: the initial transform's name, for the QC record.
        segmentation_weights: the weights file of a learned initial transform, or several, likewise.
        case_folders: False writes straight into `output_dir`; for a single case.
        tools: whose transform files to write, a list or separated by commas, see `formats.checked_formats`.
        pairs: the datalist, for what some tools need of the inputs.
        limits: beyond which a figure raises a flag, see `scripts.registration.qc.flags`.
        write_glands: see `save_registration`.
        write_spread: whether to write at each voxel how far the fields of the networks are from their mean, mm.

    Raises:
        InputError: an unknown tool, or inputs that its file cannot be written for; glands to write of a registration
            that looks for none; a spread of networks that say none.
    """

    def __init__(
        self,
        output_dir: str,
        weights: str | Sequence[str] | None,
        initial_transform: str,
        segmentation_weights: str | Sequence[str] | None = None,
        case_folders: bool = True,
        tools: str | Sequence[str] | None = None,
        pairs: Sequence[Mapping[str, str]] = (),
        limits: Mapping[str, Any] | None = None,
        write_glands: bool = False,
        write_spread: bool = False,
    ) -> None:
        if write_glands and not segmentation_weights:
            raise InputError("write_glands: no gland is looked for; that is done for a learned initial transform")
        self.write_glands, self.write_spread = write_glands, write_spread
        self.limits = dict(limits or {})
        qc.flags({}, self.limits)  # refuses an unknown one
        self.output_dir = Path(output_dir)
        self.case_folders = case_folders
        self.tools = formats.checked_formats(tools, pairs)
        self.provenance: dict[str, Any] = {"initial_transform": initial_transform}
        several = isinstance(weights, list | tuple)
        hashes = [sha256(path) for path in weights] if several else weights and sha256(weights)
        self.provenance |= {"weights": weights, "weights_sha256": hashes}
        self.provenance |= segmented_by(segmentation_weights)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        known = self.provenance | {"precision": engine.inferer.used}
        silent = [None] * len(engine.state.output)
        apart = getattr(engine.network, "apart", None) if self.write_spread else silent
        if apart is None:
            raise InputError("write_spread: these weights are of no ensemble, whose fields have a spread")
        items = zip(engine.state.batch, engine.state.output, qc.doubts(engine), apart, strict=True)
        for batch, output, doubts, spread in items:
            item = {**batch, **output}
            folder = self.output_dir / check_case_name(item["case"]) if self.case_folders else self.output_dir
            found = save_registration(folder, item, known, self.tools, self.limits, doubts, self.write_glands, spread)
            print("; ".join([f"{item['case']}: {folder}", *(f"CHECK: {flag}" for flag in found)]))
