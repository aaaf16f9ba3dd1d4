"""The gland found in single images, MR or TRUS: a mask on the image's own grid, a picture and a QC record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.orientations import aff2axcodes
from torch.utils.data import Dataset
from tqdm import tqdm

from scripts.data.checks import InputError, check_case_name
from scripts.data.dicom.reader import modality
from scripts.data.files import write_csv, written_together
from scripts.data.gate import read_ahead
from scripts.data.volumes import save_volume
from scripts.registration import figures, metrics, qc
from scripts.registration.outputs import NOTICE, segmented_by
from scripts.registration.segmentation import moments, on_image

MODALITIES = {"mr": "MR", "us": "US", "auto": None}
DARK = 0.62  # borders of an ultrasound are darker than this, see `scripts.registration.qc.border_brightness`
COLUMNS = ("case", "dice", "modality", "volume_ml", "flags")


class SegmentImages:
    """Find the gland in each image of a data set and write what `save_gland` writes, one after the other.

    An image that is refused is passed over, aloud.

    Args:
        dataset: items as `scripts.registration.segmentation.SegmentGlandsd` leaves them.
        output_dir: where to write; `CASE.nii.gz` and so on, and of several images `glands.csv`, a table.
        weights: files of the network, for the record.
        limits: beyond which a figure raises a flag, see `scripts.registration.qc.flags`.
        probability: whether to write the probability too.
        modality: "mr", "us" or "auto", by what the file says or the image looks like.
        num_workers: see `scripts.data.gate.read_ahead`.

    Raises:
        InputError: another modality.
    """

    def __init__(
        self,
        dataset: Dataset,
        output_dir: str,
        weights: str | Sequence[str],
        limits: Mapping[str, Any] | None = None,
        probability: bool = False,
        modality: str = "auto",
        num_workers: int | None = None,
    ) -> None:
        if str(modality).lower() not in MODALITIES:
            raise InputError(f"--modality {modality}: expected one of {', '.join(MODALITIES)}")
        self.dataset, self.output_dir, self.num_workers = dataset, Path(output_dir), num_workers
        self.limits, self.probability, self.modality = dict(limits or {}), probability, str(modality).lower()
        qc.flags({}, self.limits)  # refuses an unknown one
        self.provenance = segmented_by(weights)

    def run(self) -> None:
        """Segment all images.

        Raises:
            InputError: one was refused; of several, when all others are done.
        """
        count, refused, rows = len(self.dataset), [], []
        items = read_ahead(self.dataset, self.num_workers)
        for index, item in enumerate(tqdm(items, desc="Segmenting", unit="image", total=count, disable=count < 2)):
            if isinstance(item, InputError) and count == 1:
                raise item
            if isinstance(item, InputError):
                refused.append(self.dataset.data[index]["case"])
                print(f"refused: {refused[-1]}: {item}", file=sys.stderr)
                continue
            record = save_gland(self.output_dir, item, self.provenance, self.limits, self.probability, self.modality)
            told = [f"{item['case']}: {record['volume_ml']:.0f} mL"]
            told += [f"Dice {record['dice']:.3f}"] if "dice" in record else []
            tqdm.write("; ".join([*told, *(f"CHECK: {flag}" for flag in record["flags"])]))
            rows.append({k: record.get(k) for k in COLUMNS} | {"flags": "; ".join(record["flags"])})
        if count > 1:
            write_csv(self.output_dir / "glands.csv", rows, COLUMNS)
        scores = [row["dice"] for row in rows if row["dice"] is not None]
        if len(scores) > 1:
            print(
                f"Dice of {len(scores)}: median {np.median(scores):.3f}, mean {np.mean(scores):.3f},"
                f" least {min(scores):.3f}"
            )
        if refused:
            raise InputError(f"{len(refused)} of {count} images refused, for the reasons above: {', '.join(refused)}")


def save_gland(
    folder: Path,
    item: Mapping[str, Any],
    provenance: Mapping[str, Any],
    limits: Mapping[str, Any],
    probability: bool = False,
    told: str = "auto",
) -> dict[str, Any]:
    """Write the gland of one image: `CASE.nii.gz`, `.png` and `.json`, or nothing.

    Args:
        item: `image`, `label` if there is one, `header`, `file`, `case`, and `gland` and `confidence` as found.
        provenance: for the record.
        limits: see `scripts.registration.qc.flags`.
        probability: whether to write `CASE_probability.nii.gz` too.
        told: the modality that the user says.

    Returns:
        The record.
    """
    image, case, header = item["image"], check_case_name(item["case"]), torch.as_tensor(item["header"]).numpy()
    found = on_image(item["gland"], image)
    mask = found[0] > 0.5
    voxel = abs(np.linalg.det(header[:3, :3]))
    record: dict[str, Any] = {"notice": NOTICE, "case": case, "file": item["file"]}
    record |= modality_of(item["file"], image, told)
    record |= {
        "volume_ml": mask.sum().item() * voxel / 1000,
        "centre_mm": (header @ np.append(_centre(item, image), 1))[:3].round(2).tolist(),
        "header_axes": "".join(aff2axcodes(header)),
        "declared_axes": "".join(aff2axcodes(image.affine.numpy())),
    }
    record |= qc.plain(item["confidence"])
    if "label" in item:
        label = item["label"].as_tensor()[0] > 0.5
        record["dice"] = metrics.dice(mask[None, None], label[None, None]).item()
    record |= {"flags": qc.flags(record, limits, sides=("",)), "limits": dict(limits)}
    if record["contradicted"]:
        record["flags"].insert(0, f"the image is said to be {record['modality']}, but does not look like it")
    record |= dict(provenance)
    with written_together(folder) as partial:
        save_volume(partial / f"{case}.nii.gz", mask.numpy(), header, dtype=np.uint8)
        if probability:
            save_volume(partial / f"{case}_probability.nii.gz", found[0].numpy(), header, dtype=np.float32)
        _draw(partial / f"{case}.png", item, found, record)
        text = json.dumps(record, indent=2) + "\n"
        (partial / f"{case}.json").write_text(text, encoding="utf-8")
    return record


def modality_of(path: str, image: MetaTensor, told: str = "auto") -> dict[str, Any]:
    """What an image is, "MR" or "US"; who says so, "option", "header" or "image"; and whether its look contradicts.

    Raises:
        InputError: the option and the header say different things.
    """
    said, wanted = modality(path), MODALITIES[told]
    if wanted and said and said != wanted:
        raise InputError(f"{path}: its modality is {said}, but --modality is {told}")
    looks = "US" if qc.border_brightness(image) < DARK else "MR"
    known = wanted or said
    by = "option" if wanted else "header" if said else "image"
    return {"modality": known or looks, "modality_by": by, "contradicted": known in ("US", "MR") and known != looks}


def _centre(item: Mapping[str, Any], image: MetaTensor) -> np.ndarray:
    """The centroid of the gland found, voxels of its image."""
    there = torch.linalg.inv(image.affine.double().cpu()) @ torch.cat([moments(item["gland"])[0], torch.ones(1)])
    return there[:3].numpy()


def _draw(path: Path, item: Mapping[str, Any], found: torch.Tensor, record: Mapping[str, Any]) -> None:
    reorient, affine = Orientation(axcodes="RAS", labels=None), item["image"].affine
    volumes = [item["image"].as_tensor(), found, *([item["label"].as_tensor()[:1]] if "label" in item else [])]
    shown = [reorient(MetaTensor(volume, affine=affine)) for volume in volumes]
    flags = [f"CHECK: {flag.split(' (')[0]}" for flag in record["flags"]]
    facts = [*flags[:2], f"{record['case']}: {record['volume_ml']:.0f} mL, {record['modality']}"]
    facts += [f"Dice {record['dice']:.3f}"] if "dice" in record else []
    arrays = [one[0].numpy() for one in shown]
    spacing = shown[0].affine[:3, :3].norm(dim=0).tolist()
    figures.gland_found(path, arrays[0], arrays[1], spacing, facts, arrays[2] if len(arrays) > 2 else None)
