# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can be woven entered and left, with a counter per block: time, stops, memory.

A workload runs in the clones meanwhile, and kernel threads sleep in them. Memory is the guest's own
account of it, kibibytes more than before. Writes results/weave_leave.json.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
from _record import record
from _stats import estimate
from _workload import lab_session

from kernweave.session.session import Session
from kernweave.weave.counters import make_counters, select_blocks
from kernweave.weave.scope import find_scope

KERNELS = ("6.1", "6.12")
_ROUNDS = 7
_WORK = "ls -lR /usr/lib/python3 | md5sum; cat /proc/[0-9]*/stack | wc -l"
_ACCOUNTS = "awk '/^(VmallocUsed|Percpu):/ { print $2 }' /proc/meminfo; wc -l < /proc/modules"


def main() -> None:
    """Measure, print, write the result file."""
    figures: dict[str, Any] = {}
    for kernel in KERNELS:
        with lab_session(f"bench-leave-{kernel}", kernel=kernel) as session:
            figures[kernel] = measure(session)
        print(f"{kernel}: {figures[kernel]}", flush=True)
    record("weave_leave", " and ".join(KERNELS), figures)


def measure(session: Session) -> dict[str, Any]:
    """Rounds of one kernel; the first is not counted."""
    session.view.refresh()
    session.weaver.prepare()
    rounds = [_round(session) for _ in range(1 + _ROUNDS)][1:]
    spent = {
        name: asdict(estimate([row[name] for row in rounds], 3))
        for name in ("weave_s", "leave_s", "stop_ms", "moved")
    }
    worst = {f"{name}_most": max(row[name] for row in rounds) for name in ("leave_s", "stop_ms")}
    left = {name: [row[name] for row in rounds] for name in ("vmalloc_kib", "percpu_kib", "kmods")}
    return {"functions": rounds[0]["functions"], "blocks": rounds[0]["blocks"],
            "bailed_out_percent": rounds[0]["bailed_out_percent"], **spent, **worst,
            "left": left}  # fmt: skip


def _round(session: Session) -> dict[str, float]:
    before = _accounts(session)
    session.view.refresh()
    began = time.monotonic()
    source = session.analysis.source()
    scope = find_scope(source, session.weaver.rules)
    counters, _ = make_counters(source, scope, *select_blocks(source, scope))
    live = session.weaver.enter(source, scope, counters)
    assert live is not None
    entered = time.monotonic()
    session.run(["sh", "-c", _WORK], check=True, capture=True)
    leaving = time.monotonic()
    left = live.leave()
    assert not left.stuck and not left.visitors and not left.closed.any()
    live.free()
    ended = time.monotonic()
    woven = scope.woven[source.tables.blocks.function]
    after = _accounts(session)
    return {
        "functions": int(scope.woven.sum()),
        "blocks": int(woven.sum()),
        "bailed_out_percent": round(100 * float(np.mean(scope.bail_outs[woven])), 3),
        "weave_s": entered - began,
        "leave_s": ended - leaving,
        "stop_ms": max(stop.stop_ns for stop in left.stops) / 1e6,
        "moved": sum(stop.places for stop in left.stops),
        **{name: after[name] - before[name] for name in before},
    }


def _accounts(session: Session) -> dict[str, int]:
    done = session.run(["sh", "-c", _ACCOUNTS], check=True, capture=True)
    names = ("vmalloc_kib", "percpu_kib", "kmods")
    return dict(zip(names, map(int, done.stdout.split()), strict=True))


if __name__ == "__main__":
    main()
