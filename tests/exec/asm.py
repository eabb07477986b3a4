# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions to bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import iced_x86 as iced
from iced_x86 import Instruction, MemoryOperand, Register


def assemble(addr: int, *instructions: Instruction) -> bytes:
    """Encode instructions one after the other, from `addr` on."""
    encoder = iced.Encoder(64)
    code = b""
    for instruction in instructions:
        encoder.encode(instruction, addr + len(code))
        code += encoder.take_buffer()
    return code


def mem(
    base: int = Register.NONE,
    index: int = Register.NONE,
    scale: int = 1,
    disp: int = 0,
    segment: int = Register.NONE,
) -> MemoryOperand:
    """A memory operand with a 32-bit displacement; `base` RIP makes `disp` the address."""
    size = 4 if base == Register.NONE else 8
    if disp >= 1 << 63:
        disp -= 1 << 64
    return MemoryOperand(base, index, scale, disp, size, False, segment)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch or call to a label of the same program, or to an address."""

    code: Any
    target: str | int


Item = Instruction | Branch | str | bytes


@dataclass(frozen=True, slots=True)
class Program:
    """Assembled code.

    Attributes:
        addr: of the first byte.
        code: the bytes.
        at: address of each instruction, in order.
        labels: address by name.
    """

    addr: int
    code: bytes
    at: tuple[int, ...]
    labels: dict[str, int]


def program(addr: int, *items: Item) -> Program:
    """Encode a program: instructions, branches, labels (str) and raw bytes."""
    labels: dict[str, int] = {}
    at: list[int] = []
    code = b""
    for last in (False, True):  # sizes do not depend on where a branch leads
        code, at = b"", []
        for item in items:
            here = addr + len(code)
            if isinstance(item, str):
                labels[item] = here
                continue
            at.append(here)
            code += _encode(item, here, labels if last else None)
    return Program(addr, code, tuple(at), labels)


def _encode(item: Instruction | Branch | bytes, here: int, labels: dict[str, int] | None) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, Instruction):
        return assemble(here, item)
    target = item.target
    if isinstance(target, str):
        target = here if labels is None else labels[target]
    return assemble(here, Instruction.create_branch(item.code, target))


def jmp(target: str | int) -> Branch:
    """Unconditional, 5 bytes."""
    return Branch(iced.Code.JMP_REL32_64, target)


def jmp_short(target: str | int) -> Branch:
    """Unconditional, 2 bytes."""
    return Branch(iced.Code.JMP_REL8_64, target)


def jcc(condition: str, target: str | int) -> Branch:
    """Conditional, 6 bytes: `jcc("ne", "loop")`."""
    return Branch(getattr(iced.Code, f"J{condition.upper()}_REL32_64"), target)


def call(target: str | int) -> Branch:
    """Direct, 5 bytes."""
    return Branch(iced.Code.CALL_REL32_64, target)


def reg(name: str) -> Any:
    """The register of that name."""
    return getattr(Register, name.upper())


def op(name: str, *operands: str | int | MemoryOperand) -> Instruction:
    """One instruction by the name of its encoding: `op("ADD_R64_RM64", "rax", "rbx")`."""
    code = getattr(iced.Code, name)
    kinds = [type(operand) for operand in operands]
    values = [reg(operand) if isinstance(operand, str) else operand for operand in operands]
    make: dict[tuple[type, ...], Any] = {
        (): Instruction.create,
        (str,): Instruction.create_reg,
        (MemoryOperand,): Instruction.create_mem,
        (int,): Instruction.create_i32,
        (str, str): Instruction.create_reg_reg,
        (str, int): Instruction.create_reg_i64 if "IMM64" in name else Instruction.create_reg_i32,
        (str, MemoryOperand): Instruction.create_reg_mem,
        (MemoryOperand, str): Instruction.create_mem_reg,
        (MemoryOperand, int): Instruction.create_mem_i32,
    }
    made: Instruction = make[tuple(kinds)](code, *values)
    return made


RET = Instruction.create(iced.Code.RETNQ)
INT3 = Instruction.create(iced.Code.INT3)
NOP = Instruction.create(iced.Code.NOPD)
#: the ftrace nop
NOP5 = op("NOP_RM32", MemoryOperand(Register.RAX, Register.RAX, 1, 0, 1))
