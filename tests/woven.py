# SPDX-License-Identifier: GPL-2.0-or-later
"""Woven kernels for tests: from tables to a code cache, and the input of its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from clones import Clones, Native
from kernweave.analysis.code import Code, arrange
from kernweave.analysis.imagefile import FileText
from kernweave.analysis.kernel import closed_parts, tables_of
from kernweave.analysis.liveness import Liveness, solve_liveness
from kernweave.image.sites import Sites
from kernweave.weave.bind import translate
from kernweave.weave.clonemap import CloneMap, make_entries, make_map
from kernweave.weave.counters import Counters, make_counters
from kernweave.weave.layout import Layout, lay_out
from kernweave.weave.scope import Scope, Why, find_scope
from kernweave.weave.source import Source, make_source
from kernweave.x86.decode import decode

Select = Callable[[Source, Scope], tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]
FIRST_OFFSET = 0x1234_6000  # of the counters


@dataclass(frozen=True)
class Woven:
    """A code cache and what it was made from."""

    source: Source
    scope: Scope
    counters: Counters
    impossible: npt.NDArray[np.int64]
    layout: Layout
    base: int

    @cached_property
    def offsets(self) -> npt.NDArray[np.uint64]:
        return np.uint64(FIRST_OFFSET) + np.uint64(8) * np.arange(
            len(self.counters.insn), dtype=np.uint64
        )

    @cached_property
    def out(self) -> npt.NDArray[np.uint8]:
        return translate(self.source, self.scope, self.layout, self.base, self.offsets)

    @cached_property
    def map(self) -> CloneMap:
        return make_map(self.source, self.layout, self.base)

    def clones(self, out: npt.NDArray[np.uint8] | None = None) -> Clones:
        """As input of the check; `out` to judge other bytes than those translated."""
        addr = self.source.tables.instructions.addr
        entries = make_entries(self.source, self.layout, self.base)
        heads = self.source.tables.blocks.addr[self.scope.bail_outs]
        return Clones(
            out=self.out if out is None else out,
            base=self.base,
            native=self.map.native,
            copy=self.map.clone,
            counters=(addr[self.counters.insn], self.counters.place),
            offsets=self.offsets,
            bails=heads,
            entries=entries.native,
            slots=entries.slot,
        )


def weave(source: Source, base: int, *selects: Select, scope: Scope | None = None) -> Woven:
    """Weave everything that selectors mean."""
    scope = scope or find_scope(source)
    found = [select(source, scope) for select in selects]
    insn = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found)])
    place = np.concatenate([np.zeros(0, np.uint8), *(places for _, places in found)])
    counters, number = make_counters(source, scope, insn, place)
    return Woven(source, scope, counters, insn[number < 0], lay_out(source, scope, counters), base)


def analysed(file: FileText) -> tuple[Source, Code, Liveness]:
    """A kernel file as what is woven from, and the analysis it came from."""
    parts = file.parts()
    code = arrange(parts, decode((part.start, part.code) for part in parts), file.sites)
    liveness = solve_liveness(code, file.sites, closed_parts(code, file.sites, file.hints))
    tables = tables_of(code, liveness, file.hints)
    return make_source(tables, file.text, file.base, file.sites), code, liveness


def native_of(
    code: Code, text: bytes, base: int, sites: Sites, live: npt.NDArray[np.uint32]
) -> Native:
    """The native side of the check, from the analysis of the same parts."""
    labels = code.index.mark(sites.jump_labels)
    target = np.zeros(len(code.addr), np.uint64)
    row = code.rows_at(sites.jump_labels)
    target[row[row >= 0]] = sites.jump_targets[row >= 0]
    return Native(
        code=code,
        text=np.frombuffer(text + bytes(16), np.uint8),
        base=base,
        live=live,
        labels=labels,
        label_target=target,
        static=code.index.mark(sites.static_calls),
        stay=np.zeros(len(code.addr), bool),
    )


def expected_rows(native: Native, woven: Woven) -> npt.NDArray[np.bool_]:
    """bool[n]: instructions that must have a copy: all of woven functions but their bail-outs."""
    tables, scope = woven.source.tables, woven.scope
    row = np.searchsorted(tables.blocks.addr, native.code.addr, side="right") - 1
    return np.asarray(scope.block[row] == Why.WOVEN)
