# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole images as tables: functions, blocks, instructions, edges, and what is live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code, Part, arrange, build_code
from kernweave.analysis.edges import find_edges
from kernweave.analysis.liveness import Closed, Liveness, effects, solve_liveness, walk_back
from kernweave.analysis.normal import Print, make_print
from kernweave.errors import Reason
from kernweave.image.sites import Sites, contains
from kernweave.model.table import Column, columns, concat
from kernweave.model.tables import Blocks, EdgeKind, Edges, Functions, Instructions
from kernweave.x86.decode import Flow, decode

Addrs = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stretches:
    """What liveness at any instruction is found from.

    Attributes:
        addr: uint64[s], first instruction of each, ascending within an image.
        last: uint64[s], its last instruction.
        after: uint32[s], mask of what is live behind it, before its call.
    """

    addr: Addrs
    last: Addrs
    after: U32


@dataclass(frozen=True)
class Landings:
    """Where control may arrive otherwise than from the instruction before.

    Attributes:
        addr: uint64[l], instructions that a jump, a call, a fix-up or a stored address may lead
            to, ascending within an image.
    """

    addr: Addrs


@dataclass(frozen=True)
class KernelTables:
    """Tables of one or several images.

    Attributes:
        names: of each function, as printed in points.
        functions: one row each.
        instructions: one row each.
        blocks: one row each.
        edges: one row each.
        stretches: one row each.
        landings: one row each.
    """

    names: tuple[str, ...]
    functions: Functions
    instructions: Instructions
    blocks: Blocks
    edges: Edges
    stretches: Stretches
    landings: Landings


@dataclass(frozen=True)
class Stored:
    """What was found for one text.

    Attributes:
        base: run-time address of the text when it was analysed.
        tables: at that address.
        print: the text.
    """

    base: int
    tables: KernelTables
    print: Print


@dataclass(frozen=True)
class Hints:
    """What is known of functions from elsewhere than their code.

    Attributes:
        taken: uint64[t], words that may be addresses of functions, ascending.
        arguments: registers a function's prototype needs for arguments, by its symbol.
        exported: uint64[x], functions that kmods may call, ascending; None: any.
        local: addresses of functions that are known in their own file only.
    """

    taken: Addrs
    arguments: Mapping[str, int]
    exported: Addrs | None = None
    local: frozenset[int] = frozenset()


def analyse(parts: Sequence[Part], sites: Sites, hints: Hints) -> KernelTables:
    """Decode parts and find their blocks, edges and liveness.

    Args:
        parts: ascending by address.
        sites: the kernel's tables about its text.
        hints: what is known of functions from elsewhere.
    """
    code = build_code(parts, sites)
    return tables_of(code, solve_liveness(code, sites), hints)


def analyse_text(
    parts: Sequence[Part], sites: Sites, hints: Hints, text: bytes, base: int
) -> Stored:
    """The same for all parts of one text, with what tells it from others.

    Args:
        parts: ascending by address.
        sites: the kernel's tables about its text.
        hints: what is known of functions from elsewhere.
        text: native bytes of all parts and what is between them.
        base: run-time address of the first byte.
    """
    decoded = decode((part.start, part.code) for part in parts)
    known = make_print(text, base, decoded, sites)
    code = arrange(parts, decoded, sites)
    del decoded
    liveness = solve_liveness(code, sites, closed_parts(code, sites, hints))
    return Stored(base, tables_of(code, liveness, hints), known)


def closed_parts(code: Code, sites: Sites, hints: Hints) -> npt.NDArray[np.uint8] | None:
    """uint8[parts], `Closed`: parts whose callers are in the code, or call by the convention.

    Not so for what kmods may call, from inline assembly too.  What is called through its address
    is called by the convention if it is surely C: no other file knows its name, and yet BTF has a
    prototype of it, so its own file is C.  (Static calls, for instance, also reach assembly that
    keeps every register.)  Text without instrumentation is left out: paravirt calls some of it
    by a convention of its own.
    """
    if hints.exported is None:
        return None
    addr = np.array([part.start for part in code.parts], np.uint64)
    ends = np.array([max(part.end, part.start + 1) for part in code.parts], np.uint64)
    taken = contains(hints.taken, addr) | contains(np.sort(code.operands), addr)
    is_c = np.array(
        [part.start in hints.local and part.symbol in hints.arguments for part in code.parts], bool
    )
    for ranges in sites.ranges:
        if ranges.reason is Reason.NOINSTR:
            is_c &= ~ranges.overlap(addr, ends)
    callers = np.where(taken, Closed.OPEN, Closed.INSIDE)
    callers[taken & is_c] = Closed.CONVENTION
    callers[contains(hints.exported, addr)] = Closed.OPEN
    return callers.astype(np.uint8)


def tables_of(code: Code, liveness: Liveness, hints: Hints) -> KernelTables:
    """Put what was found into tables."""
    graph = liveness.graph
    leader = code.leader.copy()
    leader[_behind_noreturn(code, liveness)] = True
    block = (np.cumsum(leader) - 1).astype(np.int32)
    first = np.flatnonzero(leader)
    blocks = Blocks(
        addr=code.addr[first],
        size=_ends(code, first) - code.addr[first].astype(np.uint32),
        function=code.part[first],
        first_insn=first.astype(np.int32),
        insns=np.diff(np.append(first, len(leader))).astype(np.int32),
        live=liveness.at[graph.stretch_of(first)],
    )
    instructions = Instructions(
        addr=code.addr,
        length=code.length,
        flow=code.flow,
        trait=code.trait,
        reads=code.reads,
        writes=code.writes,
        target=code.target,
        function=code.part,
        block=block,
    )
    edges = find_edges(code, liveness, block)
    return KernelTables(
        names=tuple(part.name for part in code.parts),
        functions=_functions(code, liveness, block, _taken(code, hints, blocks, edges), hints),
        instructions=instructions,
        blocks=blocks,
        edges=edges,
        stretches=Stretches(code.addr[graph.first], code.addr[graph.last], liveness.after),
        landings=Landings(code.addr[landings_of(code, hints.taken)]),
    )


def landings_of(code: Code, taken: Addrs) -> Mask:
    """bool[n]: where control may arrive otherwise than from the instruction before.

    Args:
        code: all that may lead there.
        taken: words of data that may be addresses of instructions.
    """
    calls = code.target[code.flow == Flow.CALL]
    return np.asarray(code.landing | code.index.mark(calls, taken))


def _taken(code: Code, hints: Hints, blocks: Blocks, edges: Edges) -> Mask:
    """bool[parts]: functions whose address is known to be taken, or must be.

    It must be if nothing calls the function or jumps there: init text, gone by now, may have
    stored the address where nobody looks.
    """
    addr = np.array([part.start for part in code.parts], np.uint64)
    reached = np.array([part.start != part.group for part in code.parts], bool)
    direct = np.isin(edges.kind, (EdgeKind.CALL, EdgeKind.SIBLING)) & (edges.target >= 0)
    reached[blocks.function[edges.target[direct]]] = True
    return np.asarray(
        contains(hints.taken, addr) | contains(np.sort(code.operands), addr) | ~reached
    )


def _ends(code: Code, first: Rows) -> U32:
    last = np.append(first[1:], len(code.addr)) - 1
    return np.asarray(code.addr[last] + code.length[last].astype(np.uint64), np.uint64).astype(
        np.uint32
    )


def _behind_noreturn(code: Code, liveness: Liveness) -> Rows:
    """Rows behind calls that do not come back, in the same part."""
    graph = liveness.graph
    inside = graph.callee >= 0
    ends = np.zeros(len(graph.callee), bool)
    ends[inside] = ~liveness.returns[graph.callee[inside]]
    rows = graph.last[ends] + 1
    rows = rows[rows < len(code.addr)]
    return np.asarray(rows[code.part[rows] == code.part[rows - 1]])


def _functions(
    code: Code, liveness: Liveness, block: npt.NDArray[np.int32], taken: Mask, hints: Hints
) -> Functions:
    parts = code.parts
    numbers = np.arange(len(parts))
    first = np.searchsorted(code.part, numbers)
    end = np.searchsorted(code.part, numbers, side="right")
    empty = first == end
    row = np.minimum(first, max(len(code.addr) - 1, 0))
    last = np.maximum(end - 1, 0)
    addr = np.array([part.start for part in parts], np.uint64)
    place = {part.start: number for number, part in enumerate(parts)}
    entry = liveness.graph.stretch_of(row)
    return Functions(
        addr=addr,
        size=np.array([part.end - part.start for part in parts], np.uint32),
        kmod=np.zeros(len(parts), np.int16),
        parent=np.array([place.get(p.group, i) for i, p in enumerate(parts)], np.int32),
        first_insn=np.where(empty, -1, first).astype(np.int32),
        insns=(end - first).astype(np.int32),
        first_block=np.where(empty, -1, block[row]).astype(np.int32),
        blocks=np.where(empty, 0, block[last] - block[row] + 1).astype(np.int32),
        is_c=np.array([part.is_c for part in parts], bool),
        returns=liveness.returns[entry] | empty,
        address_taken=taken,
        arguments=np.array([hints.arguments.get(p.symbol, -1) for p in parts], np.int8),
    )


def live_before(code: Code, sites: Sites, known: Stretches) -> tuple[U32, Mask]:
    """Liveness of some functions from that of the whole kernel.

    Args:
        code: the functions, decoded from native text.
        sites: the kernel's tables.
        known: of the whole kernel, ascending by address.

    Returns:
        uint32[n] masks of what is live before each instruction, and bool[n]: which of them are
        known at all; the others' masks are full.
    """
    rows = np.arange(len(code.addr))
    stretch = np.searchsorted(known.addr, code.addr, side="right") - 1
    safe = np.maximum(stretch, 0)
    last = code.rows_at(known.last[safe])
    found = (stretch >= 0) & (last >= rows)
    found &= code.addr[np.maximum(last, 0)] - code.addr == (
        _distance(code)[np.maximum(last, 0)] - _distance(code)
    ).astype(np.uint64)
    live = np.full(len(rows), 0xFFFF_FFFF, np.uint32)
    reads, writes = effects(code, sites)
    live[found] = walk_back((reads, writes), known.after[safe[found]], last[found], rows[found])
    return live, found


def _distance(code: Code) -> Rows:
    """Bytes of instructions before each row: the difference of two rows that nothing parts."""
    return np.cumsum(code.length, dtype=np.int64) - code.length


def join(tables: Sequence[KernelTables]) -> KernelTables:
    """Tables of several images in one, rows renumbered."""
    shifts = {"function": 0, "block": 0, "insn": 0}
    moved = []
    for image, one in enumerate(tables):
        moved.append(_shift(one, shifts, image))
        shifts["function"] += len(one.functions.addr)
        shifts["block"] += len(one.blocks.addr)
        shifts["insn"] += len(one.instructions.addr)
    return KernelTables(
        tuple(name for one in moved for name in one.names),
        concat([one.functions for one in moved]),
        concat([one.instructions for one in moved]),
        concat([one.blocks for one in moved]),
        concat([one.edges for one in moved]),
        concat([one.stretches for one in moved]),
        concat([one.landings for one in moved]),
    )


#: what the row numbers in a column count
_COUNTS = {
    "parent": "function", "function": "function", "first_insn": "insn", "insn": "insn",
    "first_block": "block", "block": "block", "source": "block", "target": "block",
}  # fmt: skip


def _shift(one: KernelTables, shifts: dict[str, int], image: int) -> KernelTables:
    def moved(table: Functions | Instructions | Blocks | Edges) -> dict[str, Column]:
        found = columns(table)
        for name, column in found.items():
            if name in _COUNTS and column.dtype == np.int32:
                by = np.int32(shifts[_COUNTS[name]])
                found[name] = np.where(column < 0, column, column + by)
        return found

    kmod = np.full(len(one.names), image, np.int16)
    functions = Functions(**{**moved(one.functions), "kmod": kmod})
    return KernelTables(
        one.names,
        functions,
        Instructions(**moved(one.instructions)),
        Blocks(**moved(one.blocks)),
        Edges(**moved(one.edges)),
        one.stretches,
        one.landings,
    )
