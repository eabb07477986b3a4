# SPDX-License-Identifier: GPL-2.0-or-later
"""Which functions a recorded call may have led to, and which of them may return to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernweave.model.tables import EdgeKind
from kernweave.x86.decode import Flow
from oracle.cfg import Cfg, Pairs

I8 = npt.NDArray[np.int8]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Links = tuple[Rows, Rows]

_LEVELS = 7  # an indirect site passes 0..6 arguments


class Callees:
    """Functions that returns behind each call may come from.

    A node is a function, or a thunk as entered by sites that pass so many arguments: what goes
    on from a thunk is seen, but not from which site it came.  A call leads to nodes; what they
    jump or fall into without a call returns for them.
    """

    def __init__(self, cfg: Cfg, pairs: Pairs) -> None:
        """Find what leads where: by edges of the graph, and by what was recorded.

        Args:
            cfg: the graph.
            pairs: all recorded transfers by completed instructions.
        """
        self._cfg = cfg
        self._functions = len(cfg.functions.addr)
        one, other = cfg.rows(pairs.from_), cfg.rows(pairs.to)
        known = (one >= 0) & (other >= 0)
        self._one, self._other, self._to = one[known], other[known], pairs.to[known]
        self._most = np.full(self._functions, -1, np.int8)
        sites = (cfg.passes[self._one] >= 0) & cfg.in_thunk(self._to)
        entered = cfg.insns.function[self._other[sites]]
        np.maximum.at(self._most, entered, cfg.passes[self._one[sites]])
        calls = cfg.is_call(self._one)
        self._starts = self._arrivals(calls)
        source, target = (
            np.concatenate(side)
            for side in zip(
                self._static(), self._recorded(~calls), self._from_thunks(), strict=True
            )
        )
        self._nodes = np.unique(np.concatenate([source, target, self._starts[1]]))
        self._reach = _closure(
            len(self._nodes), np.searchsorted(self._nodes, source), self._index(target)
        )

    def _index(self, nodes: Rows) -> Rows:
        return np.searchsorted(self._nodes, nodes)

    def most_passed(self, insns: Rows) -> I8:
        """int8[m]: most arguments that a recorded site passed to each instruction's thunk."""
        return self._most[self._cfg.insns.function[insns]]

    def may_return(self, call: Rows, ret: Rows) -> tuple[Mask, Mask]:
        """For returns behind calls: which a recorded call explains, which one made before.

        Args:
            call: int64[m], instructions.
            ret: int64[m], instructions.
        """
        function = self._cfg.owner(ret)
        found = np.zeros(len(call), bool)
        starts = np.concatenate([self._starts[0] << 32 | self._starts[1], self._direct(call)])
        starts = np.unique(starts)
        site, node = starts >> 32, starts & 0xFFFF_FFFF
        begin, end = np.searchsorted(site, call), np.searchsorted(site, call, side="right")
        for nth in range(int((end - begin).max(initial=0))):
            here = np.flatnonzero(begin + nth < end)
            found[here] |= self._reaches(node[begin[here] + nth], function[here])
        return found, self._unseen(call, function)

    def _unseen(self, call: Rows, function: Rows) -> Mask:
        """Whether an indirect call could have led there, though none of its ways was recorded."""
        cfg = self._cfg
        passed = cfg.passes[call]
        return np.asarray((passed >= 0) & (cfg.needs[function] <= passed))

    def _reaches(self, node: Rows, function: Rows) -> Mask:
        same = node == function
        one, other = (np.minimum(self._index(n), len(self._nodes) - 1) for n in (node, function))
        known = (self._nodes[one] == node) & (self._nodes[other] == function)
        bit = self._reach[one, other >> 3] >> (7 - (other & 7)).astype(np.uint8) & 1
        return np.asarray(same | (known & (bit != 0)))

    def _direct(self, call: Rows) -> Rows:
        """Where direct calls lead, whether they were recorded or not."""
        cfg = self._cfg
        row = cfg.rows(cfg.insns.target[call])
        known = (row >= 0) & (cfg.passes[call] < 0)
        return call[known] << 32 | cfg.owner(row[known])

    def _thunk_node(self, site: Rows, to: npt.NDArray[np.uint64]) -> Rows:
        level = self._cfg.passes[site].astype(np.int64)
        thunk = self._cfg.insns.function[self._cfg.rows(to)]
        return self._functions + thunk * _LEVELS + level

    def _arrives(self, chosen: Mask) -> Rows:
        """Node at which each of the recorded transfers arrives."""
        site, row, to = self._one[chosen], self._other[chosen], self._to[chosen]
        thunk = self._cfg.in_thunk(to) & (self._cfg.passes[site] >= 0)
        return np.where(thunk, self._thunk_node(site, to), self._cfg.owner(row))

    def _arrivals(self, calls: Mask) -> Links:
        return self._one[calls], self._arrives(calls)

    def _recorded(self, jumps: Mask) -> Links:
        """From function to function, by anything but calls and returns."""
        cfg = self._cfg
        chosen = jumps & (cfg.insns.flow[self._one] != Flow.RETURN) & ~self._in_thunk()
        source, target = cfg.owner(self._one[chosen]), self._arrives(chosen)
        away = source != target
        return source[away], target[away]

    def _in_thunk(self) -> Mask:
        return self._cfg.in_thunk(self._cfg.insns.addr[self._one])

    def _static(self) -> Links:
        """The same as the graph has it: also what is behind the last instruction of a symbol."""
        edges, blocks = self._cfg.edges, self._cfg.blocks
        chosen = (edges.kind != EdgeKind.CALL) & (edges.target >= 0)
        parent = self._cfg.functions.parent
        source, target = (
            parent[blocks.function[side[chosen]]].astype(np.int64)
            for side in (edges.source, edges.target)
        )
        away = source != target
        pairs = np.unique(source[away] << 32 | target[away])
        seen = np.unique(self._cfg.owner(np.concatenate([self._one, self._other])))
        pairs = pairs[np.isin(pairs >> 32, seen) & np.isin(pairs & 0xFFFF_FFFF, seen)]
        return pairs >> 32, pairs & 0xFFFF_FFFF

    def _from_thunks(self) -> Links:
        """From each thunk, as entered with so many arguments, to what needs no more."""
        cfg = self._cfg
        leaves = self._in_thunk() & ~cfg.in_thunk(self._to)
        thunk, target = cfg.insns.function[self._one[leaves]], cfg.owner(self._other[leaves])
        needs = cfg.needs[target]
        found = [
            (self._functions + thunk[fits].astype(np.int64) * _LEVELS + level, target[fits])
            for level in range(_LEVELS)
            if (fits := needs <= level) is not None
        ]
        return tuple(np.concatenate(side) for side in zip(*found, strict=True))  # type: ignore[return-value]


def _closure(count: int, source: Rows, target: Rows) -> npt.NDArray[np.uint8]:
    """uint8[count, count / 8]: bits of the nodes that each node leads to, itself among them."""
    reach = np.packbits(np.eye(count, dtype=bool), axis=1)
    order = np.argsort(source, kind="stable")
    source, target = source[order], target[order]
    first = np.flatnonzero(np.append(True, source[1:] != source[:-1]))
    rows = source[first]
    while True:
        new = reach[rows] | np.bitwise_or.reduceat(reach[target], first, axis=0)
        if np.array_equal(new, reach[rows]):
            return reach
        reach[rows] = new
