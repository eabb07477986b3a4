# SPDX-License-Identifier: GPL-2.0-or-later
"""What is woven from: the tables of one image, and its native text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.convention import ARGUMENTS, LOST_AT_ENTRY
from kernweave.analysis.flow import CALLS
from kernweave.analysis.kernel import KernelTables
from kernweave.analysis.liveness import walk_back
from kernweave.analysis.lookup import RowIndex
from kernweave.image.sites import Sites
from kernweave.x86.decode import Flow, Trait
from kernweave.x86.scatter import view_words

Addrs = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

_LFENCE = bytes.fromhex("0faee8")
_SLACK = 16  # zeros behind the text, so that any piece of it can be read


@dataclass(frozen=True)
class Source:
    """One image.

    Attributes:
        tables: of this image alone, at its run-time addresses.
        text: uint8[bytes], its native text, zeros behind it.
        base: run-time address of the first byte of text.
        sites: the kernel's tables.
        changed: bool[f], functions whose text is another one than `tables` tells of.
    """

    tables: KernelTables
    text: U8
    base: int
    sites: Sites
    changed: Mask

    @cached_property
    def at(self) -> I32:
        """int32[n]: byte position of each instruction in the text."""
        addr = self.tables.instructions.addr
        return (addr.astype(np.uint32) - np.uint32(self.base & 0xFFFF_FFFF)).view(np.int32)

    @cached_property
    def index(self) -> RowIndex:
        """Finds instructions by address."""
        return RowIndex(self.tables.instructions.addr)

    @cached_property
    def first(self) -> Rows:
        """int64[p]: row of the first instruction of each part that has any, ascending."""
        found = self.tables.functions.first_insn
        return found[found >= 0].astype(np.int64)

    @cached_property
    def held(self) -> Mask:
        """bool[n]: nothing may come between these and the instruction before.

        They are in the shadow of `sti` or `mov ss`, or an indirect branch behind its fence.
        """
        instructions = self.tables.instructions
        found = np.zeros(len(self.at), bool)
        shadow = np.flatnonzero(instructions.trait[:-1] & Trait.SHADOW)
        found[shadow + 1] = True
        kinds = (Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP)
        rows = np.flatnonzero(np.isin(instructions.flow, kinds) & (self.at >= len(_LFENCE)))
        before = self.signed_at(self.at[rows] - len(_LFENCE)) & 0xFF_FFFF
        found[rows[before == int.from_bytes(_LFENCE, "little")]] = True
        return found

    def signed_at(self, at: Rows | I32) -> I32:
        """int32[m]: 4-byte numbers at some positions of the text."""
        return view_words(self.text, 4)[at].astype(np.uint32).view(np.int32)

    def mark(self, *tables: Addrs) -> Mask:
        """bool[n]: instructions whose address is in any of the tables."""
        return self.index.mark(*tables)


def make_source(
    tables: KernelTables, text: bytes, base: int, sites: Sites, changed: Mask | None = None
) -> Source:
    """Tables and text of one image.

    Args:
        tables: of this image alone.
        text: its native text.
        base: run-time address of the first byte.
        sites: the kernel's tables.
        changed: bool[f], functions whose text is another one than `tables` tells of; None: none.
    """
    if changed is None:
        changed = np.zeros(len(tables.functions.addr), bool)
    return Source(tables, np.frombuffer(text + bytes(_SLACK), np.uint8), base, sites, changed)


def live_before(source: Source, rows: Rows) -> U32:
    """uint32[m]: mask of what is live before some instructions.

    Args:
        source: the image.
        rows: int64[m], rows of instructions.
    """
    blocks, block = source.tables.blocks, source.tables.instructions.block[rows]
    live = blocks.live[block]
    inner = np.flatnonzero(blocks.first_insn[block] != rows)
    if len(inner):
        live[inner] = _walk(source, rows[inner])
    return live


def _walk(source: Source, rows: Rows) -> U32:
    """Liveness inside blocks, from that behind the stretches they are in."""
    stretches = source.tables.stretches
    begins = np.zeros(len(source.at), bool)
    begins[source.index.rows(stretches.addr)] = True
    stretch = (np.cumsum(begins, dtype=np.int32) - 1)[rows]
    last = source.index.rows(stretches.last[stretch])
    return walk_back(_effects(source), stretches.after[stretch], last, rows)


def _effects(source: Source) -> tuple[U32, U32]:
    """Reads and writes of each instruction, as the analysis took them (`liveness.effects`)."""
    instructions, sites = source.tables.instructions, source.sites
    reads, writes = instructions.reads.copy(), instructions.writes.copy()
    writes[np.isin(instructions.flow, CALLS)] = 0
    writes[source.mark(sites.exceptions, sites.static_calls)] = 0
    entries = source.mark(sites.ftrace)
    reads[entries] |= ARGUMENTS
    writes[entries] |= LOST_AT_ENTRY
    return reads, writes
