"""A page of what a cross-validation found: tables, box plots, example cases (Hu et al. 2018, Table 1, Figs. 8 to 10).

Reads what `python -m scripts crossval` leaves in a folder and writes into its sub-folder `report`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from scripts.bundle.command_line import LISTS, TEXTS
from scripts.data.checks import InputError
from scripts.data.datalist import check_output
from scripts.data.files import write_csv, written_whole
from scripts.data.renamed import SETTINGS
from scripts.data.root import CONFIGS
from scripts.registration.outputs import NOTICE
from scripts.study.plan import DONE
from scripts.study.report_cases import Example, evaluation_of, example_cases, pages
from scripts.study.report_figures import box_plot, maps, png, slices, write_pdf
from scripts.study.report_tables import (
    Method,
    best_of,
    headline,
    html_table,
    initial_alone,
    number,
    read_methods,
    summary,
)

BOXES = {"tre_mm": "TRE (mm)", "dsc": "gland DSC (no unit)", "true_error_mm": "true error in the gland (mm)"}
BEFORE = "initial transform alone"
TYPED = (*TEXTS, *LISTS, "base", "variants")  # what a command line takes as it stands
PAGE = ("report.html", "table1.csv", "table2.csv", "figures.pdf", "*.png")  # what is written
BOX = (
    "of every held-out case (dots; how many in brackets) with median and quartiles; whiskers reach to the last case"
    " within 1.5 times the interquartile range; grey: not trained."
)
SLICES = (
    "Outlines: gland on TRUS (blue, solid) and on MR (orange, dashed). Rings and crosses: centroids of the landmarks on"
    " TRUS and MR, of all slices, projected; white lines join the two."
)
MAPS = (
    "Of the displacement without the initial transform. Each column has one scale; what is beyond it has the colour of"
    " its end. Outline: gland on TRUS. Magenta: det J ≤ 0, the field folds. Grey: the border, where det J is not known."
)


def report(output_dir: str | Path, variant: str | None = None, dataset_dir: str | None = None) -> Path:
    """Write report.html, table1.csv, table2.csv, figures.pdf and PNG files into the folder `report` of `output_dir`.

    Args:
        output_dir: what crossval wrote.
        variant: whose cases are shown; the trained one with the best median TRE by default.
        dataset_dir: where the data set is now, if not where it was.

    Returns:
        The page.

    Raises:
        InputError: no such folder, no tables, nothing complete, no such variant, the data set is gone.
    """
    output = Path(output_dir).absolute()
    if not output.is_dir():
        raise InputError(f"{output}: no such folder; give the --output_dir of a cross-validation")
    if not (output / "folds.json").is_file():
        raise InputError(f"{output / 'folds.json'}: not found; is {output} the --output_dir of a cross-validation?")
    plan = json.loads((output / "folds.json").read_text(encoding="utf-8"))
    methods, missing = read_methods(output, plan["folds"])
    trained = [name for name, method in methods.items() if method.trained]
    if variant is not None and variant not in trained:
        raise InputError(
            f"--variant {variant}: not a trained variant of {output}; there are {', '.join(trained) or 'none'}"
        )
    best = best_of(methods)
    first, folder = next(iter(methods)), output / "report"
    check_output(str(folder), (), [dataset_dir], PAGE, case_folders=False)

    if "none" not in methods:
        methods[f"{BEFORE} ({first})"] = initial_alone(methods[first])
    rows = {name: summary(name, method, methods[first]) for name, method in methods.items()}
    untrained = [name for name, method in methods.items() if not method.trained]
    tables = [
        [rows[name] for name in trained],
        [rows[n] for n in dict.fromkeys(filter(None, [first, best, *untrained]))],
    ]
    for k, table in enumerate(tables, 1):
        write_csv(folder / f"table{k}.csv", table)

    about, shown = facts(output, plan, methods), variant or best
    examples = example_cases(output, shown, methods[shown].cases, dataset_dir) if shown else {}
    figures = boxes(methods) | (pictures(shown, examples) if examples else {})
    captions = {name: f"{caption} {about['caption']}" for name, (_, caption) in figures.items()}
    write_figures(folder, {name: figure for name, (figure, _) in figures.items()}, captions)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        data=escape(about["data"]),
        notice=NOTICE,
        summary=escape(headline(rows, best, best_of(methods, trained=False))),
        missing=warning(missing),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in about["facts"].items()),
        table1=html_table(tables[0], first) if trained else "<p>No trained variant is complete.</p>",
        table2=html_table(tables[1], first),
        figures="".join(html_figure(folder / f"{name}.png", caption) for name, caption in captions.items()),
        pages=links(folder, examples),
        commands=escape(about["commands"]),
    )
    with written_whole(folder / "report.html") as file:
        file.write(page)
    return folder / "report.html"


# ---- figures, each with its caption


def boxes(methods: Mapping[str, Method]) -> dict[str, tuple[Figure, str]]:
    """Box plots of what was measured."""
    found = {}
    untrained = [name for name, method in methods.items() if not method.trained]
    for metric, label in BOXES.items():
        values = {name: method.values(metric) for name, method in methods.items()}
        if any(not math.isnan(v) for of_one in values.values() for v in of_one):
            what = label.split(" (")[0]
            found[metric.removesuffix("_mm")] = box_plot(values, label, untrained), f"{what[0].upper()}{what[1:]} {BOX}"
    return found


def pictures(name: str, examples: Mapping[str, tuple[Mapping[str, str], Example]]) -> dict[str, tuple[Figure, str]]:
    """Slices and maps of the example cases of the trained variant of that name."""
    which = f"{name}, held-out cases of best, median and worst TRE with the gland, axial slice through its middle."
    return {
        kind: (draw({heading(k, *e): e[1] for k, e in examples.items()}), f"{which} {caption}")
        for kind, draw, heading, caption in (("slices", slices, scores, SLICES), ("maps", maps, folding, MAPS))
    }


# ---- sentences


def scores(name: str, row: Mapping[str, str], example: Example) -> str:
    """The heading of a row of slices."""
    tre = " → ".join(number(float(row[f"tre_with_gland{when}_mm"] or "nan"), 1) for when in ("_before", ""))
    dsc = " → ".join(number(float(row[f"dsc{when}"] or "nan"), 2) for when in ("_before", ""))
    checks_named = [f"\nCHECK: {flag}" for flag in (row.get("flags") or "").split("; ") if flag]
    return f"{name}: {row['case']}\nTRE with gland {tre} mm, gland DSC {dsc}{''.join(checks_named[:2])}"


def folding(name: str, row: Mapping[str, str], example: Example) -> str:
    """The heading of a row of maps."""
    known = example.jacobian[~np.isnan(example.jacobian)]
    count = int((known <= 0).sum())
    return (
        f"{name}: {row['case']}\ndet J from {number(known.min(), 2)} to {number(known.max(), 2)}, {count} voxels fold"
    )


def facts(output: Path, plan: Mapping[str, Any], methods: Mapping[str, Method]) -> dict[str, Any]:
    """What the results were made of: a name of the data, facts for the page, a sentence for captions, the commands."""
    runs = [run for name in methods for run in sorted((output / "runs" / name).glob("fold*"))]
    data, overlays = "the data set", {}
    for run in runs:
        with contextlib.suppress(InputError):  # a method without training may have another command, or none
            files, settings = evaluation_of(run)
            data, overlays[run.parent.name] = Path(settings["dataset_dir"]).name, files
    markers = [json.loads((run / DONE).read_text(encoding="utf-8") or "{}") for run in runs]
    made = {" ".join(f"{k} {m[k]}" for k in ("version", "commit") if m.get(k)) for m in markers}
    code = " and ".join(sorted(text or "commit not recorded" for text in made))
    folds, method = plan["folds"], next(iter(methods.values()))
    patients = sum(map(len, folds))
    landmarks = sum(int(r["label"]) > 0 and not math.isnan(float(r["dsc"] or "nan")) for r in method.labels)
    settings = ", ".join(f"{k} = {v}" for k, v in (plan.get("base", {}) | plan["settings"]).items())
    known = {
        "Data": f"{data}: {len(method.cases)} cases of {patients} patients, {landmarks} landmarks",
        "Folds": f"{len(folds)}, of {' + '.join(str(len(f)) for f in folds)} patients, seed {plan['fold_seed']}",
        "Trained": ", ".join(name for name, m in methods.items() if m.trained) or "none",
        "Not trained": ", ".join(name for name, m in methods.items() if not m.trained) or "none",
        "Settings": f"{settings}; a variant's own overlays come on top" if settings else "those of configs/train.json",
        "Code": code,
    }
    split = {name: typed(name, overlays.get(name, [])) for name in methods if not name.startswith(BEFORE)}
    given = {"dataset_dir": data, "folds": len(folds), "fold_seed": plan["fold_seed"]}
    given |= {"base": below} if (below := max(base for base, _ in split.values())) else {}
    given |= {"variants": ",".join(own for _, own in split.values()), "output_dir": output.name} | plan["settings"]
    command = " \\\n    ".join(["python -m scripts crossval", *(flag(k, v) for k, v in given.items())])
    return {
        "data": data,
        "facts": known,
        "caption": f"{known['Data']}, {len(folds)} folds by patient; {code}.",
        "commands": f"{command}\npython -m scripts report {output.name}",
    }


def typed(name: str, overlays: Sequence[Path]) -> tuple[str, str]:
    """How an evaluation's overlays were typed: those below all variants, and the variant called `name`."""
    if not overlays or overlays[0] != CONFIGS / "baseline.yaml":
        return "", name
    own = len([part for part in name.split("+") if part != "baseline"])
    below, above = overlays[1 : len(overlays) - own], overlays[len(overlays) - own :]
    words = [
        "+".join(f.stem.removeprefix("variant_") if f.parent == CONFIGS else str(f) for f in files)
        for files in (below, above)
    ]
    return words[0], words[1] or name


def flag(name: str, value: Any) -> str:
    """A setting as it is typed today."""
    name = SETTINGS.get(name, name)
    plain = isinstance(value, str) and (name in TYPED or re.fullmatch(r"[A-Za-z./~][^'\"]*", value))
    return f"--{name} {shlex.quote(value if plain else repr(value))}"


# ---- files


def warning(missing: Sequence[str]) -> str:
    """The HTML that says what is left out."""
    if not missing:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in missing)
    return f'<div class="missing"><b>Not complete, and left out of this page:</b><ul>{items}</ul></div>'


def html_figure(path: Path, caption: str) -> str:
    """A picture, within the page, and its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def links(folder: Path, examples: Mapping[str, tuple[Mapping[str, str], Example]]) -> str:
    """The sentence that leads to the pages of the example cases, from `folder`."""
    if not examples:
        return ""
    found = pages(folder.parent, examples)
    if not found:
        return "<p>Pages to look through these cases are made where requirements-view.txt is installed.</p>"
    each = (
        f'<a href="{quote(page.relative_to(folder).as_posix())}">{name}: {escape(examples[name][0]["case"])}</a>'
        for name, page in found.items()
    )
    return f"<p>Look through these cases: {', '.join(each)}.</p>"


def write_figures(folder: Path, figures: Mapping[str, Figure], captions: Mapping[str, str]) -> None:
    """Write each figure as NAME.png, and all as figures.pdf with their captions."""
    for name, figure in figures.items():
        with written_whole(folder / f"{name}.png", "wb") as file:
            file.write(png(figure))
    with written_whole(folder / "figures.pdf", "wb") as file:
        write_pdf(file, {captions[name]: figure for name, figure in figures.items()})
