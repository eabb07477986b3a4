# SPDX-License-Identifier: GPL-2.0-or-later
"""Every write to kernel text, from connect to close or to the client's death, is judged."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from auditing import Audit, all_restored, check_each_sync_is_needed, placed_now, record

import kernweave
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from oracle.audit import INT3, Poke
from oracle.lab import SERIES, OracleLab, no_trouble, oracle_lab
from oracle.oracle import WRITE

MEMCPY = {"memcpy", "memcpy_erms", "memcpy_orig"}  # text_poke() writes with it
TACTICS = ("nop5", "jmp32")
NO_SYNC = ("-DKW_SEED_NO_SYNC",)
POINTS = ("vfs_read@insns", "ksys_read", "pipe_write@blocks", "try_to_wake_up@blocks")
#: nobody runs these here: code that is written without syncs must not be executed meanwhile
IDLE_POINTS = ("do_shmat@insns", "do_msgrcv@insns", "do_semtimedop@blocks", "kernel_kexec@insns")
CLIENT = Path(__file__).parents[1] / "oracle" / "client.py"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    with oracle_lab("audit", tmp_path_factory.mktemp("audit")) as booted:
        yield booted


@pytest.fixture(scope="module")
def machine_without_syncs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    with oracle_lab("seeded", tmp_path_factory.mktemp("seeded"), cflags=NO_SYNC) as booted:
        yield booted


def attach_and_detach(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*POINTS, tactics=TACTICS):
        placed = placed_now(reader)
    all_restored(reader)
    return placed


def attach_where_nobody_runs(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*IDLE_POINTS, tactics=TACTICS):
        placed = placed_now(reader)
    all_restored(reader)
    return placed


def attach_and_be_killed(machine: OracleLab, reader: Session) -> list[Poke]:
    argv = [sys.executable, str(CLIENT), machine.target, *POINTS]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "attached\n"
        placed = placed_now(reader)
        client.kill()
    assert client.returncode == -signal.SIGKILL
    all_restored(reader)
    return placed


def attach_and_flip_a_static_key(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*POINTS, tactics=TACTICS):
        key = "/proc/sys/kernel/sched_schedstats"
        reader.run(["sh", "-c", f"echo 1 > {key}; echo 0 > {key}"], check=True)
        placed = placed_now(reader)
    all_restored(reader)
    return placed


# ---- verdicts ----------------------------------------------------------------------------------


def check_complete(audit: Audit) -> None:
    """A session's pokes: the points asked for, and the hook in ftrace's update."""
    assert len(audit.placed) > 50
    assert audit.writers <= MEMCPY, audit.writers
    heads = audit.events[(audit.events["kind"] == WRITE) & (audit.events["value"] == INT3)]
    assert set(heads["addr"].tolist()) >= {addr for addr, _, _ in audit.placed}


@pytest.mark.parametrize("client", [attach_and_detach, attach_and_be_killed])
def test_every_text_write_follows_the_protocol_and_is_planned(
    machine: OracleLab, client: Callable[[OracleLab, Session], list[Poke]]
) -> None:
    with no_trouble(machine):
        audit = record(machine, client)
    check_complete(audit)
    assert audit.judge() == ([], [])


def test_writes_the_kernel_makes_for_itself_are_listed_with_their_caller(
    machine: OracleLab,
) -> None:
    with no_trouble(machine):
        audit = record(machine, attach_and_flip_a_static_key)
    check_complete(audit)
    violations, foreign = audit.judge()
    assert violations == []
    names = {audit.names.get(write.caller or 0) for write in foreign}
    print(len(foreign), "foreign writes by", names)
    assert names == {"arch_jump_label_transform_apply"}
    for write in foreign:
        assert {write.addr - off for off in range(5)} & audit.jump_labels


def test_each_missing_sync_is_seen(machine: OracleLab) -> None:
    with no_trouble(machine):
        audit = record(machine, attach_and_detach)
    # of the hook and of the points, placed and removed
    assert check_each_sync_is_needed(audit, audit.placed) >= 4 * 3


def test_driver_without_syncs_fails(machine_without_syncs: OracleLab) -> None:
    assert (
        driver_kmod(SERIES, print).read_bytes() != driver_kmod(SERIES, print, NO_SYNC).read_bytes()
    )
    idle = contextlib.nullcontext()
    audit = record(machine_without_syncs, attach_where_nobody_runs, lambda _: idle)
    assert len(audit.placed) > 50
    violations, _ = audit.judge()
    print(violations[:3])
    assert sum(line.startswith("poke of") for line in violations) == len(audit.placed)
