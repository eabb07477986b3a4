# SPDX-License-Identifier: GPL-2.0-or-later
"""Traps of the fake driver: counters behind kprobes; csrc/kmod/trap.c."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kernweave.driver import uapi
from kernweave.driver.fake_area import Areas, FakeArea
from kernweave.driver.fake_memory import Memory, RefusalError, refuse_if, row_bytes
from kernweave.driver.uapi import Owner

_INT3 = b"\xcc"


@dataclass
class FakeSet:
    """`struct kw_set`; `area` is None once it is disarmed.

    Attributes:
        count: traps asked for.
        armed: byte under the int3 by address; None where the probe goes through ftrace.
    """

    id: int
    area: FakeArea | None
    count: int
    armed: dict[int, bytes | None] = field(default_factory=dict)


class Traps:
    """Kprobes of all sessions."""

    def __init__(
        self,
        memory: Memory,
        areas: Areas,
        check: Callable[[int], bool],
    ) -> None:
        """`check` tells whether an address is an ftrace site, and refuses where no probe may be."""
        self._memory = memory
        self._areas = areas
        self._check = check
        self._next_id = 1
        self._sets: list[FakeSet] = []

    def arm(self, area: FakeArea, rows: bytes) -> tuple[FakeSet, list[int]]:
        """Arm what the kernel allows; a status per trap: `kw_trap_arm`."""
        traps = np.frombuffer(rows, uapi.TRAP)
        made = FakeSet(self._next_id, area, len(traps))
        self._next_id += 1
        self._sets.append(made)
        area.users += 1
        statuses = []
        for row in traps:
            try:
                self._arm_one(made, area, row)
                statuses.append(0)
            except RefusalError as refusal:
                statuses.append(-refusal.errno)
        return made, statuses

    def _arm_one(self, made: FakeSet, area: FakeArea, row: np.void) -> None:
        chunk, off, addr = int(row["chunk"]), int(row["off"]), int(row["addr"])
        refuse_if(chunk >= len(area.chunks), errno.ENOENT)
        refuse_if(off % 8 != 0 or off >= 8 * area.chunks[chunk].shape[1], errno.E2BIG)
        if self._check(addr):
            made.armed[addr] = None
            return
        refuse_if(addr in self.addrs(), errno.EEXIST)
        made.armed[addr] = self._memory.read(addr, 1)
        self._memory.write(addr, _INT3)

    def disarm(self, made: FakeSet) -> bytes:
        """Remove the kprobes; missed hits, which are none here: `kw_trap_disarm`."""
        for addr, byte in made.armed.items():
            if byte is not None:
                self._memory.write(addr, byte)
        made.armed.clear()
        if made.area is not None:
            self._areas.unreachable(made.area)
            made.area = None
        return bytes(8 * made.count)

    def drop(self, made: FakeSet) -> None:
        """Forget a set of a session that ends: `kw_set_free`."""
        self.disarm(made)
        self._sets.remove(made)

    def addrs(self) -> set[int]:
        """Where a kprobe of ours wrote its int3."""
        return {addr for addr, _ in self._written()}

    def rows(self) -> bytes:
        """`uapi.PATCHED` rows: `kw_fill_kprobe`."""
        return b"".join(
            row_bytes(
                uapi.PATCHED,
                addr=addr,
                len=1,
                owner=Owner.OURS,
                original=np.frombuffer(byte.ljust(uapi.POKE_BYTES, b"\0"), np.uint8),
            )
            for addr, byte in self._written()
        )

    def _written(self) -> Iterator[tuple[int, bytes]]:
        for made in self._sets:
            for addr, byte in made.armed.items():
                if byte is not None:
                    yield addr, byte
