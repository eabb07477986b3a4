# SPDX-License-Identifier: GPL-2.0-or-later
"""Edges of the control-flow graph from stretches that have been solved."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.convention import ARGUMENT_BITS
from kernweave.analysis.flow import CALLS, Beyond
from kernweave.analysis.liveness import Liveness
from kernweave.model.tables import EdgeKind, Edges
from kernweave.x86.decode import Flow

I32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def find_edges(code: Code, liveness: Liveness, block: I32) -> Edges:
    """All edges, by source block and then by instruction.

    Args:
        code: the instructions.
        liveness: their stretches, solved: calls that do not return have no fall-through.
        block: int32[n], block of each instruction.
    """
    graph = liveness.graph
    last, first = graph.last, graph.first
    comes_back = np.ones(len(last), bool)
    inside = graph.callee >= 0
    comes_back[inside] = liveness.returns[graph.callee[inside]]
    block_of = np.append(block[first], np.full(len(Beyond), -1, np.int32))
    source = block[last]
    behind = block_of[graph.falls]
    ends_block = np.append(block[1:] != block[:-1], True)[last]
    calls = np.isin(code.flow[last], CALLS)
    # a static call in tail position that is switched off holds a return
    returns = (graph.taken == Beyond.RETURN) | (code.flow[last] == Flow.RETURN)
    jumps = (graph.taken != Beyond.NOWHERE) & ~calls & ~returns
    indirect = _is_indirect(code)[last]
    inside_function = _same_function(code, first, last, graph.taken)
    leaves = jumps & ~indirect
    faults = np.isin(code.addr[last], liveness.sites.exceptions)
    other = graph.other != Beyond.NOWHERE
    found = [
        (EdgeKind.FALL, (graph.falls >= 0) & comes_back & ends_block, behind),
        (EdgeKind.TAKEN, leaves & inside_function, block_of[graph.taken]),
        (EdgeKind.SIBLING, leaves & ~inside_function, _arrives(code, last, block)),
        (EdgeKind.CALL, calls & ~indirect, _arrives(code, last, block)),
        (EdgeKind.RETURN, returns, None),
        (EdgeKind.INDIRECT, indirect, None),
        (EdgeKind.FIXUP, other & faults, block_of[graph.other]),
        (EdgeKind.LABEL, other & ~faults, block_of[graph.other]),
    ]
    rows = [np.flatnonzero(mask) for _, mask, _ in found]
    kinds = np.repeat(np.array([kind for kind, _, _ in found], np.uint8), [len(r) for r in rows])
    targets = [
        np.full(len(row), -1, np.int32) if place is None else np.maximum(place[row], -1)
        for row, (_, _, place) in zip(rows, found, strict=True)
    ]
    stretch = np.concatenate(rows)
    order = np.lexsort((kinds, stretch))
    return Edges(
        source=source[stretch][order],
        target=np.concatenate(targets).astype(np.int32)[order],
        kind=kinds[order],
        insn=last[stretch][order].astype(np.int32),
        arguments=_arguments(liveness.holds[stretch][order]),
    )


def _arguments(holds: npt.NDArray[np.uint32]) -> npt.NDArray[np.int8]:
    """How many argument registers hold a value before the first that holds none."""
    filled = np.stack([(holds >> bit & 1).astype(bool) for bit in ARGUMENT_BITS])
    return np.asarray(np.logical_and.accumulate(filled).sum(axis=0), np.int8)


def _is_indirect(code: Code) -> Mask:
    """Indirect calls and jumps, through a thunk or not."""
    direct = np.isin(code.flow, (Flow.CALL, Flow.JUMP, Flow.BRANCH))
    start, end = code.thunks
    thunk = direct & (code.target >= np.uint64(start)) & (code.target < np.uint64(end))
    thunk &= ~np.isin(code.target, code.return_thunks)
    return np.asarray(np.isin(code.flow, (Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP)) | thunk)


def _same_function(
    code: Code, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], taken: I32
) -> Mask:
    group = np.array([part.group for part in code.parts], np.uint64)
    here = group[code.part[last]]
    there = group[code.part[first[np.maximum(taken, 0)]]]
    return np.asarray((taken >= 0) & (here == there))


def _arrives(code: Code, last: npt.NDArray[np.int64], block: I32) -> I32:
    """Block at which the call or jump that ends each stretch arrives, static calls as of now."""
    row = code.rows_at(code.target[last])
    return np.where(row >= 0, block[np.maximum(row, 0)], -1).astype(np.int32)
