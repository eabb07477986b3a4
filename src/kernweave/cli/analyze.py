# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave analyze`: the kernel as tables, and how long that takes."""

from __future__ import annotations

import resource
import time
from typing import Any

import click

from kernweave import connect
from kernweave.cli.output import print_json, print_table, progress
from kernweave.session.session import Session

ANALYZE_SCHEMA = "kernweave.analyze/1"
_ROWS = ("functions", "blocks", "instructions", "edges", "calls")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def analyze(obj: dict[str, Any], as_json: bool) -> None:
    """Analyse the kernel, or take what the cache has, and tell what there is.

    \b
    Examples:
      kernweave analyze
      kernweave --target lab:6.12 analyze --json
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        found = _measure(session)
    if as_json:
        print_json(found)
    else:
        _print_human(found)


def _measure(session: Session) -> dict[str, Any]:
    start = time.perf_counter()
    image = session.analysis.kernel
    kernel_seconds = time.perf_counter() - start
    tables = session.tables
    seconds = time.perf_counter() - start
    return {
        "schema": ANALYZE_SCHEMA,
        "kernel": session.kernel,
        **{name: len(getattr(session, name)) for name in _ROWS},
        "indirect_sites": len(tables.indirect_sites()),
        "kmods": len(tables.images) - 1,
        "no_save": tables.no_save(),
        "seconds": round(seconds, 3),
        "kernel_seconds": round(kernel_seconds, 3),
        "from_cache": image.from_cache,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _print_human(found: dict[str, Any]) -> None:
    names = (*_ROWS, "indirect_sites")
    rows = [(f"{found[name]:,}", name.replace("_", " ")) for name in names]
    print_table(("rows", "table"), rows, (True, False))
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in found["no_save"].items())
    print(f"a counter saves nothing at {shares}")
    how = "from the cache" if found["from_cache"] else "analysed"
    peak = found["peak_bytes"] / 2**20
    print(
        f"{found['kernel']} and {found['kmods']} kmods: {how} in {found['seconds']:.1f} s,", end=""
    )
    print(f" at most {peak:,.0f} MiB")
