# SPDX-License-Identifier: GPL-2.0-or-later
"""ORC, the kernel's unwind table: its formats, as one set of columns.

Every format has rows of 6 bytes: two 16-bit offsets and 16 bits of register numbers, type and
flags. Since 6.4 the kernel names its format by a hash of the C definition, in .orc_header; a
hash that is not listed here is refused, since even the register numbers have changed before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError
from kernweave.image.rows import NO_ADDRS, Addrs, Fields, Span


class OrcReg(IntEnum):
    """What an offset counts from; numbers of our own, those of the kernel vary."""

    UNDEFINED = 0
    PREV_SP = 1
    DX = 2
    DI = 3
    BP = 4
    SP = 5
    R10 = 6
    R13 = 7
    BP_INDIRECT = 8
    SP_INDIRECT = 9
    AX = 10


class OrcType(IntEnum):
    """What is at the place that the unwinder reached; the kernel's numbers since 6.4."""

    UNDEFINED = 0
    END_OF_STACK = 1
    CALL = 2
    REGS = 3
    REGS_PARTIAL = 4


@dataclass(frozen=True, slots=True)
class OrcFormat:
    """One way to pack the last 16 bits of a row.

    Attributes:
        name: the first kernel known to have it.
        regs: our number for each register number of the kernel.
        typed: 3 bits of type, then `signal`; before, 2 bits of type, then `end`.
    """

    name: str
    regs: tuple[OrcReg, ...]
    typed: bool


_REGS_6_1 = tuple(OrcReg)[:10]
_REGS_7_2 = (
    OrcReg.UNDEFINED, OrcReg.AX, OrcReg.DX, OrcReg.SP, OrcReg.BP, OrcReg.DI, OrcReg.R10,
    OrcReg.R13, OrcReg.PREV_SP, OrcReg.SP_INDIRECT, OrcReg.BP_INDIRECT,
)  # fmt: skip

#: the format by what .orc_header holds: SHA-1 of the definition in orc_types.h as
#: scripts/orc_hash.sh cuts it out; empty where there is no such section
#:
#: References:
#:     b9f174c811e3 ("x86/unwind/orc: Add ELF section with ORC version identifier"),
#:     fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in two")
ORC_FORMATS = {
    "": OrcFormat("6.1", _REGS_6_1, typed=False),
    "fe5d32bf581bd63b2ca9a5c65ba5a625eab3fe24": OrcFormat("6.12", _REGS_6_1, typed=True),
    "137c36ad7627c4dd55932176bb0ecdbd5041fc82": OrcFormat("7.2", _REGS_7_2, typed=True),
}

_IP = np.dtype([("ip", "<i4")])
_ENTRY = np.dtype([("sp_offset", "<i2"), ("bp_offset", "<i2"), ("bits", "<u2")])


@dataclass(frozen=True)
class Orc:
    """How to find the previous frame, from `addr` up to the next row's.

    Attributes:
        addr: uint64[n], ascending, equal ones possible.
        sp_offset: int16[n], bytes from `sp_reg` to the previous stack pointer.
        bp_offset: int16[n], bytes from `bp_reg` to the saved frame pointer.
        sp_reg: uint8[n], an OrcReg.
        bp_reg: uint8[n], an OrcReg.
        type: uint8[n], an OrcType.
        signal: bool[n], the frame was interrupted: its ip is not a return address.
        bits: uint16[n], the last field as the kernel packs it, to write such rows again.
    """

    addr: Addrs
    sp_offset: npt.NDArray[np.int16]
    bp_offset: npt.NDArray[np.int16]
    sp_reg: npt.NDArray[np.uint8]
    bp_reg: npt.NDArray[np.uint8]
    type: npt.NDArray[np.uint8]
    signal: npt.NDArray[np.bool_]
    bits: npt.NDArray[np.uint16]


_BYTES = np.zeros(0, np.uint8)
NO_ORC = Orc(
    NO_ADDRS,
    np.zeros(0, np.int16),
    np.zeros(0, np.int16),
    _BYTES,
    _BYTES,
    _BYTES,
    np.zeros(0, np.bool_),
    np.zeros(0, np.uint16),
)


def orc_format(header: bytes) -> OrcFormat:
    """The format that section .orc_header names; pass nothing where there is none.

    Raises:
        UnsupportedError: it names none that is known.
    """
    found = ORC_FORMATS.get(header.hex())
    if found is None:
        raise UnsupportedError(
            f"this kernel's ORC unwind table has a format that is not known: {header.hex()}",
            notes=[f"{row.name}: {key or 'no .orc_header'}" for key, row in ORC_FORMATS.items()],
        )
    return found


def decode_orc(ips: Span, entries: Span, form: OrcFormat) -> Orc:
    """The rows of .orc_unwind_ip and .orc_unwind.

    Raises:
        UnsupportedError: they differ in number, lead outside the image, or have bits or
            registers that the format does not know.
    """
    places, rows = ips.rows(_IP), entries.rows(_ENTRY)
    if len(places) != len(rows):
        raise UnsupportedError(
            f"the kernel has {len(places)} ORC addresses and {len(rows)} ORC entries"
        )
    addr = ips.check(ips.relative(places, "ip"))
    order = np.argsort(addr, kind="stable")
    return _columns(addr[order], rows[order], form)


def _columns(addr: Addrs, rows: Fields, form: OrcFormat) -> Orc:
    bits = rows["bits"].astype(np.uint16)
    sp_reg = _registers(bits & 15, form)
    bp_reg = _registers(bits >> 4 & 15, form)
    kind, signal = _types(bits, sp_reg, form)
    sp_offset, bp_offset = rows["sp_offset"].astype(np.int16), rows["bp_offset"].astype(np.int16)
    return Orc(addr, sp_offset, bp_offset, sp_reg, bp_reg, kind, signal, bits)


def _registers(numbers: npt.NDArray[np.integer[Any]], form: OrcFormat) -> npt.NDArray[np.uint8]:
    highest = int(numbers.max(initial=0))
    if highest >= len(form.regs):
        raise UnsupportedError(
            f"the kernel's ORC table names register {highest}, its format ({form.name}) has "
            f"{len(form.regs)}"
        )
    ours = np.array(form.regs, np.uint8)
    return ours.take(numbers)


def _types(
    bits: npt.NDArray[np.uint16], sp_reg: npt.NDArray[np.uint8], form: OrcFormat
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    used = 12 if form.typed else 11
    kind = (bits >> 8 & (7 if form.typed else 3)).astype(np.uint8)
    highest = OrcType.REGS_PARTIAL if form.typed else 2
    if (bits >> used).any() or (kind > highest).any():
        raise UnsupportedError(
            f"the kernel's ORC table has bits {int(np.bitwise_or.reduce(bits)):#06x}, more than "
            f"its format ({form.name}) knows"
        )
    if form.typed:
        return kind, (bits >> 11 & 1).astype(bool)
    # 6.1 has CALL, REGS, REGS_PARTIAL from 0 on. Where the stack pointer is undefined the type
    # is not looked at: with `end` the stack ends there, without it the unwinder gives up.
    # References: v6.1 arch/x86/kernel/unwind_orc.c, unwind_next_frame()
    typed = (kind + OrcType.CALL).astype(np.uint8)
    end = np.where(bits >> 10 & 1, OrcType.END_OF_STACK, OrcType.UNDEFINED).astype(np.uint8)
    undefined = sp_reg == OrcReg.UNDEFINED
    return np.where(undefined, end, typed), ~undefined & (typed >= OrcType.REGS)
