# SPDX-License-Identifier: GPL-2.0-or-later
"""Weaving that fails, or dies: native text is what it was, and the next works.

`tests/stress` has more stages, both kernels, and no memory left.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from guest import (
    CSRC,
    LONGEST_S,
    TRACING,
    Text,
    booted,
    kmodctl,
    program,
    read_text,
    shell,
    target,
    until,
)

import kernweave
from kernweave.driver.client import Driver
from kernweave.driver.link import Link
from kernweave.errors import DriverError, Reason, RefusedError
from kernweave.lab.build import build_kmod
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.session import Session
from kernweave.weave.clonemap import make_map
from kernweave.x86.decode import decode

CLIENT = Path(__file__).parent / "kill_weave.py"
CALLS = 23
SUBJECT = "__x64_sys_sched_rr_get_interval"
NEVER_RUN = "kernel_halt"
#: somebody is always inside of some of these
FEW = ("do_sys_poll@insns", "schedule*@blocks", "vfs_read@insns", "ksys_*", "__schedule@blocks",
       f"{SUBJECT}@insns")  # fmt: skip
MANY = ("n*@blocks", "s*@blocks", "v*@blocks")
EVERYTHING = "vmlinux:*@blocks"
STAGES = ("after:load_kmod:1", "after:commit:1", "after:undo:1", "after:free:1")
#: what is before one is behind another
ALL_STAGES = ("after:area:1", "after:percpu:1", "before:load_kmod:1", "after:load_kmod:1",
          "after:weave:1", "after:commit:1", "after:move:1", "after:undo:1", "after:quiesce:1",
          "after:move:2", "after:free:1", "after:forget:1", "after:unload_kmod:1")  # fmt: skip
MEMORY_MIB = 1792  # more than there can be of code, which is 1 GiB under KASLR
BLOCK = 16 << 20
#: of the memory that the tests themselves take away
EXPECTED = r"vmalloc|Call Trace|page allocation failure"
SEED = int(os.environ.get("KERNWEAVE_SEED", "0")) or random.randrange(1, 1 << 31)


@pytest.fixture(scope="module")
def machine() -> Iterator[Lab]:
    with fault_lab("6.1") as lab:
        yield lab


@contextmanager
def fault_lab(series: str) -> Iterator[Lab]:
    """A lab that may run out of memory."""
    name = f"weave-faults-{series}"
    with booted(name, kernel=series, memory_mib=MEMORY_MIB, loud=True) as lab:
        yield lab
        assert not [line for line in lab.trouble() if not re.search(EXPECTED, line)]


@pytest.fixture(scope="module")
def native(machine: Lab) -> Text:
    return read_text(machine)


@pytest.fixture
def link(machine: Lab) -> Iterator[Link]:
    """A second session, of somebody else."""
    with machine.connect() as opened:
        yield opened


@pytest.fixture
def lab(machine: Lab, native: Text, link: Link) -> Iterator[Lab]:
    """The lab; after the test nothing is left of it, and the next weaving counts right."""
    yield machine
    with kernweave.connect(target(machine), writer=False) as reader:
        until("all is restored", lambda: not len(reader.driver.placed()))
    with kernweave.connect(target(machine)) as session:
        assert_counts(session, link)
    assert not generations(link)
    assert ".kw+" not in shell(link, "cat /proc/[0-9]*/task/[0-9]*/stack")
    assert not native.changed(read_text(machine))


def generations(link: Link) -> list[str]:
    """Kmods that hold clones."""
    return shell(link, "grep -o '^kernweave_[0-9]*' /proc/modules || true").split()


def assert_counts(session: Session, link: Link) -> None:
    """So many calls give so many hits, in the only generation there is."""
    with session.weave(f"{SUBJECT}@insns") as woven:
        assert generations(link) == [woven.live.kmod]
        session.run([program("calls"), str(CALLS)], check=True)
    assert max(row.hits for row in woven.rows()) == CALLS
    assert woven.text_restored and woven.exact().all() and not woven.in_flight


# ---- no room -----------------------------------------------------------------------------------


def fill_code_memory(driver: Driver) -> int:
    """Take what there is for code, in blocks; how many."""
    blocks = 0
    while True:
        try:
            driver.area(BLOCK)
        except DriverError as error:
            assert error.errno == errno.ENOMEM
            return blocks
        blocks += 1


def test_no_room_for_code_is_told_and_changes_nothing(lab: Lab, link: Link, native: Text) -> None:
    with kernweave.connect(target(lab)) as session:
        print(fill_code_memory(session.driver), "blocks")
        with pytest.raises(DriverError) as raised:
            session.weave(EVERYTHING, partial=True)
        print(raised.value)
        assert raised.value.errno == errno.ENOMEM
        needed = re.search(r"no room for clones: ([\d,]+) bytes of code", raised.value.message)
        assert needed and int(needed[1].replace(",", "")) > BLOCK
        assert not generations(link)
        assert_counts(session, link)


def test_more_than_can_be_loaded_at_once_is_told(
    lab: Lab, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernweave.session.generations.PAYLOAD_MAX", 1 << 20)
    with kernweave.connect(target(lab)) as session:
        with pytest.raises(DriverError) as raised:
            session.weave(EVERYTHING, partial=True)
        print(raised.value)
        assert raised.value.errno == errno.EMSGSIZE and "no room for clones" in str(raised.value)
        assert not generations(link)
        assert_counts(session, link)


# ---- text that others change -------------------------------------------------------------------


def test_function_with_somebody_elses_kprobe_is_refused(lab: Lab, link: Link) -> None:
    probe = f"{TRACING}/events/kprobes/kw_faults/enable"
    shell(link, f"echo 'p:kw_faults {SUBJECT}+0' > {TRACING}/kprobe_events; echo 1 > {probe}")
    with kernweave.connect(target(lab)) as session:
        with pytest.raises(RefusedError) as raised:
            session.weave(f"{SUBJECT}@insns")
        assert {reason for _, reason, _ in raised.value.refused} <= {
            Reason.BUSY_FTRACE, Reason.BUSY_KPROBE, Reason.DENYLIST
        }  # fmt: skip
        print(raised.value)
        shell(link, f"echo 0 > {probe}; echo > {TRACING}/kprobe_events")
        assert_counts(session, link)


@pytest.mark.parametrize("method", ["weave", "area"])
def test_function_that_gets_a_kprobe_meanwhile_is_refused_or_woven_without(
    lab: Lab, link: Link, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the text was read: before the driver follows it, and after."""
    probe = f"{TRACING}/events/kprobes/kw_faults/enable"
    original = getattr(Driver, method)

    def late(self: Driver, *args: object) -> object:
        monkeypatch.setattr(Driver, method, original)
        done = original(self, *args)
        shell(link, f"echo 'p:kw_faults {SUBJECT}+0' > {TRACING}/kprobe_events; echo 1 > {probe}")
        return done

    with kernweave.connect(target(lab)) as session:
        session.view.refresh()
        session.weaver.prepare()
        monkeypatch.setattr(Driver, method, late)
        try:
            session.weave(f"{SUBJECT}@insns").detach()
        except RefusedError as error:
            print(error)
        shell(link, f"echo 0 > {probe}; echo > {TRACING}/kprobe_events")
        assert_counts(session, link)


def test_text_that_simply_became_another_is_analysed_anew(
    lab: Lab, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    kmod = build_kmod(fetch_kernel(lab.series, print), CSRC / "subject", progress=print)
    assert kmodctl(link, "load", str(kmod)) == "ok"
    said: list[str] = []
    with kernweave.connect(target(lab), progress=said.append) as session:
        monkeypatch.setattr(session.analysis, "_folder", None)
        said.clear()
        addr = immediate_of(session, NEVER_RUN)
        copies = [copy_of(session, addr)]
        known = len(said)
        scribble = f"echo {addr:#x} > /sys/module/kw_subject/parameters/scribble"
        shell(link, scribble)
        copies.append(copy_of(session, addr))
        shell(link, scribble)
        assert (known, len(said)) == (1, 2)
    assert kmodctl(link, "unload", "kw_subject") == "ok"
    assert copies[0] ^ copies[1] == 1


def immediate_of(session: Session, function: str) -> int:
    """Address of the first byte of a four-byte number in the code of a function."""
    bounds = session.view.images[0].bounds(session.view.images[0].find(function)[0])
    assert bounds
    code = decode([(bounds[0], session.read(bounds[0], bounds[1] - bounds[0]))])
    row = np.flatnonzero((code.imm_size == 4) & (code.target == 0) & (code.imm > 0))[0]
    return int(code.addr[row]) + int(code.imm[row])


def copy_of(session: Session, addr: int) -> int:
    """The byte of a clone that is the copy of a native one, read in the kernel."""
    with session.weave(f"{NEVER_RUN}@insns") as woven:
        live = woven.live
        clones = make_map(live.woven.source, live.woven.layout, live.base)
        row = np.searchsorted(clones.native, np.uint64(addr), side="right") - 1
        inside = addr - int(clones.native[row])
        return session.read(int(clones.clone[row]) + inside, 1)[0]


# ---- the client dies ---------------------------------------------------------------------------


def start(lab: Lab, stage: str, *points: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CLIENT), lab.name, stage, *points],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_client_killed_at_a_stage_leaves_nothing(lab: Lab, stage: str) -> None:
    kill_at(lab, stage)


def test_client_killed_while_it_enters_many_leaves_nothing(lab: Lab) -> None:
    kill_while(lab, "enters")


def kill_at(lab: Lab, stage: str) -> None:
    """A client that ends itself."""
    with start(lab, stage, *FEW) as client:
        client.communicate(timeout=LONGEST_S)
    assert client.returncode == -signal.SIGKILL


def kill_while(lab: Lab, stage: str) -> None:
    """A client that is ended while it enters many functions, or leaves them."""
    print("seed", SEED)
    with (
        kernweave.connect(target(lab), writer=False) as reader,
        start(lab, "never", *MANY) as client,
    ):
        try:
            assert client.stdout is not None and client.stdin is not None
            at_least = random.Random(SEED).randrange(100, 2000)
            until("entries are placed", lambda: len(reader.driver.placed()) > at_least)
            if stage == "leaves":
                assert client.stdout.readline() == "woven\n"
                entered = len(reader.driver.placed())
                client.stdin.close()
                until("undo has begun", lambda: len(reader.driver.placed()) < entered)
        finally:
            client.kill()
