# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions and blocks of chosen functions, as columns over all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.lookup import RowIndex
from kernweave.image.sites import Sites
from kernweave.x86.decode import Decoded, Flow, Trait, decode

Mask = npt.NDArray[np.bool_]
_ENDS_FLOW = (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE)
_ENDS_BLOCK = (*_ENDS_FLOW, Flow.BRANCH)
_FTRACE_BYTES = 5  # of its nop
#: what the kernel writes over the endbr64 of functions whose address it takes nowhere: a nop that
#: no compiler writes; that of 6.1 and 6.12, and that of 7.2
#:
#: References:
#:     arch/x86/include/asm/ibt.h, gen_endbr_poison()
_SEALS = (b"\x66\x0f\x1f\x00", b"\x0f\x1f\x40\xd6")


@dataclass(frozen=True, slots=True)
class Part:
    """A function's stretch of text: the function itself or its `.cold` part.

    Attributes:
        name: as printed, with kmod and number where they are needed.
        symbol: plain symbol name.
        kmod: kmod's name, None for the kernel.
        start: run-time address of the symbol.
        code: its bytes up to the next symbol, as the kernel wrote them.
        group: start of the function it belongs to; equal for a function and its cold parts.
        is_c: compiled with an ftrace site, so the C calling convention holds for it.
    """

    name: str
    symbol: str
    kmod: str | None
    start: int
    code: bytes
    group: int
    is_c: bool

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.start + len(self.code)


@dataclass(frozen=True)
class Code:
    """Instructions of some parts, padding left out, ordered by (part, address).

    Attributes:
        parts: what `part` counts.
        part: int32[n], row in `parts`.
        addr: uint64[n], run-time address.
        length: uint8[n], bytes.
        flow: uint8[n], `Flow`.
        trait: uint16[n], `Trait`.
        reads: uint32[n], mask of registers and flags read.
        writes: uint32[n], mask of registers and flags overwritten.
        target: uint64[n], direct branch or call target, else 0.
        leader: bool[n], first instruction of a block.
        landing: bool[n], control may arrive otherwise than from the instruction before.
        room: uint8[n], `length` and the int3 filler directly behind it, which nothing leads to.
        return_thunks: addresses to which a jump is a return.
        thunks: [start, end) of text in which a jump or call is an indirect one.
        operands: uint64[k], what operands may hold as addresses: absolute and rip-relative ones.
    """

    parts: tuple[Part, ...]
    part: npt.NDArray[np.int32]
    addr: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint8]
    flow: npt.NDArray[np.uint8]
    trait: npt.NDArray[np.uint16]
    reads: npt.NDArray[np.uint32]
    writes: npt.NDArray[np.uint32]
    target: npt.NDArray[np.uint64]
    leader: Mask
    landing: Mask
    room: npt.NDArray[np.uint8]
    return_thunks: npt.NDArray[np.uint64]
    thunks: tuple[int, int] = (0, 0)
    operands: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    @cached_property
    def entries(self) -> npt.NDArray[np.int64]:
        """int64[parts]: row where calls of each part arrive, behind endbr64; -1 if it is empty."""
        numbers = np.arange(len(self.parts))
        first = np.searchsorted(self.part, numbers)
        last = np.searchsorted(self.part, numbers, side="right") - 1
        row = np.minimum(first, max(len(self.part) - 1, 0))
        if len(self.part):
            first = first + (((self.trait[row] & Trait.ENDBR) != 0) & (last > first))
        return np.where(last >= first, first, -1)

    def past_endbr(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64[m]: rows that are passed as often as those given, behind an endbr64 if it is one.

        Nothing can be put on an endbr64 in force, and the nop of a sealed one has no room before
        the five-byte nop of ftrace; whoever arrives there comes to the next instruction, and
        nobody else does, unless that begins a block.
        """
        behind = np.minimum(rows + 1, max(len(self.addr) - 1, 0))
        same = (self.part[behind] == self.part[rows]) & ~self.leader[behind]
        nop = ((self.trait[behind] & Trait.NOP) != 0) & (self.length[behind] == _FTRACE_BYTES)
        sealed = (self.trait[rows] & Trait.ENDBR) != 0
        return np.where(same & (self.in_force[rows] | (sealed & nop)), behind, rows)

    @cached_property
    def in_force(self) -> Mask:
        """bool[n]: endbr64 that indirect calls must find; the nop of a sealed one is none."""
        return np.asarray((self.trait & (Trait.ENDBR | Trait.NOP)) == Trait.ENDBR)

    @cached_property
    def is_c(self) -> Mask:
        """bool[n]: whether an instruction's function has an ftrace site."""
        flags = np.array([part.is_c for part in self.parts], bool)
        return np.asarray(flags[self.part]) if len(flags) else np.zeros(0, bool)

    def parts_with(self, trait: Trait) -> Mask:
        """bool[parts]: whether any instruction of a part has a trait."""
        found = np.zeros(len(self.parts), bool)
        found[self.part[(self.trait & trait) != 0]] = True
        return found

    def rows_at(self, addrs: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """int64[m]: row of the instruction that starts at each address, -1 if none does."""
        return self.index.rows(addrs)

    @cached_property
    def index(self) -> RowIndex:
        """Finds rows by address."""
        return RowIndex(self.addr)

    def raw(self, row: int) -> bytes:
        """The bytes of one instruction."""
        part = self.parts[int(self.part[row])]
        at = int(self.addr[row]) - part.start
        return part.code[at : at + int(self.length[row])]


def build_code(parts: Sequence[Part], sites: Sites) -> Code:
    """Decode parts, find their blocks, leave their padding out."""
    return arrange(parts, decode((part.start, part.code) for part in parts), sites)


def arrange(parts: Sequence[Part], columns: Decoded, sites: Sites) -> Code:
    """Find the blocks of parts that are decoded, leave their padding out."""
    part, addr = columns.stretch, columns.addr
    index = RowIndex(addr)
    jumps = columns.target[np.isin(columns.flow, (Flow.JUMP, Flow.BRANCH))]
    targeted = index.mark(jumps, sites.jump_targets, sites.fixups)
    first = np.ones(len(part), bool)
    first[1:] = part[1:] != part[:-1]
    keep = ~_padding(columns, targeted | _is_table_row(index, sites), first)
    leader = _leaders(columns, targeted | first, keep, index.mark(sites.jump_labels))
    trait = columns.trait | np.where(_sealed(parts, part, first), Trait.ENDBR, 0)
    rows = np.flatnonzero(keep)
    return Code(
        parts=tuple(parts),
        part=part[rows],
        addr=addr[rows],
        length=columns.length[rows],
        flow=columns.flow[rows],
        trait=trait[rows],
        reads=columns.reads[rows],
        writes=columns.writes[rows],
        target=columns.target[rows],
        leader=leader[rows],
        landing=(targeted | first | index.mark(columns.operands))[rows],
        room=_room(columns, keep)[rows],
        return_thunks=sites.return_thunks,
        thunks=sites.thunks,
        operands=columns.operands,
    )


def _sealed(parts: Sequence[Part], part: npt.NDArray[np.int32], first: Mask) -> Mask:
    """The nop that stands for endbr64 in a function that is never called indirectly."""
    begins = np.array([part.code.startswith(_SEALS) for part in parts], bool)
    found = first.copy()
    found[first] = begins[part[first]]
    return found


def _padding(columns: Decoded, targeted: Mask, first: Mask) -> Mask:
    """Filler that control never reaches: int3, and nops behind the end of a flow."""
    filler: Mask = ((columns.trait & (Trait.NOP | Trait.INT3)) != 0) & ~targeted & ~first
    opens = filler.copy()
    opens[1:] &= ~filler[:-1]
    starts = np.flatnonzero(opens)
    if not len(starts):
        return filler
    run = np.cumsum(opens) - 1
    ended = np.isin(columns.flow[starts - 1], _ENDS_FLOW)
    closes = np.flatnonzero(filler & np.append(~filler[1:], True))
    last = np.append(first[1:], True)[closes]
    dead_run = ended | last
    int3: Mask = (columns.trait & Trait.INT3) != 0
    return np.asarray(filler & (int3 | dead_run[np.maximum(run, 0)]))


def _leaders(columns: Decoded, starts: Mask, keep: Mask, labels: Mask) -> Mask:
    ends = np.isin(columns.flow, _ENDS_BLOCK) | labels
    after = np.zeros(len(ends), bool)
    after[1:] = ends[:-1]
    # padding between a jump and its successor does not hide the leader
    rows = np.flatnonzero(keep)
    gap = np.zeros(len(ends), bool)
    gap[rows[1:]] = np.diff(rows) > 1
    return np.asarray((starts | after | gap) & keep)


def _is_table_row(index: RowIndex, sites: Sites) -> Mask:
    """Whether the kernel itself may rewrite or look for an instruction: then it is no filler."""
    return index.mark(
        sites.jump_labels, sites.static_calls, sites.ftrace, sites.exceptions, sites.bugs
    )


def _room(columns: Decoded, keep: Mask) -> npt.NDArray[np.uint8]:
    """Bytes of each instruction and of the int3 filler behind it, in its own part."""
    filler = ~keep & ((columns.trait & Trait.INT3) != 0)
    filler[:1] = False
    filler[1:] &= columns.stretch[1:] == columns.stretch[:-1]
    room = columns.length.copy()
    rows = np.flatnonzero(filler)
    if len(rows):
        opens = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
        bytes_behind = np.add.reduceat(columns.length[rows], opens, dtype=np.int64)
        before = rows[opens] - 1
        room[before] = np.minimum(room[before] + bytes_behind, 255)
    return room
