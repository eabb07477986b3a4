# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracers at the entry of a counted function: who came first, who leaves first, who counts what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest import JUMPS, TRACING, booted, target

import kernweave
from coexist.counting import CALLS, SUBJECT, call, count_all, refusals
from coexist.hot import write_where_all_call
from coexist.others import ENTRY_USERS, Bpf, Kprobes, Other, Tracer, shell
from kernweave.driver.link import Link
from kernweave.errors import Reason, RefusedError
from kernweave.lab.machine import Lab
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session

WRITES = 5  # times that it is attached


@pytest.fixture(params=ENTRY_USERS)
def user(request: pytest.FixtureRequest, link: Link) -> Iterator[Other]:
    """Somebody who counts the subject's calls."""
    made = ENTRY_USERS[request.param](SUBJECT)
    yield made
    made.detach(link)


@pytest.fixture(scope="module")
def per_call(machine: Lab) -> dict[int, int]:
    """Hits of each instruction of the subject per call, seen when nobody else was there."""
    with kernweave.connect(target(machine)) as session:
        with count_all(session) as hits:
            call(session)
        return {row.offset: row.hits // CALLS for row in hits.rows() if row.hits % CALLS == 0}


def assert_counts(hits: Attachment, per_call: dict[int, int], rounds: int) -> None:
    """Every point behind the entry has counted all calls; nothing of it was lost or added."""
    behind = [row for row in hits.rows() if row.tactic != "nop5"]
    assert len(behind) > 20
    assert {"jmp32", "group"} <= {row.tactic for row in behind}
    assert all(row.exact for row in behind)
    expected = {row.offset: per_call[row.offset] * CALLS * rounds for row in behind}
    assert {row.offset: row.hits for row in behind} == expected


def others_reasons(hits: Attachment) -> list[Reason]:
    """Reasons of what was refused because somebody else is there."""
    return [one.reason for one in hits.refused if one.reason is not Reason.TOO_SHORT]


def entry_of(hits: Attachment) -> tuple[int, bool]:
    """Hits of the subject's entry, and whether they are exact."""
    [row] = [row for row in hits.rows() if row.tactic == "nop5"]
    return row.hits, row.exact


# ---- one user of the entry ---------------------------------------------------------------------


def test_body_counts_behind_a_user_of_the_entry_who_came_first(
    session: Session, link: Link, user: Other, per_call: dict[int, int]
) -> None:
    user.attach(link)
    with count_all(session) as hits:
        assert others_reasons(hits) == [Reason.BUSY_FTRACE]
        call(session)
    assert_counts(hits, per_call, 1)
    call(session)  # we are gone, they stay
    with pytest.raises(RefusedError) as refused:
        session.splice(SUBJECT)
    assert refusals(refused) == [Reason.BUSY_FTRACE]
    with count_all(session) as hits:
        call(session)
        assert user.hits(link) == 3 * CALLS
        user.detach(link)
        call(session)  # they are gone, we stay
    assert_counts(hits, per_call, 2)
    with count_all(session) as hits:
        call(session)
    assert entry_of(hits) == (CALLS, True)
    assert hits.text_restored


def test_user_who_comes_later_evicts_the_entry_and_nothing_else(
    session: Session, link: Link, user: Other, per_call: dict[int, int]
) -> None:
    with count_all(session) as hits:
        call(session)
        user.attach(link)
        call(session)
        assert user.hits(link) == CALLS
        user.detach(link)
        call(session)  # they are gone, we stay
    assert hits.evicted == 1
    assert entry_of(hits) == (CALLS, False)
    assert_counts(hits, per_call, 3)
    assert hits.text_restored
    with count_all(session) as hits:
        user.attach(link)
        call(session)
    assert entry_of(hits) == (0, False)
    assert_counts(hits, per_call, 1)
    call(session)  # we are gone, they stay
    assert user.hits(link) == 2 * CALLS
    assert hits.text_restored


def test_kprobe_that_was_registered_before_us_takes_the_entry_when_it_is_enabled(
    session: Session, link: Link, per_call: dict[int, int]
) -> None:
    user = Kprobes(SUBJECT)
    user.register(link)
    try:
        with count_all(session) as hits:
            call(session)
            user.enable(link)
            call(session)
            assert user.hits(link) == CALLS
            user.enable(link, 0)
            call(session)
            assert user.hits(link) == CALLS
    finally:
        user.detach(link)
    assert entry_of(hits) == (CALLS, False)
    assert_counts(hits, per_call, 3)
    assert hits.text_restored


@pytest.mark.parametrize("engine", ["splice", "weave"])
def test_kprobe_that_is_registered_only_harms_nobody_who_runs_into_a_write(
    machine: Lab, engine: str
) -> None:
    """Through ftrace it has no instruction of its own, and kprobes are asked first at an int3."""
    write_where_all_call(machine, engine, WRITES)


def test_kprobe_that_is_registered_only_is_written_around_as_on_real_cpus() -> None:
    """There the kernel writes; under QEMU nobody may run into that (docs/design/0007)."""
    with booted("coexist-real-cpus", cflags=("-DKW_SEED_REAL_CPUS",)) as lab:
        user = Kprobes(SUBJECT)
        with lab.connect() as link, kernweave.connect(target(lab)) as session:
            user.register(link)
            for engine in (session.splice, session.weave):
                with engine(SUBJECT) as hits:
                    call(session)
                [row] = hits.rows()
                assert row.hits == CALLS and hits.exact().all() and hits.text_restored
            user.detach(link)


@pytest.mark.parametrize("kind", ["function", "function_graph"])
def test_tracer_that_is_switched_off_for_a_while_takes_the_entry_when_it_is_on_again(
    session: Session, link: Link, kind: str, per_call: dict[int, int]
) -> None:
    tracer, switch = Tracer(SUBJECT, kind), "/proc/sys/kernel/ftrace_enabled"
    tracer.attach(link)
    try:
        shell(link, f"echo 0 > {switch}")
        with count_all(session) as hits:
            call(session)
            shell(link, f"echo 1 > {switch}")
            call(session)
            assert tracer.hits(link) == CALLS
            shell(link, f"echo 0 > {switch}")
            call(session)
        shell(link, f"echo 1 > {switch}")
    finally:
        shell(link, f"echo 1 > {switch}")
        tracer.detach(link)
    assert entry_of(hits) == (CALLS, False)
    assert_counts(hits, per_call, 3)
    assert hits.text_restored


def test_stack_of_a_kprobe_in_a_callee_is_the_native_one(session: Session, link: Link) -> None:
    callee = "get_rr_interval_fair"  # called by an instruction that is displaced
    stacks = []
    user = Kprobes(callee)
    user.attach(link)
    try:
        shell(link, f"echo stacktrace > {TRACING}/events/kprobes/p_{callee}_0/trigger")
        for points in ((f"{SUBJECT}@insns", "__x64_sys_sched_rr_get_interval@insns"), ()):
            shell(link, f"echo > {TRACING}/trace")
            if points:
                with session.splice(*points, partial=True, tactics=JUMPS):
                    call(session)
            else:
                call(session)
            stacks.append(shell(link, f"grep '^ => ' {TRACING}/trace").splitlines())
        shell(link, f"echo '!stacktrace' > {TRACING}/events/kprobes/p_{callee}_0/trigger")
    finally:
        user.detach(link)
    assert stacks[0] == stacks[1]
    assert stacks[0].count(f" => {SUBJECT}") == CALLS


# ---- several at once ---------------------------------------------------------------------------


def test_users_who_come_one_after_the_other_all_count(
    session: Session, link: Link, per_call: dict[int, int]
) -> None:
    users = [make(SUBJECT) for make in ENTRY_USERS.values()][1:]  # one tracer at a time
    try:
        with count_all(session) as hits:
            for user in users:
                user.attach(link)
                call(session)
            assert [user.hits(link) for user in users] == [
                CALLS * rounds for rounds in range(len(users), 0, -1)
            ]
            for user in users:
                user.detach(link)
                call(session)
        assert_counts(hits, per_call, 2 * len(users))
        assert hits.text_restored
    finally:
        for user in users:
            user.detach(link)


def test_bpf_program_that_joins_another_at_the_entry_disturbs_no_count(
    session: Session, link: Link, per_call: dict[int, int]
) -> None:
    first, second = Bpf(SUBJECT, "fentry"), Bpf(SUBJECT, "fexit")
    try:
        first.attach(link)
        with count_all(session) as hits:
            call(session)
            second.attach(link)  # the kernel makes one trampoline for both
            call(session)
            first.detach(link)
            call(session)
            assert second.hits(link) == 2 * CALLS
        assert_counts(hits, per_call, 3)
    finally:
        first.detach(link)
        second.detach(link)


@pytest.mark.parametrize("kind", ["function", "function_graph"])
def test_tracer_of_many_functions_disturbs_no_count_behind_the_entry(
    session: Session, link: Link, kind: str, per_call: dict[int, int]
) -> None:
    tracer = Tracer(SUBJECT, kind, filters="*sched*")
    try:
        with count_all(session) as hits:
            tracer.attach(link)
            call(session)
            tracer.detach(link)
            call(session)
    finally:
        tracer.detach(link)
    assert_counts(hits, per_call, 2)
    assert entry_of(hits) == (0, False)
    assert hits.text_restored
