# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions of the fake driver: csrc/kmod/text.c, group.c, and their undo: undo.c."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kernweave.driver import uapi
from kernweave.driver.client import Undone
from kernweave.driver.fake_area import Areas, FakeArea
from kernweave.driver.fake_memory import Memory, Out, RefusalError, refuse_if, row_bytes
from kernweave.driver.uapi import Owner, PokeFlag, State

_JUMP_BYTES = 5
_JUMP_OPCODE = 0xE9
_SHORT_BYTES = 2
_SHORT_OPCODE = 0xEB
_INT3 = b"\xcc"
_OURS = (State.PLACED, State.STUCK, State.ARMED, State.HELD)


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
    flags: PokeFlag

    @property
    def end(self) -> int:
        """Address behind the last byte."""
        return self.addr + len(self.old)

    @property
    def is_short(self) -> bool:
        """Whether it jumps to a springboard."""
        return self.new[0] == _SHORT_OPCODE


@dataclass
class FakeTxn:
    """`struct kw_txn`; `area` is None once every site is restored."""

    id: int
    area: FakeArea | None
    pokes: tuple[FakePoke, ...]
    states: list[State]
    kmods: set[str] = field(default_factory=set)
    pinned: bool = False
    settled: bool = False  # nobody can be between a short jump and its springboard

    def is_asked(self) -> bool:
        """Whether a splice is in force that finds native addresses: `kw_is_asked`."""
        both = zip(self.pokes, self.states, strict=True)
        return any(PokeFlag.KEEP in poke.flags and now == State.PLACED for poke, now in both)

    def addrs(self, state: State) -> list[int]:
        """Addresses of the pokes in a state, ascending."""
        both = zip(self.pokes, self.states, strict=True)
        return [poke.addr for poke, now in both if now == state]


class Text:
    """Kernel text: who changed what, and the log of all writes.

    Attributes:
        log: batches, in the order they were written.
        patience: batches a commit has before a signal is pending for its caller; None: no signal.
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
        self.patience: int | None = None
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
            refuse_if(int(row["addr"]) < end or row["len"] > uapi.POKE_BYTES, errno.EINVAL)
            end = int(row["addr"]) + int(row["len"])
            refuse_if(not _is_allowed(_poke(row), area), errno.EINVAL)
        pokes = tuple(map(_poke, table))
        for out.detail, poke in enumerate(pokes):
            refuse_if(poke.is_short and not _has_springboard(poke, pokes), errno.EINVAL)
        for out.detail, poke in enumerate(pokes):
            kmods |= self._holder(poke.addr, len(poke.old))
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
            RefusalError: ESTALE; `out.detail` is the poke whose old bytes differ. EINTR.
        """
        for rows in _batches(txn):
            self._wait_turn()
            writes = []
            for out.detail in rows:
                poke = txn.pokes[out.detail]
                if PokeFlag.GROUP in poke.flags:
                    self._check(poke, poke.old)
                    writes.append(Write(poke.addr, poke.old[:1], _INT3))
                    txn.states[out.detail] = State.ARMED
            self._flush(writes, undo=False)
        for shorts in (False, True):
            for rows in _batches(txn, shorts):
                self._wait_turn()
                self._poke(txn, rows, out)

    def _wait_turn(self) -> None:
        """Give up if a signal is pending."""
        if self.patience is not None:
            refuse_if(self.patience == 0, errno.EINTR)
            self.patience -= 1

    def _poke(self, txn: FakeTxn, rows: list[int], out: Out) -> None:
        """`kw_poke_batch`."""
        writes = []
        for out.detail in rows:
            poke = txn.pokes[out.detail]
            armed = txn.states[out.detail] == State.ARMED
            self._check(poke, _INT3 + poke.old[1:] if armed else poke.old)
            writes.append(Write(poke.addr, poke.old, poke.new))
        for i in rows:
            txn.states[i] = State.PLACED
        self._flush(writes, undo=False)

    def _check(self, poke: FakePoke, expected: bytes) -> None:
        refuse_if(self._has_kprobe(poke.addr, len(poke.old)), errno.ESTALE)
        refuse_if(not self._memory.matches(poke.addr, expected), errno.ESTALE)

    # ---- undo ----------------------------------------------------------------------------------

    def undo(self, txn: FakeTxn, *, wait: bool = True) -> Undone:
        """Restore what is placed or stuck; idempotent: `kw_undo_all`."""
        if not txn.settled:
            for rows in _batches(txn, True):
                self._restore(txn, rows)
            gone = all(
                txn.states[i] not in (State.PLACED, State.STUCK)
                for rows in _batches(txn, True)
                for i in rows
            )
            txn.settled = gone and wait
        for rows in _batches(txn, False):
            self._restore(txn, rows)
        stuck = [*txn.addrs(State.STUCK), *txn.addrs(State.HELD)]
        if not stuck and txn.area is not None:
            self._areas.unreachable(txn.area)
            txn.area = None
        restored, evicted = (txn.states.count(s) for s in (State.RESTORED, State.EVICTED))
        return Undone(restored, evicted, len(stuck), tuple(sorted(stuck)))

    def _restore(self, txn: FakeTxn, rows: list[int]) -> None:
        """`kw_text_restore`."""
        writes = []
        for i in rows:
            poke = txn.pokes[i]
            if txn.states[i] not in _OURS:
                continue
            held = PokeFlag.HOST in poke.flags and not txn.settled
            if held or (PokeFlag.KEEP in poke.flags and self._areas.have_copies):
                txn.states[i] = State.HELD
                continue
            if txn.states[i] == State.ARMED:  # `kw_disarm`: it goes whatever is behind it
                txn.states[i] = State.RESTORED
                writes.append(Write(poke.addr, _INT3, poke.old[:1]))
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
            if state in _OURS
        )

    def _flush(self, writes: list[Write], *, undo: bool) -> None:
        """Write and log what was queued: `kw_finish`."""
        for write in writes:
            self._memory.write(write.addr, write.after)
        if writes:
            self.log.append(Batch(undo, tuple(writes)))


def _batches(txn: FakeTxn, shorts: bool | None = None) -> Iterator[list[int]]:
    """Rows of the pokes of one pass, those of one hold of `text_mutex` at a time."""
    for start in range(0, len(txn.pokes), uapi.BATCH):
        rows = range(start, min(start + uapi.BATCH, len(txn.pokes)))
        yield [i for i in rows if shorts is None or txn.pokes[i].is_short == shorts]


def _poke(row: np.void) -> FakePoke:
    size = int(row["len"])
    old, new = bytes(row["old"]), bytes(row["new_"])
    flags = PokeFlag(int(row["flags"]))
    return FakePoke(int(row["addr"]), old[:size], new[:size] or b"\0", old, flags)


def _target(addr: int, jump: bytes) -> int:
    return addr + len(jump) + int.from_bytes(jump[1:], "little", signed=True)


def _is_allowed(poke: FakePoke, area: FakeArea) -> bool:
    """`kw_is_long_jump`; of a short one the form alone."""
    if poke.is_short:
        return len(poke.new) >= _SHORT_BYTES and not poke.new[_SHORT_BYTES:].strip(_INT3)
    starts = _jumps(poke, area)
    return starts is not None and (PokeFlag.HOST in poke.flags or starts == [0])


def _jumps(poke: FakePoke, area: FakeArea) -> list[int] | None:
    """Offsets of the jumps in a poke; None if there is anything else but int3."""
    starts, off = [], 0
    while off < len(poke.new):
        jump = poke.new[off : off + _JUMP_BYTES]
        if off and jump[:1] == _INT3:
            off += 1
            continue
        target = _target(poke.addr + off, jump) % (1 << 64)
        inside = area.addr <= target < area.addr + area.size
        if len(jump) < _JUMP_BYTES or jump[0] != _JUMP_OPCODE or not inside:
            return None
        starts.append(off)
        off += _JUMP_BYTES
    return starts


def _has_springboard(short: FakePoke, pokes: Sequence[FakePoke]) -> bool:
    """`kw_is_springboard`."""
    target = _target(short.addr, short.new[:_SHORT_BYTES])
    for host in pokes:
        if host.addr <= target < host.end and PokeFlag.HOST in host.flags and not host.is_short:
            off = 0
            while off < target - host.addr:
                off += _JUMP_BYTES
                while host.new[off : off + 1] == _INT3:
                    off += 1
            return off == target - host.addr
    return False
