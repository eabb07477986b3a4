# SPDX-License-Identifier: GPL-2.0-or-later
"""Which instructions load from memory and which store to it, by their operands.

An operand counts if it is one in the instruction's written form, those of string instructions
included; the stack accesses of push, pop, call and return are no operands, nor is an address that
is only computed or hinted at (lea, prefetch, nop).
"""

from __future__ import annotations

from enum import IntFlag

import iced_x86 as iced
import numpy as np
import numpy.typing as npt

from kernweave.x86.shape import Rows, distinct, shapes, words

U8 = npt.NDArray[np.uint8]


class Memory(IntFlag):
    """What an instruction does with memory; a read-modify-write both."""

    LOAD = 1
    STORE = 2


_LOADS = {
    iced.OpAccess.READ,
    iced.OpAccess.COND_READ,
    iced.OpAccess.READ_WRITE,
    iced.OpAccess.READ_COND_WRITE,
}
_STORES = {
    iced.OpAccess.WRITE,
    iced.OpAccess.COND_WRITE,
    iced.OpAccess.READ_WRITE,
    iced.OpAccess.READ_COND_WRITE,
}
_OPERANDS = {
    value for name, value in vars(iced.OpKind).items() if name.startswith("MEMORY")
}  # fmt: skip
_NEITHER = {iced.Mnemonic.PUSH, iced.Mnemonic.POP, iced.Mnemonic.CALL, iced.Mnemonic.RET}
_info = iced.InstructionInfoFactory()
#: shapes seen before
_known: dict[bytes, int] = {}


def memory_of(code: bytes) -> Memory:
    """What one instruction does.

    Example:
        >>> memory_of(bytes.fromhex("4801442408"))  # add %rax,0x8(%rsp)
        <Memory.LOAD|STORE: 3>
    """
    ins = iced.Decoder(64, code).decode()
    found = Memory(0)
    if ins.is_invalid or ins.mnemonic in _NEITHER:
        return found
    info = _info.info(ins)
    for number in range(ins.op_count):
        if ins.op_kind(number) in _OPERANDS:
            access = info.op_access(number)
            found |= Memory.LOAD if access in _LOADS else Memory(0)
            found |= Memory.STORE if access in _STORES else Memory(0)
    return found


def find_memory(text: bytes, at: Rows, length: U8) -> U8:
    """uint8[n], `Memory`: what the instructions at some places of a text do.

    Args:
        text: machine code.
        at: int[n], byte positions.
        length: uint8[n], bytes of each.
    """
    low, high = words(text, at, length)
    rows, kind = distinct(low, high, length)
    codes, shape = shapes(low[rows], high[rows], length[rows])
    for code in codes:
        if code not in _known:
            _known[code] = int(memory_of(code))
    table = np.array([_known[code] for code in codes], np.uint8)
    return np.asarray(table[shape[kind]])
