# SPDX-License-Identifier: GPL-2.0-or-later
"""Every write to kernel text, from connect to close or to the client's death, is judged."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import kernweave
from kernweave.driver.records import ExitStatus
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from oracle.audit import INT3, Foreign, Poke, check_pokes
from oracle.filler import check_fillers, split_pokes
from oracle.lab import ENV, SERIES, OracleLab, no_trouble, oracle_lab, storm
from oracle.oracle import MARK, WRITE, Records

CPUS = 2
PAGE = 4096
MEMCPY = {"memcpy", "memcpy_erms", "memcpy_orig"}  # text_poke() writes with it
TACTICS = ("nop5", "jmp32")
SEED = 1999
NO_SYNC = ("-DKW_SEED_NO_SYNC",)
POINTS = ("vfs_read@insns", "ksys_read", "pipe_write@blocks", "try_to_wake_up@blocks")
#: nobody runs these here: code that is written without syncs must not be executed meanwhile
IDLE_POINTS = ("do_shmat@insns", "do_msgrcv@insns", "do_semtimedop@blocks", "kernel_kexec@insns")
KERNELS_OWN = (
    "arch_jump_label_transform_apply",
    "arch_static_call_transform",
    "ftrace_replace_code",
)
CLIENT = Path(__file__).parents[1] / "oracle" / "client.py"


@dataclass(frozen=True)
class Audit:
    """What was recorded from before connect to after close.

    Attributes:
        events: all writes to executable pages, all marks.
        placed: what the client had changed while it was attached: address, before, then.
        sync: mark of do_sync_core.
        names: the other marks.
        jump_labels: addresses that a static key may rewrite.
        writers: functions whose instructions wrote to kernel text.
    """

    events: Records
    placed: list[Poke]
    sync: int
    names: dict[int, str]
    jump_labels: frozenset[int]
    writers: frozenset[str]

    def judge(self) -> tuple[list[str], list[Foreign]]:
        """Judge placement and removal; return violations, and foreign writes to text.

        Writes to the pages of the code cache are violations while they can be reached.
        """
        jumps, rests = split_pokes(self.placed)
        restored = [(addr, new, old) for addr, old, new in jumps]
        wrong, foreign = check_pokes(self.events, jumps + restored, self.sync, CPUS)
        more, foreign = check_fillers(self.events, rests, foreign, self.sync, CPUS)
        first, last = self.reachable()
        pages = self._code_cache_pages()  # free ones are used again: thousands of writes
        inside = [write for write in foreign if write.addr // PAGE in pages]
        late = [f"code cache: {write}" for write in inside if first < write.seq < last]
        outside = [write for write in foreign if write.addr // PAGE not in pages]
        return wrong + more + late, outside

    def reachable(self) -> tuple[int, int]:
        """Return the sequence numbers of the first and the last write to a site."""
        events = self.events[self.events["kind"] == WRITE]
        sites = np.array([addr for addr, _, _ in self.placed], np.uint64)
        seqs = events["seq"][np.isin(events["addr"], sites)]
        return int(seqs.min()), int(seqs.max())

    def _code_cache_pages(self) -> set[int]:
        targets = (
            addr + 5 + int.from_bytes(new[1:5], "little", signed=True)
            for addr, _, new in self.placed
        )
        return {target // PAGE for target in targets}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    with oracle_lab("audit", tmp_path_factory.mktemp("audit")) as booted:
        yield booted


@pytest.fixture(scope="module")
def machine_without_syncs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    with oracle_lab("seeded", tmp_path_factory.mktemp("seeded"), cflags=NO_SYNC) as booted:
        yield booted


# ---- recording ---------------------------------------------------------------------------------


@contextlib.contextmanager
def under_load(machine: OracleLab) -> Iterator[None]:
    """Keep both CPUs busy meanwhile."""
    print(f"seed {SEED}")
    with machine.lab.connect() as link:
        link.exec_start(["nice", "-n", "19", *storm(SEED, 1_000_000, 0)], env=ENV, cwd="/")
        events = link.exec_events()
        assert next(events) == ("stdout", b"running\n")
        yield
        link.signal(signal.SIGKILL)
        kind, status = list(events)[-1]
        assert isinstance(status, ExitStatus)
        assert (kind, status.signal) == ("exit", signal.SIGKILL)


def record(
    machine: OracleLab,
    client: Callable[[OracleLab, Session], list[Poke]],
    load: Callable[[OracleLab], contextlib.AbstractContextManager[None]] = under_load,
) -> Audit:
    """Audit all of a client's life; it returns what was placed while it was attached."""
    with kernweave.connect(machine.target, writer=False, progress=print) as reader:
        driver = reader.driver
        sync, *own = driver.lookup(["do_sync_core", *KERNELS_OWN])
        start, end, phys_base = driver.lookup(["_text", "_etext", "phys_base"])
        text = [(start, end)]
        text += [(int(row["text_start"]), int(row["text_end"])) for row in driver.kmods()]
        slide = int.from_bytes(reader.read(phys_base, 8), "little")
        with load(machine):
            machine.oracle.audit_on(slide, [sync, *own], text)
            placed = client(machine, reader)
            while len(driver.placed()):  # a dead client's session ends by itself
                pass
            events = machine.oracle.audit_off()
        labels = frozenset(reader.view.sites.jump_labels.tolist())
        to_text = events[(events["kind"] == WRITE) & (events["addr"] >= np.uint64(start))]
        to_text = to_text[to_text["addr"] < np.uint64(end)]
        writers = frozenset(function_of(reader, pc) for pc in set(to_text["pc"].tolist()))
    assert placed
    names = dict(zip(own, KERNELS_OWN, strict=True))
    return Audit(events, placed, sync, names, labels, writers)


def function_of(session: Session, addr: int) -> str:
    image = session.view.images[0]
    bounds = image.bounds(addr)
    return image.name_at[bounds[0]] if bounds else f"{addr:#x}"


def placed_now(reader: Session) -> list[Poke]:
    """Return what differs from native text now: address, native bytes, present bytes."""
    found = []
    for row in reader.driver.placed():
        addr, size = int(row["addr"]), int(row["len"])
        found.append((addr, row["original"][:size].tobytes(), reader.read(addr, size)))
    return found


def attach_and_detach(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*POINTS, tactics=TACTICS):
        return placed_now(reader)


def attach_where_nobody_runs(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*IDLE_POINTS, tactics=TACTICS):
        return placed_now(reader)


def attach_and_be_killed(machine: OracleLab, reader: Session) -> list[Poke]:
    argv = [sys.executable, str(CLIENT), machine.target, *POINTS]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "attached\n"
        placed = placed_now(reader)
        client.kill()
    assert client.returncode == -signal.SIGKILL
    return placed


def attach_and_flip_a_static_key(machine: OracleLab, reader: Session) -> list[Poke]:
    with kernweave.connect(machine.target) as k, k.count(*POINTS, tactics=TACTICS):
        key = "/proc/sys/kernel/sched_schedstats"
        reader.run(["sh", "-c", f"echo 1 > {key}; echo 0 > {key}"], check=True)
        return placed_now(reader)


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
    runs = between_writes(audit)
    assert len(runs) >= 4 * 3  # of the hook and of the points, placed and removed
    for run in runs:
        for cpu in range(CPUS):
            drop = run[audit.events["cpu"][run] == cpu]
            assert replace(audit, events=np.delete(audit.events, drop)).judge()[0]


def between_writes(audit: Audit) -> list[npt.NDArray[np.intp]]:
    """Return the rows of the syncs, a group for each stretch without a write to a jump."""
    events = audit.events
    jumps = [addr + off for addr, _, _ in audit.placed for off in range(5)]
    writes = (events["kind"] == WRITE) & np.isin(events["addr"], np.array(jumps, np.uint64))
    syncs = np.flatnonzero((events["kind"] == MARK) & (events["addr"] == np.uint64(audit.sync)))
    nth = np.cumsum(writes)[syncs]
    return [syncs[nth == group] for group in np.unique(nth) if group]


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
