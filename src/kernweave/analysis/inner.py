# SPDX-License-Identifier: GPL-2.0-or-later
"""Edges inside functions, of code that was decoded alone: without the whole kernel's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code, Mask
from kernweave.analysis.flow import CALLS, Rows, build_flow
from kernweave.image.sites import Sites
from kernweave.model.tables import EdgeKind


@dataclass(frozen=True)
class InnerEdges:
    """Edges between blocks of one function, ascending by source, target and kind.

    A branch to what lies behind it gives two of the same source and target.

    Attributes:
        code: the functions.
        source: int64[e], row of the instruction that leads on, the last of its block.
        target: int64[e], row of the first instruction of the block it leads to.
        kind: uint8[e], `EdgeKind`: `FALL`, `TAKEN` or `LABEL`.
    """

    code: Code
    source: Rows
    target: Rows
    kind: npt.NDArray[np.uint8]

    def of_parts(self, parts: Sequence[int]) -> Rows:
        """int64[k]: rows of the edges that begin in some parts."""
        inside = np.zeros(len(self.code.parts), bool)
        inside[parts] = True
        return np.flatnonzero(inside[self.code.part[self.source]])

    def between(self, source: int, target: int) -> Rows:
        """int64[k]: rows of the edges from one instruction to another."""
        rows = self.leaving(source)
        return np.asarray(rows[self.target[rows] == target])

    def leaving(self, source: int) -> Rows:
        """int64[k]: rows of the edges that leave an instruction."""
        first, end = np.searchsorted(self.source, (source, source + 1))
        return np.arange(first, end)

    @cached_property
    def twice(self) -> Mask:
        """bool[e]: whether another edge has the same source and target."""
        same = (self.source[1:] == self.source[:-1]) & (self.target[1:] == self.target[:-1])
        return np.asarray(np.append(same, False) | np.append(False, same))


def find_inner_edges(code: Code, sites: Sites, comes_back: Mask) -> InnerEdges:
    """The edges that `analysis.edges` finds inside functions, but those of faults.

    Args:
        code: the functions, each with its cold parts.
        sites: the kernel's tables.
        comes_back: bool[n], whether control may come back to behind a call.
    """
    graph = build_flow(code, sites)
    last = graph.last
    ends_block = np.append(code.leader[1:], True)[last]
    faults = np.isin(code.addr[last], sites.exceptions)
    found = (
        (EdgeKind.FALL, graph.falls, ends_block & comes_back[last]),
        (EdgeKind.TAKEN, graph.taken, ~np.isin(code.flow[last], CALLS)),
        (EdgeKind.LABEL, graph.other, ~faults),
    )
    groups = np.array([part.group for part in code.parts], np.uint64)
    sources, targets, kinds = [], [], []
    for kind, place, possible in found:
        stretch = np.flatnonzero(possible & (place >= 0))
        source, target = last[stretch], graph.first[place[stretch]]
        inside = groups[code.part[source]] == groups[code.part[target]]
        sources.append(source[inside])
        targets.append(target[inside])
        kinds.append(np.full(int(inside.sum()), kind, np.uint8))
    source, target, kind_of = (np.concatenate(one) for one in (sources, targets, kinds))
    order = np.lexsort((kind_of, target, source))
    return InnerEdges(code, source[order], target[order], kind_of[order])
