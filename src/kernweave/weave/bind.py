# SPDX-License-Identifier: GPL-2.0-or-later
"""A layout to machine code: all copies, then all fix-ups, each kind one vector write.

A woven block, with its counter:

    movabs $offset,%dead
    incq   %gs:0x0(%dead)
    ...                           copies; distances and rip-relative displacements corrected
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.errors import InternalError
from kernweave.model.table import concat
from kernweave.weave.branches import BRANCHES, NEAR_BYTES, Form, is_in
from kernweave.weave.layout import Layout, Snippets
from kernweave.weave.scope import Scope
from kernweave.weave.source import I32, U8, Source
from kernweave.x86.counter import bind_counters
from kernweave.x86.decode import Trait, decode
from kernweave.x86.scatter import copy_bytes, write_numbers, write_pieces

_NOP5 = np.frombuffer(bytes.fromhex("0f1f440000"), np.uint8)
_JUMP, _ESCAPE, _NEAR_BRANCH, _SHORT_BRANCH = 0xE9, 0x0F, 0x80, 0x70
_INT3 = 0xCC


@dataclass(frozen=True)
class Distances:
    """Four-byte displacements that depend on where the code cache is.

    Attributes:
        at: int32[d], byte position of each in the code cache.
        end: int32[d], byte position that it counts from.
        inside: int32[d], byte position it leads to, -1: it leads to native memory.
        native: uint64[d], where it leads then.
    """

    at: I32
    end: I32
    inside: I32
    native: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Outward:
    """Displacements that lead out of the code cache.

    Attributes:
        at: int32[d], byte position of each in the code cache.
        end: int32[d], byte position that it counts from.
        native: uint64[d], where it leads.
    """

    at: I32
    end: I32
    native: npt.NDArray[np.uint64]


def emit(
    source: Source, scope: Scope, layout: Layout, offsets: npt.NDArray[np.uint64]
) -> tuple[U8, Outward]:
    """The bytes of the code cache, at no address yet, and what depends on it: zeros as yet.

    Args:
        source: the image.
        scope: what is woven.
        layout: of the code cache.
        offsets: uint64[c], gs-relative address of each counter.
    """
    out = np.full(layout.total, _INT3, np.uint8)
    _copy(source, scope, layout, out)
    _count(layout.snippets, offsets, out)
    found = []
    for distances in (
        _branches(scope, layout),
        _stubs(scope, layout),
        _bail_outs(source, scope, layout),
        _operands(source, layout),
    ):
        away = np.where(distances.inside >= 0, distances.inside - distances.end, np.int32(0))
        write_numbers(out, distances.at, away)
        outside = distances.inside < 0
        found.append(
            Outward(distances.at[outside], distances.end[outside], distances.native[outside])
        )
    return out, concat(found)


def translate(
    source: Source, scope: Scope, layout: Layout, base: int, offsets: npt.NDArray[np.uint64]
) -> U8:
    """The bytes of the code cache at `base`, a multiple of 64.

    Raises:
        InternalError: native code or data is more than 2 GiB away from `base`.
    """
    out, outward = emit(source, scope, layout, offsets)
    away = (outward.native - np.uint64(base)).view(np.int64) - outward.end
    if ((away < -(1 << 31)) | (away >= 1 << 31)).any():
        raise InternalError("the code cache is more than 2 GiB away from native code or data")
    write_numbers(out, outward.at, away.astype(np.int32))
    return out


def _copy(source: Source, scope: Scope, layout: Layout, out: U8) -> None:
    """Write every copy, branches with their native distances, and the jumps of bail-outs."""
    form, size, copy = scope.shapes.form, layout.size, layout.copy
    plain = is_in(form, Form.PLAIN, Form.REL32, Form.STATIC_CALL)
    copy_bytes(out, copy, source.text, source.at, np.where(plain, size, np.uint8(0)))
    short = np.flatnonzero((form == Form.SHORT_BRANCH) & (size > 0))
    out[copy[short]] = _ESCAPE
    out[copy[short] + 1] = source.text[source.at[short]] + np.uint8(_NEAR_BRANCH - _SHORT_BRANCH)
    out[copy[is_in(form, Form.SHORT_JUMP, Form.LABEL_ON, Form.NATIVE) & (size > 0)]] = _JUMP
    out[copy[layout.bail]] = _JUMP
    out[layout.tails[1]] = _JUMP
    labels = copy[(form == Form.LABEL_OFF) & (size > 0)]
    for nops in (labels, layout.slots.at):
        write_pieces(out, nops, np.tile(_NOP5, (len(nops), 1)))


def _count(snippets: Snippets, offsets: npt.NDArray[np.uint64], out: U8) -> None:
    """Write every counter, and the opcodes of the jumps that end stubs."""
    for number, snippet in enumerate(snippets.kinds):
        rows = np.flatnonzero(snippets.kind == number)
        if len(rows):
            write_pieces(out, snippets.at[rows], bind_counters(snippet, offsets[rows]))
    out[snippets.stub_jump] = _JUMP


def targets_of(scope: Scope, layout: Layout) -> I32:
    """int32[k]: byte position each of `scope.shapes.branch` leads to, -1: native code.

    That is a stub where the taken edge is counted.
    """
    found = _inside(layout, scope.shapes.target)
    stubs = layout.snippets.stub
    branch = np.searchsorted(scope.shapes.branch, layout.counters.insn[stubs])
    found[branch] = layout.snippets.at[stubs]
    return found


def _inside(layout: Layout, rows: I32) -> I32:
    return np.where(rows >= 0, layout.start[rows], np.int32(-1))


def _branches(scope: Scope, layout: Layout) -> Distances:
    """Direct branches and calls."""
    shapes = scope.shapes
    rows = shapes.branch
    chosen = is_in(shapes.form[rows], *BRANCHES) & (layout.size[rows] > 0)
    rows = rows[chosen]
    end = layout.copy[rows] + layout.size[rows]
    return Distances(end - 4, end, targets_of(scope, layout)[chosen], shapes.to[chosen])


def _stubs(scope: Scope, layout: Layout) -> Distances:
    """Jumps from stubs to where the branch leads."""
    stubs, shapes = layout.snippets.stub, scope.shapes
    branch = np.searchsorted(shapes.branch, layout.counters.insn[stubs])
    end = layout.snippets.stub_jump + NEAR_BYTES
    return Distances(end - 4, end, _inside(layout, shapes.target[branch]), shapes.to[branch])


def _bail_outs(source: Source, scope: Scope, layout: Layout) -> Distances:
    """Jumps to native code: of bail-outs, in place of copies, and behind copies."""
    addr, length = source.tables.instructions.addr, source.tables.instructions.length
    stay = np.flatnonzero((scope.shapes.form == Form.NATIVE) & (layout.size > 0))
    heads = np.concatenate((layout.bail, stay))
    rows, at = layout.tails
    native = np.concatenate((addr[heads], addr[rows] + length[rows]))
    end = np.concatenate((layout.copy[heads], at)) + np.int32(NEAR_BYTES)
    return Distances(end - 4, end, np.full(len(end), -1, np.int32), native)


def _operands(source: Source, layout: Layout) -> Distances:
    """Rip-relative operands: the same native address from elsewhere."""
    instructions = source.tables.instructions
    rows = np.flatnonzero(((instructions.trait & Trait.RIP) != 0) & (layout.size > 0))
    at, length = source.at[rows], instructions.length[rows]
    together = np.zeros(int(length.sum()), np.uint8)
    starts = (np.cumsum(length, dtype=np.int64) - length).astype(np.int32)
    copy_bytes(together, starts, source.text, at, length)
    decoded = decode([(0, together.tobytes())])
    if not np.array_equal(decoded.length, length) or (decoded.disp_size != 4).any():
        raise InternalError("a rip-relative operand is not where it was")
    distance = source.signed_at(at + decoded.disp).astype(np.int64)
    native = instructions.addr[rows] + length + distance.view(np.uint64)
    copy = layout.copy[rows]
    return Distances(copy + decoded.disp, copy + length, np.full(len(rows), -1, np.int32), native)
