"""The tutorial runs from top to bottom, from a copy of the bundle, and the page in docs/ shows what its cells said."""

import csv
import json
import re
import shutil
from pathlib import Path
from statistics import median

import nbformat
import pytest
from conftest import ROOT

from benchmarks.tutorial import TUTORIAL, code, executed, fingerprint

PLACE = re.compile(r"(?<![\w.)}/])/\w+/\w|[A-Za-z]:\\")  # of a file on some machine


@pytest.fixture(scope="module")
def page():
    return nbformat.read(TUTORIAL, as_version=4)


def kinds(notebook):
    """Of each cell that is executed, what it shows: "stdout", or of what kind a picture is."""
    return [[one.get("name") or sorted(one.data) for one in cell.outputs] for cell in code(notebook)]


def test_the_stored_outputs_are_those_of_the_cells(page):
    assert page.metadata.executed == fingerprint(page), "python benchmarks/tutorial.py"
    assert [cell.execution_count for cell in code(page)] == list(range(1, len(code(page)) + 1))
    assert all(kinds(page)) and sum(shown != "stdout" for cell in kinds(page) for shown in cell) >= 6


def test_the_page_is_small_and_names_no_place_of_the_machine_that_made_it(page):
    assert TUTORIAL.stat().st_size < 2_000_000 and "Research use only" in page.cells[0].source
    for output in (one for cell in code(page) for one in cell.outputs):
        assert output.get("name") != "stderr" and output.output_type != "error"
        said = output.text if output.output_type == "stream" else output.data["text/plain"]
        assert not PLACE.search(said), said
    assert PLACE.search("in /home/me/x") and PLACE.search(r"C:\x") and not PLACE.search("TRUS / MR, out/ddf.nii.gz")


def test_the_links_of_the_page_lead_to_files(page):
    texts = [cell.source for cell in page.cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(texts))
    assert len(links) > 8 and all((TUTORIAL.parent / link).is_file() for link in links)


def test_it_runs_from_top_to_bottom_leaves_the_bundle_as_it_was_and_learning_helps(page, tmp_path, monkeypatch):
    bundle, temporary = tmp_path / "bundle", tmp_path / "temporary files"
    for part in ("configs", "scripts", "models"):
        shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    (bundle / "docs").mkdir()
    shutil.copy(TUTORIAL, bundle / "docs")
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    found = executed(bundle / "docs" / "tutorial.ipynb")
    assert kinds(found) == kinds(page)
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    (work,) = temporary.glob("tutorial_*")
    dsc, tre = ({folder: medians(work / folder, name) for folder in ("before", "after")} for name in ("dsc", "tre_mm"))
    assert dsc["after"] > dsc["before"] + 0.02 and tre["after"] < tre["before"]
    flags = {case: flags_of(work / "registered" / case) for case in ("upside_down", "exchanged")}
    assert "--fixed_axes RPI" in flags["upside_down"] and "exchanged" in flags["exchanged"]
    assert "axes" not in flags_of(work / "mended")


def medians(folder: Path, name: str) -> float:
    with (folder / "cases.csv").open() as file:
        return median(float(row[name]) for row in csv.DictReader(file))


def flags_of(folder: Path) -> str:
    return " ".join(json.loads((folder / "qc.json").read_text())["flags"])
