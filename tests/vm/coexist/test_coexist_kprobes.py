# SPDX-License-Identifier: GPL-2.0-or-later
"""Kprobes in the middle of counted functions: beside our sites, on them, reaching into them."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
from guest import ENV, JUMPS, LONGEST_S, TRACING, target, until

import kernweave
from coexist.counting import ALL, CALLS, SUBJECT, call, count_all, refusals, until_unpinned
from coexist.others import OPTIMIZE, TRAPS_ARMED, Kprobes, shell
from kernweave.driver.link import Link
from kernweave.errors import DriverError, Reason, RefusedError
from kernweave.lab.machine import Lab
from kernweave.model.plan import Plan
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session
from kernweave.session.survey import SiteVerdict

SEED = 20991122
TURNS = 10
MOST_TURNS = 100  # a slow machine may be disturbed in nearly all of them


@dataclass(frozen=True)
class Subject:
    """The subject's instructions, and hits of each per call when nobody else is there."""

    sites: dict[int, SiteVerdict]
    per_call: dict[int, int]

    def length(self, offset: int) -> int:
        later = [other for other in self.sites if other > offset]
        return min(later, default=offset + 1) - offset

    def times(self, rounds: int) -> dict[int, int]:
        return {offset: rounds * CALLS * hits for offset, hits in self.per_call.items()}

    def before_a_jump(self) -> list[tuple[int, int]]:
        """(short instruction, our site behind it) where five bytes from the first reach the second.

        Both run, and the kernel can optimise a kprobe at the first one.
        """
        found = []
        for site, verdict in self.sites.items():
            for short in self.sites:
                near = 0 < site - short < 5 and self.sites[short].tactic == "int3"
                if near and verdict.tactic == "jmp32" and self.per_call[site]:
                    found.append((short, site))
        assert found
        return found[:3]


@pytest.fixture(scope="module")
def subject(machine: Lab) -> Subject:
    with kernweave.connect(target(machine)) as session:
        found = session.sites(f"{SUBJECT}@insns", tactics=("nop5", "jmp32", "int3"))
        sites = {site.offset: site for site in found if site.offset is not None}
        with session.splice(f"{SUBJECT}@insns", tactics=ALL) as hits:
            call(session)
        counts = {row.offset: row.hits for row in hits.rows()}
        assert all(count % CALLS == 0 for count in counts.values())
        return Subject(sites, {at: count // CALLS for at, count in counts.items()})


def count_at(session: Session, offset: int, tactic: str) -> Attachment:
    return session.splice(f"{SUBJECT}+{offset:#x}", tactics=[tactic])


def hits_of(hits: Attachment) -> dict[int, int]:
    return {row.offset: row.hits for row in hits.rows() if row.exact}


def some_of(counts: dict[int, int], offsets: dict[int, int]) -> dict[int, int]:
    return {offset: counts[offset] for offset in offsets}


def optimised(link: Link) -> set[int]:
    """Offsets in the subject of the kprobes that are jumps now."""
    rows = shell(link, "cat /sys/kernel/debug/kprobes/list").splitlines()
    return {
        int(row.split()[2].partition("+")[2], 16)
        for row in rows
        if f" {SUBJECT}+" in row and "[OPTIMIZED]" in row
    }


def settle(link: Link) -> None:
    """Wait until the kernel has optimised what it wants to optimise: it does when one leaves."""
    other = Kprobes("__x64_sys_sched_rr_get_interval", [5])
    other.attach(link)
    other.detach(link)


def becomes_optimised(link: Link, offset: int) -> bool:
    """Whether a kprobe is a jump by now, or some time later: the kernel takes its time."""
    for _ in range(20):
        if offset in optimised(link):
            return True
        time.sleep(0.1)
    return False


def beside_hosts(hits: Attachment, subject: Subject) -> list[int]:
    """Every instruction but those inside a window with springboards: the kernel refuses these."""
    pokes = hits.plan.pokes
    start = hits.placed[0].addr - hits.placed[0].offset
    inside = {
        at
        for addr, old, host in zip(pokes.addr.tolist(), pokes.old, pokes.host, strict=True)
        if host
        for at in range(addr - start + 1, addr - start + len(old))
    }
    return [at for at in subject.sites if at not in inside]


def of_offsets(counts: dict[int, int], theirs: Kprobes) -> dict[int, int]:
    return {at: counts[at] for at in theirs.offsets}


# ---- at every instruction ----------------------------------------------------------------------


def test_kprobes_at_every_instruction_later_leave_first_and_all_count(
    session: Session, link: Link, subject: Subject
) -> None:
    with count_all(session) as hits:
        theirs = Kprobes(SUBJECT, beside_hosts(hits, subject))
        theirs.attach(link)
        call(session)
        assert theirs.hits_by_offset(link) == of_offsets(subject.times(1), theirs)
        theirs.detach(link)
        call(session)
    assert 0 not in hits_of(hits)  # the entry went to ftrace, through which its kprobe goes
    alone = {row.offset for row in hits.rows() if row.tactic == "jmp32"}
    assert len(alone) > 10
    assert alone <= hits_of(hits).keys()  # groups were given back, and say so
    assert "group" in {row.tactic for row in hits.rows() if not row.exact}
    assert hits_of(hits) == some_of(subject.times(2), hits_of(hits))
    assert hits.text_restored


def test_kprobes_at_every_instruction_later_keep_counting_when_we_leave(
    lab: Lab, link: Link, subject: Subject
) -> None:
    with kernweave.connect(target(lab)) as session:
        with count_all(session) as hits:
            theirs = Kprobes(SUBJECT, beside_hosts(hits, subject))
            theirs.attach(link)
            call(session)
        assert hits_of(hits) == some_of(subject.times(1), hits_of(hits))
        alone = {int(row.addr, 16) for row in hits.rows() if row.tactic == "jmp32"}
        assert alone <= set(hits.unrestored)
        assert not hits.text_restored
        call(session)
        assert theirs.hits_by_offset(link) == of_offsets(subject.times(2), theirs)
    with kernweave.connect(target(lab)) as session:
        call(session)
        assert theirs.hits_by_offset(link) == of_offsets(subject.times(3), theirs)
    theirs.detach(link)
    until_unpinned(lab)


@pytest.mark.parametrize(
    ("optimise", "first"), [(0, 0), (1, 0), (1, 1), (1, 2)], ids=["traps", "one", "two", "three"]
)
def test_kprobes_at_every_third_instruction_before_us_and_all_count(
    session: Session, link: Link, subject: Subject, optimise: int, first: int
) -> None:
    offsets = list(subject.sites)[1:][first::3]
    theirs = Kprobes(SUBJECT, offsets)
    shell(link, f"echo {optimise} > {OPTIMIZE}")
    theirs.attach(link)
    settle(link)
    if optimise:
        until("some are optimised", lambda: optimised(link))
    else:
        assert not optimised(link)
    with count_all(session, tactics=ALL) as hits:
        call(session)
        assert theirs.hits_by_offset(link) == some_of(subject.times(1), dict.fromkeys(offsets, 0))
        theirs.detach(link)
        call(session)
    busy = {one.point for one in hits.refused if one.reason is Reason.BUSY_KPROBE}
    jumps = [at for at in offsets if subject.sites[at].tactic == "jmp32"]
    assert {f"{SUBJECT}+{at:#x}" for at in jumps} <= busy
    assert len(busy) + len(hits.placed) == len(subject.sites)
    assert hits_of(hits) == some_of(subject.times(2), hits_of(hits))
    assert hits.text_restored


def test_entry_under_a_jump_of_its_own_still_yields_to_ftrace(session: Session) -> None:
    # not tried with a kprobe there: ftrace would give up for good
    [site] = session.sites(f"{SUBJECT}+0x0", tactics=["jmp32"])
    assert site.tactic != "jmp32"


# ---- optimised kprobes that reach into our sites -----------------------------------------------


def test_optimised_kprobe_before_us_refuses_what_it_reaches(
    session: Session, link: Link, subject: Subject
) -> None:
    reaching = []
    for short, site in subject.before_a_jump():
        theirs = Kprobes(SUBJECT, [short])
        theirs.attach(link)
        settle(link)
        if becomes_optimised(link, short):
            reaching.append(short)
            with pytest.raises(RefusedError) as refused:
                count_at(session, site, "jmp32")
            assert refusals(refused) == [Reason.BUSY_KPROBE]
        theirs.detach(link)
    assert reaching


def test_kprobe_that_would_reach_into_our_site_later_is_not_optimised(
    session: Session, link: Link, subject: Subject
) -> None:
    for short, site in subject.before_a_jump():
        theirs = Kprobes(SUBJECT, [short])
        with count_at(session, site, "jmp32") as hits:
            theirs.attach(link)
            settle(link)
            assert short not in optimised(link)
            call(session)
            assert theirs.hits(link) == subject.times(1)[short]
        assert hits_of(hits) == {site: subject.times(1)[site]}
        assert hits.text_restored
        call(session)
        assert theirs.hits(link) == subject.times(2)[short]
        theirs.detach(link)


@pytest.mark.parametrize("how", ["enabled", "allowed"])
def test_kprobe_that_is_optimised_later_takes_no_count_away(
    session: Session, link: Link, subject: Subject, how: str
) -> None:
    for short, site in subject.before_a_jump():
        theirs = Kprobes(SUBJECT, [short])
        if how == "enabled":
            theirs.register(link)
        else:
            shell(link, f"echo 0 > {OPTIMIZE}")
            theirs.attach(link)
        try:
            with count_at(session, site, "jmp32") as hits:
                theirs.enable(link)
                shell(link, f"echo 1 > {OPTIMIZE}")
                settle(link)
                call(session)
                assert theirs.hits(link) == subject.times(1)[short]
                theirs.detach(link)
            assert hits_of(hits) in ({}, {site: subject.times(1)[site]})
            assert hits.text_restored
        except RefusedError as refused:
            assert refused.refused[0][1] is Reason.BUSY_KPROBE
            theirs.detach(link)


# ---- kprobes and our traps ---------------------------------------------------------------------


def test_kprobe_on_our_trap_before_or_after_us_counts_and_so_do_we(
    session: Session, link: Link, subject: Subject
) -> None:
    [at] = [at for at, site in subject.sites.items() if site.tactic == "int3"][:1]
    theirs = Kprobes(SUBJECT, [at])
    with count_at(session, at, "int3") as hits:
        theirs.attach(link)
        call(session)
    assert hits_of(hits) == {at: subject.times(1)[at]}
    call(session)  # we are gone, they stay
    assert theirs.hits(link) == subject.times(2)[at]
    with count_at(session, at, "int3") as hits:
        call(session)
        assert theirs.hits(link) == subject.times(3)[at]
        theirs.detach(link)
        call(session)  # they are gone, we stay
    assert hits_of(hits) == {at: subject.times(2)[at]}
    assert hits.text_restored


def test_trap_whose_place_somebody_else_still_traps_is_restored(
    session: Session, link: Link, subject: Subject
) -> None:
    [at] = [at for at, site in subject.sites.items() if site.tactic == "int3"][:1]
    theirs = Kprobes(SUBJECT, [at])
    with count_at(session, at, "int3") as hits:
        theirs.attach(link)
    assert hits.text_restored  # what is there now is theirs
    assert not hits.unrestored


def test_our_trap_inside_an_optimised_kprobe_makes_it_trap_and_both_count(
    session: Session, link: Link, subject: Subject
) -> None:
    for short, _ in subject.before_a_jump():
        inside = [at for at in subject.sites if 0 < at - short < 5]
        inside = [at for at in inside if subject.sites[at].tactic == "int3"]
        theirs = Kprobes(SUBJECT, [short])
        theirs.attach(link)
        settle(link)
        for at in inside:
            with count_at(session, at, "int3") as hits:
                call(session)
            assert hits_of(hits) == {at: subject.times(1)[at]}
            assert hits.text_restored
        assert theirs.hits(link) == subject.times(len(inside))[short]
        theirs.detach(link)


def test_kprobe_that_joined_our_trap_is_no_jump_over_our_site_when_the_trap_leaves(
    session: Session, link: Link, subject: Subject
) -> None:
    for short, site in subject.before_a_jump():
        theirs = Kprobes(SUBJECT, [short])
        trap = count_at(session, short, "int3")
        with count_at(session, site, "jmp32") as hits:
            theirs.attach(link)
            trap.detach()
            settle(link)
            assert not becomes_optimised(link, short)
            call(session)
            assert theirs.hits(link) == subject.times(1)[short]
        assert hits_of(hits) == {site: subject.times(1)[site]}
        assert trap.text_restored and hits.text_restored
        theirs.detach(link)


@pytest.mark.xfail(strict=True, reason="at detach they are armed again, and nobody saw it")
def test_traps_that_the_administrator_disarms_for_a_while_are_not_exact(
    session: Session, link: Link, subject: Subject
) -> None:
    with count_all(session, tactics=["int3"]) as hits:
        shell(link, f"echo 0 > {TRAPS_ARMED}")
        call(session)
        shell(link, f"echo 1 > {TRAPS_ARMED}")
        call(session)
    assert hits_of(hits) == some_of(subject.times(2), hits_of(hits))


def test_traps_that_the_administrator_disarms_are_not_exact(
    session: Session, link: Link, subject: Subject
) -> None:
    with count_all(session, tactics=ALL) as hits:
        call(session)
        shell(link, f"echo 0 > {TRAPS_ARMED}")
        call(session)
    jumps = {row.offset: row.hits for row in hits.rows() if row.tactic != "int3"}
    assert jumps == some_of(subject.times(2), jumps)
    assert all(row.exact == (row.tactic != "int3") for row in hits.rows())
    assert hits.text_restored


# ---- the rest of a long instruction ------------------------------------------------------------


def test_kprobe_on_the_rest_of_a_displaced_instruction_is_refused_by_the_kernel(
    session: Session, link: Link, subject: Subject
) -> None:
    long = [at for at in subject.sites if subject.length(at) > 5 and subject.per_call[at]]
    with count_all(session) as hits:
        assert {row.offset for row in hits.rows()} >= set(long[:4])
        for at in long[:4]:
            for inside in (1, 5, subject.length(at) - 1):
                theirs = Kprobes(SUBJECT, [at + inside])
                with pytest.raises(AssertionError, match="ended with 1"):
                    theirs.attach(link)
        call(session)
    assert hits_of(hits) == some_of(subject.times(1), hits_of(hits))
    assert hits.text_restored


# ---- between reading and writing ---------------------------------------------------------------


def test_kprobe_that_comes_and_goes_while_text_is_read_is_noticed(
    session: Session, link: Link, subject: Subject
) -> None:
    view = session.view
    [start] = view.images[0].find(SUBJECT)
    starts, ends = (np.array([at], np.uint64) for at in (start, start + max(subject.sites)))
    view.refresh()
    native = view.read_text(starts, ends)
    assert view.is_current()
    view.refresh()
    theirs = Kprobes(SUBJECT, [min(at for at in subject.sites if at)])
    theirs.attach(link)
    read = view.read_text(starts, ends)
    theirs.detach(link)
    assert read == native or not view.is_current()


def test_kprobe_that_comes_before_the_commit_and_is_optimised_later_takes_no_count_away(
    session: Session, link: Link, subject: Subject
) -> None:
    short, site = subject.before_a_jump()[0]
    theirs = Kprobes(SUBJECT, [short])

    def register_then(plan: Plan) -> Plan:
        theirs.register(link)
        return plan

    place = f"{SUBJECT}+{site:#x}"
    with contextlib.suppress(RefusedError):
        with session.splice(place, tactics=["jmp32"], amend=register_then) as hits:
            theirs.enable(link)
            settle(link)
            call(session)
            theirs.detach(link)
        assert hits_of(hits) == {site: subject.times(1)[site]}


# ---- all at the same time ----------------------------------------------------------------------

STORM = """cd {tracing}
while [ ! -e /tmp/calm ]; do
for at in {offsets}; do
    echo "p:storm {function}+$at" >> kprobe_events || true
    echo 1 > events/kprobes/storm/enable || true
    echo 0 > events/kprobes/storm/enable || true
    echo -:kprobes/storm >> kprobe_events || true
    if [ -e /tmp/calm ]; then break; fi
done
echo function > current_tracer || true
echo nop > current_tracer || true
done 2> /dev/null"""


def test_counts_stay_exact_while_kprobes_and_a_tracer_come_and_go(
    session: Session, link: Link, lab: Lab, subject: Subject
) -> None:
    offsets = list(subject.sites)
    random.Random(SEED).shuffle(offsets)
    script = STORM.format(tracing=TRACING, offsets=" ".join(map(str, offsets)), function=SUBJECT)
    shell(link, f"rm -f /tmp/calm; echo {SUBJECT} > {TRACING}/set_ftrace_filter")
    counted = 0
    with lab.connect() as storm:
        storm.exec_start(["sh", "-ec", script], env=ENV, cwd="/")
        for turn in range(MOST_TURNS):
            if turn >= TURNS and counted > TURNS:
                break
            with contextlib.suppress(RefusedError, DriverError):
                with count_all(session, tactics=JUMPS if turn % 2 else ALL) as hits:
                    call(session)
                assert hits_of(hits) == some_of(subject.times(1), hits_of(hits))
                counted += len(hits_of(hits))
        shell(link, "touch /tmp/calm")
        for _ in storm.exec_events(LONGEST_S):
            pass
    print("seed", SEED, "counted", counted)
    shell(link, f"echo > {TRACING}/set_ftrace_filter")
    assert counted > TURNS
    until_unpinned(lab)
