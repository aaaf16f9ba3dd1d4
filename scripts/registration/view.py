"""A registration as a page one can look through: `view.html`, one file that needs no network.

NiiVue (https://niivue.com, BSD-2) draws the planes. It is taken from the installed ipyniivue, see
requirements-view.txt, and put into the page with its licence. What else the page holds is in `view.html`, `view.css`
and `view.js`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ignite.engine import Engine, Events

from scripts.data.checks import InputError
from scripts.data.datalist import LABELS, check_output
from scripts.data.files import written_whole
from scripts.data.root import CONFIGS, VERSION
from scripts.registration import qc
from scripts.registration.outputs import NOTICE, PAGE
from scripts.registration.reread import Reread, read, targets_of
from scripts.registration.view_data import shown_data

VOXELS = 2_000_000  # of the page's grid
LARGEST = 15_000_000  # bytes of a page; a larger one is made anew on a coarser grid
PACKAGE, MISSING = "ipyniivue", "the viewer is not installed: pip install -r requirements-view.txt"
SECURITY = (  # nothing is loaded from anywhere, and nothing runs but what was written here
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; style-src {style};"
    " script-src {niivue} {script}"
)


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

    def page_of(voxels: int) -> bytes:
        return _page(shown, *shown_data(shown, marked, voxels), scripts).encode()

    page, voxels = page_of(VOXELS), VOXELS
    while len(page) > LARGEST and voxels > VOXELS / 100:
        voxels = int(voxels * min(0.8, LARGEST / len(page)))
        page = page_of(voxels)
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


def _page(
    shown: Reread,
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
        flag = next((flag for flag in record["flags"] if f"({name} " in flag), None)
        what = told[name].get("description", "") + (f". Beyond its limits: {flag.split(' (')[0]}" if flag else "")
        side = {"moving": "MR, ", "fixed": "TRUS, "}.get(name.partition("_")[0], "")
        label = side + name.removeprefix("moving_").removeprefix("fixed_").replace("_", " ")
        cells = (f"{value:.3g}" + " <b>CHECK</b>" * bool(flag), escape(" and ".join(ends)), escape(what))
        rows.append((not flag, f"<tr><th>{escape(label)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"))
    for _, row in sorted(rows, key=lambda one: one[0]):
        yield row
