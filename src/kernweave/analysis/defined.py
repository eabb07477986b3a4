# SPDX-License-Identifier: GPL-2.0-or-later
"""Which registers may hold a value at all, by the calling convention.

A C function is entered with nothing in r10 and r11, and a call of one leaves nothing in what it
need not keep but for its result.  An indirect or static call may define every register but these
two; any other call every register.  Outside C functions everything is taken to hold a value.  So
are the status flags.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.convention import KEPT, RESULTS, TEMPORARY
from kernweave.analysis.flow import Beyond, FlowGraph
from kernweave.image.sites import Sites
from kernweave.x86.decode import ALL_MASK, FLAGS_MASK, Flow

U32 = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def solve_defined(code: Code, sites: Sites, graph: FlowGraph, to_c: Mask) -> U32:
    """uint32[s]: what may hold a value behind each stretch, before its call.

    Args:
        code: the instructions.
        sites: the kernel's tables.
        graph: stretches of `code`.
        to_c: bool[s], which stretches end in a call from C of a C function.
    """
    if not len(graph.first):
        return np.zeros(0, np.uint32)
    entries = code.index.mark(sites.ftrace)
    touches = np.where(entries, 0, code.reads | code.writes) | np.uint32(FLAGS_MASK)
    add = np.bitwise_or.reduceat(touches.astype(np.uint32), graph.first)
    cut = np.zeros(len(add), np.uint32)
    cut[graph.stretch_of(np.flatnonzero(entries))] = TEMPORARY
    calls = (graph.callee != Beyond.NEUTRAL) & ~to_c
    soft = calls & (graph.callee == Beyond.INDIRECT)
    keep = np.where(to_c, KEPT | FLAGS_MASK, ALL_MASK).astype(np.uint32)
    result = np.select([to_c, soft, calls], [RESULTS, ALL_MASK & ~TEMPORARY, ALL_MASK])
    result = result.astype(np.uint32)

    def leave(rows: Rows, at: U32) -> U32:
        return np.asarray((((at & ~cut[rows]) | add[rows]) & keep[rows]) | result[rows])

    at = _spread(graph, leave, _at_first(code, graph))
    return np.asarray((at & ~cut) | add)


def _at_first(code: Code, graph: FlowGraph) -> U32:
    """Everything where control may come from anywhere, nothing elsewhere.

    What follows a call that does not come back looks reached, but may only be by a jump table.
    """
    reached = np.zeros(len(graph.first) + 1, bool)
    for column in (graph.falls, graph.taken, graph.other):
        reached[np.maximum(column, -1)] = True
    known = reached[:-1] & code.is_c[graph.first] & ~_is_entry(code, graph)
    known &= ~_may_hold_tables(code)[graph.first]
    return np.where(known, FLAGS_MASK, ALL_MASK).astype(np.uint32)


def _may_hold_tables(code: Code) -> Mask:
    """bool[n]: instructions of functions with indirect jumps, which may lead anywhere in them."""
    groups = np.array([part.group for part in code.parts], np.uint64)
    jumps = groups[np.unique(code.part[code.flow == Flow.INDIRECT_JUMP])]
    return np.asarray(np.isin(groups, jumps)[code.part])


def _is_entry(code: Code, graph: FlowGraph) -> Mask:
    """Whether calls may arrive at a stretch."""
    found = np.zeros(len(graph.first) + 1, bool)
    found[np.maximum(graph.callee, -1)] = True
    entries = code.index.rows(np.array([part.start for part in code.parts], np.uint64))
    found[graph.stretch_of(entries[entries >= 0])] = True
    return found[:-1]


def _spread(graph: FlowGraph, leave: Callable[[Rows, U32], U32], at: U32) -> U32:
    """The least solution above what holds at first."""
    active: Rows = np.arange(len(at))
    marked = np.zeros(len(at), bool)
    while len(active):
        out = leave(active, at[active])
        for column in (graph.falls, graph.taken, graph.other):
            target = column[active]
            real = target >= 0
            target = target[real]
            more = (out[real] & ~at[target]) != 0
            marked[target[more]] = True
            np.bitwise_or.at(at, target[more], out[real][more])
        active = np.flatnonzero(marked)
        marked[active] = False
    return at
