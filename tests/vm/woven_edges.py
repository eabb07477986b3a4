# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts of edges in clones against executions at both of their ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernweave.session.generations import Live
from kernweave.weave.counters import edges_inside, places_of
from kernweave.weave.source import Source
from kernweave.x86.decode import Flow

Numbers = npt.NDArray[np.int64]
LEAST = 10_000


def edge_differences(
    live: Live, executions: Callable[[Numbers], Numbers], hits: Numbers, interrupted: int
) -> list[str]:
    """Branches and blocks whose edges do not add up to what was executed of their copies.

    Args:
        live: that was left.
        executions: of the copies of some instructions, -1 where there is none.
        hits: int64[c], of all counters.
        interrupted: how many tasks may have been moved between an edge and one of its ends.
    """
    source, edges = live.woven.source, live.woven.source.tables.edges
    rows = edges_inside(source, live.woven.scope)
    counted, passed = _passed(live, rows, hits)
    insns, sums = [], []
    for end, chosen in ((edges.insn, _branches(source)), (edges.target, _joins(source))):
        size = 1 + int(max(end.max(), chosen.max()))
        ours = np.bincount(end[rows], counted, size)[chosen]
        every = np.bincount(end[end >= 0], minlength=size)[chosen]
        whole = (ours == every) & (every > 0)
        sums.append(np.bincount(end[rows], passed, size)[chosen[whole]].astype(np.int64))
        insns.append(chosen[whole])
    insns[1] = source.tables.blocks.first_insn[insns[1]].astype(np.int64)
    insn, total = np.concatenate(insns), np.concatenate(sums)
    ran = executions(insn)
    wrong = np.flatnonzero((ran >= 0) & (ran != total))
    off = int(np.abs(ran - total)[wrong].sum())
    compared = int((ran > 0).sum())
    print(f"{compared} ends of edges, {len(wrong)} off by {off}; {interrupted} places were moved")
    assert compared > LEAST
    if off <= interrupted:
        return []
    addrs = source.tables.instructions.addr[insn]
    return [f"{addrs[i]:#x}: {total[i]} by its edges, {ran[i]} executions" for i in wrong.tolist()]


def _passed(live: Live, rows: Numbers, hits: Numbers) -> tuple[npt.NDArray[np.bool_], Numbers]:
    """Whether each edge has a counter, and what that says."""
    counters, tables = live.counters, live.woven.source.tables
    insn = tables.edges.insn[rows]
    place = places_of(tables.edges.kind[rows], tables.instructions.flow[insn])
    pairs = zip(counters.insn.tolist(), counters.place.tolist(), strict=True)
    found = dict(zip(pairs, hits.tolist(), strict=True))
    keys = list(zip(insn.tolist(), place.tolist(), strict=True))
    known = np.array([key in found for key in keys])
    return known, np.array([found.get(key, 0) for key in keys], np.int64)


def _branches(source: Source) -> Numbers:
    """Rows of conditional branches: whatever they do is an edge."""
    return np.flatnonzero(source.tables.instructions.flow == Flow.BRANCH)


def _joins(source: Source) -> Numbers:
    """Rows of blocks to which control comes by edges only: no entries, no fix-ups."""
    tables = source.tables
    found = np.ones(len(tables.blocks.addr), bool)
    first = tables.functions.first_block
    found[first[first >= 0]] = False
    found[tables.instructions.block[source.mark(source.sites.fixups)]] = False
    return np.flatnonzero(found)
