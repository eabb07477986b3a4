# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups come and go under CPUs that are parked in the very functions that are changed."""

from __future__ import annotations

from guest import JUMPS, assert_exact, program, read_text, target
from parked import IDLE, come_and_go

import kernweave
from kernweave.errors import Reason
from kernweave.image.denied import INT3_PATH
from kernweave.lab.machine import Lab


def test_groups_come_and_go_under_parked_cpus(machine: Lab) -> None:
    seen = come_and_go(machine, rounds=15)
    assert seen["group"] > 100  # thousands as a rule
    assert_exact(machine)


#: what is called between an int3 and the driver's notifier, and what looks as if it were
ON_THE_WAY = ("*rcu_read*", "*notifier*", "notify_die", "irqentry_*", "*exceptions_notify",
              "arch_uprobe_exception_notify", "kgdb_*", "do_int3", "exc_int3")  # fmt: skip


def test_int3_leads_to_no_other_int3_on_its_way(machine: Lab) -> None:
    """Groups wait with an int3 in everything around the path of their own traps."""
    before = read_text(machine)
    with kernweave.connect(target(machine)) as session:
        there = [name for name in INT3_PATH if session.view.images[0].find(name)]
        assert len(there) >= 5  # the kernel at hand has no event notifier_run
        verdicts = session.sites(*(f"{name}@insns" for name in there))
        assert {one.reason for one in verdicts} == {Reason.DENYLIST}
        points = [f"{name}@insns" for name in (*ON_THE_WAY, *IDLE)]
        for _ in range(3):
            with session.count(*points, partial=True, tactics=JUMPS) as hits:
                session.run([program("mixed"), "1"], check=True)
            assert hits.text_restored and hits.exact().all()
            assert hits.tactics()["group"] > 100
    assert not before.changed(read_text(machine))


def test_whoever_is_told_of_an_int3_before_the_driver_is_left_alone(machine: Lab) -> None:
    with kernweave.connect(target(machine), writer=False) as session:
        ours = next(row for row in session.driver.kmods() if row["name"] == b"kernweave")
        node = int.from_bytes(
            session.read(session.driver.lookup(["die_chain"])[0] + 8, 8), "little"
        )
        callbacks = []
        while node:
            call, node = (int.from_bytes(session.read(node + at, 8), "little") for at in (0, 8))
            if ours["text_start"] <= call < ours["text_end"]:
                break
            callbacks.append(call)
        assert node and callbacks
        names = [session.view.images[0].name_at[call] for call in callbacks]
        verdicts = session.sites(*(f"{name}@insns" for name in names))
        assert {one.reason for one in verdicts} == {Reason.DENYLIST}, names


def test_cpu_that_goes_and_comes_finds_its_text(machine: Lab) -> None:
    """What a CPU that is off sleeps in is left alone; groups are put around it meanwhile."""
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
