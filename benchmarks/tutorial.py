"""Runs docs/tutorial.ipynb from top to bottom and keeps in it what its cells show.

python benchmarks/tutorial.py    # after a change of its cells, or of what they show; wants requirements-tutorial.txt
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"
SECONDS = 1800  # of one cell, at most
LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d.*\n", re.M)  # a line of a log


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fingerprint(notebook: NotebookNode) -> str:
    """SHA-256 of what is executed."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code(notebook)).encode()).hexdigest()


def kept(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Pictures and printed text, without what differs from run to run: progress, messages, lines of a log."""
    found: list[NotebookNode] = []
    for one in outputs:
        if one.output_type != "stream":
            found.append(one)
        elif one.name == "stdout" and (text := LOGGED.sub("", one.text)):
            if found and found[-1].output_type == "stream":
                found[-1].text += text
            else:
                found.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    return found


def executed(path: Path) -> NotebookNode:
    """The notebook at `path`, run in its folder, with what it shows: printed text and pictures.

    The metadata hold the `fingerprint` of the cells that were run, and no version of Python.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder, record_timing=False).execute()
    for cell in code(notebook):
        cell.outputs = kept(cell.outputs)
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.executed = fingerprint(notebook)
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(TUTORIAL), TUTORIAL)
