# SPDX-License-Identifier: GPL-2.0-or-later
"""Where counters go: which instructions, edges and memory accesses a selector means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kernweave.model.tables import EdgeKind
from kernweave.weave.scope import Scope, Why
from kernweave.weave.source import I32, U8, Mask, Rows, Source
from kernweave.x86.decode import Flow, Trait
from kernweave.x86.memory import Memory, find_memory


class Place(IntEnum):
    """Where a counter is, seen from an instruction."""

    BEFORE = 0  # whoever comes to it
    BEHIND = 1  # whoever falls through it
    TAKEN = 2  # whoever its branch takes


@dataclass(frozen=True)
class Counters:
    """Counters to be woven in, ascending by instruction, then by place.

    Attributes:
        insn: int32[c], row of an instruction.
        place: uint8[c], `Place`.
        clobber: uint32[c], masks of registers and flags to overwrite before each counter.
    """

    insn: I32
    place: U8
    clobber: npt.NDArray[np.uint32]


def make_counters(source: Source, scope: Scope, insn: Rows, place: U8) -> tuple[Counters, Rows]:
    """Put counters in order; what asks for the same place shares one.

    What is asked for before an endbr64 goes behind it: indirect calls must find the endbr64, and
    whoever comes to it falls through.  That is before the next instruction, unless others come
    there as well.

    Args:
        source: the image.
        scope: what is woven.
        insn: int64[m], rows of instructions.
        place: uint8[m], `Place`.

    Returns:
        The counters, and int64[m]: which of them each one asked for has, -1 if none is possible:
        the instruction is not woven, or must follow the one before at once.
    """
    insn, place = _behind_endbr(source, insn, place)
    possible = _possible(source, scope, insn, place)
    key = insn[possible] * len(Place) + place[possible]
    if len(key) and not (key[1:] > key[:-1]).all():
        kept, number = np.unique(key, return_inverse=True)
    else:
        kept, number = key, np.arange(len(key))
    row = np.full(len(insn), -1, np.int64)
    row[possible] = number
    counters = Counters(
        (kept // len(Place)).astype(np.int32),
        (kept % len(Place)).astype(np.uint8),
        np.zeros(len(kept), np.uint32),
    )
    return counters, row


def _behind_endbr(source: Source, insn: Rows, place: U8) -> tuple[Rows, U8]:
    """The same places, none before an endbr64."""
    instructions = source.tables.instructions
    endbr = (instructions.trait[insn] & Trait.ENDBR) != 0
    behind = np.where(endbr & (place == Place.BEFORE), Place.BEHIND, place)
    row = np.minimum(insn + 1, len(instructions.addr) - 1)
    alone = instructions.block[row] == instructions.block[insn]
    moved = endbr & alone & (behind == Place.BEHIND)
    return np.where(moved, row, insn), np.where(moved, Place.BEFORE, behind).astype(np.uint8)


def _possible(source: Source, scope: Scope, insn: Rows, place: U8) -> Mask:
    """bool[m]: whether there is such a place in a clone."""
    tables = source.tables
    block = tables.instructions.block[insn]
    why = scope.block[block]
    head = tables.blocks.first_insn[block] == insn
    woven = (why == Why.WOVEN) | ((why > Why.ENTRY_BLOCK) & head & (place == Place.BEFORE))
    held = source.held
    next_held = np.append(held[1:], False)
    parted = np.where(place == Place.BEFORE, held[insn], next_held[insn] & (place == Place.BEHIND))
    return np.asarray(woven & ~parted)


# ---- selectors -----------------------------------------------------------------------------------


def select_blocks(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """The first instruction of every block of what is woven."""
    outside = (scope.block > Why.WOVEN) & (scope.block <= Why.ENTRY_BLOCK)
    return _before(source.tables.blocks.first_insn[~outside].astype(np.int64))


def select_entries(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """The first instruction behind the endbr64 of each function."""
    functions = source.tables.functions
    homes = scope.woven & (functions.parent == np.arange(len(functions.addr)))
    rows = functions.first_insn[homes].astype(np.int64)
    endbr = (source.tables.instructions.trait[rows] & Trait.ENDBR) != 0
    return _before(rows + endbr)


def select_insns(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Every instruction."""
    return _before(np.flatnonzero(_woven(source, scope)))


def select_calls(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Direct, indirect and static calls, and jumps to other functions."""
    flow, target = source.tables.instructions.flow, source.tables.instructions.target
    calls = np.isin(flow, (Flow.CALL, Flow.INDIRECT_CALL))
    calls |= _leaves(source) & ~np.isin(target, source.sites.return_thunks)
    return _before(np.flatnonzero(calls & _woven(source, scope)))


def select_returns(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Returns, and jumps to other functions."""
    returns = source.tables.instructions.flow == Flow.RETURN
    return _before(np.flatnonzero((returns | _leaves(source)) & _woven(source, scope)))


def select_loads(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Instructions with a memory operand that they read."""
    return _before(_accessing(source, scope, Memory.LOAD))


def select_stores(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Instructions with a memory operand that they write."""
    return _before(_accessing(source, scope, Memory.STORE))


def select_edges(source: Source, scope: Scope) -> tuple[Rows, U8]:
    """Edges inside functions, those of faults apart."""
    edges, rows = source.tables.edges, edges_inside(source, scope)
    insn = edges.insn[rows].astype(np.int64)
    return insn, places_of(edges.kind[rows], source.tables.instructions.flow[insn])


def edges_inside(source: Source, scope: Scope) -> Rows:
    """int64[e]: rows of the edges inside woven functions, those of faults apart."""
    tables = source.tables
    edges, parent = tables.edges, tables.functions.parent
    kinds = np.isin(edges.kind, (EdgeKind.FALL, EdgeKind.TAKEN, EdgeKind.LABEL))
    rows = np.flatnonzero(
        kinds & (edges.target >= 0) & scope.woven[tables.blocks.function[edges.source]]
    )
    home = parent[tables.blocks.function]
    return np.asarray(rows[home[edges.source[rows]] == home[edges.target[rows]]])


def places_of(kind: U8, flow: U8) -> U8:
    """uint8[m], `Place`: where edges inside functions are counted.

    Args:
        kind: uint8[m], `EdgeKind` of each.
        flow: uint8[m], `Flow` of the instruction that each leaves.
    """
    place = np.full(len(kind), Place.TAKEN, np.uint8)
    place[kind == EdgeKind.FALL] = Place.BEHIND
    place[(kind == EdgeKind.TAKEN) & (flow == Flow.JUMP)] = Place.BEFORE
    return place


def _before(rows: Rows) -> tuple[Rows, U8]:
    return rows, np.full(len(rows), Place.BEFORE, np.uint8)


def _accessing(source: Source, scope: Scope, access: Memory) -> Rows:
    rows = np.flatnonzero(_woven(source, scope))
    length = source.tables.instructions.length[rows]
    found = find_memory(source.text.tobytes(), source.at[rows].astype(np.int64), length)
    return np.asarray(rows[(found & access) != 0])


def _woven(source: Source, scope: Scope) -> Mask:
    return scope.woven[source.tables.instructions.function]


def _leaves(source: Source) -> Mask:
    """bool[n]: jumps out of the function, or to nobody knows where; a loop to its start stays."""
    functions, instructions = source.tables.functions, source.tables.instructions
    found = instructions.flow == Flow.INDIRECT_JUMP
    rows = np.flatnonzero(instructions.flow == Flow.JUMP)
    target = instructions.target[rows]
    there = np.searchsorted(functions.addr, target, side="right") - 1
    safe = np.maximum(there, 0)
    inside = (there >= 0) & (target < functions.addr[safe] + functions.size[safe])
    own = functions.parent[safe] == functions.parent[instructions.function[rows]]
    found[rows[~(inside & own)]] = True
    return np.asarray(found)
