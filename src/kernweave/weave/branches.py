# SPDX-License-Identifier: GPL-2.0-or-later
"""How each instruction is copied, and where its direct branch leads: one byte and one row each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kernweave.weave.source import I32, U8, Mask, Rows, Source
from kernweave.x86.decode import Flow, Trait

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
    """

    form: U8
    size: U8
    branch: Rows
    target: I32
    to: npt.NDArray[np.uint64]


def find_shapes(source: Source, line_matters: bool = False) -> Shapes:
    """Look at all branches and patchable instructions of an image.

    Args:
        source: the image.
        line_matters: returns and indirect jumps are safe by their address only.
    """
    instructions, sites = source.tables.instructions, source.sites
    labels = source.mark(sites.jump_labels)
    static = source.mark(sites.static_calls)
    direct = np.isin(instructions.flow, (Flow.JUMP, Flow.BRANCH, Flow.CALL))
    direct &= instructions.target != 0
    branch = np.flatnonzero(direct | labels)
    form = np.zeros(len(instructions.addr), np.uint8)
    if line_matters:
        form[np.isin(instructions.flow, (Flow.RETURN, Flow.INDIRECT_JUMP))] = Form.NATIVE
    form[branch] = _forms(source, branch)
    form[labels] = _label_forms(source, np.flatnonzero(labels))
    calls = np.flatnonzero(static)
    form[calls[form[calls] == Form.PLAIN]] = Form.STATIC_CALL
    form[calls[np.isin(form[calls], (Form.SHORT_JUMP, Form.SHORT_BRANCH))]] = Form.ODD
    to = instructions.target[branch]
    labelled = labels[branch]
    at = np.searchsorted(sites.jump_labels, instructions.addr[branch[labelled]])
    to[labelled] = sites.jump_targets[at]
    target = source.index.rows(to).astype(np.int32)
    target[static[branch]] = -1
    size = _BYTES[form]
    return Shapes(form, np.where(size, size, instructions.length), branch, target, to)


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
    instructions = source.tables.instructions
    found = np.full(len(rows), Form.ODD, np.uint8)
    found[(instructions.trait[rows] & Trait.NOP) != 0] = Form.LABEL_OFF
    found[instructions.flow[rows] == Flow.JUMP] = Form.LABEL_ON
    return found


def is_in(forms: U8, *which: Form) -> Mask:
    """bool[n]: which rows have one of some forms."""
    chosen = np.zeros(len(Form), bool)
    chosen[list(which)] = True
    return np.asarray(chosen[forms])
