# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be woven: whole functions with their `.cold` parts, and which of their blocks cannot.

A function is woven if it has an ftrace site, through which its callers are redirected, and no part
of it is denied.  A block that cannot be copied safely is a bail-out: its clone is a jump to the
native block.  Nobody can tell the difference there, as at every block boundary the clone's state is
the native one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kernweave.image.sites import contains
from kernweave.model.tables import EdgeKind
from kernweave.weave.branches import NEAR_BYTES, Form, Shapes, find_shapes
from kernweave.weave.source import U8, Mask, Rows, Source
from kernweave.x86.decode import Flow, Trait


class Why(IntEnum):
    """Why a function is not woven, or a block is a bail-out."""

    WOVEN = 0
    # functions
    NOT_ASKED = 1
    NO_ENTRY = 2  # no ftrace site at its entry: assembly, notrace
    DENIED = 3  # in a range in which nothing may be placed: noinstr, denylist, kprobes, own plans
    BUSY_FTRACE = 4  # ftrace uses its site
    SWAPGS = 5  # changes the gs base, which the counter needs
    ENTRY_BLOCK = 6  # its first block is a bail-out
    CHANGED = 7  # its text is not what was analysed
    # blocks
    NOT_KNOWN = 16  # bytes that no decoder knows, or a branch in a form no compiler writes
    NEAR = 17  # loop, jrcxz, xbegin: reaches 128 bytes, or means its own address
    LEAVES = 18  # iret, sysret: its frame names native addresses
    TRAP = 19  # int3 and int n: somebody looks for them by their address
    INSIDE_CALL = 20  # calls into its own function: fills the return predictor, or reads its ip
    SHADOW = 21  # sti, mov ss: the instruction behind it would be parted from it
    LINE = 22  # an indirect call that is safe by its address within the cache line only
    LOCK = 23  # its lock prefix may still be patched
    TABLE = 24  # a table of the kernel names a place inside an instruction
    ZEROPAD = 25  # fixed up only if its fix-up is right behind it: no counter may come between


@dataclass(frozen=True, slots=True)
class Rules:
    """What the kernel at hand asks for.

    Attributes:
        line_matters: indirect branches and returns are safe by their address within the cache
            line (ITS): they stay where they are, and clones jump there.
        locks_live: lock prefixes may still be patched (CPUs come and go).
    """

    line_matters: bool = False
    locks_live: bool = False


@dataclass(frozen=True)
class Scope:
    """What is woven.

    Attributes:
        function: uint8[f], `Why` each function is woven or not, its `.cold` parts alike.
        block: uint8[b], `Why` each block is cloned or not; of functions not woven, theirs.
        shapes: of all instructions.
    """

    function: U8
    block: U8
    shapes: Shapes

    @property
    def bail_outs(self) -> Mask:
        """bool[b]: blocks of woven functions that are not cloned."""
        return np.asarray(self.block >= Why.NOT_KNOWN)

    @property
    def woven(self) -> Mask:
        """bool[f]: functions and parts that are woven."""
        return np.asarray(self.function == Why.WOVEN)


def find_scope(source: Source, rules: Rules | None = None, asked: Mask | None = None) -> Scope:
    """What can be woven.

    Args:
        source: the image.
        rules: what the kernel at hand asks for.
        asked: bool[f], functions that are wanted; a `.cold` part goes with its function.  None:
            all of them.
    """
    rules = rules or Rules()
    shapes = find_shapes(source, rules.line_matters)
    tables = source.tables
    block = _bad_blocks(source, shapes, rules)
    function = _bad_functions(source, asked)
    function[_bad_entries(source, shapes, block, function)] = Why.ENTRY_BLOCK
    function = function[tables.functions.parent]
    outside = function[tables.blocks.function]
    return Scope(function, np.where(outside != Why.WOVEN, outside, block), shapes)


def native_blocks(source: Source, scope: Scope) -> Mask:
    """bool[b]: blocks of woven functions that may run natively: bail-outs, and what follows them.

    Control stays in native code until the function returns, so what is counted there is not all.
    """
    tables = source.tables
    found = scope.bail_outs.copy()
    home = tables.functions.parent[tables.blocks.function]
    left = np.zeros(len(tables.functions.addr), bool)
    left[home[found]] = True
    edges = tables.edges
    rows = np.flatnonzero((edges.target >= 0) & left[home[edges.source]])
    rows = rows[home[edges.target[rows]] == home[edges.source[rows]]]
    rows = rows[~np.isin(edges.kind[rows], (EdgeKind.CALL, EdgeKind.SIBLING))]
    while True:
        new = edges.target[rows[found[edges.source[rows]]]]
        if found[new].all():
            return found
        found[new] = True


def find_nops(source: Source, first: Rows) -> Rows:
    """int64[m]: rows of ftrace's nops, from the first rows of functions that have them."""
    instructions = source.tables.instructions
    endbr = (instructions.trait[first] & Trait.ENDBR) != 0  # in force or sealed
    return np.asarray(np.minimum(first + endbr, len(instructions.addr) - 1))


def _bad_entries(source: Source, shapes: Shapes, block: U8, function: U8) -> Rows:
    """Functions, woven up to now, whose entry cannot be: its block, or no slot fits there."""
    functions, instructions = source.tables.functions, source.tables.instructions
    homes = (function == Why.WOVEN) & (functions.parent == np.arange(len(function)))
    rows = np.flatnonzero(homes & (functions.first_insn >= 0))
    first = functions.first_insn[rows].astype(np.int64)
    nops = find_nops(source, first)
    bad = shapes.size[nops] != NEAR_BYTES
    for insn in (first, nops):
        bad |= block[instructions.block[insn]] != Why.WOVEN
    return np.asarray(rows[bad])


def _bad_functions(source: Source, asked: Mask | None) -> U8:
    """uint8[f], `Why`; holds for homes, with what their parts are guilty of."""
    functions, sites = source.tables.functions, source.sites
    parent, count = functions.parent, len(functions.addr)
    found = np.zeros(count, np.uint8)
    ends = functions.addr + np.maximum(functions.size, 1).astype(np.uint64)
    denied = np.zeros(count, bool)
    for ranges in sites.ranges:
        denied |= ranges.overlap(functions.addr, ends)
    behind = np.where(_begins_with(source, Trait.ENDBR), 4, 0).astype(np.uint64)
    ftrace = functions.addr + behind
    swaps = np.zeros(count, bool)
    instructions = source.tables.instructions
    swaps[instructions.function[(instructions.trait & Trait.SWAPGS) != 0]] = True
    homes = parent == np.arange(count)
    reasons = (
        (Why.CHANGED, source.changed),
        (Why.SWAPGS, swaps),
        (Why.BUSY_FTRACE, homes & contains(sites.ftrace_busy, ftrace)),
        (Why.DENIED, denied),
        (Why.NO_ENTRY, homes & ~(functions.is_c & contains(sites.ftrace, ftrace))),
        (Why.NOT_ASKED, homes & ~asked if asked is not None else np.zeros(count, bool)),
    )
    for why, guilty in reasons:  # the last one that fits is named
        found[parent[guilty]] = why
    return found


def _begins_with(source: Source, trait: Trait) -> Mask:
    """bool[f]: whether the first instruction of each function has a trait."""
    functions, instructions = source.tables.functions, source.tables.instructions
    row = np.maximum(functions.first_insn, 0)
    return np.asarray((functions.first_insn >= 0) & ((instructions.trait[row] & trait) != 0))


def _bad_blocks(source: Source, shapes: Shapes, rules: Rules) -> U8:
    """uint8[b], `Why`."""
    block = source.tables.instructions.block
    found = np.zeros(len(source.tables.blocks.addr), np.uint8)
    for why, rows in _bad_rows(source, shapes, rules):
        found[block[rows]] = why
    return _with_shadows(source, found)


def _bad_rows(source: Source, shapes: Shapes, rules: Rules) -> Iterator[tuple[Why, Rows]]:
    """Instructions that cannot be copied; the last reason of each is named."""
    instructions = source.tables.instructions
    flow, trait = instructions.flow, instructions.trait
    if rules.locks_live:
        yield Why.LOCK, np.flatnonzero(trait & Trait.LOCK)
    if rules.line_matters:
        yield Why.LINE, np.flatnonzero(flow == Flow.INDIRECT_CALL)
    yield Why.ZEROPAD, np.flatnonzero(source.mark(source.sites.zeropads))
    yield Why.TABLE, _named_inside(source)
    yield Why.INSIDE_CALL, _calls_inside(source)
    yield Why.TRAP, _traps(source)
    yield Why.LEAVES, np.flatnonzero(flow == Flow.LEAVE)
    yield Why.NOT_KNOWN, np.flatnonzero((flow == Flow.INVALID) | (shapes.form == Form.ODD))
    yield Why.NEAR, np.flatnonzero(trait & Trait.NEAR)


def _named_inside(source: Source) -> Rows:
    """Instructions that a table of the kernel names by another address than their first."""
    sites, addr = source.sites, source.tables.instructions.addr
    tables = (sites.exceptions, sites.bugs, sites.jump_labels, sites.static_calls, sites.ftrace)
    named = np.concatenate(tables)
    named = named[source.index.rows(named) < 0]
    row = np.searchsorted(addr, named, side="right") - 1
    inside = named < addr[row] + source.tables.instructions.length[row]
    return np.asarray(row[(row >= 0) & inside])


def _calls_inside(source: Source) -> Rows:
    """Calls that lead into their own function, but not to its start."""
    instructions, functions = source.tables.instructions, source.tables.functions
    rows = np.flatnonzero(instructions.flow == Flow.CALL)
    target = instructions.target[rows]
    there = np.maximum(np.searchsorted(functions.addr, target, side="right") - 1, 0)
    own = functions.parent[there] == functions.parent[instructions.function[rows]]
    inside = target > functions.addr[there]
    inside &= target < functions.addr[there] + functions.size[there]
    return np.asarray(rows[own & inside])


_UD1 = 0xB90F  # its opcode, little-endian


def _traps(source: Source) -> Rows:
    """Software interrupts; ud2 and ud1 are no such."""
    instructions = source.tables.instructions
    rows = np.flatnonzero(
        (instructions.flow == Flow.TRAP) & ((instructions.trait & Trait.UD2) == 0)
    )
    at = source.at[rows]
    ud1 = np.zeros(len(rows), bool)
    for prefixes in range(4):
        ud1 |= (source.signed_at(at + prefixes) & 0xFFFF) == _UD1
    return rows[~ud1]


def _with_shadows(source: Source, found: U8) -> U8:
    """Blocks that would part an instruction from its shadow bail out too."""
    instructions = source.tables.instructions
    rows = np.flatnonzero(instructions.trait & Trait.SHADOW)
    here = instructions.block[rows]
    row = np.minimum(rows + 1, len(instructions.addr) - 1)
    adjacent = instructions.addr[rows] + instructions.length[rows] == instructions.addr[row]
    adjacent &= instructions.function[row] == instructions.function[rows]
    there = instructions.block[row]
    while True:
        lost = (found[here] == Why.WOVEN) & (~adjacent | (found[there] != Why.WOVEN))
        if not lost.any():
            return found
        found[here[lost]] = Why.SHADOW
