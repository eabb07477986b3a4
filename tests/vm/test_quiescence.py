# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups come and go under CPUs that are parked in the very functions that are changed."""

from __future__ import annotations

from guest import JUMPS, assert_exact, read_text, target

import kernweave
from kernweave.lab.machine import Lab

#: what an idle CPU passes through, and where it sleeps
IDLE = ("do_idle", "default_idle_call", "tick_nohz_idle_enter", "tick_nohz_idle_exit",
        "tick_nohz_idle_stop_tick", "tick_nohz_restart_sched_tick", "cpu_startup_entry",
        "schedule_idle")  # fmt: skip
ROUNDS = 15


def test_groups_come_and_go_under_parked_cpus(machine: Lab) -> None:
    before = read_text(machine)
    with kernweave.connect(target(machine)) as session:
        seen: dict[str, int] = {}
        for _ in range(ROUNDS):
            points = [f"{name}@insns" for name in IDLE]
            with session.count(*points, partial=True, tactics=JUMPS) as hits:
                session.sleep(0.05)  # nobody does anything: both CPUs are parked
            assert hits.text_restored
            for row in hits.rows():
                assert row.exact
                seen[row.tactic] = seen.get(row.tactic, 0) + row.hits
    assert seen["group"] > 1000
    assert not before.changed(read_text(machine))
    assert_exact(machine)


def test_cpu_that_goes_and_comes_finds_its_text(machine: Lab) -> None:
    """A CPU that is off sleeps in a function that groups are put into meanwhile."""
    online = "/sys/devices/system/cpu/cpu1/online"
    points = [f"{name}@insns" for name in (*IDLE, "native_play_dead", "mwait_play_dead")]
    with kernweave.connect(target(machine)) as session:
        session.run(["sh", "-c", f"echo 0 > {online}"], check=True)
        with session.count(*points, partial=True, tactics=JUMPS) as hits:
            session.run(["sh", "-c", f"echo 1 > {online}"], check=True)
            session.sleep(0.1)
            session.run(["sh", "-c", f"echo 0 > {online}"], check=True)
        assert hits.text_restored
        assert hits.exact().all()
        session.run(["sh", "-c", f"echo 1 > {online}"], check=True)
        session.sleep(0.1)
    assert_exact(machine)
