# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave callers`: who calls a function?"""

from __future__ import annotations

from typing import Any

import click

from kernweave import connect
from kernweave.cli.calls import call_row, print_calls
from kernweave.cli.output import print_json, progress
from kernweave.session.rows import Function

CALLERS_SCHEMA = "kernweave.callers/1"


@click.command()
@click.argument("function", metavar="FUNCTION")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def callers(obj: dict[str, Any], function: str, as_json: bool) -> None:
    """Print the functions that call FUNCTION, or jump to it; every name is a point.

    \b
    Examples:
      kernweave callers vfs_read
      kernweave callers 9p:v9fs_session_init --json
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        named = session.functions[function]
        if as_json:
            for call in named.calls_in:
                print_json(call_row(call))
            print_json(_end_row(named))
        else:
            _print_human(named)


def _end_row(named: Function) -> dict[str, Any]:
    calls = named.calls_in
    return {
        "schema": CALLERS_SCHEMA,
        "function": named.parent.name,
        "callers": len(named.callers),
        "sites": sum(len(call.sites) for call in calls),
        "address_taken": named.address_taken,
        "indirect_sites": named.fitting_sites,
    }


def _print_human(named: Function) -> None:
    end = _end_row(named)
    print_calls("caller", [(call, call.caller.name) for call in named.calls_in])
    print(f"{end['callers']:,} callers of {end['function']}, {end['sites']:,} call sites")
    if end["address_taken"]:
        print(
            "address taken: may be called indirectly, "
            f"by any of {end['indirect_sites']:,} indirect call sites"
        )
