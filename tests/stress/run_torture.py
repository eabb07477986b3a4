# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix of tortures: `make stress KERNEL= MODE= ENGINE= SEED= MINUTES=`.

Without arguments: every cell that has not gone well yet with what is checked out. Each run adds a
row to bench/results/torture.jsonl as it ends, so that an interrupted matrix goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from datetime import UTC, datetime
from functools import partial

import torture
import torture_rows as rows
import torture_weave
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab

Cell = tuple[str, str, str, float]  # kernel, mode, engine, minutes

KERNELS = ("6.1", "6.12")
PREEMPTION = ("voluntary", "full")  # modes in which scopes are woven
WEAVE_MINUTES = 15.0
ENGINES: dict[str, torture.Play] = {
    "splice": torture.play_splices,
    "weave": torture_weave.play_weaves,
    "poison": partial(torture_weave.play_weaves, poison=True),
}


def main() -> int:
    """Run what is due; 1 if something went wrong."""
    # whoever runs this in the background may have it ignore interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = _arguments()
    cells = [
        (kernel, mode, engine, args.minutes or _minutes(mode, engine))
        for engine in ([args.engine] if args.engine else ENGINES)
        for mode in ([args.mode] if args.mode else torture.MODES)
        for kernel in ([args.kernel] if args.kernel else KERNELS)
        if engine == "splice" or args.mode or mode in PREEMPTION
    ]
    if not (args.kernel or args.mode or args.engine or args.seed or args.minutes):
        cells = _due(cells)
    failed = 0
    for kernel, mode, engine, minutes in cells:
        row = run(kernel, mode, engine, args.seed or random.randrange(1, 1 << 31), minutes)
        failed += row.result != torture.OK and not row.result.startswith("ModeError")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make stress")
    parser.add_argument("--kernel", choices=["", *KERNELS], default="")
    parser.add_argument("--mode", choices=["", *torture.MODES], default="")
    parser.add_argument("--engine", choices=["", *ENGINES], default="")
    parser.add_argument("--seed", type=lambda text: int(text or 0), default=0)
    parser.add_argument("--minutes", type=lambda text: float(text or 0), default=0.0)
    return parser.parse_args()


def _minutes(mode: str, engine: str) -> float:
    return torture.MODES[mode].minutes if engine == "splice" else WEAVE_MINUTES


def _due(cells: list[Cell]) -> list[Cell]:
    found = rows.read_rows()
    due = [cell for cell in cells if not rows.is_done(found, cell[:3], cell[3], rows.has_subject)]
    total = sum(minutes for *_, minutes in due)
    print(f"{len(due)} of {len(cells)} cells are due: {total:g} minutes of torture")
    return due


def run(kernel: str, mode: str, engine: str, seed: int, minutes: float) -> rows.Row:
    """Torture one kernel in one mode, and record it."""
    print(f"{kernel} {mode} {engine}: SEED={seed} MINUTES={minutes:g}", flush=True)
    commit, dirty, tally, release = rows.head(), rows.is_dirty(), torture.Tally(), ""
    began = time.monotonic()
    lab: Lab | None = None
    try:
        with torture.booted(kernel, mode) as lab:
            state = lab.status().state
            release = state.kernel if state else ""
            problems = torture.torture(lab, seed, round(60 * minutes), tally, ENGINES[engine])
        result = "; ".join(problems) or torture.OK
    except (KernweaveError, TimeoutError, AssertionError) as error:
        result = torture.describe_death(lab, error) if lab else _name(error)
    row = rows.Row(
        commit=commit, dirty=dirty, date=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=kernel, release=release, mode=mode, seed=seed, minutes=minutes,
        rounds=tally.rounds, placed=dict(tally.placed), refused=dict(tally.refused),
        hits=tally.hits, missed=tally.missed, result=result, engine=engine,
    )  # fmt: skip
    rows.append_row(row)
    _report(row, time.monotonic() - began)
    return row


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _report(row: rows.Row, seconds: float) -> None:
    placed = ", ".join(f"{count:,} {tactic}" for tactic, count in row.placed.items())
    print(
        f"  {row.rounds} rounds in {seconds:.0f} s; placed {placed or 'nothing'}; "
        f"refused {sum(row.refused.values()):,}; {row.hits:,} hits, {row.missed:,} missed"
    )
    print(f"  {row.result}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is left")
