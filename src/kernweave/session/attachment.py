# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters that are spliced into the kernel: read them, take them out."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.driver.client import Area, Chunk, Driver
from kernweave.driver.uapi import Owner, State
from kernweave.errors import DriverError
from kernweave.model.plan import Plan, Point, Refused
from kernweave.session.counts import Counts

_INT3 = 0xCC


@dataclass(frozen=True)
class Placed:
    """What is in the kernel: everything an attachment needs to be taken out again.

    Attributes:
        points: placed points, in the order asked for.
        site: int64[m], row of `plan` that each point has.
        plan: as it was committed.
        area: where the trampolines are.
        chunks: the counters, in order, and the bytes in use of each.
        txn: the driver's transaction, None without jumps.
        trap_sets: the driver's sets of kprobes, in the order of the plan's traps.
        refused: points whose kprobe the kernel refused.
    """

    points: tuple[Point, ...]
    site: npt.NDArray[np.int64]
    plan: Plan
    area: Area
    chunks: tuple[tuple[Chunk, int], ...]
    txn: int | None
    trap_sets: tuple[int, ...] = ()
    refused: tuple[Refused, ...] = ()


class Attachment(Counts):
    """Counters of one `Session.count` that are spliced in."""

    def __init__(self, driver: Driver, placed: Placed, refused: tuple[Refused, ...]) -> None:
        """Take over what was committed; made by `Session.count`."""
        super().__init__(placed.points, (*refused, *placed.refused))
        self._driver = driver
        self._inside = placed
        self._hits: npt.NDArray[np.uint64] | None = None
        self._evicted = np.zeros(len(placed.plan.addr), bool)
        self._missed = np.zeros(len(placed.plan.addr), np.uint64)
        self._disarmed = np.zeros(len(placed.plan.addr), bool)

    @property
    def plan(self) -> Plan:
        """What was written into the kernel."""
        return self._inside.plan

    @property
    def site(self) -> npt.NDArray[np.int64]:
        """int64[m], row of `plan` that each placed point has."""
        return self._inside.site

    @property
    def attached(self) -> bool:
        """Whether the counters are still in the kernel."""
        return self._hits is None

    @property
    def evicted(self) -> int:
        """Sites given back to ftrace while they were counted."""
        return int(self._evicted.sum())

    @property
    def tactic_of(self) -> list[str]:
        """The tactic of each placed point."""
        return [self.plan.tactic[row].value for row in self._inside.site]

    @property
    def engine_of(self) -> list[str]:
        """The engine of each placed point."""
        return ["splice"] * len(self._inside.site)

    def detach(self) -> None:
        """Restore the text, wait until nobody is in a trampoline, read the final counts.

        Idempotent.  What somebody else has armed meanwhile stays and is listed in `unrestored`.
        """
        if self._hits is not None:
            return
        self._duration_ns = self.duration_ns
        driver, inside = self._driver, self._inside
        self._undo_jumps()
        self._disarmed[self.plan.jumps :] = np.array(self._trap_bytes()) != _INT3
        missed = [driver.disarm(number) for number in inside.trap_sets]
        if missed:
            self._missed[self.plan.jumps :] = np.concatenate(missed)
        driver.quiesce()
        self._hits = self._read()
        pinned = bool(self.unrestored)
        self.unrestored += self._traps_left()
        self.text_restored = not self.unrestored
        if not pinned:
            self.in_flight = driver.free(inside.area)
            if inside.txn is not None:
                driver.forget(inside.txn)

    def _undo_jumps(self) -> None:
        txn = self._inside.txn
        if txn is None:
            return
        self.unrestored = self._driver.undo(txn).stuck_addrs
        states = self._driver.states(txn)
        jumps = self.plan.jumps
        self._evicted[:jumps] = (states == State.EVICTED)[self.plan.poke[:jumps]]

    def _traps_left(self) -> tuple[int, ...]:
        """Read the first byte of every trap again and compare; those that are not native.

        A kprobe of somebody else may be there: then the byte under it is compared.
        """
        jumps, plan = self.plan.jumps, self.plan
        addrs, now = plan.addr[jumps:], self._trap_bytes()
        if not len(addrs):
            return ()
        others = {
            int(row["addr"]) + i: byte
            for heads in (False, True)  # one may be where another's jump reaches to
            for row in self._driver.kprobes()
            for i, byte in enumerate(row["original"][: row["len"]].tolist())
            if heads == (i == 0) and row["owner"] == Owner.OTHERS
        }
        native = np.array(
            [others.get(addr, byte) for addr, byte in zip(addrs.tolist(), now, strict=True)]
        )
        left = (
            (native != np.frombuffer(plan.trapped, np.uint8))
            & ~self._disarmed[jumps:]
            & (native >= 0)
        )
        return tuple(addrs[left].tolist())

    def _trap_bytes(self) -> list[int]:
        """The first byte of every trap, -1 where the text has gone with its kmod."""
        addrs = self.plan.addr[self.plan.jumps :]
        try:
            return list(self._driver.read_ranges(addrs, addrs + np.uint64(1)))
        except DriverError as error:
            if error.errno != errno.EFAULT:
                raise
        return [self._byte_or_gone(addr) for addr in addrs.tolist()]

    def _byte_or_gone(self, addr: int) -> int:
        try:
            return self._driver.read(addr, 1)[0]
        except DriverError as error:
            if error.errno != errno.EFAULT:
                raise
            return -1

    def _read(self) -> npt.NDArray[np.uint64]:
        """uint64[n]: hits per site, summed over all possible CPUs."""
        driver, inside = self._driver, self._inside
        parts = [
            driver.counters(inside.area, chunk, size).sum(axis=0, dtype=np.uint64)
            for chunk, size in inside.chunks
        ]
        return np.concatenate(parts)

    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: hits of each placed point; still rising while attached."""
        per_site = self._read() if self._hits is None else self._hits
        return np.asarray(per_site[self.plan.counter[self._inside.site]])

    def missed(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: arrivals at each placed point that could not be counted; known at detach."""
        return np.asarray(self._missed[self._inside.site])

    def exact(self) -> npt.NDArray[np.bool_]:
        """bool[m]: whether each count is final and complete.

        A trap that was not armed any more at detach is not: its kmod had gone, or the administrator
        had disarmed all kprobes. Nor is one that has missed hits: two CPUs that miss at once may
        count one miss, because the kernel's own counter of them is shared
        (kprobes_inc_nmissed_count). Nor is what a task that sleeps in a fault is going to run.
        """
        final = self._hits is not None
        site = self._inside.site
        whole = ~self._evicted[site] & ~self._disarmed[site] & (self._missed[site] == 0)
        if self.in_flight:
            whole &= ~self._resumed()[site]
        return np.asarray(final & whole)

    def _resumed(self) -> npt.NDArray[np.bool_]:
        """bool[n]: counted in a trampoline that a task may come back to after a fault."""
        plan = self.plan
        found = np.zeros(len(plan.pokes.addr) + 1, bool)  # traps have row -1
        found[np.searchsorted(plan.pokes.addr, plan.copies.native, side="right") - 1] = True
        return found[plan.poke]
