# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the machine stops when trampolines go that a task may come back to after a fault.

What freeing an area takes with copies that may fault, less what it takes without: the driver looks
at the stacks of all tasks meanwhile, with the machine stopped. With the guest's own tasks, and
with many more that sleep.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from _one_point import stopwatch
from _record import record
from _stats import estimate
from _workload import lab_session

from kernweave.session.session import Session

_RUNS = 40
_SLEEPERS = 1000
_WITH, _WITHOUT = "strncpy_from_user+0x98", "strncpy_from_user+0x3f"
_TASKS = "ls -d /proc/[0-9]*/task/[0-9]* | wc -l"


def main() -> None:
    """Measure in a lab of its own and write results/stack_scan.json."""
    figures: dict[str, Any] = {}
    with lab_session("bench-stack-scan") as session:
        kernel = session.kernel
        for name, sleepers in (("idle", 0), ("many_tasks", _SLEEPERS)):
            figures[name] = _measure(session, sleepers)
    record("stack_scan", kernel, figures)


def _measure(session: Session, sleepers: int) -> dict[str, Any]:
    """Milliseconds of the request `free`, with and without copies, in turns."""
    script = f"for i in $(seq {sleepers}); do setsid sleep 600 >/dev/null 2>&1 </dev/null & done"
    session.run(["sh", "-c", script], check=True)
    tasks = session.run(["sh", "-c", _TASKS], capture=True, check=True)
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(_RUNS):
        for name, point in (("with", _WITH), ("without", _WITHOUT)):
            hits = session.splice(point)
            assert bool(len(hits.plan.copies.addr)) == (name == "with")
            seconds: dict[str, float] = defaultdict(float)
            with stopwatch(session.driver, seconds):
                hits.detach()
            spent[name].append(1e3 * seconds["free"])
    more = [one - other for one, other in zip(spent["with"], spent["without"], strict=True)]
    return {
        "tasks": int(tasks.stdout),
        "free_with_copies_ms": asdict(estimate(spent["with"], 3)),
        "free_without_ms": asdict(estimate(spent["without"], 3)),
        "more_ms": asdict(estimate(more, 3)),
        "more_most_ms": round(max(more), 3),
    }


if __name__ == "__main__":
    main()
