# SPDX-License-Identifier: GPL-2.0-or-later
"""Static keys and static calls change under exact counts; kmods come and go under points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from guest import CSRC, JUMPS, TRACING, kmodctl, program

from coexist.counting import ALL, CALLS
from coexist.others import EVENT, PREEMPT, shell
from kernweave.driver.link import Link
from kernweave.errors import Reason
from kernweave.lab.build import build_kmod
from kernweave.lab.packages import fetch_kernel
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session

KMOD = "kw_subject"
WORK = f"{KMOD}:kw_subject_work@insns"
TIMER = "do_setitimer"  # has a tracepoint and, for preemption, static calls; only timers call it


@pytest.fixture
def link(link: Link) -> Iterator[Link]:
    """Who unloads the kmod in the end."""
    yield link
    assert kmodctl(link, "unload", KMOD) in ("ok", "ENOENT")


@pytest.fixture(scope="module")
def kmod() -> Path:
    return build_kmod(fetch_kernel("6.1", print), CSRC / "subject", progress=print)


def load(link: Link, kmod: Path) -> None:
    assert kmodctl(link, "load", str(kmod)) == "ok"


def put(link: Link, parameter: str, value: int, times: int = 1) -> None:
    file = f"/sys/module/{KMOD}/parameters/{parameter}"
    shell(link, f"i=0; while [ $i -lt {times} ]; do echo {value} > {file}; i=$((i + 1)); done")


def seen(link: Link) -> dict[str, int]:
    """What the kmod itself counted."""
    names = ("plain", "keyed", "first", "second")
    out = shell(link, f"cd /sys/module/{KMOD}/parameters; cat {' '.join(names)}")
    return dict(zip(names, map(int, out.split()), strict=True))


def timers(session: Session) -> None:
    session.run([program("timers"), str(CALLS)], check=True)


def hits_of(hits: Attachment) -> dict[str, int]:
    assert all(row.exact for row in hits.rows())
    return {row.point: row.hits for row in hits.rows()}


def total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {point: sum(count[point] for count in counts) for point in counts[0]}


def reasons(hits: Attachment) -> set[Reason]:
    return {one.reason for one in hits.refused}


# ---- static keys and static calls --------------------------------------------------------------


def test_tracepoint_that_goes_on_and_off_inside_a_counted_function_changes_no_count(
    session: Session, link: Link
) -> None:
    alone = []
    for value in (0, 1):
        shell(link, f"echo {value} > {EVENT}")
        with session.splice(f"{TIMER}@insns", partial=True, tactics=ALL) as hits:
            timers(session)
        alone.append(hits_of(hits))
    assert alone[0] != alone[1]
    assert {Reason.JUMP_LABEL, Reason.STATIC_CALL} <= reasons(hits)
    shell(link, f"echo 0 > {EVENT}; echo > {TRACING}/trace")
    with session.splice(f"{TIMER}@insns", partial=True, tactics=ALL) as hits:
        for mode in ("full", "none", "voluntary"):
            shell(link, f"echo {mode} > {PREEMPT}; echo 1 > {EVENT}")
            timers(session)
            shell(link, f"echo 0 > {EVENT}")
            timers(session)
    assert hits_of(hits) == total(3 * alone)
    assert hits.text_restored
    lines = shell(link, f"grep -c 'itimer_state: which=0' {TRACING}/trace")
    assert int(lines) == 3 * CALLS


@pytest.mark.parametrize("first", ["we", "they"])
def test_tracepoint_that_one_side_leaves_on_is_exact_for_the_other(
    session: Session, link: Link, first: str
) -> None:
    shell(link, f"echo > {TRACING}/trace")
    if first == "they":
        shell(link, f"echo 1 > {EVENT}")
    with session.splice(f"{TIMER}@entry", f"{TIMER}@return", tactics=JUMPS) as hits:
        shell(link, f"echo 1 > {EVENT}")
        timers(session)
        if first == "they":
            shell(link, f"echo 0 > {EVENT}")
        timers(session)
    timers(session)
    assert hits_of(hits)[TIMER] == 2 * CALLS
    assert hits.text_restored
    lines = shell(link, f"grep -c 'itimer_state: which=0' {TRACING}/trace")
    assert int(lines) == (CALLS if first == "they" else 3 * CALLS)


@pytest.mark.parametrize("tactics", [JUMPS, ALL], ids=["jumps", "traps"])
def test_keys_and_calls_of_a_kmod_that_change_under_counts_change_no_count(
    session: Session, link: Link, kmod: Path, tactics: Sequence[str]
) -> None:
    load(link, kmod)
    states = [(key, value) for key in (0, 1) for value in (0, 1)]
    alone = []
    for key, value in states:
        put(link, "key", key)
        put(link, "call", value)
        with session.splice(WORK, partial=True, tactics=tactics) as hits:
            put(link, "work", 1, CALLS)
        alone.append(hits_of(hits))
    assert {Reason.JUMP_LABEL, Reason.STATIC_CALL} <= reasons(hits)
    before = seen(link)
    with session.splice(WORK, partial=True, tactics=tactics) as hits:
        for key, value in reversed(states):
            put(link, "key", key)
            put(link, "call", value)
            put(link, "work", 1, CALLS)
    assert hits_of(hits) == total(alone)
    assert set(hits_of(hits).values()) >= {4 * CALLS}
    assert hits.text_restored
    changes = {"plain": 4, "keyed": 2, "first": 2, "second": 2}
    assert seen(link) == {name: before[name] + CALLS * by for name, by in changes.items()}


# ---- kmods -------------------------------------------------------------------------------------


def test_kmod_with_jumps_in_it_stays_until_we_leave(
    session: Session, link: Link, kmod: Path
) -> None:
    load(link, kmod)
    with session.splice(WORK, partial=True, tactics=JUMPS) as hits:
        assert kmodctl(link, "unload", KMOD) == "EAGAIN"
        put(link, "work", 1, CALLS)
        assert seen(link)["plain"] == CALLS
    assert set(hits_of(hits).values()) >= {CALLS}
    assert hits.text_restored
    assert kmodctl(link, "unload", KMOD) == "ok"


def test_kmod_that_goes_with_our_traps_in_it_is_told_and_takes_nothing_else_along(
    session: Session, link: Link, kmod: Path
) -> None:
    load(link, kmod)
    elsewhere = f"{TIMER}@insns"
    with session.splice(WORK, elsewhere, partial=True, tactics=["int3"]) as hits:
        put(link, "work", 1, CALLS)
        timers(session)
        gone = kmodctl(link, "unload", KMOD)
        timers(session)
    rows = [row for row in hits.rows() if row.kmod == KMOD]
    assert rows
    assert all(row.hits in (0, CALLS) for row in rows)
    assert all(row.exact == (gone != "ok") for row in rows)
    others = [row for row in hits.rows() if row.kmod is None]
    assert all(row.exact for row in others)
    assert max(row.hits for row in others) == 2 * CALLS
    assert hits.text_restored


def test_kmod_that_goes_and_comes_back_with_our_traps_in_it_is_told(
    session: Session, link: Link, kmod: Path
) -> None:
    load(link, kmod)
    with session.splice(WORK, partial=True, tactics=["int3"]) as hits:
        put(link, "work", 1, CALLS)
        if kmodctl(link, "unload", KMOD) == "ok":
            load(link, kmod)
        put(link, "work", 1, CALLS)
    assert all(row.hits == (2 * CALLS if row.exact else CALLS) for row in hits.rows() if row.hits)
    assert hits.text_restored
    with session.splice(WORK, partial=True, tactics=ALL) as hits:
        put(link, "work", 1, CALLS)
    assert max(hits_of(hits).values()) == CALLS
    assert hits.text_restored


def test_kmods_that_come_and_go_change_no_count_elsewhere(
    session: Session, link: Link, kmod: Path
) -> None:
    points = (f"{TIMER}@insns", "load_module@insns", "free_module@insns", "jump_label_update@insns")
    with session.splice(*points, partial=True, tactics=JUMPS) as hits:
        for _ in range(3):
            load(link, kmod)
            timers(session)
            assert kmodctl(link, "unload", KMOD) == "ok"
    rows = {row.point: row.hits for row in hits.rows()}
    assert rows[f"{TIMER}+0x0"] == 3 * CALLS
    assert rows["load_module+0x0"] == 3
    assert rows["free_module+0x0"] == 3
    assert hits.text_restored
