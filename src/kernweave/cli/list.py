# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave list`: which functions are there?"""

from __future__ import annotations

from typing import Any

import click

from kernweave import connect
from kernweave.cli.output import print_json, print_table, progress
from kernweave.errors import RefusedError

FUNCTION_SCHEMA = "kernweave.function/1"


@click.command(name="list")
@click.argument("glob", metavar="GLOB")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def list_(obj: dict[str, Any], glob: str, as_json: bool) -> None:
    """Print the functions that match GLOB, kmods included; each name is a point.

    \b
    Examples:
      kernweave list 'tcp_*'
      kernweave list '9p:*'
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        found = session.list_functions(glob)
    if not found:
        raise RefusedError(f"no function matches {glob}", help="globs are * ? [abc]")
    if as_json:
        for one in found:
            print_json(
                {
                    "schema": FUNCTION_SCHEMA,
                    "function": one.name,
                    "kmod": one.kmod,
                    "addr": f"{one.addr:#x}",
                    "size": one.size,
                }
            )
        return
    cells = [(f"{one.addr:#x}", f"{one.size:,}", one.name) for one in found]
    print_table(("address", "bytes", "function"), cells, (False, True, False))
