# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel as tables: functions, blocks, instructions, edges."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class EdgeKind(IntEnum):
    """How control gets from one block to another."""

    FALL = 0  # to what lies behind
    TAKEN = 1  # by a branch or jump inside the function
    CALL = 2  # of a known function, from where control comes back if it returns
    RETURN = 3  # to whoever called: no target
    SIBLING = 4  # a jump to another function
    INDIRECT = 5  # an indirect call or jump: no target, see `candidates`
    FIXUP = 6  # after a fault
    LABEL = 7  # a jump label that is a jump


@dataclass(frozen=True)
class Functions:
    """Functions and their `.cold` parts, by image and address.

    Attributes:
        addr: uint64[f], run-time address.
        size: uint32[f], bytes up to the next symbol.
        kmod: int16[f], row in the images' names, 0 is the kernel.
        parent: int32[f], the function a `.cold` part belongs to, else the row itself.
        first_insn: int32[f], row of its first instruction; -1 if it has none.
        insns: int32[f], how many.
        first_block: int32[f], row of its first block; -1 if it has none.
        blocks: int32[f], how many.
        is_c: bool[f], has an ftrace site, so the C calling convention holds.
        returns: bool[f], some path may reach its return.
        address_taken: bool[f], its address is an operand or a word of the kernel's data, or nothing
            else leads to it.
        arguments: int8[f], how many registers its prototype needs for arguments; -1 if that is
            not known.
    """

    addr: U64
    size: U32
    kmod: npt.NDArray[np.int16]
    parent: I32
    first_insn: I32
    insns: I32
    first_block: I32
    blocks: I32
    is_c: Mask
    returns: Mask
    address_taken: Mask
    arguments: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Instructions:
    """Instructions without padding, by image and address.

    Attributes:
        addr: uint64[n], run-time address.
        length: uint8[n], bytes.
        flow: uint8[n], `x86.effect.Flow`.
        trait: uint16[n], `x86.effect.Trait`.
        reads: uint32[n], mask of registers (bit 0..15) and status flags (16..21) read.
        writes: uint32[n], mask of those overwritten whatever happens.
        target: uint64[n], address a direct jump or call leads to, else 0.
        function: int32[n], row of its function.
        block: int32[n], row of its block.
    """

    addr: U64
    length: U8
    flow: U8
    trait: U16
    reads: U32
    writes: U32
    target: U64
    function: I32
    block: I32


@dataclass(frozen=True)
class Blocks:
    """Basic blocks, by image and address.

    Attributes:
        addr: uint64[b], run-time address.
        size: uint32[b], bytes up to the end of its last instruction.
        function: int32[b], row of its function.
        first_insn: int32[b], row of its first instruction.
        insns: int32[b], how many.
        live: uint32[b], mask of registers and flags live before it.
    """

    addr: U64
    size: U32
    function: I32
    first_insn: I32
    insns: I32
    live: U32


@dataclass(frozen=True)
class Edges:
    """Edges of the control-flow graph, by source.

    Attributes:
        source: int32[e], row of a block.
        target: int32[e], row of a block, -1 where the kind has none or it is not in the tables.
        kind: uint8[e], `EdgeKind`.
        insn: int32[e], row of the instruction that leads there.
        arguments: int8[e], of an indirect call or jump of C code: how many argument registers, in
            their order, may hold a value; 6 where that is not known.
    """

    source: I32
    target: I32
    kind: U8
    insn: I32
    arguments: npt.NDArray[np.int8]
