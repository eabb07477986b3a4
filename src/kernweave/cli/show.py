# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave show`: a function's code by blocks, with what could be probed where."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kernweave import connect
from kernweave.cli.dot import blocks_of, dot_source, find_dot, write_svg
from kernweave.cli.output import print_json, print_refused, progress
from kernweave.errors import UsageError
from kernweave.session.attach import check_refusals
from kernweave.session.listing import EdgeInfo, InsnInfo
from kernweave.session.woven import Clonable

_TEXT_WIDTH = 44
_VERDICT_WIDTH = 10
_WIDTH = 79


@click.command()
@click.argument("function", metavar="FUNCTION")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per instruction.")
@click.option("--dot", is_flag=True, help="The blocks as a graph, in Graphviz's language.")
@click.option(
    "--svg",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the blocks into FILE; needs Graphviz.",
)
@click.option("--weave", is_flag=True, help="Which blocks cannot be cloned, and why.")
@click.pass_obj
def show(
    obj: dict[str, Any], function: str, as_json: bool, dot: bool, svg: Path | None, weave: bool
) -> None:
    """Disassemble FUNCTION by blocks: edges, tactic and dead registers per instruction.

    \b
    Examples:
      kernweave show vfs_read
      kernweave show 9p:v9fs_mount --svg v9fs_mount.svg

    \b
    Edges are: fall (to what lies behind), taken (a branch inside the function), call,
    sibling (a jump to another function), indirect (with how many functions it may call), return,
    fixup (after a fault), label (a jump label that is a jump).
    A register or flag is listed as dead where that is certain.
    """  # noqa: D301
    if as_json + dot + (svg is not None) + weave > 1:
        raise UsageError("--json, --dot, --svg and --weave exclude each other")
    if svg:
        find_dot()
    with connect(obj["target"], writer=False, progress=progress) as session:
        if weave:
            _print_weave(function, session.clonable(f"{function}@blocks"))
            return
        rows = session.listing(function)
    if as_json:
        for row in rows:
            print_json(row)
    elif dot:
        print(dot_source(function, rows), end="")
    elif svg:
        write_svg(dot_source(function, rows), svg)
    else:
        _print_human(rows)


def _print_weave(function: str, found: Clonable) -> None:
    """Bail-outs by reason."""
    if not len(found.placed):
        check_refusals(found, partial=True)
    cloned = int(found.placed.sum())
    print(f"{function}: {cloned:,} of {len(found.placed):,} blocks can be cloned")
    print_refused(found.all_refused())


def _print_human(rows: Sequence[InsnInfo]) -> None:
    blocks = blocks_of(rows)
    width = max(len(_verdict(row)) for row in rows)
    for block in blocks:
        print(_head(block))
        for row in block:
            print(_line(row, width))
    print(f"{len(blocks)} blocks, {len(rows)} instructions; last column: dead registers and flags")


def _head(block: Sequence[InsnInfo]) -> str:
    """A block's point and its edges, those of one kind together."""
    part = block[0].point.rpartition("+")[0] or block[0].point
    kinds: dict[str, list[str]] = {}
    for edge in (edge for row in block for edge in row.edges):
        places = kinds.setdefault(edge.kind, [])
        place = _place(edge, part)
        if place not in places:
            places.append(place)
    leads = ", ".join(f"{kind} {' '.join(places)}".rstrip() for kind, places in kinds.items())
    return textwrap.fill(
        f"{block[0].point}  ->  {leads or 'nowhere'}",
        _WIDTH,
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _place(edge: EdgeInfo, part: str) -> str:
    """Where an edge leads: inside the same part by the offset alone."""
    if edge.candidates is not None:
        return f"(candidates: {edge.candidates:,})"
    place = edge.to or ""
    return place.removeprefix(part) if place.startswith(f"{part}+") else place


def _verdict(row: InsnInfo) -> str:
    return str(row.tactic or row.reason)


def _line(row: InsnInfo, verdict_width: int) -> str:
    """A wide verdict takes from the text, so that all columns are below each other."""
    text, width = row.text, _TEXT_WIDTH - max(verdict_width - _VERDICT_WIDTH, 0)
    if len(text) > width:
        text = f"{text[: width - 1]}~"
    head = f"  +{row.offset:<#6x} {_verdict(row):{max(verdict_width, _VERDICT_WIDTH)}}"
    return f"{head} {text:{width}} {_short(row.dead)}".rstrip()


def _short(dead: str) -> str:
    """What fits: the best scratch registers first."""
    names = dead.split()
    chosen = [name for name in ("flags", "r11", "r10", "rax") if name in names]
    more = len([name for name in names if name not in chosen])
    return " ".join(chosen[:2]) + (f" +{more + len(chosen[2:])}" if more + len(chosen[2:]) else "")
