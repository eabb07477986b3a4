# SPDX-License-Identifier: GPL-2.0-or-later
"""Which instructions of the decoded functions a selector means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.model.point import Selector
from kernweave.x86.decode import Flow
from kernweave.x86.memory import Memory, find_memory

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


def select_rows(code: Code, parts: Sequence[int], selector: Selector) -> Rows:
    """Rows of the points that `selector` means in `parts`, ascending by row; not of edges."""
    if selector is Selector.ENTRY:
        found = np.unique(code.entries[parts])
        return found[found >= 0]
    inside = np.zeros(len(code.parts), bool)
    inside[parts] = True
    if selector in _ACCESS:
        return _accessing(code, np.flatnonzero(inside[code.part]), _ACCESS[selector])
    return np.flatnonzero(inside[code.part] & _SELECT[selector](code))


def _insns(code: Code) -> Mask:
    return np.ones(len(code.addr), bool)


def _blocks(code: Code) -> Mask:
    return code.leader


def _leaves(code: Code) -> Mask:
    """Unconditional jumps out of the function: to another one, or to nobody knows where.

    A jump to the own start is a loop: it stays.
    """
    starts = np.array([part.start for part in code.parts], np.uint64)
    ends = np.array([part.end for part in code.parts], np.uint64)
    groups = np.array([part.group for part in code.parts], np.uint64)
    order = np.argsort(starts)
    row = np.searchsorted(starts[order], code.target, side="right") - 1
    home = order[np.maximum(row, 0)]
    stays = (row >= 0) & (code.target < ends[home]) & (groups[home] == groups[code.part])
    jumps = (code.flow == Flow.JUMP) & ~stays
    return np.asarray(jumps | (code.flow == Flow.INDIRECT_JUMP))


def _returns(code: Code) -> Mask:
    return np.asarray((code.flow == Flow.RETURN) | _leaves(code))


def _calls(code: Code) -> Mask:
    calls = np.isin(code.flow, (Flow.CALL, Flow.INDIRECT_CALL))
    return np.asarray(calls | (_leaves(code) & ~_is_return_thunk(code)))


def _is_return_thunk(code: Code) -> Mask:
    return np.isin(code.target, code.return_thunks)


def _accessing(code: Code, rows: Rows, access: Memory) -> Rows:
    """Some of the rows: those with an explicit memory operand that they read or write."""
    starts = np.array([part.start for part in code.parts], np.uint64)
    ends = np.cumsum([len(part.code) for part in code.parts], dtype=np.int64)
    text = b"".join(part.code for part in code.parts)
    part = code.part[rows]
    inside = (code.addr[rows] - starts[part]).astype(np.int64)
    at = inside + np.append(0, ends)[part]
    found = find_memory(text, at, code.length[rows])
    return np.asarray(rows[(found & access) != 0])


_ACCESS = {Selector.LOADS: Memory.LOAD, Selector.STORES: Memory.STORE}
_SELECT = {
    Selector.INSNS: _insns,
    Selector.BLOCKS: _blocks,
    Selector.RETURN: _returns,
    Selector.CALLS: _calls,
}
