# SPDX-License-Identifier: GPL-2.0-or-later
"""Generations in a running kernel: loaded, entered, left, unloaded."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, Driver, Generation, Moved
from kernweave.driver.records import PAYLOAD_MAX
from kernweave.driver.uapi import Side
from kernweave.errors import DriverError
from kernweave.image.symbols import Symbols
from kernweave.image.tables import Tables
from kernweave.session.target import AnyLink
from kernweave.session.view import is_generation
from kernweave.weave.clonemap import make_entries
from kernweave.weave.counters import Counters
from kernweave.weave.generation import Template, Woven, make_generation
from kernweave.weave.handover import make_handover
from kernweave.weave.layout import Layout, lay_out
from kernweave.weave.mapfile import claim_name, make_names, save_names
from kernweave.weave.scope import Scope
from kernweave.weave.source import I32, Source

_CHUNK = uapi.MAX_PERCPU
_COUNTER_BYTES = 8
_LEAVE_S = 2.0  # to wait for who is inside; for what was moved as long as it takes
_LOOKS = 2  # that must find nobody, before the driver lets go
_TRIES = 5
_LEAST_STOPS = 5  # where a grace period alone takes that long
_NOP5 = np.frombuffer(bytes.fromhex("0f1f440000"), np.uint8)
_JUMP = 0xE9


@dataclass(frozen=True)
class Kernel:
    """What generations are made with.

    Attributes:
        driver: of the session.
        link: that loads kmods.
        template: what every kmod of this kernel has.
        tables: the kernel's.
        symbols: the kernel's.
        folder: where maps of clones are kept.
    """

    driver: Driver
    link: AnyLink
    template: Template
    tables: Tables
    symbols: Symbols
    folder: Path


@dataclass(frozen=True)
class Left:
    """How leaving went.

    Attributes:
        stops: what each stop of the machine did.
        visitors: tasks that are in clones still.
        closed: bool[e], entries that somebody else's patch took before.
        stuck: addresses that could not be restored.
    """

    stops: tuple[Moved, ...]
    visitors: int
    closed: npt.NDArray[np.bool_]
    stuck: tuple[int, ...]


class Live:
    """A generation that is loaded; the driver knows it, and nothing leads to it yet.

    Attributes:
        entered: transaction of the jumps at its entries; None: it is not entered.
        outside: tasks that may have stayed in native code at `enter`.
        area: of the driver, which holds it.
    """

    def __init__(self, kernel: Kernel, source: Source, scope: Scope, counters: Counters) -> None:
        """Translate, load and hand over.

        Raises:
            DriverError: the kernel or the driver refuses; ENOMEM, if there is no room.
            UnsupportedError: the kernel has no ORC unwinder.
        """
        driver = kernel.driver
        self._kernel = kernel
        self.entered: int | None = None
        self.outside = 0
        self.area = driver.area(0)
        try:
            layout = lay_out(source, scope, counters)
            with _room_for(layout):
                self._load(source, scope, layout)
        except BaseException:
            driver.free(self.area)
            raise

    def _load(self, source: Source, scope: Scope, layout: Layout) -> None:
        kernel, driver = self._kernel, self._kernel.driver
        counters = len(layout.counters.insn)
        self.chunks = _chunks(driver, self.area, counters)
        offsets = _offsets(self.chunks, counters)
        name_at = kernel.symbols.name_at
        names = [name_at.get(addr, f"{addr:x}") for addr in source.tables.functions.addr.tolist()]
        self.woven = Woven(source, scope, layout, offsets, names, kernel.tables)
        self.kmod = claim_name(kernel.folder, set(_kmods(driver)))
        file = make_generation(self.woven, kernel.template, self.kmod)
        if len(file) > PAYLOAD_MAX:
            raise DriverError(
                f"a kmod of {len(file):,} bytes, {PAYLOAD_MAX:,} can be loaded", errno.EMSGSIZE
            )
        kernel.link.load_kmod(file)
        try:
            self.base = _text_of(driver, self.kmod)
            save_names(kernel.folder, self.kmod, make_names(self.woven, self.base))
            driver.weave(self.area, self.handover)
        except BaseException:
            kernel.link.unload_kmod(self.kmod)
            raise

    @cached_property
    def handover(self) -> Generation:
        """What the driver knows of it."""
        return make_handover(self.woven, self.kmod, self.base)

    @cached_property
    def functions(self) -> I32:
        """int32[e]: row of the function of each entry."""
        return make_entries(self.woven.source, self.woven.layout, self.base).function

    @property
    def counters(self) -> Counters:
        """What is counted."""
        return self.woven.layout.counters

    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[c]: hits of each counter, of all CPUs."""
        driver = self._kernel.driver
        parts = [driver.counters(self.area, chunk, _CHUNK).sum(axis=0) for chunk in self.chunks]
        found = np.concatenate([np.zeros(0, np.uint64), *parts])
        return found[: len(self.counters.insn)]

    def enter(self) -> Moved:
        """Redirect all entries, then take along who sleeps natively in what is woven.

        Raises:
            CommitError: ESTALE or EINVAL, if a function was changed; nothing is entered.
        """
        driver, entries = self._kernel.driver, self.handover.entries
        pokes = np.zeros(len(entries), uapi.POKE)
        pokes["addr"], pokes["len"] = entries["site"], len(_NOP5)
        pokes["old"][:, : len(_NOP5)] = _NOP5
        away = (entries["clone"] - entries["site"] - np.uint64(len(_NOP5))).view(np.int64)
        pokes["new_"][:, 0] = _JUMP
        pokes["new_"][:, 1:5] = away.astype("<i4").view(np.uint8).reshape(-1, 4)
        self.entered = driver.commit(self.area, pokes)
        try:
            moved = driver.move(self.area, Side.CLONE)
        except BaseException:
            self.leave()
            raise
        self.outside = moved.visitors
        return moved

    def leave(self) -> Left:
        """Send everybody back to native code; counters can be read until `free`."""
        driver = self._kernel.driver
        stops: tuple[Moved, ...] = ()
        stuck: tuple[int, ...] = ()
        closed = driver.closed(self.area)
        if self.entered is not None:
            stuck = driver.undo(self.entered).stuck_addrs
            closed = closed | (driver.states(self.entered) == uapi.State.EVICTED)
        if stuck or self.entered is None:
            return Left(stops, 0, closed, stuck)
        deadline = time.monotonic() + _LEAVE_S
        looks, late = 0, False
        while looks < _LOOKS and not late:
            driver.quiesce()  # again after each move: who was moved may know the place it had
            now = driver.move(self.area, Side.NATIVE)
            stops += (now,)
            looks = 0 if now.visitors or now.places else looks + 1
            late = _is_late(deadline, stops) and now.visitors > 0 and not now.places
        driver.quiesce()
        return Left(stops, stops[-1].visitors, closed, stuck)

    def free(self) -> None:
        """Free everything; nobody is in a clone.

        If somebody is after all, the driver frees it when they have left, and the kmod goes when
        a session weaves next.

        Raises:
            DriverError: EAGAIN or EBUSY, if somebody may be, or something still leads there.
        """
        kernel = self._kernel
        visitors = self._free_area()
        if self.entered is not None:
            kernel.driver.forget(self.entered)
        if not visitors:
            kernel.link.unload_kmod(self.kmod)

    def _free_area(self) -> int:
        """Tasks that are inside still; somebody else's wait may have moved one since `leave`."""
        for _ in range(_TRIES):
            try:
                return self._kernel.driver.free(self.area)
            except DriverError as error:
                if error.errno != errno.EAGAIN:
                    raise
            self._kernel.driver.quiesce()
        return self._kernel.driver.free(self.area)


def _is_late(deadline: float, stops: tuple[Moved, ...]) -> bool:
    return time.monotonic() > deadline and len(stops) >= _LEAST_STOPS


@contextmanager
def _room_for(layout: Layout) -> Iterator[None]:
    """Say what is needed if there is no room for it."""
    try:
        yield
    except DriverError as error:
        if error.errno not in (errno.ENOMEM, errno.EMSGSIZE):
            raise
        counters = _COUNTER_BYTES * len(layout.counters.insn)
        raise DriverError(
            f"no room for clones: {layout.total:,} bytes of code with its tables, "
            f"{counters:,} bytes of counters per CPU",
            error.errno,
            notes=[error.message],
            help="count fewer points at a time",
        ) from error


def _chunks(driver: Driver, area: Area, counters: int) -> tuple[Chunk, ...]:
    number = -(-_COUNTER_BYTES * counters // _CHUNK)
    return tuple(driver.percpu(area, _CHUNK) for _ in range(number))


def _offsets(chunks: tuple[Chunk, ...], counters: int) -> npt.NDArray[np.uint64]:
    """uint64[c]: gs-relative address of each counter."""
    per = _CHUNK // _COUNTER_BYTES
    row = np.arange(counters, dtype=np.uint64)
    starts = np.array([chunk.offset for chunk in chunks], np.int64).view(np.uint64)
    inside = np.uint64(_COUNTER_BYTES) * (row % np.uint64(per))
    return np.asarray(starts[row // np.uint64(per)] + inside)


def _kmods(driver: Driver) -> dict[str, int]:
    """Name -> address of its text, of all kmods."""
    return {
        bytes(row["name"]).rstrip(b"\0").decode(): int(row["text_start"]) for row in driver.kmods()
    }


def _text_of(driver: Driver, kmod: str) -> int:
    try:
        return _kmods(driver)[kmod]
    except KeyError:
        raise DriverError(f"kmod {kmod} has gone", errno.ENOENT) from None


def unload_left(driver: Driver, unload: Callable[[str], None]) -> int:
    """Unload generations of sessions that were killed; how many are in use still."""
    used = 0
    for kmod in _kmods(driver):
        if not is_generation(kmod.encode()):
            continue
        try:
            unload(kmod)
        except DriverError as error:
            if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOENT):
                raise
            used += error.errno != errno.ENOENT
    return used
