# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave sites`: what would `count` do with each point?"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import islice
from typing import Any

import click

from kernweave import connect
from kernweave.cli.count import END_SCHEMA
from kernweave.cli.output import print_json, print_table, progress
from kernweave.model.plan import Tactic
from kernweave.session.session import Session
from kernweave.session.survey import Survey
from kernweave.session.woven import CLONE

_SHOWN_ROWS = 30
_TACTICS = (*Tactic, CLONE)


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

    Without --tactic, edges have the tactic clone.

    \b
    Examples:
      kernweave sites vfs_read@insns
      kernweave sites 'tcp_*@blocks' --json
    """  # noqa: D301
    tactics = tactic.split(",") if tactic else None
    with connect(obj["target"], writer=False, progress=progress) as session:
        found = session.survey(*points, tactics=tactics)
        tally = found.tally()
        if as_json:
            _print_json(session, found)
        else:
            _print_human(found, tally, every)
    return 0 if any(name in tally for name in _TACTICS) else 1


def _print_json(session: Session, found: Survey) -> None:
    tactics: Counter[str] = Counter()
    refused = []
    for one in found:
        print_json(one)
        if one.tactic:
            tactics[one.tactic] += 1
        else:
            refused.append({"point": one.point, "reason": one.reason, "detail": one.detail})
    end = {
        "schema": END_SCHEMA,
        "requested": len(found),
        "placed": len(found) - len(refused),
        "refused": refused,
        "tactics": dict(tactics.most_common()),
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
    print_json(end)
    sys.stdout.flush()


def _print_human(found: Survey, tally: dict[str, int], every: bool) -> None:
    shown = list(found if every else islice(found, _SHOWN_ROWS))
    cells = [
        (one.point, one.tactic or f"refused: {one.reason}", one.site_bytes or "") for one in shown
    ]
    print_table(("point", "tactic", "bytes"), cells, (False, False, False))
    if len(shown) < len(found):
        print(f"... {len(found) - len(shown):,} more rows: add --all")
    print()
    total = len(found)
    rows = [
        (name if name in _TACTICS else f"refused: {name}", f"{n:,}", f"{100 * n / total:.2f}%")
        for name, n in tally.items()
    ]
    print_table(
        ("tactic", "points", "share"), [*rows, ("all", f"{total:,}", "")], (False, True, True)
    )
