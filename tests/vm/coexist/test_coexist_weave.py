# SPDX-License-Identifier: GPL-2.0-or-later
"""Others come to functions that run as clones, change what the kernel patches, or patch it live."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from guest import CSRC, ENV, LONGEST_S, TRACING, kmodctl, target, until
from weaving import draw, load, prepared

import kernweave
from coexist.counting import CALLS, SUBJECT, call, count_all, refusals
from coexist.others import ENTRY_USERS, PREEMPT, Kprobes, shell
from kernweave.driver.link import Link
from kernweave.driver.uapi import PatchedKind, Side
from kernweave.errors import Reason, RefusedError, UnsupportedError
from kernweave.lab.build import build_kmod
from kernweave.lab.cache import cache_dir
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.session.woven import Weaver
from kernweave.weave.counters import select_blocks
from kernweave.weave.mapfile import load_all, load_names, symbolize

SEED = 20261124
EVERYTHING = 1 << 30
NOP5 = bytes.fromhex("0f1f440000")
SCHEDSTATS = "/proc/sys/kernel/sched_schedstats"
EVENTS = f"{TRACING}/events/sched/enable"
PATCH = "kw_livepatch"
CLIENT = """
import sys, kernweave
with kernweave.connect(sys.argv[1]) as k:
    with k.weave(*sys.argv[2:], partial=True):
        print("woven", flush=True)
        sys.stdin.read()
"""


def generations(link: Link) -> str:
    """Kmods that hold clones."""
    return shell(link, "grep -o '^kernweave_[0-9]*' /proc/modules || true")


def test_clones_count_what_splices_count(session: Session, link: Link) -> None:
    with count_all(session) as spliced:
        call(session)
    with session.weave(f"{SUBJECT}@insns") as woven:
        assert generations(link)
        call(session)
        live = weakref.ref(woven.live)
    assert woven.text_restored and not generations(link) and live() is None
    assert [row.hits for row in spliced.rows()] == [row.hits for row in woven.rows()]
    assert all(row.exact and row.engine == "weave" for row in woven.rows())
    assert woven.tactics() == {"clone": len(woven.placed)}


def test_where_nothing_can_be_woven_the_rest_is_spliced(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Weaver) -> None:
        raise UnsupportedError("not on this kernel")

    monkeypatch.setattr(Weaver, "prepare", refuse)
    with session.count(f"{SUBJECT}@edges", f"{SUBJECT}@insns", partial=True) as hits:
        call(session)
    assert {row.engine for row in hits.rows()} == {"splice"}
    assert Reason.EDGE in {refused.reason for refused in hits.refused}
    assert max(row.hits for row in hits.rows()) == CALLS


@pytest.mark.parametrize("kind", ENTRY_USERS)
def test_who_comes_to_a_woven_function_gets_it(session: Session, link: Link, kind: str) -> None:
    other = ENTRY_USERS[kind](SUBJECT)
    with session.weave(f"{SUBJECT}@insns") as woven:
        call(session)
        other.attach(link)
        call(session)
        assert other.hits(link) == CALLS
    assert woven.text_restored and woven.evicted == 1
    rows = woven.rows()
    assert {row.hits for row in rows} <= {0, CALLS} and not any(row.exact for row in rows)
    call(session)
    assert other.hits(link) == 2 * CALLS
    with pytest.raises(RefusedError) as refused:
        session.weave(SUBJECT)
    assert refusals(refused) == [Reason.BUSY_FTRACE]
    other.detach(link)
    with session.weave(SUBJECT) as woven:
        call(session)
    assert [(row.hits, row.exact) for row in woven.rows()] == [(CALLS, True)]


def test_kprobe_inside_a_woven_function_hits(session: Session, link: Link) -> None:
    with count_all(session) as spliced:
        call(session)
    offset = next(row.offset for row in spliced.rows() if row.offset > 5 and row.hits == CALLS)
    other = Kprobes(SUBJECT, [offset])
    with session.weave(f"{SUBJECT}@insns") as woven:
        call(session)
        other.attach(link)
        call(session)
        assert other.hits(link) == CALLS
    assert woven.evicted == 1 and woven.text_restored
    with pytest.raises(RefusedError) as refused:
        session.weave(SUBJECT)
    assert refusals(refused) == [Reason.BUSY_KPROBE]


def test_own_splices_in_a_woven_function_count(session: Session) -> None:
    with session.weave(f"{SUBJECT}@insns") as woven:
        call(session)
        with count_all(session) as spliced:
            call(session)
    assert {row.hits for row in spliced.rows()} <= {0, CALLS} and woven.evicted == 1
    assert max(row.hits for row in spliced.rows()) == CALLS
    assert woven.text_restored and spliced.text_restored


# ---- what the kernel patches ---------------------------------------------------------------------


@pytest.fixture
def everything(session: Session) -> Iterator[Live]:
    """Clones of all functions that can be woven, entered."""
    source = prepared(session)
    live = load(session, source, draw(source, EVERYTHING, SEED), (select_blocks,))
    live.enter()
    yield live
    left = live.leave()
    assert (left.stuck, left.visitors) == ((), 0)
    live.free()


def differences(session: Session, live: Live) -> list[str]:
    """Clones' copies that are not what the kernel has patched natively."""
    rows, read = live.handover.mirrors, session.driver.read_ranges
    native, clone, length = (rows[name].astype(np.uint64) for name in ("native", "clone", "len"))
    here = _split(read(native, native + length), length)
    there = _split(read(clone, clone + np.uint64(5)), np.full(len(rows), 5, np.uint64))
    return [
        f"{int(row['native']):#x}: {one.hex()}, clone {other.hex()}"
        for row, one, other in zip(rows, here, there, strict=True)
        if other != _copy_of(row, one)
    ]


def _split(data: bytes, lengths: np.ndarray) -> list[bytes]:
    ends = np.cumsum(lengths.astype(np.int64)).tolist()
    return [data[end - size : end] for end, size in zip(ends, lengths.tolist(), strict=True)]


def _copy_of(row: np.void, native: bytes) -> bytes:
    """What the copy of a patched instruction must be."""
    end = int(row["clone"]) + 5
    if row["kind"] == PatchedKind.JUMP_LABEL:
        away = int(row["target"]) - end
        return (
            b"\xe9" + away.to_bytes(4, "little", signed=True) if native[0] in b"\xe9\xeb" else NOP5
        )
    if native[0] == 0xC3:  # may be safe only where it is
        return b"\xe9" + (int(row["native"]) - end).to_bytes(4, "little", signed=True)
    if native[0] not in b"\xe8\xe9":
        return native
    leads_to = int(row["native"]) + 5 + int.from_bytes(native[1:5], "little", signed=True)
    return native[:1] + (leads_to - end).to_bytes(4, "little", signed=True)


def test_what_the_kernel_patches_is_patched_in_all_clones(
    session: Session, link: Link, everything: Live
) -> None:
    assert differences(session, everything) == []
    before = everything.handover.mirrors["clone"].astype(np.uint64)
    copies = session.driver.read_ranges(before, before + np.uint64(5))
    changes = (
        (f"echo 1 > {SCHEDSTATS}", f"echo 0 > {SCHEDSTATS}"),
        (f"echo 1 > {EVENTS}", f"echo 0 > {EVENTS}"),
        (f"echo full > {PREEMPT}", f"echo voluntary > {PREEMPT}"),
    )
    for there, back in changes:
        shell(link, there)
        assert session.driver.read_ranges(before, before + np.uint64(5)) != copies
        assert differences(session, everything) == []
        call(session)
        shell(link, back)
        assert differences(session, everything) == []
    assert not session.driver.closed(everything.area).any()
    assert session.driver.read_ranges(before, before + np.uint64(5)) == copies


def test_leaving_ends_though_the_kernel_patches_all_the_time(session: Session, lab: Lab) -> None:
    flips = f"while :; do echo 1 > {SCHEDSTATS}; echo 0 > {SCHEDSTATS}; done"
    with lab.connect() as other:
        with session.weave(f"{SUBJECT}@insns") as woven:
            other.exec_start(["sh", "-c", flips], env=ENV, cwd="/", fresh=True)
            call(session)
        assert woven.text_restored and woven.in_flight == 0
        other.signal(signal.SIGKILL)
        assert list(other.exec_events(LONGEST_S))
        shell(other, f"echo 0 > {SCHEDSTATS}")


def test_function_tracer_of_everything_comes_and_goes(
    link: Link, everything: Live, session: Session
) -> None:
    shell(link, f"cd {TRACING}; echo function > current_tracer; sleep 0.2")
    assert session.driver.closed(everything.area).mean() > 0.9
    shell(link, f"cd {TRACING}; grep -q vfs_read trace; echo nop > current_tracer")


def test_stacks_name_clones(link: Link, everything: Live) -> None:
    found = shell(link, "sleep 100 & sleep 0.3; cat /proc/$!/stack; kill $!")
    assert ".kw+0x" in found and f"[{everything.kmod}]" in found
    folder = cache_dir() / "generations"
    lines = [symbolize(line, lambda kmod: load_names(folder, kmod)) for line in found.splitlines()]
    assert not any(".kw+0x" in line for line in lines)
    assert any("do_nanosleep+0x" in line for line in lines)
    start = shell(link, f"grep ' do_nanosleep[.]kw.*{everything.kmod}' /proc/kallsyms").split()[0]
    perf = f"{int(start, 16) + 1:x} do_nanosleep.kw+0x1 ([kernel.kallsyms])"  # no generation
    assert "do_nanosleep+0x" in symbolize(perf, lambda _: None, lambda: load_all(folder))


@pytest.mark.parametrize("function", [SUBJECT, "schedule_timeout", "do_sys_poll"])
def test_livepatch_takes_a_woven_function(session: Session, link: Link, function: str) -> None:
    with session.weave(f"{SUBJECT}@insns", function, partial=True) as woven:
        call(session)
        kmod = build_kmod(fetch_kernel("6.1", print), CSRC / "livepatch", progress=print)
        assert kmodctl(link, "load", str(kmod)) == "ok"
        state = f"/sys/kernel/livepatch/{PATCH}"
        until("all tasks are patched", lambda: shell(link, f"cat {state}/transition") == "0\n")
        call(session)
        assert int(shell(link, f"cat /sys/module/{PATCH}/parameters/calls")) == CALLS
    assert woven.text_restored and woven.evicted == 1
    shell(link, f"echo 0 > {state}/enabled")
    until("no task is patched", lambda: kmodctl(link, "unload", PATCH) in ("ok", "ENOENT"))


def test_splice_waits_for_who_sleeps_in_clones_that_are_being_left(session: Session) -> None:
    function = "schedule_timeout"
    with session.weave(function) as woven:
        entered = woven.live.entered
        assert entered is not None and not session.driver.undo(entered).stuck_addrs
        with session.splice(f"{function}@blocks", partial=True) as spliced:
            assert len(spliced.placed) > 1
            left = session.driver.move(woven.live.area, Side.NATIVE)
    assert (left.places, left.visitors) == (0, 0)
    assert woven.text_restored and spliced.text_restored


# ---- who dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [(f"{SUBJECT}@insns",), ("*",)], ids=["one", "all"])
def test_client_killed_leaves_nothing(lab: Lab, link: Link, points: tuple[str, ...]) -> None:
    argv = [sys.executable, "-c", CLIENT, target(lab), *points]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None and client.stdout.readline() == "woven\n"
        client.send_signal(signal.SIGKILL)
        client.wait(LONGEST_S)
    users = "cat /sys/module/kernweave_*/refcnt"
    until("nobody is in the clones", lambda: shell(link, users).split() == ["0"])
    with kernweave.connect(target(lab)) as session:
        with session.weave(f"{SUBJECT}@insns") as woven:
            assert len(generations(link).split()) == 1
            call(session)
        assert max(row.hits for row in woven.rows()) == CALLS
    assert not generations(link)
