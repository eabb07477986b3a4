# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave callees`: whom does a function call?"""

from __future__ import annotations

from typing import Any

import click

from kernweave import connect
from kernweave.cli.calls import call_row, indirect_row, print_calls
from kernweave.cli.output import print_json, progress
from kernweave.session.rows import Function

CALLEES_SCHEMA = "kernweave.callees/1"


@click.command()
@click.argument("function", metavar="FUNCTION")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def callees(obj: dict[str, Any], function: str, as_json: bool) -> None:
    """Print the functions that FUNCTION calls, or jumps to; every name is a point.

    \b
    Examples:
      kernweave callees vfs_read
      kernweave callees 9p:v9fs_mount --json

    Calls from its .cold parts are among them.
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        named = session.functions[function]
        if as_json:
            for call in named.calls_out:
                print_json(call_row(call))
            for site in named.indirect_sites:
                print_json(indirect_row(named, site))
            print_json(_end_row(named))
        else:
            _print_human(named)


def _end_row(named: Function) -> dict[str, Any]:
    return {
        "schema": CALLEES_SCHEMA,
        "function": named.parent.name,
        "callees": len(named.callees),
        "sites": sum(len(call.sites) for call in named.calls_out),
        "indirect_sites": len(named.indirect_sites),
    }


def _print_human(named: Function) -> None:
    end = _end_row(named)
    print_calls("callee", [(call, call.callee.name) for call in named.calls_out])
    for site in named.indirect_sites:
        print(f"indirect at {site.point}: candidates: {site.candidates:,}")
    print(
        f"{end['callees']:,} callees of {end['function']}, {end['sites']:,} call sites; "
        f"{end['indirect_sites']:,} indirect call sites"
    )
