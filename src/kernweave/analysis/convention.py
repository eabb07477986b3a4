# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's C calling convention as masks.

References:
    System V ABI for x86-64, 3.2.1; arch/x86/entry/calling.h
"""

from __future__ import annotations

from kernweave.x86.decode import FLAGS_MASK, REG_NAMES, REGS_MASK


def _mask(*names: str) -> int:
    return sum(1 << REG_NAMES.index(name) for name in names)


#: what a callee may read; rax: number of vector registers, of a function with varying arguments
ARGUMENTS = _mask("rax", "rdi", "rsi", "rdx", "rcx", "r8", "r9", "rsp")
#: registers of the arguments, in their order
ARGUMENT_BITS = tuple(REG_NAMES.index(name) for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9"))
#: what a callee gives back unchanged
KEPT = _mask("rbx", "rbp", "rsp", "r12", "r13", "r14", "r15")
RESULTS = _mask("rax", "rdx")
LOST_BY_CALL = REGS_MASK & ~KEPT | FLAGS_MASK
#: neither arguments nor kept
TEMPORARY = _mask("r10", "r11")
LOST_AT_ENTRY = TEMPORARY | FLAGS_MASK
