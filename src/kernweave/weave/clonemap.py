# SPDX-License-Identifier: GPL-2.0-or-later
"""Native addresses to clone addresses and back, and what the kernel's tables need for clones.

Copies lie in the order of the native instructions, so one table serves both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kernweave.model.table import concat, select
from kernweave.weave.bind import targets_of
from kernweave.weave.branches import NEAR_BYTES
from kernweave.weave.layout import Layout
from kernweave.weave.scope import Scope
from kernweave.weave.source import I32, U8, Source

Addrs = npt.NDArray[np.uint64]
U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class CloneMap:
    """Every instruction that has a copy, ascending by both addresses.

    Attributes:
        native: uint64[m], its run-time address.
        clone: uint64[m], that of its copy, behind its counter; a slot is before it.
        arrival: uint64[m], where control arrives in the clone: its counter or copy.
        length: uint8[m], bytes natively.
        size: uint8[m], bytes of the copy.
        insn: int32[m], its row.
        function: int32[m], row of its function or `.cold` part.
    """

    native: Addrs
    clone: Addrs
    arrival: Addrs
    length: U8
    size: U8
    insn: I32
    function: I32

    def clones_of(self, native: Addrs) -> Addrs:
        """uint64[k]: copies of the instructions at some native addresses, 0 where there is none."""
        return _look_up(self.native, native, self.clone)

    def arrivals_of(self, native: Addrs) -> Addrs:
        """uint64[k]: where to go in the clone instead of native addresses, 0: nowhere."""
        return _look_up(self.native, native, self.arrival)

    def natives_of(self, clone: Addrs) -> Addrs:
        """uint64[k]: native instructions whose copies or arrivals are at some addresses, else 0."""
        found = _look_up(self.clone, clone, self.native)
        return np.where(found, found, _look_up(self.arrival, clone, self.native))

    def returns_of(self, clone: Addrs) -> Addrs:
        """uint64[k]: native return addresses for those that calls in clones push, else 0."""
        ends = self.clone + self.size
        return _look_up(ends, clone, self.native + self.length)


def _look_up(keys: Addrs, wanted: Addrs, values: Addrs) -> Addrs:
    if not len(keys):
        return np.zeros(len(wanted), np.uint64)
    row = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[row] == wanted, values[row], np.uint64(0))


def make_map(source: Source, layout: Layout, base: int) -> CloneMap:
    """The map of a code cache at `base`."""
    instructions = source.tables.instructions
    rows = np.flatnonzero(layout.size)
    start = np.uint64(base)
    return CloneMap(
        native=instructions.addr[rows],
        clone=layout.copy[rows].astype(np.uint64) + start,
        arrival=layout.start[rows].astype(np.uint64) + start,
        length=instructions.length[rows],
        size=layout.size[rows],
        insn=rows.astype(np.int32),
        function=instructions.function[rows],
    )


# ---- the kernel's tables -------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """Woven functions.

    Attributes:
        function: int32[s], row of each.
        native: uint64[s], its run-time address.
        clone: uint64[s], where the native entry leads: behind the slot.
        slot: uint64[s], five bytes of nop in the clone: the copy of ftrace's.
        body: uint64[s], native address to which a jump in the slot leads: ftrace's nop.
    """

    function: I32
    native: Addrs
    clone: Addrs
    slot: Addrs
    body: Addrs


def make_entries(source: Source, layout: Layout, base: int) -> Entries:
    """The entries of a code cache at `base`."""
    instructions, slots = source.tables.instructions, layout.slots
    slot = slots.at.astype(np.uint64) + np.uint64(base)
    return Entries(
        function=instructions.function[slots.insn],
        native=instructions.addr[slots.insn],
        clone=slot + np.uint64(NEAR_BYTES),
        slot=slot,
        body=instructions.addr[slots.body],
    )


class Patched(IntEnum):
    """What the kernel rewrites while it runs."""

    JUMP_LABEL = 0
    STATIC_CALL = 1
    FTRACE = 2


@dataclass(frozen=True)
class Mirror:
    """Copies of what the kernel rewrites, ascending by native address.

    Attributes:
        native: uint64[p], where the kernel writes.
        length: uint8[p], how many bytes.
        clone: uint64[p], where the copy is.
        size: uint8[p], how many bytes it has.
        kind: uint8[p], `Patched`.
        target: uint64[p], where a jump label's jump leads in the clone, or natively if there it
            has no copy; 0 of the other kinds.
    """

    native: Addrs
    length: U8
    clone: Addrs
    size: U8
    kind: U8
    target: Addrs


def make_mirror(source: Source, scope: Scope, layout: Layout, base: int) -> Mirror:
    """The mirror of a code cache at `base`."""
    sites, shapes, start = source.sites, scope.shapes, np.uint64(base)
    instructions = source.tables.instructions
    found = []
    kinds = (sites.jump_labels, sites.static_calls, sites.ftrace)
    for kind, table in zip(Patched, kinds, strict=True):
        rows = source.index.rows(np.unique(table))
        rows = rows[rows >= 0]
        rows = rows[layout.size[rows] > 0]
        length = instructions.length[rows]
        if kind == Patched.STATIC_CALL:
            length = np.maximum(length, NEAR_BYTES)
        target = np.zeros(len(rows), np.uint64)
        if kind == Patched.JUMP_LABEL:
            branch = np.searchsorted(shapes.branch, rows)
            inside = targets_of(scope, layout)[branch]
            target = np.where(inside >= 0, inside.astype(np.uint64) + start, shapes.to[branch])
        found.append(
            Mirror(
                native=instructions.addr[rows],
                length=length.astype(np.uint8),
                clone=layout.copy[rows].astype(np.uint64) + start,
                size=layout.size[rows],
                kind=np.full(len(rows), kind, np.uint8),
                target=target,
            )
        )
    every = concat(found)
    return select(every, np.argsort(every.native, kind="stable"))


@dataclass(frozen=True)
class Rewritten:
    """Rows of one of the kernel's tables, for clones; ascending by address.

    Attributes:
        row: int32[r], row of the native table.
        addr: uint64[r], address in the clone.
        other: uint64[r], where an exception is fixed up, in the clone or natively; else 0.
    """

    row: I32
    addr: Addrs
    other: Addrs


def exceptions_of(source: Source, clones: CloneMap) -> Rewritten:
    """The exception table of the clones; `row` counts `source.sites.exceptions`."""
    sites = source.sites
    found = _rows_of(sites.exceptions, clones)
    fixup = sites.fixups[found.row]
    inside = clones.arrivals_of(fixup)
    return Rewritten(found.row, found.addr, np.where(inside, inside, fixup))


def bugs_of(source: Source, clones: CloneMap) -> Rewritten:
    """The bug table of the clones; `row` counts `source.sites.bugs`."""
    return _rows_of(source.sites.bugs, clones)


def _rows_of(table: Addrs, clones: CloneMap) -> Rewritten:
    addr = clones.clones_of(table)
    row = np.flatnonzero(addr)
    return Rewritten(row.astype(np.int32), addr[row], np.zeros(len(row), np.uint64))
