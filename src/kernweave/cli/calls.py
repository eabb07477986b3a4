# SPDX-License-Identifier: GPL-2.0-or-later
"""What `callers` and `callees` print of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernweave.cli.output import print_table
from kernweave.session.rows import Call, Function, IndirectSite

CALL_SCHEMA = "kernweave.call/1"
_HOW = {"call": "call", "sibling": "sibling jump"}


def call_row(call: Call) -> dict[str, Any]:
    """The object of kernweave.call/1 for a caller and a callee."""
    return {
        "schema": CALL_SCHEMA,
        "caller": call.caller.name,
        "callee": call.callee.name,
        "kind": call.kind,
        "sites": call.sites,
        "candidates": None,
    }


def indirect_row(caller: Function, site: IndirectSite) -> dict[str, Any]:
    """The object of kernweave.call/1 for one indirect site."""
    return {
        "schema": CALL_SCHEMA,
        "caller": caller.parent.name,
        "callee": None,
        "kind": "indirect",
        "sites": [site.point],
        "candidates": site.candidates,
    }


def print_calls(header: str, calls: Sequence[tuple[Call, str]]) -> None:
    """Print one line per call with the name that matters, most sites first."""
    if not calls:
        return
    rows = [
        (f"{len(call.sites):,}", _HOW[call.kind], name)
        for call, name in sorted(calls, key=lambda pair: -len(pair[0].sites))
    ]
    print_table(("sites", "how", header), rows, (True, False, False))
