# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave sites`: what would `count` do with each point?"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click

from kernweave import connect
from kernweave.cli.count import END_SCHEMA
from kernweave.cli.output import print_json, print_table, progress
from kernweave.model.plan import Tactic
from kernweave.session.session import Session
from kernweave.session.survey import SiteVerdict

_SHOWN_ROWS = 30


@click.command()
@click.argument("points", nargs=-1, required=True, metavar="POINT...")
@click.option("--tactic", metavar="A,B", help=f"Allow only these tactics: {', '.join(Tactic)}.")
@click.option("--all", "every", is_flag=True, help="Print every row, not the first 30.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def sites(
    obj: dict[str, Any], points: tuple[str, ...], tactic: str | None, every: bool, as_json: bool
) -> int:
    """Tell the tactic, or the reason of the refusal, for each POINT. Changes nothing.

    \b
    Examples:
      kernweave sites vfs_read@insns
      kernweave sites 'tcp_*@blocks' --json
    """  # noqa: D301
    tactics = tactic.split(",") if tactic else None
    with connect(obj["target"], writer=False, progress=progress) as session:
        found = session.sites(*points, tactics=tactics)
        if as_json:
            for one in found:
                print_json(one)
            print_json(_end_row(session, found))
            sys.stdout.flush()
        else:
            _print_human(found, every)
    return 0 if any(one.tactic for one in found) else 1


def _end_row(session: Session, found: list[SiteVerdict]) -> dict[str, Any]:
    placed = [one for one in found if one.tactic]
    return {
        "schema": END_SCHEMA,
        "requested": len(found),
        "placed": len(placed),
        "refused": [
            {"point": one.point, "reason": one.reason, "detail": one.detail}
            for one in found
            if one.reason
        ],
        "tactics": dict(Counter(one.tactic for one in placed).most_common()),
        "hits": 0,
        "missed": 0,
        "in_flight": 0,
        "text_restored": True,
        "unrestored": [],
        "duration_ns": 0,
        "command": None,
        "target": session.target,
        "kernel": session.kernel,
    }


def _print_human(found: list[SiteVerdict], every: bool) -> None:
    shown = found if every else found[:_SHOWN_ROWS]
    cells = [
        (one.point, one.tactic or f"refused: {one.reason}", one.site_bytes or "") for one in shown
    ]
    print_table(("point", "tactic", "bytes"), cells, (False, False, False))
    if len(shown) < len(found):
        print(f"... {len(found) - len(shown):,} more rows: add --all")
    tally = Counter(one.tactic or f"refused ({one.reason})" for one in found)
    parts = ", ".join(f"{name} {number:,}" for name, number in tally.most_common())
    print(f"{len(found):,} points: {parts}")
