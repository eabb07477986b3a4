# SPDX-License-Identifier: GPL-2.0-or-later
"""Others change the same kernel's text: static keys, static calls, ftrace, kprobes, kmods."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from guest import JUMPS, TRACING, Text, assert_exact, kmodctl, names_of, program, read_text, target

import kernweave
from coexist.counting import refusals, until_unpinned
from coexist.others import PREEMPT, Kprobes, Tracer, shell
from kernweave.driver.link import Link
from kernweave.driver.uapi import Owner
from kernweave.errors import Reason, RefusedError
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.attachment import Attachment
from kernweave.session.hooks import SEARCHES
from kernweave.session.session import Session

SCHEDULER = ("try_to_wake_up", "ttwu_do_wakeup", "__schedule", "enqueue_task_fair",
             "dequeue_task_fair", "update_curr", "pick_next_task_fair")  # fmt: skip
SEED = 20991122
WATCHDOG = "/proc/sys/kernel/watchdog_thresh"


@pytest.fixture
def lab(lab: Lab, native: Text) -> Iterator[Lab]:
    """The lab, with its text compared after each test, and a session that counts in the end."""
    yield lab
    assert_exact(lab)
    assert not native.changed(read_text(lab))


def insns(*functions: str) -> list[str]:
    return [f"{name}@insns" for name in functions]


def work(session: Session, rounds: int = 2) -> None:
    session.run([program("mixed"), str(rounds)], check=True)


def points_of(hits: Attachment, tactic: str) -> list[tuple[str, int]]:
    """(function, offset) of what was placed by a tactic."""
    return [(row.function, row.offset) for row in hits.rows() if row.tactic == tactic]


# ---- static keys and static calls --------------------------------------------------------------


def test_static_key_that_flips_inside_counted_functions_does_no_harm(
    session: Session, link: Link
) -> None:
    with session.splice(*insns(*SCHEDULER), partial=True, tactics=JUMPS) as hits:
        assert Reason.JUMP_LABEL in {one.reason for one in hits.refused}
        for _ in range(5):
            for value in (1, 0):
                shell(link, f"echo {value} > /proc/sys/kernel/sched_schedstats")
                work(session, 1)
    assert hits.text_restored
    assert sum(row.hits for row in hits.rows()) > 0


def test_static_calls_that_change_inside_counted_functions_do_no_harm(
    session: Session, link: Link
) -> None:
    calls = ("__cond_resched", "preempt_schedule", "preempt_schedule_notrace",
             "irqentry_exit_cond_resched", "down_read", "mutex_lock", "copy_page_range",
             "__alloc_pages", "kmem_cache_alloc", "vfs_read")  # fmt: skip
    known = [name for name in (*SCHEDULER, *calls) if session.view.images[0].find(name)]
    with session.splice(*insns(*known), partial=True, tactics=JUMPS) as hits:
        assert Reason.STATIC_CALL in {one.reason for one in hits.refused}
        for mode in ("full", "none", "voluntary", "full", "voluntary"):
            shell(link, f"echo {mode} > {PREEMPT}")
            assert f"({mode})" in shell(link, f"cat {PREEMPT}")
            work(session, 1)
    assert hits.text_restored


# ---- ftrace ------------------------------------------------------------------------------------


def traced(link: Link, function: str) -> bool:
    shell(link, "cat /proc/self/status")
    # of the whole file there may be no end: reading it is traced, too
    return function in shell(link, f"head -c 20000 {TRACING}/trace")


def test_entry_that_ftrace_uses_first_is_refused(session: Session, link: Link) -> None:
    Tracer("vfs_read", "function").attach(link)
    with pytest.raises(RefusedError) as refused:
        session.splice("vfs_read")
    assert refusals(refused) == [Reason.BUSY_FTRACE]
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        work(session, 1)
    assert hits.text_restored
    assert [one.point for one in hits.refused if one.reason is Reason.BUSY_FTRACE] == [
        "vfs_read+0x0"
    ]


@pytest.mark.parametrize("tracer", ["function", "function_graph"])
def test_ftrace_that_comes_later_gets_the_entry_and_the_point_is_not_exact(
    session: Session, link: Link, tracer: str
) -> None:
    with session.splice("vfs_read", "vfs_write") as hits:
        Tracer("vfs_read", tracer).attach(link)
        assert traced(link, "vfs_read")
    assert [(row.function, row.exact) for row in hits.rows()] == [
        ("vfs_read", False),
        ("vfs_write", True),
    ]
    assert hits.text_restored
    assert hits.evicted == 1
    assert traced(link, "vfs_read")


@pytest.mark.parametrize("tracer", ["function", "function_graph"])
def test_ftrace_of_all_functions_evicts_two_thousand_entries(
    session: Session, link: Link, tracer: str
) -> None:
    print("seed", SEED)
    symbols, names = names_of(session)
    ftrace = set(session.view.sites.ftrace.tolist())
    entries = [name for name in names if symbols.find(name)[0] in ftrace]
    chosen = random.Random(SEED).sample(entries, 2000)
    # the kernel itself changes 40,000 records without a pause, which an emulated CPU needs long for
    shell(link, f"echo 60 > {WATCHDOG}")
    with session.splice(*chosen, partial=True) as hits:
        shell(link, f"cd {TRACING}; echo > set_ftrace_filter; echo {tracer} > current_tracer")
        shell(link, f"echo nop > {TRACING}/current_tracer")
        work(session, 1)
    shell(link, f"echo 10 > {WATCHDOG}")
    assert hits.text_restored
    assert hits.evicted > 1500
    assert session.splice("vfs_read").placed


# ---- kprobes -----------------------------------------------------------------------------------


def attach_kprobe(link: Link, place: tuple[str, int], armed: bool = True) -> Kprobes:
    theirs = Kprobes(place[0], [place[1]])
    theirs.register(link)
    if armed:
        theirs.enable(link)
    return theirs


@pytest.mark.parametrize("armed", [True, False], ids=["armed", "registered"])
def test_kprobe_that_is_there_first_is_busy(session: Session, link: Link, armed: bool) -> None:
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        place = points_of(hits, "jmp32")[3]
    attach_kprobe(link, place, armed)
    with pytest.raises(RefusedError) as refused:
        session.splice(f"{place[0]}+{place[1]:#x}")
    assert refusals(refused) == [Reason.BUSY_KPROBE]
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as rest:
        work(session, 1)
    assert rest.text_restored


@pytest.mark.parametrize("armed", [True, False], ids=["armed", "registered"])
def test_kprobe_on_our_site_pins_it_until_the_kprobe_goes(
    lab: Lab, link: Link, armed: bool
) -> None:
    with kernweave.connect(target(lab)) as session:
        hits = session.splice("vfs_read@insns", partial=True, tactics=JUMPS)
        place = points_of(hits, "jmp32")[3]
        theirs = attach_kprobe(link, place, armed)
        work(session, 1)
        hits.detach()
        work(session, 1)
        assert not hits.text_restored
        assert len(hits.unrestored) == 1
    theirs.enable(link, 1)
    shell(link, "cat /proc/self/status")
    theirs.enable(link, 0)
    shell(link, "cat /proc/self/status")
    with kernweave.connect(target(lab), writer=False) as reader:
        # the site, and what its trampolines' area needs as long as it is there
        assert reader.driver.facts.pinned == 1 + len(SEARCHES)
        owners = [row["owner"] for row in reader.driver.placed()]
        assert owners == [Owner.LEFT] * (1 + len(SEARCHES))
    assert kmodctl(link, "unload", "kernweave") == "EAGAIN"
    theirs.detach(link)
    until_unpinned(lab)


def test_kprobe_on_a_counted_entry_evicts_it(session: Session, link: Link) -> None:
    with session.splice("vfs_read") as hits:
        attach_kprobe(link, ("vfs_read", 0))
        shell(link, "cat /proc/self/status")
        assert "p_vfs_read_0" in shell(link, f"head -c 20000 {TRACING}/trace")
    assert [row.exact for row in hits.rows()] == [False]
    assert hits.text_restored


def test_kprobe_through_ftrace_does_not_hide_the_code_behind_it(
    session: Session, link: Link
) -> None:
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        before = [point.text for point in hits.placed]
    attach_kprobe(link, ("vfs_read", 0))
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        work(session, 1)
        assert [point.text for point in hits.placed] == before[1:]


def test_optimised_kprobes_and_our_sites_side_by_side_do_no_harm(
    session: Session, link: Link
) -> None:
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        offsets = sorted(row.offset for row in hits.rows())
        refused = [one for one in hits.refused if one.reason is Reason.TOO_SHORT]
        short = [int(one.point.partition("+")[2], 16) for one in refused]
    for off in short[:12]:  # instructions before ours: a jump there may cover ours
        theirs = attach_kprobe(link, ("vfs_read", off))
        with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
            work(session, 1)
            assert hits.plan.addr.size
        assert hits.text_restored
        theirs.detach(link)
    with session.splice("vfs_read@insns", partial=True, tactics=JUMPS) as hits:
        for off in short[:12]:
            theirs = attach_kprobe(link, ("vfs_read", off))
            shell(link, "cat /proc/self/status")
            theirs.detach(link)
        work(session, 1)
    assert offsets
    assert hits.text_restored


# ---- kmods -------------------------------------------------------------------------------------


def test_kmod_that_comes_and_goes_while_counted(lab: Lab, session: Session, link: Link) -> None:
    path = _find_kmod("loop")
    with session.splice("vfs_read@insns", "load_module@insns", partial=True, tactics=JUMPS) as hits:
        for _ in range(3):
            assert kmodctl(link, "load", path) == "ok"
            assert kmodctl(link, "unload", "loop") == "ok"
    assert hits.text_restored
    assert kmodctl(link, "load", path) == "ok"
    with session.splice("loop:*@insns", partial=True, tactics=JUMPS) as hits:
        assert hits.rows()[0].kmod == "loop"
        assert kmodctl(link, "unload", "loop") == "EAGAIN"
        work(session, 1)
    assert hits.text_restored
    assert kmodctl(link, "unload", "loop") == "ok"


def test_points_in_the_agents_own_kmod_count(session: Session) -> None:
    with session.splice(
        "virtio_console:*@insns", "9p:*@blocks", partial=True, tactics=JUMPS
    ) as hits:
        work(session, 1)
    rows = {row.point: row.hits for row in hits.rows()}
    assert rows["virtio_console:port_fops_write+0x0"] > 0
    assert hits.text_restored


def _find_kmod(name: str) -> str:
    root = fetch_kernel("6.1", print)
    found = sorted(root.modules.rglob(f"{name}.ko"))
    assert found, f"{name}.ko is not in the kernel's package"
    return str(found[0])
