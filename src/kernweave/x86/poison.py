# SPDX-License-Identifier: GPL-2.0-or-later
"""Code before counters that overwrites registers and flags: who still needed them is found out.

pushfq                        if status flags are among them
xorq   $flags,(%rsp)          exactly those change
popfq
movabs $garbage,%register     for each; no canonical address, and another one for each register
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache

from kernweave.x86.counter import WORD_BYTES, Snippet, counter_snippet
from kernweave.x86.effect import FLAG_NAMES, FLAGS_SHIFT, REG_NAMES

_GARBAGE = 0xDEAD_57AB_0000_0000
#: bit of each status flag in rflags, in the order of FLAG_NAMES
_RFLAGS = {"of": 11, "sf": 7, "zf": 6, "af": 4, "cf": 0, "pf": 2}
_RSP = REG_NAMES.index("rsp")


@cache
def poison_code(mask: int) -> bytes:
    """Machine code that changes all registers and status flags in `mask`, and nothing else.

    Args:
        mask: as in `x86.effect`; the stack pointer is left alone.
    """
    code = _poison_flags(mask)
    for register in range(len(REG_NAMES)):
        if mask >> register & 1 and register != _RSP:
            opcode = bytes((0x48 | register >> 3, 0xB8 | register & 7))
            code += opcode + struct.pack("<Q", _GARBAGE | register)
    return code


@cache
def poisoned_counter(dead: int, clobber: int) -> Snippet:
    """The counter for where `dead` is dead, behind code that changes all in `clobber`."""
    counter, poison = counter_snippet(dead), poison_code(clobber)
    if not poison:
        return counter
    flags = len(_poison_flags(clobber))
    pushed = ((1, WORD_BYTES), (flags, 0)) if flags else ()
    return replace(
        counter,
        code=poison + counter.code,
        hole=len(poison) + counter.hole,
        depths=(*pushed, *((len(poison) + at, depth) for at, depth in counter.depths)),
    )


def _poison_flags(mask: int) -> bytes:
    flags = sum(
        1 << _RFLAGS[name] for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1
    )
    return b"\x9c\x48\x81\x34\x24" + struct.pack("<I", flags) + b"\x9d" if flags else b""
