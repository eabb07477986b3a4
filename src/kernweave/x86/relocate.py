# SPDX-License-Identifier: GPL-2.0-or-later
"""One displaced instruction at a new address: the same effect, and the way back behind it."""

from __future__ import annotations

import struct

import iced_x86 as iced

from kernweave.errors import InternalError

JUMP_BYTES = 5
#: calls of the hypervisor, which comes back behind them; they can be anywhere
_HYPERCALLS = (
    iced.Mnemonic.VMCALL,
    iced.Mnemonic.VMMCALL,
    iced.Mnemonic.VMGEXIT,
    iced.Mnemonic.TDCALL,
)
_NEVER_RETURNS_HERE = (
    iced.FlowControl.CALL,  # it is a jump now
    iced.FlowControl.INDIRECT_CALL,
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
    """The instruction `code` of `addr`, for `new_addr`.

    A call becomes `push $return; jmp target`, so that the address on the stack is the native
    one and no return ever leads into a trampoline.

    Args:
        code: exactly one instruction.
        addr: its native run-time address.
        new_addr: where the result is going to be.
    """
    ins = iced.Decoder(64, code, ip=addr).decode()
    if ins.is_invalid or ins.len != len(code):
        raise InternalError(f"{code.hex()} is not one instruction")
    if ins.mnemonic in _HYPERCALLS:
        return code
    if ins.flow_control == iced.FlowControl.CALL:
        if not ins.is_call_near:
            raise InternalError(f"cannot displace {ins}")
        push = _push_return(addr + len(code))
        return push + encode_jump(new_addr + len(push), ins.near_branch_target)
    if ins.flow_control == iced.FlowControl.INDIRECT_CALL:
        if not can_relocate(code):
            raise InternalError(f"cannot displace {ins}")
        push = _push_return(addr + len(code))
        return push + _as_jump(ins, new_addr + len(push))
    if ins.is_jcc_short_or_near or ins.is_jmp_short_or_near:
        ins.as_near_branch()
        return _encode(ins, new_addr)
    if ins.is_ip_rel_memory_operand:
        return _encode(ins, new_addr)
    return code


def can_relocate(call: bytes) -> bool:
    """Whether a call can become a jump: near, and not by way of the stack pointer; or need not."""
    ins = iced.Decoder(64, call).decode()
    by_stack = iced.Register.RSP in (ins.memory_base, ins.op0_register)
    if ins.is_call_near_indirect:
        return not by_stack
    return ins.is_call_near or ins.mnemonic in _HYPERCALLS


def _as_jump(call: iced.Instruction, addr: int) -> bytes:
    """The jump to where an indirect call goes, behind the push of its return address."""
    jump = call.copy()
    jump.code = iced.Code.JMP_RM64
    return _encode(jump, addr)


def way_back(code: bytes, addr: int, new_addr: int) -> bytes:
    """What follows the copy of `code`, the last instruction displaced, at `new_addr`.

    A jump to its native successor; where there is none, int3: nothing runs past it, not even
    speculatively.
    """
    ins = iced.Decoder(64, code, ip=addr).decode()
    if ins.flow_control in _NEVER_RETURNS_HERE and ins.mnemonic not in _HYPERCALLS:
        return b"\xcc"
    return encode_jump(new_addr, addr + len(code))
