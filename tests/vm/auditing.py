# SPDX-License-Identifier: GPL-2.0-or-later
"""Records every write to executable pages in a client's life, and judges it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from guest import until

import kernweave
from kernweave.driver.records import ExitStatus
from kernweave.session.session import Session
from oracle.audit import Foreign, Poke, check_pokes
from oracle.filler import check_fillers, split_pokes
from oracle.lab import ENV, OracleLab, storm
from oracle.oracle import MARK, WRITE, Records

CPUS = 2
PAGE = 4096
SEED = 1999
KERNELS_OWN = (
    "arch_jump_label_transform_apply",
    "arch_static_call_transform",
    "ftrace_replace_code",
)


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
        closed: slots of clones, which are written once.
    """

    events: Records
    placed: list[Poke]
    sync: int
    names: dict[int, str]
    jump_labels: frozenset[int]
    writers: frozenset[str]
    closed: tuple[Poke, ...] = ()

    def judge(self) -> tuple[list[str], list[Foreign]]:
        """Judge placement and removal; return violations, and foreign writes to text.

        Writes to the pages of the code cache are violations while they can be reached.
        """
        jumps, rests = split_pokes(self.placed)
        restored = [(addr, new, old) for addr, old, new in jumps]
        pokes = [*jumps, *restored, *self.closed]
        wrong, foreign = check_pokes(self.events, pokes, self.sync, CPUS)
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


def all_restored(reader: Session) -> None:
    """Wait: a session ends by itself."""
    until("all is restored", lambda: not len(reader.driver.placed()))


def check_each_sync_is_needed(audit: Audit, pokes: Sequence[Poke]) -> int:
    """Without a group of syncs between these pokes the verdict is another; how many there are."""
    runs = between_writes(audit.events, audit.sync, pokes)
    for run in runs:
        for cpu in range(CPUS):
            drop = run[audit.events["cpu"][run] == cpu]
            assert replace(audit, events=np.delete(audit.events, drop)).judge()[0]
    return len(runs)


def between_writes(events: Records, sync: int, pokes: Sequence[Poke]) -> list[npt.NDArray[np.intp]]:
    """Return the rows of the syncs, a group for each stretch without a write to a jump."""
    jumps = [addr + off for addr, _, _ in pokes for off in range(5)]
    writes = (events["kind"] == WRITE) & np.isin(events["addr"], np.array(jumps, np.uint64))
    syncs = np.flatnonzero((events["kind"] == MARK) & (events["addr"] == np.uint64(sync)))
    nth = np.cumsum(writes)[syncs]
    return [syncs[nth == group] for group in np.unique(nth) if group]
