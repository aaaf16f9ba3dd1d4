"""A registration as `register` left it in a folder, read again with its images, to be shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.checks import InputError
from scripts.data.datalist import LABELS
from scripts.data.files import readable
from scripts.data.formats import Step, read_transform
from scripts.data.pairs import LoadPaird
from scripts.data.points import read_points
from scripts.data.volumes import load_volume
from scripts.network import fields
from scripts.registration.apply import warp
from scripts.registration.apply_points import backward, carried
from scripts.registration.outputs import fingerprint
from scripts.registration.transforms import as_declared


class Reread(NamedTuple):
    """A registration as it was written, read again. Worlds are those of the headers but for `pair`, as declared.

    Attributes:
        pair: of `LoadPaird`.
        steps: the transform.
        warped: the registered MR on the voxels of the fixed image, with its affine as declared, (1, X, Y, Z).
        folder: where the other files are.
        record: qc.json.
        remarks: what is left out, in sentences.
    """

    pair: Mapping[str, Any]
    steps: list[Step]
    warped: MetaTensor
    folder: Path
    record: Mapping[str, Any]
    remarks: list[str]


def read(folder: Path, fixed: str | None, moving: str | None) -> Reread:
    """A folder that `register` wrote, and its images, elsewhere than they were if so said."""
    if not (folder / "qc.json").is_file():
        raise InputError(f"{folder / 'qc.json'}: not found; give the --output_dir of a registration")
    record = json.loads((folder / "qc.json").read_text(encoding="utf-8"))
    if "fingerprints" not in record:
        raise InputError(f"{folder / 'qc.json'}: of a version that did not say which images it was; register again")
    read_as, remarks, files = dict(record["read_as"]), [], {}
    for side, given in (("moving", moving), ("fixed", fixed)):
        files[f"{side}_image"] = readable(given or record[f"{side}_file"])
        if not Path(files[f"{side}_image"]).exists():
            raise InputError(f"{files[f'{side}_image']}: not found; say where it is now by --{side} FILE")
    for key in LABELS:
        label = read_as.pop(key, None)
        if label is not None and Path(label).exists():
            files[key] = label
        elif label is not None:
            remarks.append(f"Labels that are not there any more are left out: {label}.")
    pair = LoadPaird(**read_as)({"case": record["case"]} | files)
    for side in ("moving", "fixed"):
        if fingerprint(pair, side) != record["fingerprints"][side]:
            raise InputError(f"{files[f'{side}_image']}: not the {side} image that was registered into {folder}")
    warped = load_volume(str(folder / "warped_moving_image.nii.gz")).as_tensor()
    warped = MetaTensor(warped, affine=pair["fixed_image"].affine)
    return Reread(pair, read_transform(folder / "ddf.nii.gz"), warped, folder, record, remarks)


def pulled(shown: Reread, volume: MetaTensor, affine: Tensor, size: Sequence[int]) -> Tensor:
    """A volume of the moving image's grid, registered, on a grid of the fixed world as declared: (C, *size)."""
    image = shown.pair["moving_image"]
    header = torch.as_tensor(shown.pair.get("moving_header", image.affine)).double()
    to_header = torch.linalg.inv(as_declared(shown.pair, "fixed"))
    return warp(shown.steps, MetaTensor(volume.as_tensor(), affine=header), to_header @ affine, size)


def targets_of(shown: Reread, points: str, points_from: str, coordinates: str | None) -> Iterator[tuple[str, Tensor]]:
    """The points of a file, by name, in the fixed world as declared, RAS mm, (3,); NaN of those that have no place."""
    found = read_points(readable(points), coordinates)
    if found.what != "points":
        raise InputError(f"{points}: {found.what} of a surface; the page lists points: give their table")
    world, status = found.world, ["no position" if one.isnan().any() else "ok" for one in found.world]
    if points_from == "moving":
        world, _, status = carried(partial(backward, shown.steps), world)
    world = fields.transform_points(as_declared(shown.pair, "fixed"), world.T[None, :, :, None, None])[0, :, :, 0, 0].T
    names = found.names or [f"point {k + 1}" for k in range(len(world))]
    for name, point, state in zip(names, world, status, strict=True):
        if state == "ok":
            yield name, point
        else:
            shown.remarks.append(f"{name} is not shown: {state}.")
