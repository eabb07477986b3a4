# SPDX-License-Identifier: GPL-2.0-or-later
"""A livepatch takes the place of a counted function, and gives it back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest import CSRC, kmodctl, target, until

import kernweave
from coexist.counting import CALLS, SUBJECT, call, count_all, refusals
from coexist.others import shell
from kernweave.driver.link import Link
from kernweave.errors import Reason, RefusedError
from kernweave.lab.build import build_kmod
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session

PATCH = "kw_livepatch"
STATE = f"/sys/kernel/livepatch/{PATCH}"
#: where tasks sleep: the kernel looks at the stack of each before it takes the patch
SLEEPERS = ("__schedule@insns", "schedule@insns", "schedule_timeout@insns", "do_wait@insns",
            "worker_thread@insns", "kthread@insns", "smpboot_thread_fn@insns",
            "do_sys_poll@insns", "ep_poll@insns")  # fmt: skip


@pytest.fixture
def link(link: Link) -> Iterator[Link]:
    """Who takes the patch out in the end."""
    yield link
    remove(link)


def apply(link: Link) -> None:
    """Load the patch and wait until every task has it."""
    kmod = build_kmod(fetch_kernel("6.1", print), CSRC / "livepatch", progress=print)
    assert kmodctl(link, "load", str(kmod)) == "ok"
    until("all tasks are patched", lambda: shell(link, f"cat {STATE}/transition") == "0\n")


def revert(link: Link) -> None:
    """Disable the patch and wait until no task has it."""
    there = f"[ ! -e {STATE}/enabled ]"
    shell(link, f"{there} || echo 0 > {STATE}/enabled || {there}")
    until("no task is patched", lambda: shell(link, f"{there} && echo no || true") == "no\n")


def remove(link: Link) -> None:
    revert(link)
    assert kmodctl(link, "unload", PATCH) in ("ok", "ENOENT")


def patched_calls(link: Link) -> int:
    """Calls that the patch took."""
    return int(shell(link, f"cat /sys/module/{PATCH}/parameters/calls"))


def body(hits: Attachment) -> dict[int, tuple[int, bool]]:
    """Hits and exactness behind the subject's entry."""
    rows = [row for row in hits.rows() if row.function == SUBJECT and row.offset]
    return {row.offset: (row.hits, row.exact) for row in rows}


@pytest.fixture(scope="module")
def once(machine: Lab) -> dict[int, tuple[int, bool]]:
    """What one workload does in the subject when it is not patched."""
    with kernweave.connect(target(machine)) as session:
        with count_all(session) as hits:
            call(session)
        return body(hits)


def test_patched_function_counts_nothing_and_its_replacement_all(
    session: Session, link: Link, once: dict[int, tuple[int, bool]]
) -> None:
    apply(link)
    with pytest.raises(RefusedError) as refused:
        session.splice(SUBJECT)
    assert refusals(refused) == [Reason.BUSY_FTRACE]
    with count_all(session, f"{PATCH}:kw_rr_get_interval@insns") as hits:
        call(session)
    assert patched_calls(link) == CALLS
    assert body(hits) == dict.fromkeys(once, (0, True))
    theirs = [row for row in hits.rows() if row.kmod == PATCH]
    assert theirs
    assert all((row.hits, row.exact) == (CALLS, True) for row in theirs)
    assert hits.text_restored
    call(session)  # we are gone, they stay
    assert patched_calls(link) == 2 * CALLS
    remove(link)
    with session.splice(SUBJECT) as hits:
        call(session)
    assert [(row.hits, row.exact) for row in hits.rows()] == [(CALLS, True)]


def test_patch_that_goes_while_its_replacement_is_counted(
    session: Session, link: Link, once: dict[int, tuple[int, bool]]
) -> None:
    apply(link)
    with count_all(session, f"{PATCH}:kw_rr_get_interval@insns") as hits:
        call(session)
        revert(link)
        assert kmodctl(link, "unload", PATCH) == "EAGAIN"  # there are points in it
        call(session)
        assert patched_calls(link) == CALLS
    assert body(hits) == once
    assert {row.hits for row in hits.rows() if row.kmod == PATCH} == {CALLS}
    assert hits.text_restored
    assert kmodctl(link, "unload", PATCH) == "ok"


def test_patch_comes_over_a_counted_function_and_goes(
    session: Session, link: Link, once: dict[int, tuple[int, bool]]
) -> None:
    with count_all(session, *SLEEPERS) as hits:
        call(session)
        apply(link)
        call(session)
        assert patched_calls(link) == CALLS
        revert(link)
        call(session)
        assert patched_calls(link) == CALLS
    assert body(hits) == {at: (2 * count, True) for at, (count, _) in once.items()}
    [entry] = [row for row in hits.rows() if row.function == SUBJECT and not row.offset]
    assert (entry.hits, entry.exact) == (CALLS, False)
    assert hits.evicted == 1
    assert hits.text_restored


def test_patch_that_came_later_stays_when_we_leave(
    session: Session, link: Link, once: dict[int, tuple[int, bool]]
) -> None:
    with count_all(session, *SLEEPERS) as hits:
        call(session)
        apply(link)
        call(session)
    assert body(hits) == once
    assert hits.text_restored
    call(session)
    assert patched_calls(link) == 2 * CALLS
    remove(link)
    with count_all(session) as hits:
        call(session)
    assert body(hits) == once
