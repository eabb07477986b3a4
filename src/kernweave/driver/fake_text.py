# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions of the fake driver: csrc/kmod/text.c, and their undo: csrc/kmod/undo.c."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kernweave.driver import uapi
from kernweave.driver.client import Undone
from kernweave.driver.fake_area import Areas, FakeArea
from kernweave.driver.fake_memory import Memory, Out, RefusalError, refuse_if, row_bytes
from kernweave.driver.uapi import Owner, State

_JUMP_BYTES = 5
_JUMP_OPCODE = 0xE9
_INT3 = b"\xcc"


@dataclass(frozen=True, slots=True)
class Write:
    """One text write: address, bytes before, bytes after."""

    addr: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """The writes of one hold of `text_mutex`: of a commit, or of an undo."""

    undo: bool
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class FakePoke:
    """`struct kw_poke`, with `old` cut to its length; `whole` is the full field."""

    addr: int
    old: bytes
    new: bytes
    whole: bytes


@dataclass
class FakeTxn:
    """`struct kw_txn`; `area` is None once every site is restored."""

    id: int
    area: FakeArea | None
    pokes: tuple[FakePoke, ...]
    states: list[State]
    kmods: set[str] = field(default_factory=set)
    pinned: bool = False

    def addrs(self, state: State) -> list[int]:
        """Addresses of the pokes in a state, ascending."""
        both = zip(self.pokes, self.states, strict=True)
        return [poke.addr for poke, now in both if now == state]


class Text:
    """Kernel text: who changed what, and the log of all writes.

    Attributes:
        log: batches, in the order they were written.
        txns: every transaction that is not dropped, of all sessions and pinned ones.
    """

    def __init__(
        self,
        memory: Memory,
        core: tuple[int, int],
        areas: Areas,
        kmod_at: Callable[[int], str | None],
        has_kprobe: Callable[[int, int], bool],
    ) -> None:
        self._memory = memory
        self._core = core
        self._areas = areas
        self._kmod_at = kmod_at
        self._has_kprobe = has_kprobe
        self._next_id = 1
        self.log: list[Batch] = []
        self.txns: list[FakeTxn] = []

    # ---- commit --------------------------------------------------------------------------------

    def prepare(self, area: FakeArea, rows: bytes, out: Out) -> FakeTxn:
        """Check every poke before the first is written, and link the transaction.

        Raises:
            RefusalError: EINVAL or EFAULT; `out.detail` is the poke.
        """
        table = np.frombuffer(rows, uapi.POKE)
        kmods: set[str] = set()
        end = 0
        for out.detail, row in enumerate(table):
            wrong = int(row["addr"]) < end or not _is_jump_into(row, area)
            refuse_if(wrong, errno.EINVAL)
            kmods |= self._holder(int(row["addr"]), int(row["len"]))
            end = int(row["addr"]) + int(row["len"])
        pokes = tuple(map(_poke, table))
        txn = FakeTxn(self._next_id, area, pokes, [State.WAITING] * len(pokes), kmods)
        self._next_id += 1
        area.users += 1
        self.txns.append(txn)
        return txn

    def _holder(self, addr: int, size: int) -> set[str]:
        """The kmod that must stay loaded for this poke, if any: `kw_hold_kmod`."""
        if self._core[0] <= addr and addr + size <= self._core[1]:
            return set()
        kmod = self._kmod_at(addr)
        if kmod is None or self._kmod_at(addr + size - 1) != kmod:
            raise RefusalError(errno.EFAULT)
        return {kmod}

    def apply(self, txn: FakeTxn, out: Out) -> None:
        """Poke in batches: `kw_poke_all`; the caller undoes when it is refused.

        Raises:
            RefusalError: ESTALE; `out.detail` is the poke whose old bytes differ.
        """
        for start in range(0, len(txn.pokes), uapi.BATCH):
            batch = range(start, min(start + uapi.BATCH, len(txn.pokes)))
            for out.detail in batch:
                poke = txn.pokes[out.detail]
                refuse_if(self._has_kprobe(poke.addr, len(poke.old)), errno.ESTALE)
                refuse_if(not self._memory.matches(poke.addr, poke.old), errno.ESTALE)
            writes = []
            for i in batch:
                poke = txn.pokes[i]
                writes.append(Write(poke.addr, poke.old, poke.new))
                txn.states[i] = State.PLACED
            self._flush(writes, undo=False)
            out.detail = batch[-1]

    # ---- undo ----------------------------------------------------------------------------------

    def undo(self, txn: FakeTxn) -> Undone:
        """Restore what is placed or stuck; idempotent: `kw_undo_all`."""
        for start in range(0, len(txn.pokes), uapi.BATCH):
            self._restore(txn, range(start, min(start + uapi.BATCH, len(txn.pokes))))
        stuck = txn.addrs(State.STUCK)
        if not stuck and txn.area is not None:
            self._areas.unreachable(txn.area)
            txn.area = None
        restored, evicted = (txn.states.count(s) for s in (State.RESTORED, State.EVICTED))
        return Undone(restored, evicted, len(stuck), tuple(stuck))

    def _restore(self, txn: FakeTxn, batch: range) -> None:
        """`kw_text_restore`."""
        writes = []
        for i in batch:
            poke = txn.pokes[i]
            if txn.states[i] not in (State.PLACED, State.STUCK):
                continue
            txn.states[i] = State.RESTORED
            if self._has_kprobe(poke.addr, len(poke.old)):
                txn.states[i] = State.STUCK
            elif self._memory.matches(poke.addr, poke.new):
                writes.append(Write(poke.addr, poke.new, poke.old))
            elif not self._memory.matches(poke.addr, poke.old):
                txn.states[i] = State.STUCK
        self._flush(writes, undo=True)

    def evict(self, addr: int) -> None:
        """Give one site back: `kw_evict`."""
        for txn in self.txns:
            for i, poke in enumerate(txn.pokes):
                if poke.addr != addr or txn.states[i] != State.PLACED:
                    continue
                if self._memory.matches(poke.addr, poke.new):
                    self._flush([Write(poke.addr, poke.new, poke.old)], undo=True)
                    txn.states[i] = State.EVICTED
                return

    def drop(self, txn: FakeTxn) -> None:
        """Forget a transaction and its hold on kmods: `kw_txn_free`."""
        self.txns.remove(txn)

    def held_kmods(self) -> set[str]:
        """Kmods that cannot be unloaded because their text is or was changed."""
        return set().union(*(txn.kmods for txn in self.txns))

    def placed(self) -> bytes:
        """`uapi.PATCHED` rows of all sites that are ours: `kw_placed`."""
        return b"".join(
            row_bytes(
                uapi.PATCHED,
                addr=poke.addr,
                len=len(poke.old),
                owner=Owner.LEFT if txn.pinned else Owner.OURS,
                original=np.frombuffer(poke.whole, np.uint8),
            )
            for txn in self.txns
            for poke, state in zip(txn.pokes, txn.states, strict=True)
            if state in (State.PLACED, State.STUCK)
        )

    def _flush(self, writes: list[Write], *, undo: bool) -> None:
        """Write and log what was queued: `kw_finish`."""
        for write in writes:
            self._memory.write(write.addr, write.after)
        if writes:
            self.log.append(Batch(undo, tuple(writes)))


def _poke(row: np.void) -> FakePoke:
    size = int(row["len"])
    old, new = bytes(row["old"]), bytes(row["new_"])
    return FakePoke(int(row["addr"]), old[:size], new[:size], old)


def _is_jump_into(row: np.void, area: FakeArea) -> bool:
    """`kw_is_jump_into`."""
    new = bytes(row["new_"])
    size = int(row["len"])
    if not _JUMP_BYTES <= size < uapi.POKE_BYTES or new[0] != _JUMP_OPCODE:
        return False
    if new[_JUMP_BYTES:size].strip(_INT3):  # what is left of a longer instruction
        return False
    distance = int.from_bytes(new[1:_JUMP_BYTES], "little", signed=True)
    target = (int(row["addr"]) + _JUMP_BYTES + distance) % (1 << 64)
    return area.addr <= target < area.addr + area.size
