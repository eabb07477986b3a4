# SPDX-License-Identifier: GPL-2.0-or-later
"""A function's blocks and edges as a graph, in Graphviz's language."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kernweave.errors import KernweaveError, UnsupportedError
from kernweave.session.listing import EdgeInfo, InsnInfo

_STYLE = {
    "fall": "",
    "taken": ' [color="blue"]',
    "label": ' [color="blue", style="dashed", label="label"]',
    "fixup": ' [color="red", style="dashed", label="fixup"]',
    "sibling": ' [color="gray40", label="sibling"]',
}
_LEAVES = ("return", "indirect", "call")


def blocks_of(rows: Sequence[InsnInfo]) -> list[list[InsnInfo]]:
    """The instructions of each block."""
    found: list[list[InsnInfo]] = []
    for row in rows:
        if row.leader or not found:
            found.append([])
        found[-1].append(row)
    return found


def dot_source(title: str, rows: Sequence[InsnInfo]) -> str:
    """The graph of a listing: a box per block, an oval per function that it jumps to."""
    blocks = blocks_of(rows)
    names = {row.addr: block[0].addr for block in blocks for row in block}
    lines = [
        f"digraph {_quoted(title)} {{",
        '  node [shape="box", fontname="monospace", fontsize=10];',
        '  edge [fontname="monospace", fontsize=9];',
    ]
    lines += [f"  {_quoted(block[0].addr)} [label={_label(block)}];" for block in blocks]
    for block in blocks:
        lines += _edges(block, names)
    return "\n".join([*lines, "}", ""])


def _edges(block: Sequence[InsnInfo], names: dict[str, str]) -> Iterator[str]:
    drawn = set()
    for edge in (edge for row in block for edge in row.edges):
        target = _target(edge, names)
        if target and (edge.kind, target) not in drawn:
            drawn.add((edge.kind, target))
            if target not in names.values():
                yield f'  {_quoted(target)} [shape="oval"];'
            yield f"  {_quoted(block[0].addr)} -> {_quoted(target)}{_STYLE[edge.kind]};"


def _target(edge: EdgeInfo, names: dict[str, str]) -> str | None:
    """The node an edge leads to; calls come back and are in the text."""
    if edge.kind in _LEAVES or not edge.to or not edge.to_addr:
        return None
    return names.get(edge.to_addr, edge.to)


def _label(block: Sequence[InsnInfo]) -> str:
    lines = [block[0].point, *(_line(row) for row in block)]
    return '"' + "".join(f"{_escaped(line)}\\l" for line in lines) + '"'


def _line(row: InsnInfo) -> str:
    fits = [edge.candidates for edge in row.edges if edge.candidates is not None]
    note = f"  ; candidates: {fits[0]:,}" if fits else ""
    return f"+{row.offset:<#6x} {row.text}{note}"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def find_dot() -> str:
    """Where Graphviz's `dot` is.

    Raises:
        UnsupportedError: it is not installed.
    """
    found = shutil.which("dot")
    if found is None:
        raise UnsupportedError(
            "--svg needs Graphviz's dot, which is not installed",
            help="sudo apt install graphviz, or take its input with --dot",
        )
    return found


def write_svg(source: str, file: Path) -> None:
    """Draw a graph into a file.

    Raises:
        UnsupportedError: Graphviz is not installed.
        KernweaveError: it fails, or the file cannot be written.
    """
    done = subprocess.run(
        [find_dot(), "-Tsvg"], input=source.encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise KernweaveError(
            f"dot ended with status {done.returncode}",
            notes=done.stderr.decode(errors="replace").splitlines()[:5],
        )
    try:
        file.write_bytes(done.stdout)
    except OSError as error:
        raise KernweaveError(f"cannot write {file}: {error.strerror}") from error
