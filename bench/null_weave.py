# SPDX-License-Identifier: GPL-2.0-or-later
"""What running in clones costs, without any counter: instructions per system call (`-icount`).

For each loop of system calls all functions that it enters are woven, then all of the kernel.  Then
all again with the entries counted, which shows that the clones are what runs; `entries_per_call`
holds the start of the program and whatever else runs meanwhile, too.
Writes results/null_weave.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _record import record
from _workload import Workload, lab_session

from kernweave.session.session import Session
from kernweave.weave.counters import make_counters, select_entries
from kernweave.weave.scope import Scope, find_scope
from kernweave.weave.source import U8, Mask, Rows, Source

KERNELS = ("6.1", "6.12")
CALLS = ("getppid", "read", "mix")
Select = Callable[[Source, Scope], tuple[Rows, U8]]


def main() -> None:
    """Measure, print, write the result file."""
    figures: dict[str, Any] = {}
    for kernel in KERNELS:
        with lab_session(f"bench-null-weave-{kernel}", icount=True, kernel=kernel) as session:
            figures[kernel] = {call: measure(session, call) for call in CALLS}
        for call, row in figures[kernel].items():
            print(f"{kernel} {call}: {row}", flush=True)
    record("null_weave", " and ".join(KERNELS), figures)


def measure(session: Session, call: str) -> dict[str, Any]:
    """Instructions per call, natively and woven."""
    workload = Workload(session, call)
    entered = functions_entered(session, workload)
    native = workload.cost()
    path, _ = _woven(session, workload, entered)
    everything, _ = _woven(session, workload, np.ones(len(entered), bool))
    counted, entries = _woven(session, workload, np.ones(len(entered), bool), select_entries)
    assert entries >= workload.total
    return {
        "functions_on_path": int(entered.sum()),
        "native_instructions": native,
        "path_woven_instructions": path,
        "path_woven_added_percent": round(100 * (path / native - 1), 3),
        "all_woven_instructions": everything,
        "all_woven_added_percent": round(100 * (everything / native - 1), 3),
        "entries_counted_instructions": counted,
        "entries_per_call": round(entries / workload.total, 3),
    }


def functions_entered(session: Session, workload: Workload) -> Mask:
    """bool[f]: functions of the kernel that a round of the loop enters about once per call."""
    with session.count("vmlinux:*", partial=True, tactics=["nop5"]) as hits:
        workload.cost()
    often = hits.hits() >= workload.total
    find = session.view.images[0].find
    addrs = [addr for point, much in zip(hits.placed, often.tolist(), strict=True) if much
             for addr in find(point.function)]  # fmt: skip
    session.view.refresh()
    return np.isin(session.analysis.source().tables.functions.addr, np.array(addrs, np.uint64))


def select_nothing(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """No instruction."""
    return np.zeros(0, np.int64), np.zeros(0, np.uint8)


def _woven(
    session: Session, workload: Workload, asked: Mask, select: Select = select_nothing
) -> tuple[float, int]:
    """Instructions per call, and the sum of all counters."""
    session.view.refresh()
    session.weaver.prepare()
    session.view.refresh()
    source = session.analysis.source()
    scope = find_scope(source, session.weaver.rules, asked)
    counters, _ = make_counters(source, scope, *select(source, scope))
    live = session.weaver.enter(source, scope, counters)
    assert live is not None
    try:
        cost = workload.cost()
    finally:
        left = live.leave()
        assert not left.stuck and not left.visitors
        hits = int(live.hits().sum())
        live.free()
    return cost, hits


if __name__ == "__main__":
    main()
