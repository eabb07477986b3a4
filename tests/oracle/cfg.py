# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded transfers against the control-flow graph: by which edge, if any, each one went."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.kernel import KernelTables
from kernweave.image.sites import Sites
from kernweave.model.tables import EdgeKind
from kernweave.x86.decode import Flow

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NEVER = 127  # more arguments than any site passes
_CALLS = (Flow.CALL, Flow.INDIRECT_CALL)


class Way(IntEnum):
    """How a transfer is accounted for."""

    NONE = 0  # not in the graph: a disagreement
    # of an instruction that completed
    INSIDE = 1  # on to the next instruction of the block
    FALL = 2  # by an edge of that kind, the next four too
    TAKEN = 3
    LABEL = 4
    CALL = 5
    SIBLING = 6
    THUNK = 7  # from an indirect call or jump to its thunk
    INDIRECT = 8  # to a candidate, from a thunk or not
    RETURN = 9  # behind a call that was recorded and leads to the function that returns
    OPEN = 10  # behind an indirect call through text in no table, or before recording began
    FORK = 11  # the first step of a new task
    AGAIN = 12  # an instruction once more
    REWRITTEN = 13  # by what a site of the kernel's text held then
    UNLISTED = 14  # by or to text that is in no table
    # of exceptions and interrupts
    ENTER = 15  # from user mode to the entry of a gate or of system calls
    LEAVE = 16  # to user mode by an instruction that does that
    INTERRUPT = 17  # from the kernel to the entry of an interrupt
    FAULT = 18  # to that of an exception, by an instruction that may cause it
    BACK = 19  # to what was interrupted, or one transfer on
    FIXUP = 20  # by an edge of that kind
    SERIALIZE = 21  # from an iretq to what lies behind it


@dataclass(frozen=True)
class Pairs:
    """Transfers by address: uint64[n] each."""

    from_: U64
    to: U64


class Cfg:
    """Tables of a kernel and its kmods, found by address."""

    def __init__(self, tables: KernelTables, sites: Sites, looked_up: Collection[str] = ()) -> None:
        """Index tables.

        Args:
            tables: of the kernel and its kmods.
            sites: what the kernel rewrites.
            looked_up: functions that a kmod finds by name while it runs.
        """
        self.tables = tables
        self._looked_up = set(looked_up)
        self.sites = sites
        self.insns, self.blocks = tables.instructions, tables.blocks
        self.functions, self.edges = tables.functions, tables.edges
        self._order = np.argsort(self.insns.addr, kind="stable")
        self._addr = self.insns.addr[self._order]
        self._function_order = np.argsort(self.functions.addr, kind="stable")
        self._keys = {kind: self._edge_keys(kind) for kind in EdgeKind}

    def _edge_keys(self, kind: EdgeKind) -> Rows:
        chosen = self.edges.kind == kind
        target = self.edges.target[chosen].astype(np.int64)
        return np.sort(self.edges.insn[chosen].astype(np.int64) << 32 | target & 0xFFFF_FFFF)

    def rows(self, addrs: U64) -> Rows:
        """int64[m]: the instruction at each address, -1 if none begins there."""
        at = np.minimum(np.searchsorted(self._addr, addrs), len(self._addr) - 1)
        return np.where(self._addr[at] == addrs, self._order[at], -1)

    def block_at(self, addrs: U64) -> Rows:
        """int64[m]: the block that begins at each address, -1 if none does."""
        row = self.rows(addrs)
        block = self.insns.block[row].astype(np.int64)
        return np.where((row >= 0) & (self.blocks.addr[block] == addrs), block, -1)

    def function_at(self, addrs: U64) -> Rows:
        """int64[m]: the function that begins at each address, -1 if none does."""
        ordered = self.functions.addr[self._function_order]
        at = np.minimum(np.searchsorted(ordered, addrs), len(ordered) - 1)
        return np.where(ordered[at] == addrs, self._function_order[at], -1)

    def owner(self, insns: Rows) -> Rows:
        """int64[m]: the function, `.cold` parts counted as their parents, of instructions."""
        return self.functions.parent[self.insns.function[insns]].astype(np.int64)

    def has(self, kind: EdgeKind, insn: Rows, block: Rows) -> Mask:
        """bool[m]: whether there is an edge by each instruction to each block."""
        wanted = insn << 32 | block & 0xFFFF_FFFF
        keys = self._keys[kind]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.asarray((insn >= 0) & (block >= 0) & (keys[at] == wanted))

    @cached_property
    def returns(self) -> Mask:
        """bool[n]: instructions with a RETURN edge."""
        found = np.zeros(len(self.insns.addr), bool)
        found[self.edges.insn[self.edges.kind == EdgeKind.RETURN]] = True
        return found

    @cached_property
    def passes(self) -> I8:
        """int8[n]: arguments that each indirect call or jump may pass, -1 of all others."""
        found = np.full(len(self.insns.addr), -1, np.int8)
        chosen = self.edges.kind == EdgeKind.INDIRECT
        found[self.edges.insn[chosen]] = self.edges.arguments[chosen]
        return found

    @cached_property
    def needs(self) -> I8:
        """int8[f]: arguments that an indirect call must pass to lead to each function.

        A function whose address is taken by nothing but init text, which is gone, looks as if it
        were not; but if nothing leads to it directly there is no other way.  What a kmod looks
        up by name is a word of that kmod's data, which the tables know nothing of.
        """
        edges, function = self.edges, self.blocks.function
        chosen = np.isin(edges.kind, (EdgeKind.CALL, EdgeKind.SIBLING)) & (edges.target >= 0)
        direct = np.zeros(len(self.functions.addr), bool)
        direct[function[edges.target[chosen]]] = True
        looked_up = np.array([name in self._looked_up for name in self.tables.names], bool)
        may_be = self.functions.address_taken | ~direct | looked_up
        return np.where(may_be, self.functions.arguments, NEVER).astype(np.int8)

    def in_thunk(self, addrs: U64) -> Mask:
        """bool[m]: addresses in the thunks of indirect calls and jumps."""
        start, end = (np.uint64(edge) for edge in self.sites.thunks)
        return np.asarray((addrs >= start) & (addrs < end))

    def is_call(self, insns: Rows) -> Mask:
        """bool[m]: calls."""
        return np.asarray((insns >= 0) & np.isin(self.insns.flow[insns], _CALLS))

    def before(self, addrs: U64) -> Rows:
        """int64[m]: the instruction that ends where the one at each address begins, -1 if none."""
        at = np.searchsorted(self._addr, addrs) - 1
        row = self._order[np.maximum(at, 0)]
        ends = self.insns.addr[row] + self.insns.length[row].astype(np.uint64)
        return np.where((at >= 0) & (ends == addrs), row, -1)

    def comes_back(self, call: Rows, to: Rows) -> Mask:
        """bool[m]: whether control may go on at instruction `to` when a call returns."""
        block = self.insns.block
        known = (call >= 0) & (to >= 0)
        begins = self.blocks.first_insn[block[to]] == to
        falls = self.has(EdgeKind.FALL, call, block[to].astype(np.int64)) & begins
        return np.asarray(known & self.is_call(call) & (falls | (block[call] == block[to])))

    def name(self, addr: int) -> str:
        """An address as `function+0xoff`."""
        at = int(np.searchsorted(self.functions.addr[self._function_order], addr, "right")) - 1
        row = int(self._function_order[max(at, 0)])
        off = addr - int(self.functions.addr[row])
        inside = at >= 0 and 0 <= off < int(self.functions.size[row])
        return f"{self.tables.names[row]}+{off:#x}" if inside else f"{addr:#x}"


_EDGES = {
    Way.FALL: EdgeKind.FALL, Way.TAKEN: EdgeKind.TAKEN, Way.LABEL: EdgeKind.LABEL,
    Way.CALL: EdgeKind.CALL, Way.SIBLING: EdgeKind.SIBLING,
}  # fmt: skip


def direct_ways(cfg: Cfg, pairs: Pairs) -> U8:
    """uint8[n]: the `Way` of each pair that needs no more than the graph; returns are left out."""
    one, other = cfg.rows(pairs.from_), cfg.rows(pairs.to)
    block = cfg.block_at(pairs.to)
    found = np.zeros(len(one), np.uint8)
    for way, kind in _EDGES.items():
        found[(found == 0) & cfg.has(kind, one, block)] = way
    known = (one >= 0) & (other >= 0)
    behind = pairs.from_ + cfg.insns.length[one].astype(np.uint64)
    inside = known & (pairs.to == behind) & (cfg.insns.block[one] == cfg.insns.block[other])
    goes_on = cfg.insns.flow[one] == Flow.NEXT
    found[(found == 0) & inside & goes_on] = Way.INSIDE
    passed = np.where(one >= 0, cfg.passes[one], -1)
    thunk = cfg.in_thunk(pairs.to) & (cfg.insns.target[one] == pairs.to)
    found[(found == 0) & (passed >= 0) & thunk] = Way.THUNK
    entered = cfg.function_at(pairs.to)
    fits = (passed >= 0) & (entered >= 0) & (cfg.needs[entered] <= passed)
    found[(found == 0) & fits] = Way.INDIRECT
    return found
