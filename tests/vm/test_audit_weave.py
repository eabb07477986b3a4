# SPDX-License-Identifier: GPL-2.0-or-later
"""Every write to kernel text and clones, from entering to leaving, is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from auditing import SEED, check_each_sync_is_needed, placed_now, record
from weaving import load, prepared

import kernweave
from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.weave.counters import select_blocks
from oracle.audit import Poke
from oracle.lab import OracleLab, no_trouble, oracle_lab, storm

SLOT, JUMP = 5, 0xE9
#: run by the load, for the auditor knows the pages of clones that run
HOT = ("ksys_read", "ksys_write", "vfs_read", "vfs_write", "pipe_read", "pipe_write", "fput",
       "rw_verify_area", "__x64_sys_read", "__x64_sys_write", "__x64_sys_futex", "do_futex",
       "futex_wait", "futex_wake", "try_to_wake_up", "enqueue_task_fair", "dequeue_task_fair",
       "update_curr", "ktime_get", "hrtimer_interrupt")  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    with oracle_lab("audit-weave", tmp_path_factory.mktemp("audit")) as booted:
        yield booted


def test_entries_and_slots_of_clones_are_written_by_the_protocol(machine: OracleLab) -> None:
    closed: tuple[Poke, ...] = ()
    command = storm(SEED, 60, 0)

    def client(machine: OracleLab, reader: Session) -> list[Poke]:
        nonlocal closed
        placed, closed = enter_and_leave(reader, live, command)
        return placed

    with no_trouble(machine), kernweave.connect(machine.target) as k:
        source = prepared(k)
        asked = np.isin(source.tables.functions.addr, k.driver.lookup(HOT))
        live = load(k, source, asked, (select_blocks,))
        audit = record(machine, client)
        hits = live.hits().sum()
        live.free()
    assert hits > 0
    assert len(closed) == len(audit.placed) >= len(HOT) // 2
    assert {new[0] for _, _, new in closed} == {JUMP}
    assert replace(audit, closed=closed).judge() == ([], [])
    assert check_each_sync_is_needed(replace(audit, closed=closed), closed) >= 3


def enter_and_leave(
    reader: Session, live: Live, command: list[str]
) -> tuple[list[Poke], tuple[Poke, ...]]:
    """What was placed meanwhile, and the slots that were closed."""
    slots = live.handover.entries["slot"].tolist()
    hooks, native = placed_now(reader), [reader.read(slot, SLOT) for slot in slots]
    live.enter()
    reader.run(command, check=True, capture=True)
    placed = [poke for poke in placed_now(reader) if poke not in hooks]
    live.leave()
    now = [reader.read(slot, SLOT) for slot in slots]
    return placed, tuple(zip(slots, native, now, strict=True))
