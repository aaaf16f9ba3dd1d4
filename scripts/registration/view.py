"""A registration as a page one can look through: `view.html`, one file that needs no network.

NiiVue (https://niivue.com, BSD-2) draws the planes. It is taken from the installed ipyniivue, see
requirements-view.txt, and put into the page with its licence. What else the page holds is in `view.html`, `view.css`
and `view.js`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from scripts.data.checks import InputError
from scripts.data.datalist import LABELS, check_output
from scripts.data.files import readable, written_whole
from scripts.data.formats import Step, forward, read_transform
from scripts.data.pairs import LoadPaird
from scripts.data.points import read_points
from scripts.data.root import CONFIGS, VERSION
from scripts.data.volumes import load_volume
from scripts.network import fields
from scripts.registration import qc
from scripts.registration.apply import backward
from scripts.registration.initial_transform import read_initial_transform
from scripts.registration.metrics import centroid
from scripts.registration.outputs import GLANDS, NOTICE, PAGE, fingerprint
from scripts.registration.segmentation import coarsened
from scripts.registration.transforms import as_declared

VOXELS = 2_000_000  # of the page's grid
LARGEST = 15_000_000  # bytes of a page; a larger one is made anew on a coarser grid
NODE = 3.0  # mm between the nodes of the field that is drawn, about
GLAND_CENTRE, LARGEST_DEFORMATION = "centre of the gland on TRUS", "largest deformation"
PACKAGE, MISSING = "ipyniivue", "the viewer is not installed: pip install -r requirements-view.txt"
SECURITY = (  # nothing is loaded from anywhere, and nothing runs but what was written here
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; style-src {style};"
    " script-src {niivue} {script}"
)


class Target(NamedTuple):
    """A place to jump to: what it is, and its voxel on the page's grid."""

    name: str
    voxel: list[float]


class Shown(NamedTuple):
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


def view(
    output_dir: str | Path,
    fixed: str | None = None,
    moving: str | None = None,
    points: str | None = None,
    points_from: str | None = None,
    coordinates: str | None = None,
) -> Path:
    """Write `view.html` into a folder that `register` wrote; the arguments are those of the verb `view`.

    Returns:
        The page.

    Raises:
        InputError: no registration there, images that are gone or are others, points that cannot be read, no viewer.
    """
    if points_from not in ((None,) if points is None else ("fixed", "moving")):
        raise InputError(
            f"points_from {points_from}: say which image the points were marked in, --points_from fixed or moving"
            if points
            else "--points_from has no meaning without --points"
        )
    scripts = viewer()
    shown = read(Path(output_dir), fixed, moving)
    files = {"case": shown.record["case"]} | {
        f"{side}_image": shown.pair[f"{side}_file"] for side in ("moving", "fixed")
    }
    check_output(str(shown.folder), [files], [points], (PAGE,), case_folders=False)
    marked = [] if points is None else list(targets_of(shown, points, points_from, coordinates))
    voxels = VOXELS
    while len(page := written(shown, marked, voxels, scripts).encode()) > LARGEST and voxels > VOXELS / 100:
        voxels = int(voxels * min(0.8, LARGEST / len(page)))
    with written_whole(shown.folder / PAGE, "wb") as file:
        file.write(page)
    return shown.folder / PAGE


class ViewRegistrations:
    """Ignite handler that writes the page of each registered case; it comes after `SaveRegistrations`.

    Args:
        output_dir, case_folders: as of `scripts.registration.outputs.SaveRegistrations`.

    Raises:
        InputError: no viewer.
    """

    def __init__(self, output_dir: str, case_folders: bool = True) -> None:
        viewer()
        self.output_dir, self.case_folders = Path(output_dir), case_folders

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._view)

    def _view(self, engine: Engine) -> None:
        for item in engine.state.batch:
            view(self.output_dir / item["case"] if self.case_folders else self.output_dir)


# ---- what is read


def viewer_is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def viewer() -> tuple[str, str]:
    """NiiVue's JavaScript, a module that leaves its class in `globalThis.Niivue`, and its licence.

    Raises:
        InputError: it is not installed, or is another version.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(MISSING) from error
    found = {path.name: Path(path.locate()) for path in files if path.name in ("widget.js", "LICENSE")}
    if len(found) < 2 or not all(path.is_file() for path in found.values()):
        raise InputError(MISSING)
    module, licence = (found[name].read_text(encoding="utf-8") for name in ("widget.js", "LICENSE"))
    named = re.search(r"Creating new Niivue instance.{0,200}?=new ([\w$]+)\(", module)  # the one use of its class
    if named is None or "</script" in module or "<!--" in module:
        raise InputError(f"{found['widget.js']}: not the viewer this page knows: pip install -r requirements-view.txt")
    return f"{module}\nglobalThis.Niivue = {named[1]};\n", licence


def read(folder: Path, fixed: str | None, moving: str | None) -> Shown:
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
    return Shown(pair, read_transform(folder / "ddf.nii.gz"), warped, folder, record, remarks)


def pulled(shown: Shown, volume: MetaTensor, affine: Tensor, size: Sequence[int]) -> Tensor:
    """A volume of the moving image's grid, registered, on a grid of the fixed world as declared: (C, *size)."""
    to_header = torch.linalg.inv(as_declared(shown.pair, "fixed"))
    image = shown.pair["moving_image"]
    to_voxel = torch.linalg.inv(torch.as_tensor(shown.pair.get("moving_header", image.affine)).double())
    slabs = []
    for first, count in fields.slabs(size):
        voxels = fields.identity_grid((count, *size[1:]), torch.float64, "cpu")[None]
        voxels[:, 0] += first
        there, known = forward(shown.steps, fields.transform_points(to_header @ affine, voxels))
        points = fields.transform_points(to_voxel, there)
        slabs.append((fields.sample(volume.as_tensor()[None].double(), points, padding_mode="outside") * known)[0])
    return torch.cat(slabs, 1).float()


def targets_of(shown: Shown, points: str, points_from: str, coordinates: str | None) -> Iterator[tuple[str, Tensor]]:
    """The points of a file, by name, in the fixed world as declared, RAS mm, (3,); NaN of those that have no place."""
    found = read_points(readable(points), coordinates)
    world, states = found.world.T[None, :, :, None, None].clone(), ["ok"] * len(found.world)
    there = ~found.world.isnan().any(1)
    if points_from == "moving":
        back, _, known = backward(shown.steps, world[:, :, there])
        world[:, :, there] = back
        for index, state in zip(there.nonzero().flatten().tolist(), known, strict=True):
            states[index] = state
    world = fields.transform_points(as_declared(shown.pair, "fixed"), world)[0, :, :, 0, 0].T
    names = found.names or [f"point {k + 1}" for k in range(len(world))]
    for name, point, state in zip(names, world, states, strict=True):
        if state == "ok" and not point.isnan().any():
            yield name, point
        else:
            shown.remarks.append(f"{name} is not shown: {'no position' if state == 'ok' else state}.")


# ---- what is written


def grid_of(image: MetaTensor, voxels: int) -> tuple[Tensor, list[int]]:
    """A grid over an image, its axes towards R, A, S as nearly as they lie, of at most so many voxels: affine, size."""
    upright = Orientation(axcodes="RAS", labels=None)(MetaTensor(image.as_tensor()[:1], affine=image.affine.double()))
    own, count = upright.affine.double(), torch.tensor(upright.shape[1:], dtype=torch.float64)
    spacing = own[:3, :3].norm(dim=0)
    finest = spacing.clone()
    while (count * spacing / finest).ceil().prod() > voxels:  # the finest axes first, they lose least
        finest = torch.maximum(finest, finest.min() * 1.02)
    size = (count * spacing / finest - 1e-6).ceil()
    affine = own.clone()
    affine[:3, :3] *= finest / spacing
    affine[:3, 3] += own[:3, :3] @ ((count - 1) / 2) - affine[:3, :3] @ ((size - 1) / 2)
    return affine, size.int().tolist()


def on_grid(volume: MetaTensor, affine: Tensor, size: Sequence[int]) -> NDArray:
    """A volume (C, …) on the page's grid, zero outside: (C, *size)."""
    coarse = coarsened(volume, affine)
    to_coarse = torch.linalg.inv(coarse.affine.double()) @ affine
    return fields.resample(coarse.as_tensor()[None].float(), to_coarse, size, padding_mode="outside")[0].numpy()


def smooth(mask: MetaTensor) -> MetaTensor:
    """A binary mask (1, X, Y, Z) whose outline at 0.5 has no steps of voxels: a Gaussian of 0.7 voxels."""
    return MetaTensor(torch.from_numpy(gaussian_filter(mask.numpy()[0], 0.7)[None]), affine=mask.affine)


def bytes_of(image: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Grey levels between two values as 0 to 255."""
    return np.rint(255 * np.clip((image - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)


def packed(values: NDArray) -> str:
    """An array (X, Y, Z) or (3, X, Y, Z) as JavaScript unpacks it: the first of X, Y, Z fastest; gzip, base64."""
    flat = values.reshape(-1, *values.shape[-3:]).transpose(0, 3, 2, 1)
    return base64.b64encode(gzip.compress(np.ascontiguousarray(flat).tobytes(), 6, mtime=0)).decode()


def written(shown: Shown, marked: Sequence[tuple[str, Tensor]], voxels: int, scripts: tuple[str, str]) -> str:
    """The page, its images on a grid of at most so many voxels."""
    affine, size = grid_of(shown.pair["fixed_image"], voxels)
    moving, fixed = shown.pair["moving_image"], shown.pair["fixed_image"]
    (centred,) = read_initial_transform("centre", moving, fixed)

    def unmoved(volume: MetaTensor) -> MetaTensor:
        return MetaTensor(volume.as_tensor(), affine=torch.linalg.inv(centred) @ moving.affine.double())

    images = {"fixed": fixed, "after": shown.warped, "before": unmoved(moving)}
    grey = {name: on_grid(image, affine, size)[0] for name, image in images.items()}
    ends, windows = {}, {}
    for side, image in (("trus", fixed), ("mr", moving)):
        ends[side] = np.percentile(image.numpy(), (0.1, 99.9))
        windows[side] = bytes_of(np.percentile(image.numpy(), (1, 99)), *ends[side]).tolist()
    grey = {name: bytes_of(image, *ends["trus" if name == "fixed" else "mr"]) for name, image in grey.items()}
    masks = list(_masks(shown, affine, size, unmoved))
    field = _field(shown, affine, size)
    remarks = list(shown.remarks)
    targets = list(_targets(masks, marked, affine, size, field, remarks))
    spacing = affine[:3, :3].norm(dim=0).tolist()
    plain = nib.Nifti1Image(np.zeros(size, np.uint8), np.diag([*spacing, 1.0]))
    gland = next((target.voxel for target in targets if target.name == GLAND_CENTRE), None)
    data = {
        "size": size,
        "spacing": spacing,
        "affine": affine[:3].tolist(),
        "start": gland or [(n - 1) / 2 for n in size],
        "grid": base64.b64encode(gzip.compress(plain.to_bytes(), mtime=0)).decode(),
        "images": {name: packed(image) for name, image in grey.items()},
        "masks": [mask | {"values": packed(mask["values"])} for mask in masks],
        "field": field and field | {"values": packed(field["values"])},
        "targets": [target._asdict() for target in targets],
    }
    own = shown.pair["fixed_image"].shape[1:]
    drawn = f"{' × '.join(map(str, size))} voxels of {' × '.join(f'{mm:.2g}' for mm in spacing)} mm"
    if math.prod(size) < math.prod(own):
        remarks.append(
            f"The images are coarser here than in the files: {drawn}, where the TRUS has {' × '.join(map(str, own))}."
        )
    return _page(shown, data, windows, remarks, scripts)


def _masks(shown: Shown, affine: Tensor, size: list[int], unmoved: Any) -> Iterator[dict[str, Any]]:
    """Glands and labels on the page's grid, as probabilities from 0 to 255, and which image they are of."""

    def mask(kind: str, side: str, values: NDArray, when: str | None = None) -> dict[str, Any]:
        return {"kind": kind, "side": side, "when": when, "values": bytes_of(values, 0, 1)}

    found = all((shown.folder / name).is_file() for name in GLANDS)
    labelled = {key: shown.pair[key] for key in LABELS if key in shown.pair}
    if found:
        moving, fixed = (smooth(load_volume(str(shown.folder / name))) for name in GLANDS)
        fixed = MetaTensor(fixed.as_tensor(), affine=shown.pair["fixed_image"].affine)
        yield mask("glands", "fixed", on_grid(fixed, affine, size)[0])
        yield mask("glands", "moving", pulled(shown, moving, affine, size)[0].numpy(), "after")
        yield mask("glands", "moving", on_grid(unmoved(moving), affine, size)[0], "before")
    if "fixed_label" in labelled:
        for values in on_grid(labelled["fixed_label"], affine, size):
            yield mask("labels", "fixed", values)
    if "moving_label" in labelled:
        for values in pulled(shown, labelled["moving_label"], affine, size).numpy():
            yield mask("labels", "moving", values, "after")
        for values in on_grid(unmoved(labelled["moving_label"]), affine, size):
            yield mask("labels", "moving", values, "before")


def _field(shown: Shown, affine: Tensor, size: list[int]) -> dict[str, Any] | None:
    """The deformation beyond the initial transform on nodes of the page's grid, mm / 100 along its axes; None without
    the initial transform as a matrix."""
    matrix = shown.record.get("initial_matrix")
    if matrix is None:
        return None
    spacing = affine[:3, :3].norm(dim=0)
    every = [max(1, round(NODE / mm)) for mm in spacing.tolist()]
    count = [-(-n // k) for n, k in zip(size, every, strict=True)]
    nodes = affine @ torch.diag(torch.tensor([*every, 1], dtype=torch.float64))
    x = fields.world_grid(count, nodes)
    to_header = torch.linalg.inv(as_declared(shown.pair, "fixed"))
    y, known = forward(shown.steps, fields.transform_points(to_header, x))
    y = fields.transform_points(as_declared(shown.pair, "moving"), y)
    back = torch.linalg.inv(torch.tensor(matrix, dtype=torch.float64))
    moved = (fields.transform_points(back, y) - x) * known
    along = torch.einsum("ji,bjxyz->ixyz", affine[:3, :3] / spacing, moved)
    length = along.norm(dim=0)
    most = torch.unravel_index(length.argmax(), length.shape)
    return {
        "size": count,
        "every": every,
        "most": max(1.0, round(length.max().item(), 1)),
        "place": [int(i) * k for i, k in zip(most, every, strict=True)],
        "values": np.rint(100 * along.numpy()).clip(-32767, 32767).astype("<i2"),
    }


def _targets(
    masks: Sequence[Mapping[str, Any]],
    marked: Sequence[tuple[str, Tensor]],
    affine: Tensor,
    size: Sequence[int],
    field: Mapping[str, Any] | None,
    remarks: list[str],
) -> Iterator[Target]:
    """The places that the page's list jumps to: points given, landmarks, the gland, the largest deformation."""
    for name, point in marked:
        voxel = (torch.linalg.inv(affine) @ torch.cat([point, torch.ones(1, dtype=torch.float64)]))[:3]
        if all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel.tolist(), size, strict=True)):
            yield Target(name, voxel.tolist())
        else:
            remarks.append(f"{name} is not shown: it lies outside the TRUS.")

    def centre(mask: dict) -> Tensor:
        return centroid(torch.from_numpy(mask["values"] / 255)[None, None], (1, 1, 1))[0]

    labels = {
        side: [m for m in masks if m["kind"] == "labels" and m["side"] == side and m["when"] != "before"]
        for side in ("fixed", "moving")
    }
    centres = {side: [centre(mask) for mask in of_one] for side, of_one in labels.items()}
    spacing = affine[:3, :3].norm(dim=0)
    for number, place in enumerate(centres["fixed"]):
        name = "gland, by label" if number == 0 else f"landmark {number}"
        if len(centres["moving"]) > number:
            apart = ((centres["moving"][number] - place) * spacing).norm().item()
            name += f", {apart:.1f} mm from the MR's" if math.isfinite(apart) else ", lost in warping"
        if not place.isnan().any():
            yield Target(name, place.tolist())
    glands = [mask for mask in masks if mask["kind"] == "glands" and mask["side"] == "fixed"]
    if glands and not centre(glands[0]).isnan().any():
        yield Target(GLAND_CENTRE, centre(glands[0]).tolist())
    if field is not None:
        yield Target(LARGEST_DEFORMATION, [float(v) for v in field["place"]])


# ---- the page


def _page(
    shown: Shown,
    data: Mapping[str, Any],
    windows: Mapping[str, Sequence[int]],
    remarks: Sequence[str],
    scripts: tuple[str, str],
) -> str:
    record, here = shown.record, Path(__file__)
    niivue, licence = scripts
    style, script = (here.with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    parts = {"niivue": niivue, "script": script, "style": style}
    hashes = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    remarks, field = list(remarks), data["field"]
    labelled = any(key in shown.pair for key in LABELS)
    found = any(mask["kind"] == "glands" for mask in data["masks"])
    if not found:
        remarks.append("The glands that were found are not in the folder: register with --view True keeps them.")
    if field is None:
        remarks.append("The deformation is not drawn: qc.json has no matrix of the initial transform.")
    flags = "".join(f"<li>{escape(flag)}</li>" for flag in record["flags"])
    picture = shown.folder / "overview.png"
    image = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    buttons = (
        f'<li><button data-target="{number}">{number + 1}. {escape(target["name"])}</button></li>'
        for number, target in enumerate(data["targets"])
    )
    made = (
        f"prostate_mr_trus_registration {VERSION}; {PACKAGE} {importlib.metadata.version(PACKAGE)}, whose licence is:"
    )
    return Template(here.with_suffix(".html").read_text(encoding="utf-8")).substitute(
        parts,
        policy=SECURITY.format(**{name: f"'sha256-{value}'" for name, value in hashes.items()}),
        case=escape(record["case"]),
        notice=NOTICE,
        motion=escape(qc.motion(record)),
        flags=f'<div class="check"><b>CHECK</b> What speaks against it:<ul>{flags}</ul></div>' if flags else "",
        of_glands="found" if found else "(none kept)",
        no_field="" if field else " disabled",
        trus_low=windows["trus"][0],
        trus_high=windows["trus"][1],
        mr_low=windows["mr"][0],
        mr_high=windows["mr"][1],
        most=f"{field['most']:g}" if field else "–",
        targets="".join(buttons),
        labels_on="" if found else " checked",
        remarks=escape(" ".join(remarks + ["No labels."] * (not labelled))),
        figures="".join(_rows(record)),
        overview=f'<img src="data:image/png;base64,{image}" alt="Three planes before and after">' if image else "",
        made=escape(made),
        licence=escape(licence),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def _rows(record: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a QC record as rows of a table, flagged ones first; what they are, as the schema says."""
    told = json.loads((CONFIGS / "qc_schema.json").read_text(encoding="utf-8"))["properties"]
    rows = []
    for name, value in record.items():
        if not isinstance(value, int | float) or name not in told:
            continue
        limits = next((record["limits"][key] for key in (name, name.partition("_")[2]) if key in record["limits"]), [])
        ends = [f"{word} {limit:g}" for word, limit in zip(("≥", "≤"), limits, strict=False) if limit is not None]
        flagged = any(f"({name} " in flag for flag in record["flags"])
        meaning = qc.MEANINGS.get(name) or qc.MEANINGS.get(name.partition("_")[2]) if flagged else None
        what = told[name].get("description", "") + (f". Beyond its limits: {meaning}" if meaning else "")
        side = {"moving": "MR, ", "fixed": "TRUS, "}.get(name.partition("_")[0], "")
        label = side + name.removeprefix("moving_").removeprefix("fixed_").replace("_", " ")
        cells = (f"{value:.3g}" + " <b>CHECK</b>" * flagged, escape(" and ".join(ends)), escape(what))
        rows.append((not flagged, f"<tr><th>{escape(label)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"))
    for _, row in sorted(rows, key=lambda one: one[0]):
        yield row
