"""PLY of triangles, binary or text, read by NumPy: VTK 9.7's own reader crashes on a file that is cut short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.data.checks import InputError

ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
CORNERS = ("vertex_indices", "vertex_index")
HEADER = re.compile(rb"ply\r?\n(.*?\n)end_header[ \t]*\r?\n", re.DOTALL)


class Element(NamedTuple):
    """What a header says of one kind of rows: its name, how many there are, and the type of one, as NumPy has it."""

    name: str
    count: int
    fields: list[tuple]


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Vertices (N, 3), float64, as they are in the file, faces (M, 3), int64, and the comments.

    Raises:
        InputError: it is damaged, or holds other faces than triangles.
    """
    data = path.read_bytes()
    head = HEADER.match(data)
    try:
        lines = head[1].decode("latin-1").splitlines()
        order = ORDERS[lines[0].split()[1]]
        vertex, face = _elements(lines[1:], order)[:2]
        body = data[head.end() :]
        rows = _binary_rows(body, vertex, face) if order else _text_rows(body, vertex, face)
        corners = next(name for name in CORNERS if name in rows[1].dtype.names)
    except (TypeError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise InputError(f"{path}: cannot be read as a surface: no PLY of vertices and faces, or damaged") from error
    odd = rows[1][f"{corners} count"] != 3
    if odd.any():
        number = rows[1][f"{corners} count"][odd][0]
        raise InputError(f"{path}: a face has {number:g} corners, or it is damaged; triangulate it first")
    with np.errstate(invalid="ignore"):  # who asked refuses NaN
        vertices = np.column_stack([rows[0][axis] for axis in "xyz"]).astype(np.float64)
    comments = "\n".join(line for line in lines if line.startswith("comment"))
    return vertices, rows[1][corners].astype(np.int64), comments


def _elements(lines: list[str], order: str) -> list[Element]:
    found: list[Element] = []
    for kind, *told in (line.split() for line in lines if line.strip()):
        if kind == "element":
            found.append(Element(told[0], int(told[1]), []))
        elif kind == "property" and told[0] == "list":  # of three, as every face of triangles has
            count, one, name = told[1:]
            row = [(f"{name} count", order + TYPES[count]), (name, order + TYPES[one], (3,))]
            found[-1].fields.extend(row)
        elif kind == "property":
            found[-1].fields.append((told[1], order + TYPES[told[0]]))
        elif kind not in ("comment", "obj_info"):
            raise ValueError(kind)
    if [element.name for element in found[:2]] != ["vertex", "face"] or min(e.count for e in found) < 0:
        raise ValueError("elements")
    return found


def _binary_rows(body: bytes, vertex: Element, face: Element) -> list[np.ndarray]:
    start = vertex.count * np.dtype(vertex.fields).itemsize
    return [
        np.frombuffer(body, vertex.fields, vertex.count),
        np.frombuffer(body, face.fields, face.count, offset=start) if face.count else np.empty(0, face.fields),
    ]


def _text_rows(body: bytes, vertex: Element, face: Element) -> list[np.ndarray]:
    lines = body.splitlines()
    first = [np.loadtxt(lines[: vertex.count], np.dtype(vertex.fields), ndmin=1, comments=None)]
    corners = [line.split(maxsplit=1)[0] for line in lines[vertex.count : vertex.count + face.count]]
    if any(count != b"3" for count in corners):
        odd = np.zeros(1, face.fields)
        odd[odd.dtype.names[0]] = int(next(count for count in corners if count != b"3"))
        return [*first, odd]
    rows = np.loadtxt(lines[vertex.count : vertex.count + face.count], np.dtype(face.fields), ndmin=1, comments=None)
    if len(first[0]) != vertex.count or len(rows) != face.count:
        raise ValueError("cut short")
    return [*first, rows]
