# SPDX-License-Identifier: GPL-2.0-or-later
"""Where everything goes in the code cache: sizes of all instructions' pieces, and their sums.

The pieces of one instruction, in this order; most are empty:

    counter    before the copy
    copy       of the instruction; of a bail-out's first one `jmp native` instead
    counter    behind the copy: of the edge to what follows
    tail       what keeps control from running on where the native code does not: int3 where there
               is int3, `jmp native` where anything else follows

The copy of ftrace's nop, at a function's start or behind its endbr64, is the entry slot: a nop,
later `jmp native`.  What is counted before that nop is counted right behind the slot, so who finds
it closed is not counted; the native entry leads there, as its jump is in the native nop's place.

Behind the last instruction of a part are its stubs, a counter and a jump for each branch whose
taken edge is counted, and int3 up to the next part, which begins at a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import InternalError
from kernweave.weave.branches import NEAR_BYTES, Form, is_in
from kernweave.weave.counters import Counters, Place
from kernweave.weave.scope import Scope, Why, find_nops
from kernweave.weave.source import I32, U8, Mask, Rows, Source, live_before
from kernweave.x86.counter import Snippet, counter_kinds
from kernweave.x86.decode import Flow
from kernweave.x86.poison import poisoned_counter

ALIGN = 16
_INT3 = 0xCC
_MOST_BYTES = 1 << 30
_EVERYTHING = np.uint32(0xFFFF_FFFF)
_NO_FALL = (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE, Flow.INVALID)


@dataclass(frozen=True)
class Slots:
    """Entry slots, one per woven function, ascending.

    Attributes:
        insn: int64[s], row of the function's first instruction.
        at: int32[s], byte position of the slot: the copy of ftrace's nop.
        body: int64[s], row of that nop, to which a closed slot leads.
    """

    insn: Rows
    at: I32
    body: Rows


@dataclass(frozen=True)
class Snippets:
    """The counters' code.

    Attributes:
        kind: integer[c], which of `kinds` each counter is.
        kinds: all there are.
        at: int32[c], byte position of each.
        stub: bool[c], whether a jump of five bytes follows it.
    """

    kind: npt.NDArray[np.integer[Any]]
    kinds: tuple[Snippet, ...]
    at: I32
    stub: Mask

    @property
    def stub_jump(self) -> I32:
        """int32[stubs]: byte position of the jump behind each stub's counter."""
        lengths = np.array([len(snippet.code) for snippet in self.kinds], np.int32)
        return np.asarray((self.at + lengths[self.kind])[self.stub])


@dataclass(frozen=True)
class Layout:
    """The code cache, before its address is known; byte positions count from its start.

    Attributes:
        start: int32[n], where control arrives that goes to an instruction; -1 if that is not here.
        copy: int32[n], where the instruction's copy begins.
        size: uint8[n], bytes of the copy, 0 if there is none.
        bail: int64[k], rows of the first instructions of bail-outs; in place of a copy is a jump.
        slots: the entry slots.
        snippets: the counters' code, in the order of the counters.
        counters: what is counted.
        tails: (int64[t], int32[t]): rows with a jump to the native instruction behind them, and
            byte position of the jump.
        total: bytes of it all.
    """

    start: I32
    copy: I32
    size: U8
    bail: Rows
    slots: Slots
    snippets: Snippets
    counters: Counters
    tails: tuple[Rows, I32]
    total: int


def lay_out(source: Source, scope: Scope, counters: Counters) -> Layout:
    """Measure everything.

    Args:
        source: the image.
        scope: what is woven.
        counters: what is counted.
    """
    size, bail = _copies(source, scope)
    first, nops = _entries(source, scope)
    int3, jumps = _tails(source, scope, size)
    kind, kinds = _choose(source, scope, counters)
    lengths = np.array([len(snippet.code) for snippet in kinds], np.int32)[kind]
    room = size.astype(np.int32)
    room[bail] = NEAR_BYTES
    here = room > 0
    room[int3] += 1
    room[jumps] += NEAR_BYTES
    _add_counters(room, counters, lengths)
    tail_end = room[jumps]
    stubs = counters.place == Place.TAKEN
    stub_at, last = _add_stubs(source, scope, room, counters.insn[stubs], lengths[stubs])
    start, total = _sum(room)
    copy = start.copy()
    at = _place(counters, lengths, copy, size, nops)
    at[stubs] = start[last] + stub_at
    tails = (jumps, start[jumps] + tail_end - np.int32(NEAR_BYTES))
    start[~here] = -1
    return Layout(
        start=start,
        copy=copy,
        size=size,
        bail=bail,
        slots=Slots(first, copy[nops], nops),
        snippets=Snippets(kind, kinds, at, stubs),
        counters=counters,
        tails=tails,
        total=total,
    )


def _sum(room: I32) -> tuple[I32, int]:
    """Where each instruction's pieces begin, and the bytes of all of them."""
    end = np.cumsum(room, dtype=np.int64)
    total = int(end[-1]) if len(end) else 0
    if total >= _MOST_BYTES:
        raise InternalError(f"{total} bytes of clones are more than a jump reaches")
    return end.astype(np.int32) - room, total


def _copies(source: Source, scope: Scope) -> tuple[U8, Rows]:
    """Bytes of every copy, 0 where there is none, and the rows that begin bail-outs."""
    why = scope.block[source.tables.instructions.block]
    size = np.where(why == Why.WOVEN, scope.shapes.size, np.uint8(0))
    bail = source.tables.blocks.first_insn[scope.bail_outs].astype(np.int64)
    return size, bail


def _entries(source: Source, scope: Scope) -> tuple[Rows, Rows]:
    """First row of each woven function, and the row of its ftrace site."""
    functions = source.tables.functions
    homes = scope.woven & (functions.parent == np.arange(len(functions.addr)))
    first = functions.first_insn[homes].astype(np.int64)
    return first, find_nops(source, first)


def _bounds(source: Source, scope: Scope) -> tuple[Rows, Rows]:
    """First and last row of each woven part."""
    functions = source.tables.functions
    chosen = scope.woven & (functions.first_insn >= 0)
    first = functions.first_insn[chosen].astype(np.int64)
    return first, first + functions.insns[chosen] - 1


def _tails(source: Source, scope: Scope, size: U8) -> tuple[Rows, Rows]:
    """Copies behind which int3 follows, and those behind which a jump to native code does.

    Natively something else follows them than in the clone: filler, or another function.
    """
    instructions, form = source.tables.instructions, scope.shapes.form
    parted = np.ones(len(size), bool)
    end = source.at + instructions.length
    parted[:-1] = (end[:-1] != source.at[1:]) | (
        instructions.function[:-1] != instructions.function[1:]
    )
    rows = np.flatnonzero(parted & (size > 0))
    static = scope.shapes.static[rows]
    end = source.at[rows] + np.where(static, size[rows], instructions.length[rows])
    int3 = source.text[end] == _INT3
    falls = ~np.isin(instructions.flow[rows], _NO_FALL) | is_in(
        form[rows], Form.LABEL_ON, Form.LABEL_OFF
    )
    return rows[int3], rows[~int3 & falls]


def _choose(
    source: Source, scope: Scope, counters: Counters
) -> tuple[npt.NDArray[np.integer[Any]], tuple[Snippet, ...]]:
    """The counter's code for each place: what is dead there it need not save."""
    live = live_at(source, scope, counters)
    if not counters.clobber.any():
        return counter_kinds(live)
    both = (~live).astype(np.uint64) << np.uint64(32) | counters.clobber
    kinds, kind = np.unique(both, return_inverse=True)
    snippets = tuple(poisoned_counter(one >> 32, one & 0xFFFF_FFFF) for one in kinds.tolist())
    return kind, snippets


def live_at(source: Source, scope: Scope, counters: Counters) -> npt.NDArray[np.uint32]:
    """uint32[c]: masks of the registers and flags that each counter must not change."""
    live = np.full(len(counters.insn), _EVERYTHING, np.uint32)
    insn = counters.insn.astype(np.int64)
    row = insn.copy()
    behind = np.flatnonzero(counters.place == Place.BEHIND)
    row[behind] = source.index.rows(_ends(source, insn[behind]))
    taken = np.flatnonzero(counters.place == Place.TAKEN)
    row[taken] = scope.shapes.target[np.searchsorted(scope.shapes.branch, insn[taken])]
    known = np.flatnonzero(row >= 0)
    live[known] = live_before(source, row[known])
    return live


def _ends(source: Source, rows: Rows) -> npt.NDArray[np.uint64]:
    instructions = source.tables.instructions
    return np.asarray(instructions.addr[rows] + instructions.length[rows].astype(np.uint64))


def _add_counters(room: I32, counters: Counters, lengths: I32) -> None:
    """Make room for counters before and behind copies."""
    for place in (Place.BEFORE, Place.BEHIND):  # of each, an instruction has at most one
        chosen = counters.place == place
        room[counters.insn[chosen]] += lengths[chosen]


def _add_stubs(
    source: Source, scope: Scope, room: I32, insn: I32, lengths: I32
) -> tuple[I32, Rows]:
    """Make room for stubs and for the filler behind parts.

    Args:
        source: the image.
        scope: what is woven.
        room: int32[n], bytes of each instruction's pieces; the stubs of a part and the filler are
            added to its last instruction.
        insn: int32[s], ascending: rows whose branches have stubs.
        lengths: int32[s], bytes of their counters.

    Returns:
        int32[s] and int64[s]: where each stub begins, from the start of the last row of its part;
        and that row.
    """
    first, last = _bounds(source, scope)
    if not len(first):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    own, sizes = room[last], lengths + np.int32(NEAR_BYTES)
    part = np.searchsorted(last, insn)
    ends = np.append(np.int32(0), np.cumsum(sizes, dtype=np.int32))
    at = own[part] + ends[:-1] - ends[np.searchsorted(part, part)]
    room[last] += np.bincount(part, sizes, len(last)).astype(np.int32)
    room[last] += -np.add.reduceat(room, first) % ALIGN
    return np.asarray(at, np.int32), last[part]


def _place(counters: Counters, lengths: I32, copy: I32, size: U8, nops: Rows) -> I32:
    """Byte positions of counters before and behind copies; copies but slots move behind the former.

    Args:
        counters: all of them; positions of those in stubs come out 0.
        lengths: int32[c], their bytes.
        copy: int32[n], where each copy begins, but for the counter before it; changed.
        size: uint8[n], bytes of each copy.
        nops: int64[s], rows whose copies are slots.
    """
    at = np.zeros(len(counters.insn), np.int32)
    is_slot = np.zeros(len(copy), bool)
    is_slot[nops] = True
    before, behind = counters.place == Place.BEFORE, counters.place == Place.BEHIND
    entry = before & is_slot[counters.insn]
    before &= ~entry
    at[before] = copy[counters.insn[before]]
    copy[counters.insn[before]] += lengths[before]
    end = copy + size
    at[entry] = end[counters.insn[entry]]
    end[counters.insn[entry]] += lengths[entry]
    at[behind] = end[counters.insn[behind]]
    return at
