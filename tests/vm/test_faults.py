# SPDX-License-Identifier: GPL-2.0-or-later
"""Displaced instructions that fault, sleep in a fault, warn or end their task: all as at home."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from guest import (
    CSRC,
    FAULTING,
    JUMPS,
    LONGEST_S,
    assert_exact,
    booted,
    kmodctl,
    names_of,
    program,
    read_text,
    shell,
    target,
    until,
)

import kernweave
from kernweave.driver.client import Driver
from kernweave.driver.link import Link
from kernweave.driver.uapi import Owner
from kernweave.errors import Reason, RefusedError
from kernweave.image.sites import contains
from kernweave.lab.build import build_kmod
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.attachment import Attachment
from kernweave.session.hooks import SEARCHES
from kernweave.session.session import Session

ROUNDS = 300
SLEEPER = "strncpy_from_user@insns"
DIRECTORY = "/tmp/kw-faults"
HOOKED = (*SEARCHES, "arch_prepare_kprobe", "ftrace_replace_code")
KMOD = "kw_subject"
WARN = f"{KMOD}:kw_subject_warn@insns"
PARAMETERS = f"/sys/module/{KMOD}/parameters"
WARNINGS = 12
EXPECTED = f"{KMOD}|invalid opcode|Call Trace"


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab whose text is what it was in the end, and whose log has what is expected only."""
    with booted(f"faults-{request.param}", kernel=request.param, loud=True) as machine:
        before = read_text(machine)
        yield machine
        assert_exact(machine)
        assert not before.changed(read_text(machine))
        assert not [line for line in machine.trouble() if not re.search(EXPECTED, line)]


@pytest.fixture
def link(lab: Lab) -> Iterator[Link]:
    """A second session, of somebody else."""
    with lab.connect() as opened:
        shell(opened, f"rm -rf {DIRECTORY}; mkdir {DIRECTORY}")
        yield opened
        shell(opened, f"touch {DIRECTORY}/go")


def searched(session: Session, hits: Attachment) -> np.ndarray:
    """bool[m]: placed points that the kernel looks up when they fault."""
    addrs = np.array([point.addr for point in hits.placed], np.uint64)
    return contains(session.view.sites.exceptions, addrs)


@pytest.mark.parametrize("kind", ["bad", "lazy"])
def test_faults_in_displaced_instructions_are_fixed_up(lab: Lab, kind: str) -> None:
    with kernweave.connect(target(lab)) as session:
        known = set(names_of(session)[1])
        points = [f"{name}@insns" for name in FAULTING if name in known]
        with session.splice(*points, partial=True, tactics=JUMPS) as hits:
            session.run([program("faults"), kind, str(ROUNDS)], check=True)
        assert hits.text_restored and hits.exact().all() and not hits.in_flight
        counts = hits.hits()[searched(session, hits)]
        assert counts.sum() >= ROUNDS and len(counts) > 5


def test_functions_in_which_the_driver_has_hooks_are_counted_but_for_those(lab: Lab) -> None:
    """Also when the hooks are made for this very attach."""
    with kernweave.connect(target(lab)) as session:
        points = [f"{name}@insns" for name in HOOKED]
        with session.splice(*points, "vfs_read", "strncpy_from_user@insns") as hits:
            session.run([program("faults"), "bad", "10"], check=True)
        refused = {one.point for one in hits.refused if one.reason is Reason.BUSY_PLAN}
        assert hits.text_restored and hits.exact().all()
        for name in HOOKED:
            assert 0 < sum(point.startswith(f"{name}+") for point in refused) <= 4


def start_sleeper(link: Link) -> None:
    """A task that sleeps in a fault, in the kernel, until there is a file `go`."""
    command = f"{program('faults')} sleep {DIRECTORY}/go"
    # the file is there before anybody looks: the shell may end before its child opens it
    shell(link, f"touch {DIRECTORY}/out; {command} > {DIRECTORY}/out 2>&1 < /dev/null &")
    until("the task sleeps", lambda: "asleep" in said(link))


def said(link: Link) -> str:
    return shell(link, f"cat {DIRECTORY}/out", fresh=False)


def wake(link: Link) -> None:
    shell(link, f"touch {DIRECTORY}/go")
    until("the task is awake", lambda: "awake" in said(link))


def test_task_that_sleeps_in_a_fault_keeps_its_trampoline(lab: Lab, link: Link) -> None:
    with kernweave.connect(target(lab)) as session:
        with session.splice(SLEEPER, partial=True, tactics=JUMPS) as hits:
            start_sleeper(link)
        assert hits.text_restored
        assert hits.in_flight == 1
        assert not hits.exact()[searched(session, hits)].all()
        assert hits.exact().sum() > len(hits.placed) / 2
        with session.splice(SLEEPER, partial=True, tactics=JUMPS) as again:
            wake(link)
        assert again.text_restored and again.exact().all() and not again.in_flight
    settled(lab)


def settled(lab: Lab) -> None:
    """Nothing of a session is left, nor of one before, and the driver can be unloaded."""
    with kernweave.connect(target(lab), writer=False) as reader:
        until("all is restored", lambda: not len(reader.driver.placed()))


def test_client_that_goes_leaves_what_a_sleeping_task_needs(lab: Lab, link: Link) -> None:
    session = kernweave.connect(target(lab))
    session.splice(SLEEPER, partial=True, tactics=JUMPS)
    start_sleeper(link)
    session._link.close()  # as if it had died
    with kernweave.connect(target(lab)) as other:
        left = other.driver.placed()
        assert set(left["owner"].tolist()) == {Owner.LEFT} and len(left) == 3
        assert kmodctl(link, "unload", "kernweave") in ("EAGAIN", "EBUSY", "EWOULDBLOCK")
        ends = other.driver.returns()
        assert len(ends)
        if lab.series == "6.1":  # elsewhere the windows are not other ones
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Driver, "returns", lambda _: np.zeros(0, np.uint64))
                with pytest.raises(RefusedError, match="somebody comes back into it"):
                    other.splice(SLEEPER, partial=True, tactics=JUMPS)
        with other.splice(SLEEPER, partial=True, tactics=JUMPS) as hits:
            pokes = hits.plan.pokes
            starts = pokes.addr
            stops = starts + np.array([len(old) for old in pokes.old], np.uint64)
            assert not ((starts < ends[:, None]) & (ends[:, None] < stops)).any()
            other.run([program("faults"), "bad", "10"], check=True)
            wake(link)  # it goes on behind the window it came by, where another one is now
        assert hits.text_restored and hits.exact().all()
        assert Reason.EXCEPTION_ENTRY in {one.reason for one in hits.refused}
    settled(lab)
    with kernweave.connect(target(lab)) as new:
        placed = new.sites(SLEEPER)
        assert Reason.EXCEPTION_ENTRY.value not in {one.reason for one in placed}


def test_warning_stays_a_warning_and_a_bug_a_bug(lab: Lab, link: Link) -> None:
    kmod = build_kmod(fetch_kernel(lab.series, print), CSRC / "subject", progress=print)
    assert not lab.trouble()
    assert kmodctl(link, "load", str(kmod)) == "ok"
    with kernweave.connect(target(lab)) as session:
        with session.splice(WARN, partial=True, tactics=JUMPS) as hits:
            shell(link, f"for i in $(seq {WARNINGS}); do echo 1 > {PARAMETERS}/warn; done")
            shell(link, "echo 0 > /proc/sys/kernel/panic_on_oops")
            shell(link, f"(echo 1 > {PARAMETERS}/bug) || true")
        assert hits.text_restored and hits.exact().all()
        assert int(shell(link, f"cat {PARAMETERS}/warned")) == WARNINGS
        addrs = np.array([point.addr for point in hits.placed], np.uint64)
        bugs = hits.hits()[contains(session.view.sites.bugs, addrs)]
        assert sorted(bugs.tolist()) == [1, WARNINGS, WARNINGS]
        shell(link, f"echo 1 > {PARAMETERS}/warn")
    shell(link, "echo '<7>all is said' > /dev/kmsg")
    lab.wait_console("all is said", LONGEST_S)  # another CPU may be writing it
    log = lab.log()
    place = r"at \S*kw_subject\.c:(\d+) kw_subject_warn\+"
    lines = re.findall(f"WARNING: .*{place}", log)
    # the last one at home: the once is over there, too
    assert sorted(map(lines.count, set(lines))) == [1, WARNINGS + 1]
    assert len(re.findall(r"kernel BUG at \S*kw_subject\.c:\d+!", log)) == 1


def test_int3_that_is_gone_when_it_is_looked_at_is_not_an_oops(lab: Lab, link: Link) -> None:
    if KMOD not in shell(link, "cat /proc/modules"):
        kmod = build_kmod(fetch_kernel(lab.series, print), CSRC / "subject", progress=print)
        assert kmodctl(link, "load", str(kmod)) == "ok"
    before = int(shell(link, "cat /sys/module/kernweave/parameters/gone"))
    shell(link, f"echo 1 > {PARAMETERS}/vanish")
    assert int(shell(link, f"cat {PARAMETERS}/gone")) == 2  # what is there was run
    after = int(shell(link, "cat /sys/module/kernweave/parameters/gone"))
    assert after == before if lab.series == "6.1" else after > before  # 6.1 itself runs it again
