# SPDX-License-Identifier: GPL-2.0-or-later
"""How each instruction is copied, and where its direct branch leads: one byte and one row each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kernweave.weave.source import I32, U8, Mask, Rows, Source
from kernweave.x86.decode import Flow

NEAR_BYTES = 5  # jmp rel32, call rel32, and whatever the kernel may write over them


class Form(IntEnum):
    """How an instruction is copied."""

    PLAIN = 0  # byte for byte, a rip-relative displacement corrected
    REL32 = 1  # byte for byte, its last four bytes a new distance
    SHORT_JUMP = 2  # jmp rel8 becomes jmp rel32
    SHORT_BRANCH = 3  # jcc rel8 becomes jcc rel32
    LABEL_OFF = 4  # a jump label that is a nop; five bytes, so that a jump fits
    LABEL_ON = 5  # a jump label that is a jump
    STATIC_CALL = 6  # five bytes as they are: the site of a static call that holds no branch
    NATIVE = 7  # a jump to the native instruction, which is safe only where it is
    ODD = 8  # not copied at all


_CALL, _JUMP, _SHORT = 0xE8, 0xE9, 0xEB
_NOPS = (0x0F, 0x66, 0x3E)  # first bytes of a jump label's nops: 0f 1f 44.., 66 90, 3e 8d ..

#: bytes of a copy; 0: those of the native instruction
_BYTES = np.array([0, 0, 5, 6, *(NEAR_BYTES,) * 4, 0], np.uint8)
#: forms that end in a distance of four bytes
BRANCHES = (Form.REL32, Form.SHORT_JUMP, Form.SHORT_BRANCH, Form.LABEL_ON)


@dataclass(frozen=True)
class Shapes:
    """How instructions are copied.

    Attributes:
        form: uint8[n], `Form`.
        size: uint8[n], bytes of the copy.
        branch: int64[k], rows of all direct branches and calls, and of jump labels, ascending.
        target: int32[k], row of the instruction each leads to, -1 if it is none of this image, or
            if the kernel's own patching decides where (static calls).
        to: uint64[k], native address it leads to; of a jump label that is a nop, would lead to.
        static: bool[n], sites of static calls.
    """

    form: U8
    size: U8
    branch: Rows
    target: I32
    to: npt.NDArray[np.uint64]
    static: Mask


def find_shapes(source: Source, line_matters: bool = False) -> Shapes:
    """Look at all branches and patchable instructions of an image.

    What the kernel patches is told by its bytes: the tables may be of an earlier boot.

    Args:
        source: the image.
        line_matters: returns and indirect jumps are safe by their address only.
    """
    instructions, sites = source.tables.instructions, source.sites
    labels = source.mark(sites.jump_labels)
    static = source.mark(sites.static_calls)
    direct = np.isin(instructions.flow, (Flow.JUMP, Flow.BRANCH, Flow.CALL))
    direct &= (instructions.target != 0) & ~static & ~source.mark(sites.ftrace)
    direct[static] |= np.isin(source.text[source.at[static]], (_CALL, _JUMP))
    branch = np.flatnonzero(direct | labels)
    form = np.zeros(len(instructions.addr), np.uint8)
    if line_matters:
        form[np.isin(instructions.flow, (Flow.RETURN, Flow.INDIRECT_JUMP))] = Form.NATIVE
    form[branch] = _forms(source, branch)
    form[labels] = _label_forms(source, np.flatnonzero(labels))
    form[static] = np.where(direct[static], Form.REL32, Form.STATIC_CALL)
    odd = (instructions.flow == Flow.BRANCH) | (instructions.length == 2)
    form[static & odd] = Form.ODD
    to = instructions.target[branch]
    calls = branch[static[branch]]
    distance = source.signed_at(source.at[calls] + 1).astype(np.int64).view(np.uint64)
    to[static[branch]] = instructions.addr[calls] + np.uint64(NEAR_BYTES) + distance
    labelled = labels[branch]
    at = np.searchsorted(sites.jump_labels, instructions.addr[branch[labelled]])
    to[labelled] = sites.jump_targets[at]
    target = source.index.rows(to).astype(np.int32)
    target[static[branch]] = -1
    size = _BYTES[form]
    size = np.where(size, size, instructions.length)
    size[static & (form != Form.ODD)] = NEAR_BYTES
    return Shapes(form, size, branch, target, to, static)


def _forms(source: Source, rows: Rows) -> U8:
    """uint8[m]: by the bytes of direct branches."""
    instructions = source.tables.instructions
    length, flow = instructions.length[rows], instructions.flow[rows]
    end = source.at[rows] + length
    distance = (instructions.target[rows] - instructions.addr[rows] - length).view(np.int64)
    opcode = source.text[np.maximum(end - NEAR_BYTES, 0)]
    wide = (length >= NEAR_BYTES) & (source.signed_at(end - 4) == distance)
    wide &= np.isin(opcode, (0xE8, 0xE9)) | ((flow == Flow.BRANCH) & (opcode & 0xF0 == 0x80))
    found = np.full(len(rows), Form.ODD, np.uint8)
    short = ~wide & (length == 2)
    first = source.text[end - 2]
    found[short & (first == 0xEB)] = Form.SHORT_JUMP
    found[short & (first & 0xF0 == 0x70)] = Form.SHORT_BRANCH
    found[wide] = Form.REL32
    return found


def _label_forms(source: Source, rows: Rows) -> U8:
    """uint8[m]: of jump labels, by what they are at the moment."""
    first = source.text[source.at[rows]]
    found = np.full(len(rows), Form.ODD, np.uint8)
    found[np.isin(first, _NOPS)] = Form.LABEL_OFF
    found[np.isin(first, (_JUMP, _SHORT))] = Form.LABEL_ON
    return found


def is_in(forms: U8, *which: Form) -> Mask:
    """bool[n]: which rows have one of some forms."""
    chosen = np.zeros(len(Form), bool)
    chosen[list(which)] = True
    return np.asarray(chosen[forms])
