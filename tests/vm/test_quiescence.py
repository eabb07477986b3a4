# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups come and go under CPUs that are parked in the very functions that are changed."""

from __future__ import annotations

import signal

from guest import ENV, JUMPS, LONGEST_S, assert_exact, program, read_text, shell, target
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


ONLINE = "/sys/devices/system/cpu/cpu1/online"


def test_jumps_and_clones_come_and_go_while_cpus_do(machine: Lab) -> None:
    """The other way round, too: CPUs come and go although text is written all the time."""
    before = read_text(machine)
    flips = f"for i in $(seq 1000); do echo 0 > {ONLINE}; echo 1 > {ONLINE}; echo $i; done"
    with machine.connect() as link, kernweave.connect(target(machine)) as session:
        link.exec_start(["sh", "-c", flips], env=ENV, cwd="/", fresh=True)
        for _ in range(4):
            with session.splice(*(f"{name}@insns" for name in IDLE), partial=True) as spliced:
                session.run([program("mixed"), "1"], check=True)
            with session.weave("vmlinux:vfs_*@blocks", "cpu*@insns", partial=True) as woven:
                session.run([program("mixed"), "1"], check=True)
            assert spliced.text_restored and woven.text_restored and not woven.in_flight
            assert sum(row.hits for row in woven.rows()) > 0
        link.signal(signal.SIGKILL)
        said = b"".join(data for _, data in link.exec_events(LONGEST_S) if isinstance(data, bytes))
        print(f"cpu1 came and went {len(said.split())} times")
        assert len(said.split()) > 4
        shell(link, f"echo 1 > {ONLINE} || true")
    assert not before.changed(read_text(machine))
    assert_exact(machine)


def test_cpu_that_goes_and_comes_finds_its_text(machine: Lab) -> None:
    """What a CPU that is off sleeps in is left alone; groups are put around it meanwhile."""
    points = [f"{name}@insns" for name in (*IDLE, "native_play_dead", "mwait_play_dead")]
    with kernweave.connect(target(machine)) as session:
        session.run(["sh", "-c", f"echo 0 > {ONLINE}"], check=True)
        with session.count(*points, partial=True, tactics=JUMPS) as hits:
            session.run(["sh", "-c", f"echo 1 > {ONLINE}"], check=True)
            session.sleep(0.1)
            session.run(["sh", "-c", f"echo 0 > {ONLINE}"], check=True)
        assert hits.text_restored
        assert hits.exact().all()
        session.run(["sh", "-c", f"echo 1 > {ONLINE}"], check=True)
        session.sleep(0.1)
    assert_exact(machine)
