# SPDX-License-Identifier: GPL-2.0-or-later
"""Who calls whom: calls between images, and all direct calls as one table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.analysis.kernel import KernelTables
from kernweave.model.tables import EdgeKind

I32 = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Addrs = npt.NDArray[np.uint64]

DIRECT = (EdgeKind.CALL, EdgeKind.SIBLING)
_MOST_ARGUMENTS = 6


@dataclass(frozen=True)
class Calls:
    """Direct calls and jumps from function to function, one row per site, by image and address.

    Attributes:
        caller: int32[c], row of a function; `.cold` parts count as the function they belong to.
        callee: int32[c], row of a function, likewise.
        kind: uint8[c], `EdgeKind`: CALL or SIBLING.
        insn: int32[c], row of the instruction.
    """

    caller: I32
    callee: I32
    kind: npt.NDArray[np.uint8]
    insn: I32


class AddressIndex:
    """Rows by address for rows that ascend only within each image."""

    def __init__(self, addr: Addrs) -> None:
        """Index uint64[n] distinct addresses."""
        self._order = np.argsort(addr, kind="stable")
        self._sorted = addr[self._order]

    def last_before(self, addrs: Addrs) -> Rows:
        """int64[m]: row with the highest address that is not above each, -1 if all are above."""
        at = np.searchsorted(self._sorted, addrs, side="right") - 1
        return np.where(at >= 0, self._order[np.maximum(at, 0)], -1) if len(self._order) else at


def link(tables: KernelTables) -> KernelTables:
    """The same tables; calls and jumps from one image into another have their targets."""
    edges, blocks = tables.edges, tables.blocks
    open_ends = np.flatnonzero(np.isin(edges.kind, DIRECT) & (edges.target < 0))
    if not len(open_ends) or not len(blocks.addr):
        return tables
    addrs = tables.instructions.target[edges.insn[open_ends]]
    row = AddressIndex(blocks.addr).last_before(addrs)
    found = (row >= 0) & (blocks.addr[row] == addrs)
    target = np.array(edges.target)
    target[open_ends[found]] = row[found]
    return replace(tables, edges=replace(edges, target=target))


def find_calls(tables: KernelTables) -> Calls:
    """Every direct call, and every direct jump to another function."""
    edges, blocks, functions = tables.edges, tables.blocks, tables.functions
    chosen = np.isin(edges.kind, DIRECT) & (edges.target >= 0)
    caller, callee = (blocks.function[side[chosen]] for side in (edges.source, edges.target))
    return Calls(
        functions.parent[caller], functions.parent[callee], edges.kind[chosen], edges.insn[chosen]
    )


def count_fitting(tables: KernelTables) -> Rows:
    """int64[7]: how many functions an indirect site may call that passes 0..6 arguments."""
    functions = tables.functions
    needed = functions.arguments[functions.address_taken]
    return np.array([np.count_nonzero(needed <= passed) for passed in range(_MOST_ARGUMENTS + 1)])
