# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel of some functions and one kmod, assembled and analysed, for tests of the tables."""

from __future__ import annotations

import iced_x86 as iced
import numpy as np

from exec.asm import NOP5, RET, Item, call, jcc, jmp, op, program
from kernweave.analysis.code import Part
from kernweave.analysis.kernel import Hints, KernelTables, analyse, join
from kernweave.image.sites import Sites
from kernweave.image.symbols import Symbols
from kernweave.session.tables import Kernel

ADDR = 0xFFFF_FFFF_8100_0000
KMOD = 0xFFFF_FFFF_C000_0000
STEP = 0x40
INDIRECT = iced.Instruction.create_reg(iced.Code.CALL_RM64, iced.Register.RAX)
MOVE = op("MOV_R64_RM64", "rax", "rbx")

A, B, COLD, TWICE_1, TWICE_2 = (ADDR + i * STEP for i in range(5))
M, HELPER = KMOD, KMOD + STEP

KERNEL: dict[int, tuple[str, tuple[Item, ...]]] = {
    A: ("a", (NOP5, jcc("e", COLD), call(B), call(B), INDIRECT, jmp(TWICE_1))),
    B: ("b", (NOP5, jcc("ne", "end"), MOVE, "end", RET)),
    COLD: ("a.cold", (call(TWICE_2), jmp(A + 5))),
    TWICE_1: ("twice", (NOP5, RET)),
    TWICE_2: ("twice", (NOP5, RET)),
}
IN_KMOD: dict[int, tuple[str, tuple[Item, ...]]] = {
    M: ("m", (NOP5, call(HELPER), call(B), jmp(A))),
    HELPER: ("b", (NOP5, RET)),
}


def make_kernel() -> Kernel:
    """Two images: what each function does is in `KERNEL` and `IN_KMOD`."""
    symbols = [symbols_of(None, KERNEL, ("also_b", B)), symbols_of("km", IN_KMOD)]
    tables = join([tables_of(None, KERNEL), tables_of("km", IN_KMOD)])
    return Kernel(tables, symbols, lambda: None)


def symbols_of(
    kmod: str | None, functions: dict[int, tuple[str, tuple[Item, ...]]], *more: tuple[str, int]
) -> Symbols:
    named = sorted([(addr, name) for addr, (name, _) in functions.items()])
    named = sorted([*named, *((addr, name) for name, addr in more)])
    addrs = np.array([addr for addr, _ in named], np.uint64)
    return Symbols(kmod, addrs, tuple(name for _, name in named), int(addrs[-1]) + STEP)


def tables_of(kmod: str | None, functions: dict[int, tuple[str, tuple[Item, ...]]]) -> KernelTables:
    parts = [part_of(kmod, addr, name, items) for addr, (name, items) in functions.items()]
    return analyse(parts, sites(), Hints(np.array([B, TWICE_2], np.uint64), {"b": 2, "twice": 0}))


def part_of(kmod: str | None, addr: int, name: str, items: tuple[Item, ...]) -> Part:
    code = program(addr, *items).code.ljust(STEP, b"\xcc")
    return Part(name, name, kmod, addr, code, A if name == "a.cold" else addr, True)


def sites() -> Sites:
    return Sites(ftrace=np.array(sorted([*KERNEL, *IN_KMOD]), np.uint64))
