# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing is taken for granted about how the kernel was booted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from guest import JUMPS, assert_exact, booted, program, read_text, target

import kernweave
from kernweave.errors import Reason
from kernweave.lab.machine import Lab
from kernweave.session.session import Session

FUNCTIONS = (
    "vfs_write", "do_sys_openat2", "filp_close", "do_filp_open", "path_openat", "__schedule",
    "try_to_wake_up", "kernel_clone", "do_exit", "handle_mm_fault", "do_mmap",
    "unix_stream_sendmsg", "tcp_sendmsg", "tcp_recvmsg", "do_epoll_wait", "get_signal",
    "hrtimer_interrupt", "ksys_read", "__alloc_pages", "link_path_walk",
)  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """How to boot, and what must then be refused somewhere."""

    name: str
    args: tuple[str, ...]
    smp: int = 2
    refused: tuple[Reason, ...] = ()


MODES = (
    Mode("nokaslr", ("nokaslr",)),
    Mode("preempt-full", ("preempt=full",)),
    Mode("one-cpu", (), smp=1),
    Mode("one-of-two-cpus", ("maxcpus=1",), refused=(Reason.LOCK_PREFIX,)),
    Mode("mitigations-off", ("mitigations=off",)),
)
#: run by tests/stress
MORE_MODES = (
    Mode("preempt-none", ("preempt=none",)),
    Mode("retbleed-unret", ("retbleed=unret",)),
    Mode("lockstep-idle", ("idle=poll",)),
)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_boot_mode_counts_and_restores(mode: Mode) -> None:
    check_mode(mode)


def check_mode(mode: Mode) -> None:
    with booted(f"boot-{mode.name}", smp=mode.smp, kernel_args=mode.args) as lab:
        before = read_text(lab)
        assert_exact(lab)
        with kernweave.connect(target(lab)) as session:
            reasons = _count(session)
        assert set(mode.refused) <= reasons
        assert not before.changed(read_text(lab))


def test_driver_that_leaves_all_writing_to_the_kernel_counts_and_restores() -> None:
    """As where LASS or IBT keep it from writing through the kernel's mapping."""
    with booted("boot-write-alone", cflags=("-DKW_SEED_WRITE_ALONE",)) as lab:
        before = read_text(lab)
        assert_exact(lab)
        with kernweave.connect(target(lab)) as session:
            _count(session)
            with session.weave("vfs_*", "__schedule@blocks", partial=True) as woven:
                session.run([program("mixed"), "2"], check=True)
            assert woven.text_restored and woven.hits().sum() > 100
        assert not before.changed(read_text(lab))


def _count(session: Session) -> set[Reason]:
    """Count under a workload; return the reasons of the points that were refused."""
    points = ["vfs_read@insns", *(f"{name}@blocks" for name in FUNCTIONS)]
    with session.count(
        *points, "lockref_get@insns", "mutex_unlock@insns", partial=True, tactics=JUMPS
    ) as hits:
        session.run([program("mixed"), "2"], check=True)
    assert hits.text_restored
    counts = {row.point: row.hits for row in hits.rows()}
    assert sum(count > 0 for count in counts.values()) > 100
    assert counts["vfs_read+0x0"] > 0
    return {one.reason for one in hits.refused}


def test_two_boots_have_two_bases(machine: Lab) -> None:
    first = read_text(machine).start
    with booted("boot-base") as lab:
        second = read_text(lab).start
        assert_exact(machine)
        assert_exact(lab)
    if second == first:  # one boot in about 500
        with booted("boot-base") as lab:
            assert read_text(lab).start != first
