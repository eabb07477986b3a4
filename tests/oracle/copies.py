# SPDX-License-Identifier: GPL-2.0-or-later
"""Is a displaced copy the same instruction as its native original? Told by capstone.

A disassembler of its own: the code under test uses iced-x86. What may differ is only what
moving changes: rip-relative displacements and branch displacements (same absolute target),
their width, and the form of a direct call, which must not leave a trampoline address on the
stack: `push native return address; jmp target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import capstone
from capstone import x86_const as x86

_DECODER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_DECODER.detail = True
_MASK = (1 << 64) - 1
_CALL_REL32 = 0xE8
_PUSH_IMM32 = 0x68
_JMP_REL32 = 0xE9
_SEGMENT_PREFIXES = b"\x2e\x3e"  # padding of thunk calls, without effect on direct branches


def same_instruction(
    native_bytes: bytes, native_addr: int, copy_bytes: bytes, copy_addr: int
) -> bool:
    """Return whether the copy does at its address what the native one does at its own."""
    return not why_different(native_bytes, native_addr, copy_bytes, copy_addr)


def why_different(native_bytes: bytes, native_addr: int, copy_bytes: bytes, copy_addr: int) -> str:
    """Return why the copy is not the native instruction, '' if it is."""
    native = _decode(native_bytes, native_addr)
    copy = _decode(copy_bytes, copy_addr)
    if len(native) != 1:
        return f"native bytes {native_bytes.hex()} are not one instruction"
    if _is_direct_call(native[0]):
        return _why_different_call(native[0], copy)
    if len(copy) != 1:
        return f"copy bytes {copy_bytes.hex()} are not one instruction"
    return _why_different_one(native[0], copy[0])


def _decode(code: bytes, addr: int) -> list[Any]:
    """Return the instructions that fill `code` exactly; none if it has another shape."""
    found = disassemble(code, addr)
    return found if sum(insn.size for insn in found) == len(code) else []


@dataclass(frozen=True)
class _Unknown:
    """An instruction without operands that capstone does not know."""

    address: int
    mnemonic: str
    bytes: bytes
    id: int = 0
    op_str: str = ""
    operands: tuple[()] = ()
    prefix: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def size(self) -> int:
        return len(self.bytes)

    def group(self, number: int) -> bool:
        return number == 0


_UNKNOWN = {bytes.fromhex("0f01e8"): "serialize"}


def disassemble(code: bytes, addr: int) -> list[Any]:
    """Return the instructions from the start of `code` on, as far as they are any."""
    found: list[Any] = []
    at = 0
    while at < len(code):
        found += _DECODER.disasm(code[at:], (addr + at) & _MASK)
        at = sum(insn.size for insn in found)
        unknown = code[at : at + 3]
        if unknown not in _UNKNOWN:
            break
        found.append(_Unknown((addr + at) & _MASK, _UNKNOWN[unknown], unknown))
        at += len(unknown)
    return found


def _is_direct_call(insn: Any) -> bool:
    return bool(bytes(insn.bytes).lstrip(_SEGMENT_PREFIXES)[0] == _CALL_REL32)


def _target(insn: Any) -> int:
    return int(insn.operands[0].imm) & _MASK


def _why_different_call(native: Any, copy: Sequence[Any]) -> str:
    if len(copy) != 2 or copy[0].bytes[0] != _PUSH_IMM32 or copy[1].bytes[0] != _JMP_REL32:
        return f"a direct call must become push imm32; jmp rel32, not {_shown(copy)}"
    pushed = int.from_bytes(copy[0].bytes[1:5], "little", signed=True) & _MASK
    back = (native.address + native.size) & _MASK
    if pushed != back:
        return f"pushes {pushed:#x}, the native return address is {back:#x}"
    if _target(copy[1]) != _target(native):
        return f"jumps to {_target(copy[1]):#x}, the native call goes to {_target(native):#x}"
    return ""


def _why_different_one(native: Any, copy: Any) -> str:
    if native.id != copy.id or native.mnemonic != copy.mnemonic:
        return f"{_shown([copy])} instead of {_shown([native])}"
    if _modifiers(native) != _modifiers(copy):
        return f"prefixes differ: {_shown([copy])} instead of {_shown([native])}"
    mine, theirs = _operands(native), _operands(copy)
    if mine != theirs:
        return f"operands differ: {_shown([copy])} instead of {_shown([native])}"
    return ""


def _modifiers(insn: Any) -> tuple[Any, ...]:
    # A segment prefix of a branch is a hint or padding; on memory it is part of the operand.
    return insn.prefix[0], insn.prefix[2], insn.prefix[3]


def _operands(insn: Any) -> list[tuple[Any, ...]]:
    relative = insn.group(x86.X86_GRP_BRANCH_RELATIVE)
    return [_operand(insn, op, relative) for op in insn.operands]


def _operand(insn: Any, op: Any, relative: bool) -> tuple[Any, ...]:
    common = (op.type, 8 if relative else op.size, op.access)
    if op.type == x86.X86_OP_REG:
        return (*common, op.reg)
    if op.type == x86.X86_OP_IMM:
        return (*common, op.imm & _MASK)
    mem = op.mem
    disp = mem.disp
    if mem.base == x86.X86_REG_RIP:
        disp = (insn.address + insn.size + disp) & _MASK
    return (*common, mem.segment, mem.base, mem.index, mem.scale, disp)


def _shown(insns: Sequence[Any]) -> str:
    return "; ".join(f"{i.mnemonic} {i.op_str}".strip() for i in insns) or "nothing decodable"
