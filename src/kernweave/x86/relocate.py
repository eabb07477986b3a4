# SPDX-License-Identifier: GPL-2.0-or-later
"""One displaced instruction at a new address: the same effect, the same successors."""

from __future__ import annotations

import struct

import iced_x86 as iced

from kernweave.errors import InternalError

JUMP_BYTES = 5
_CALL_FLOW = (iced.FlowControl.CALL, iced.FlowControl.INDIRECT_CALL)
_NEVER_RETURNS_HERE = (
    iced.FlowControl.UNCONDITIONAL_BRANCH,
    iced.FlowControl.RETURN,
    iced.FlowControl.INDIRECT_BRANCH,
)


def encode_jump(source: int, target: int) -> bytes:
    """`jmp rel32` at `source`.

    Raises:
        InternalError: the target is more than 2 GiB away.
    """
    distance = target - (source + JUMP_BYTES)
    if not -(1 << 31) <= distance < 1 << 31:
        raise InternalError(f"jump from {source:#x} to {target:#x} is out of reach")
    return b"\xe9" + struct.pack("<i", distance)


def _push_return(addr: int) -> bytes:
    """`push imm32`, sign-extended: kernel text is in the top 2 GiB."""
    return b"\x68" + struct.pack("<I", addr & 0xFFFFFFFF)


def _encode(ins: iced.Instruction, addr: int) -> bytes:
    encoder = iced.Encoder(64)
    try:
        encoder.encode(ins, addr)
    except ValueError as error:
        raise InternalError(f"cannot re-encode {ins} at {addr:#x}: {error}") from None
    return encoder.take_buffer()


def relocate_insn(code: bytes, addr: int, new_addr: int) -> bytes:
    """The instruction `code` of `addr`, for `new_addr`, with the way back to its successor.

    A direct call becomes `push $return; jmp target`, so that the address on the stack is the
    native one and no return ever leads into a trampoline.

    Args:
        code: exactly one instruction.
        addr: its native run-time address.
        new_addr: where the result is going to be.
    """
    ins = iced.Decoder(64, code, ip=addr).decode()
    if ins.is_invalid or ins.len != len(code):
        raise InternalError(f"{code.hex()} is not one instruction")
    after = addr + len(code)
    flow = ins.flow_control
    if flow in _CALL_FLOW:
        if not ins.is_call_near:
            raise InternalError(f"cannot displace {ins}")
        push = _push_return(after)
        return push + encode_jump(new_addr + len(push), ins.near_branch_target)
    if ins.is_jcc_short_or_near or ins.is_jmp_short_or_near:
        ins.as_near_branch()
        copy = _encode(ins, new_addr)
    elif ins.is_ip_rel_memory_operand:
        copy = _encode(ins, new_addr)
    else:
        copy = code
    if flow in _NEVER_RETURNS_HERE:
        return copy + b"\xcc"  # nothing runs past it, not even speculatively
    return copy + encode_jump(new_addr + len(copy), after)
