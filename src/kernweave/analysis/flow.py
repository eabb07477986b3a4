# SPDX-License-Identifier: GPL-2.0-or-later
"""Where control goes: stretches of code, what follows each, whom it calls.

A stretch is a block or a piece of one: it also ends at every call and behind every instruction
whose fault is fixed up, so that whatever leads elsewhere is its last instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.image.sites import Sites
from kernweave.x86.decode import Flow, Trait

I32 = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Addrs = npt.NDArray[np.uint64]


class Beyond(IntEnum):
    """Places outside the code at hand, as negative stretch numbers."""

    NOWHERE = -1  # control does not go there
    RETURN = -2  # to the caller
    C_FUNCTION = -3  # a function with an ftrace site
    UNKNOWN = -4  # anything: every register may be read
    UNKNOWN_REGS = -5  # the same, but the status flags are lost
    INDIRECT = -6  # the same, by an indirect or static call or jump of C code
    NEUTRAL = -7  # no call at all: nothing read, nothing written


CALLS = (Flow.CALL, Flow.INDIRECT_CALL)
_NO_FALL = (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE, Flow.INVALID)


@dataclass(frozen=True)
class FlowGraph:
    """Stretches in the order of the code's rows; a negative number is a `Beyond`.

    Attributes:
        first: int64[s], row of the first instruction of each.
        last: int64[s], row of the last.
        falls: int32[s], the stretch behind it.
        taken: int32[s], where its last instruction jumps, or `RETURN`; not for jump labels.  Of a
            call into the middle of its own part the target, too: it may be no call.
        other: int32[s], where a fault in it is fixed up, or where a jump label leads as a jump.
        callee: int32[s], stretch at which its call arrives; `NEUTRAL` if it calls nobody.
    """

    first: Rows
    last: Rows
    falls: I32
    taken: I32
    other: I32
    callee: I32

    def stretch_of(self, rows: Rows) -> Rows:
        """int64[m]: the stretch that holds each row."""
        return np.searchsorted(self.first, rows, side="right") - 1


def build_flow(code: Code, sites: Sites) -> FlowGraph:
    """Cut code into stretches and connect them."""
    first, last = _cut(code, sites)
    at_row = np.full(len(code.addr) + 1, Beyond.UNKNOWN, np.int32)  # the last for "no row"
    at_row[first] = np.arange(len(first))
    flow, addr, target = code.flow[last], code.addr[last], code.target[last]
    known = code.index.mark(sites.jump_labels)[last]
    # the kernel rewrites these: whatever is there now, it is a call or leaves the function
    rewritten = code.index.mark(sites.static_calls)[last]
    is_call = np.isin(flow, CALLS) | (rewritten & (flow == Flow.NEXT))
    behind = at_row[code.rows_at(addr + code.length[last].astype(np.uint64))]
    falls = np.where(~np.isin(flow, _NO_FALL) | known, behind, Beyond.NOWHERE)
    falls[code.index.mark(sites.fatal_bugs)[last]] = Beyond.NOWHERE
    taken = np.full(len(last), Beyond.NOWHERE, np.int32)
    jumps = np.isin(flow, (Flow.JUMP, Flow.BRANCH))
    taken[jumps] = _places(code, sites, at_row, target[jumps])
    taken[flow == Flow.RETURN] = Beyond.RETURN
    taken[np.isin(flow, (Flow.LEAVE, Flow.INVALID))] = Beyond.UNKNOWN
    taken[(flow == Flow.INDIRECT_JUMP) | (rewritten & ~is_call)] = Beyond.INDIRECT
    is_c = code.is_c[last]
    quiet = is_c & ~code.parts_with(Trait.POPF)[code.part[last]]
    branch = flow == Flow.BRANCH
    taken[(taken == Beyond.C_FUNCTION) & (~is_c | branch)] = Beyond.UNKNOWN
    taken[known] = Beyond.NOWHERE  # `other` has it
    taken[(taken == Beyond.INDIRECT) & (~quiet | branch)] = Beyond.UNKNOWN
    # a jump may lead to another part of this function, which may read the flags
    taken[(taken == Beyond.UNKNOWN) & quiet & ~jumps] = Beyond.UNKNOWN_REGS
    callee = np.full(len(last), Beyond.NEUTRAL, np.int32)
    callee[is_call] = Beyond.INDIRECT
    direct = (flow == Flow.CALL) & ~rewritten
    callee[direct] = _places(code, sites, at_row, target[direct])
    inner = _calls_inside(code, first, last, callee)
    taken[inner] = callee[inner]
    callee[is_call & np.isin(callee, (Beyond.RETURN, Beyond.NOWHERE))] = Beyond.UNKNOWN
    callee[(callee == Beyond.C_FUNCTION) & ~is_c] = Beyond.UNKNOWN
    callee[(callee == Beyond.INDIRECT) & ~quiet] = Beyond.UNKNOWN
    callee[(callee == Beyond.UNKNOWN) & quiet] = Beyond.UNKNOWN_REGS
    return FlowGraph(first, last, falls, taken, _others(code, sites, at_row, last), callee)


def _cut(code: Code, sites: Sites) -> tuple[Rows, Rows]:
    """First and last row of each stretch."""
    starts = code.leader.copy()
    starts[:1] = True
    ends = np.isin(code.flow, CALLS) | code.index.mark(sites.exceptions, sites.static_calls)
    starts[1:] |= ends[:-1]
    calls = code.rows_at(code.target[code.flow == Flow.CALL])
    starts[calls[calls >= 0]] = True
    first = np.flatnonzero(starts)
    return first, np.append(first[1:] - 1, len(code.addr) - 1)[: len(first)]


def _places(code: Code, sites: Sites, at_row: I32, target: Addrs) -> I32:
    """Where direct jumps or calls arrive."""
    found = at_row[code.rows_at(target)]
    outside = found < 0
    ftraced = np.isin(target, sites.ftrace) & outside
    found[ftraced] = Beyond.C_FUNCTION
    for start, end in (sites.thunks, *sites.static_text):
        found[(target >= np.uint64(start)) & (target < np.uint64(end))] = Beyond.INDIRECT
    found[np.isin(target, sites.return_thunks)] = Beyond.RETURN
    return found


def _calls_inside(code: Code, first: Rows, last: Rows, callee: I32) -> Mask:
    """bool[s]: calls into the middle of their own part.

    They may be there for their push alone (__FILL_RETURN_BUFFER): control then goes on from the
    target and never returns to the call.
    """
    row = first[np.maximum(callee, 0)]
    begins = np.ones(len(code.part), bool)
    begins[1:] = code.part[1:] != code.part[:-1]
    return np.asarray((callee >= 0) & (code.part[row] == code.part[last]) & ~begins[row])


def _others(code: Code, sites: Sites, at_row: I32, last: Rows) -> I32:
    other = np.full(len(last), Beyond.NOWHERE, np.int32)
    ends = np.full(len(code.addr) + 1, -1)
    ends[last] = np.arange(len(last))
    for keys, values in ((sites.exceptions, sites.fixups), (sites.jump_labels, sites.jump_targets)):
        stretch = ends[code.rows_at(keys)]
        inside = stretch >= 0
        other[stretch[inside]] = at_row[code.rows_at(values[inside])]
    return other
