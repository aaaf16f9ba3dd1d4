"""The table of contents of many registrations: `index.html`, a row a case, those with flags first."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from ignite.engine import Engine, Events

from scripts.data.files import written_whole
from scripts.registration.outputs import NOTICE, PAGE

INDEX = "index.html"
FIGURES = {  # of qc.json -> heading, decimals; those that no case has are left out
    "gland_dsc": ("gland DSC", 2),
    "tre_mm": ("TRE, mm", 1),
    "translation_mm": ("moved from aligned centres, mm", 1),
    "gland_displacement_mm": ("deformed in the gland, mm", 1),
    "folded_percent": ("folded, %", 2),
}


class WriteIndex:
    """Ignite handler that writes `index.html` when a batch ends, also one that was refused in part.

    Args:
        output_dir: as of `scripts.registration.outputs.SaveRegistrations`.
        pairs: the datalist; those that were not registered are named.
    """

    def __init__(self, output_dir: str, pairs: Sequence[Mapping[str, str]]) -> None:
        self.output_dir, self.open = Path(output_dir), [pair["case"] for pair in pairs]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._done)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._write)

    def _done(self, engine: Engine) -> None:
        cases = {item["case"] for item in engine.state.batch}
        self.open = [case for case in self.open if case not in cases]

    def _write(self, engine: Engine, *raised: BaseException) -> None:
        if self.output_dir.is_dir():
            write_index(self.output_dir, self.open)


def write_index(output_dir: Path, refused: Sequence[str] = ()) -> Path:
    """Write `index.html` of the registrations in the folders of `output_dir`.

    Args:
        refused: cases that were to be registered and were not; what their folders hold is of before, and not shown.

    Returns:
        The page.
    """
    records = {
        path.parent: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(output_dir.glob("*/qc.json"))
        if path.parent.name not in refused
    }
    columns = {name: told for name, told in FIGURES.items() if any(r.get(name) is not None for r in records.values())}
    order = sorted(records, key=lambda folder: (-len(records[folder]["flags"]), folder.name))
    rows = [f'<tr><th>{escape(case)}</th><td></td><td data-value="{10**6}"><b>CHECK</b> not registered, for the reason'
            f" that the run gave</td>{'<td></td>' * len(columns)}</tr>" for case in refused]  # fmt: skip
    rows += [_row(folder, records[folder], columns) for folder in order]
    flagged = sum(bool(record["flags"]) for record in records.values())
    headings = ("case", "", "flags", *(heading for heading, _ in columns.values()))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    parts = {name: page.partition(f"<{name}>")[2].partition(f"</{name}>")[0] for name in ("style", "script")}
    hashes = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    summary = f"{len(records)} registered, {flagged} of them with flags" + (
        f"; {len(refused)} not registered" if refused else ""
    )
    text = Template(page).substitute(
        {f"{name}_hash": value for name, value in hashes.items()},
        notice=NOTICE,
        summary=summary,
        headings="".join(f'<th><button type="button">{h}</button></th>' if h else "<th>planes</th>" for h in headings),
        rows="\n".join(rows),
    )
    with written_whole(output_dir / INDEX) as file:
        file.write(text)
    return output_dir / INDEX


def _row(folder: Path, record: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]) -> str:
    there = next((name for name in (PAGE, "overview.png") if (folder / name).is_file()), "qc.json")
    link, case = f"{quote(folder.name)}/{there}", escape(folder.name)
    source = f"{quote(folder.name)}/overview.png"
    picture = f'<a href="{link}"><img loading="lazy" src="{source}" alt="planes of {case}"></a>'
    flags = "".join(f"<li>{escape(flag)}</li>" for flag in record["flags"])
    flags = f"<b>CHECK</b><ul>{flags}</ul>" if flags else "none"
    cells = "".join(_figures(record, columns))
    return (
        f'<tr><th data-value="{case}"><a href="{link}">{case}</a></th><td>{picture}</td>'
        f'<td data-value="{len(record["flags"])}">{flags}</td>{cells}</tr>'
    )


def _figures(record: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    for name, (heading, decimals) in columns.items():
        value = record.get(name)
        shown = "–" if value is None else f"{value:.{decimals}f}"
        yield f'<td data-value="{"" if value is None else value}" data-heading="{heading}">{shown}</td>'
