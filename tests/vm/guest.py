# SPDX-License-Identifier: GPL-2.0-or-later
"""What safety tests need of a lab: its whole text, its log, programs and commands in the guest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import kernweave
from kernweave.driver.link import Link
from kernweave.errors import UnsupportedError
from kernweave.image.symbols import Symbols
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

CSRC = Path(__file__).parent / "csrc"
ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
TRACING = "/sys/kernel/tracing"
#: functions that `faults.c` makes fault; each kernel has some of them
FAULTING = ("strncpy_from_user", "strnlen_user", "copyout", "copyin", "_copy_from_user",
            "_copy_to_user", "copy_user_enhanced_fast_string", "copy_user_generic_string",
            "rep_movs_alternative", "rep_stos_alternative", "filldir64", "__put_user_nocheck_8",
            "__get_user_nocheck_8", "fault_in_readable", "put_timespec64", "get_timespec64",
            "count.constprop.0", "futex_get_value_locked")  # fmt: skip
LONGEST_S = 240.0  # ends a wait for what never comes; a loaded machine is no fault
JUMPS = ("nop5", "jmp32", "group", "springboard")


@contextmanager
def booted(
    name: str,
    *,
    kernel: str = "6.1",
    smp: int = 2,
    memory_mib: int = 1024,
    kernel_args: Sequence[str] = (),
    cflags: tuple[str, ...] = (),
    loud: bool = False,
) -> Iterator[Lab]:
    """A lab of this test process with the driver; its log is clean at the end unless `loud`."""
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    lab = Lab(f"{name}-{os.getpid()}", kernel=kernel)
    try:
        try:
            kmod = driver_kmod(lab.series, print, cflags)
            lab.up(
                kmod=kmod, progress=print, smp=smp, memory_mib=memory_mib, kernel_args=kernel_args
            )
        except UnsupportedError as error:
            if wanted == "1":
                raise
            pytest.skip(f"no lab on this machine: {error}")
        yield lab
        trouble = [] if loud else lab.trouble()
    finally:
        lab.down()
    assert not trouble


def program(name: str) -> str:
    """Path of a static program of `csrc`, the same on the host and in the guest."""
    return str(build_static(CSRC / f"{name}.c", cflags=["-pthread", "-Wno-unused-result"]))


def target(lab: Lab) -> str:
    return f"lab:{lab.name}"


def until(what: str, condition: Callable[[], object], limit_s: float = LONGEST_S) -> None:
    """Wait for a condition; polling, for what tells nobody."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.01)


def shell(link: Link, script: str, *, fresh: bool = True) -> str:
    """Standard output of a script that must succeed; not `fresh` spares it most of its time."""
    out, err = bytearray(), bytearray()
    done = link.run(
        ["sh", "-ec", script],
        env=ENV,
        cwd="/",
        stdout=out.extend,
        stderr=err.extend,
        timeout=LONGEST_S,
        fresh=fresh,
    )
    assert done.exit == 0, f"{script!r} ended with {done.exit}: {err.decode()}"
    return out.decode()


def kmodctl(link: Link, verb: str, what: str) -> str:
    """`ok` or the errno's name of loading (a file) or unloading (a name) a kmod."""
    out = bytearray()
    argv = [program("kmodctl"), verb, what]
    link.run(argv, env=ENV, cwd="/", stdout=out.extend, timeout=LONGEST_S)
    return out.decode().strip()


@dataclass(frozen=True)
class Text:
    """All kernel text, static keys left out: only the kernel itself changes those."""

    start: int
    data: bytes
    keys: tuple[int, ...]

    def changed(self, other: Text) -> list[str]:
        """Addresses of bytes that differ."""
        assert self.start == other.start
        mine, theirs = (np.frombuffer(one.data, np.uint8) for one in (self, other))
        differs = mine != theirs
        for key in (*self.keys, *other.keys):
            differs[key - self.start : key - self.start + 5] = False
        return [f"{self.start + int(at):#x}" for at in np.flatnonzero(differs)]


def read_text(lab: Lab) -> Text:
    """Kernel text as a second, reading session sees it."""
    with kernweave.connect(target(lab), writer=False) as reader:
        facts, sites = reader.driver.facts, reader.view.sites
        keys = [*sites.jump_labels.tolist(), *sites.static_calls.tolist()]
        return Text(
            facts.text_start,
            reader.read(facts.text_start, facts.text_end - facts.text_start),
            tuple(key for key in keys if facts.text_start <= key < facts.text_end),
        )


def names_of(session: Session) -> tuple[Symbols, list[str]]:
    """The kernel image's symbols, and the names that mean one address each."""
    symbols = session.view.images[0]
    return symbols, sorted(name for name in symbols.by_name if len(symbols.find(name)) == 1)


def assert_exact(lab: Lab, calls: int = 23) -> None:
    """A new writing session works at once, and so many calls give so many hits."""
    with kernweave.connect(target(lab)) as session:
        assert session.driver.facts.pinned == 0
        with session.count("__x64_sys_sched_rr_get_interval") as hits:
            session.run([program("calls"), str(calls)], check=True)
        assert [row.hits for row in hits.rows()] == [calls]
        assert hits.text_restored
