# SPDX-License-Identifier: GPL-2.0-or-later
"""What idle CPUs are parked in, and counters that come and go there."""

from __future__ import annotations

from collections import Counter

from guest import JUMPS, read_text, target

import kernweave
from kernweave.lab.machine import Lab

#: what an idle CPU passes through, and where it sleeps
IDLE = ("do_idle", "default_idle_call", "tick_nohz_idle_enter", "tick_nohz_idle_exit",
        "tick_nohz_idle_stop_tick", "tick_nohz_restart_sched_tick", "cpu_startup_entry",
        "schedule_idle")  # fmt: skip


def come_and_go(machine: Lab, rounds: int) -> Counter[str]:
    """Count every instruction of `IDLE` again and again while nobody does anything.

    Returns:
        The hits of each tactic; all counts were exact, and the text is as before.
    """
    before = read_text(machine)
    seen: Counter[str] = Counter()
    points = [f"{name}@insns" for name in IDLE]
    with kernweave.connect(target(machine)) as session:
        for _ in range(rounds):
            with session.count(*points, partial=True, tactics=JUMPS) as hits:
                session.sleep(0.05)  # all CPUs are parked
            assert hits.text_restored
            for row in hits.rows():
                assert row.exact
                seen[row.tactic] += row.hits
    assert not before.changed(read_text(machine))
    return seen
