# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave list`: which functions are there?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click

from kernweave import connect
from kernweave.cli.output import print_json, progress
from kernweave.errors import RefusedError
from kernweave.session.survey import FunctionInfo

FUNCTION_SCHEMA = "kernweave.function/1"
_WIDTH = 79

Row = tuple[FunctionInfo, str | None]


@click.command(name="list")
@click.argument("glob", metavar="GLOB")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def list_(obj: dict[str, Any], glob: str, as_json: bool) -> None:
    """Print the functions that match GLOB, kmods included; each name is a point.

    Below it stands its prototype, where the kernel's BTF has one for that name.

    \b
    Examples:
      kernweave list 'tcp_*'
      kernweave list '9p:*'
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        found = session.list_functions(glob)
        if not found:
            raise RefusedError(f"no function matches {glob}", help="globs are * ? [abc]")
        rows = ((one, session.prototype(one)) for one in found)  # made as they are printed
        report = _print_json if as_json else _print_human
        report(rows)


def _print_json(rows: Iterable[Row]) -> None:
    for one, prototype in rows:
        print_json(
            {
                "schema": FUNCTION_SCHEMA,
                "function": one.name,
                "kmod": one.kmod,
                "addr": f"{one.addr:#x}",
                "size": one.size,
                "prototype": prototype,
            }
        )


def _print_human(rows: Iterable[Row]) -> None:
    print(f"{'address':18}  {'bytes':>7}  function")
    for one, prototype in rows:
        print(f"{one.addr:#018x}  {one.size:7,}  {one.name}")
        if prototype:
            print(_folded(prototype))


def _folded(prototype: str) -> str:
    """A prototype under 80 columns, broken behind its commas."""
    lines = ["    "]
    for piece in re.findall(r"[^,]+,? ?", prototype):
        if len(lines[-1]) + len(piece.rstrip()) > _WIDTH and lines[-1].strip():
            lines.append(" " * 8)
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
