# SPDX-License-Identifier: GPL-2.0-or-later
"""Unwind rows for clones: which native row holds from where on, and what a counter has pushed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.image.orc import Orc
from kernweave.weave.layout import Layout, Snippets
from kernweave.weave.scope import Scope
from kernweave.weave.source import I32, Rows, Source

Addrs = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CloneOrc:
    """How to unwind, from `addr` up to the next row's.

    Attributes:
        addr: uint64[o], address in the clones, ascending.
        row: int32[o], row of the native table that holds; -1: none does.
        pushed: uint8[o], bytes that a counter has pushed: they are added to the offset of a row
            that counts from the stack pointer.
    """

    addr: Addrs
    row: I32
    pushed: npt.NDArray[np.uint8]


def orc_of(source: Source, scope: Scope, layout: Layout, orc: Orc, base: int) -> CloneOrc:
    """The unwind table of a code cache at `base`.

    Args:
        source: the image.
        scope: what is woven.
        layout: of the code cache.
        orc: the native table.
        base: run-time address of the code cache.
    """
    holds = _in_force(source, orc)
    at, row = _changes(source, layout, holds)
    stub_at, stub_row = _stubs(scope, layout, holds)
    at, row = np.append(at, stub_at), np.append(row, stub_row)
    order = np.argsort(at, kind="stable")
    at, row = at[order], row[order]
    push_at, pushed = _pushes(layout.snippets)
    behind = row[np.searchsorted(at, push_at, side="right") - 1]
    every = np.append(at, push_at)
    order = np.argsort(every, kind="stable")
    return CloneOrc(
        addr=every[order].astype(np.uint64) + np.uint64(base),
        row=np.append(row, behind)[order].astype(np.int32),
        pushed=np.append(np.zeros(len(at), np.uint8), pushed)[order],
    )


def _in_force(source: Source, orc: Orc) -> I32:
    """int32[n]: row of the native table that holds at each instruction, -1: none."""
    addr = source.tables.instructions.addr
    found = np.full(len(addr) + 1, -1, np.int32)
    found[np.searchsorted(addr, orc.addr)] = np.arange(len(orc.addr), dtype=np.int32)
    return np.maximum.accumulate(found[:-1])


def _changes(source: Source, layout: Layout, holds: I32) -> tuple[Rows, I32]:
    """Byte positions where another row begins to hold, and which.

    Behind the instruction that changes the frame, so before the counters of the next one.
    """
    rows = np.flatnonzero(layout.start >= 0)
    part, addr = source.tables.instructions.function[rows], source.tables.instructions.addr[rows]
    row = holds[rows]
    begins = np.ones(len(rows), bool)
    begins[1:] = part[1:] != part[:-1]
    changes = begins.copy()
    changes[1:] |= row[1:] != row[:-1]
    chosen = np.flatnonzero(changes)
    end = addr + source.tables.instructions.length[rows]
    follows = ~begins[chosen] & (end[chosen - 1] == addr[chosen])
    follows &= layout.size[rows[chosen - 1]] > 0
    before = rows[chosen - 1]
    at = layout.start[rows[chosen]].astype(np.int64)
    behind = layout.copy[before].astype(np.int64) + layout.size[before]
    return np.where(follows, behind, at), row[chosen]


def _stubs(scope: Scope, layout: Layout, holds: I32) -> tuple[Rows, I32]:
    """Each stub has the frame of where its branch leads, or else of the branch."""
    stubs, shapes = layout.snippets.stub, scope.shapes
    insn = layout.counters.insn[stubs]
    target = shapes.target[np.searchsorted(shapes.branch, insn)]
    return layout.snippets.at[stubs].astype(np.int64), holds[np.where(target >= 0, target, insn)]


def _pushes(snippets: Snippets) -> tuple[Rows, npt.NDArray[np.uint8]]:
    """Byte positions in counters where the stack pointer has moved, and by how much."""
    at, pushed = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    for number, snippet in enumerate(snippets.kinds):
        places = snippets.at[snippets.kind == number].astype(np.int64)
        for off, depth in snippet.depths if len(places) else ():
            at.append(places + off)
            pushed.append(np.full(len(places), depth, np.uint8))
    return np.concatenate(at), np.concatenate(pushed)
