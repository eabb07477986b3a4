# SPDX-License-Identifier: GPL-2.0-or-later
"""What one instruction does: flow, traits, registers and flags read and written."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from functools import cache

import iced_x86 as iced

#: bit 0..15 of a mask: registers in encoding order; bit 16..21: status flags
REG_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
FLAG_NAMES = ("of", "sf", "zf", "af", "cf", "pf")
FLAGS_SHIFT = 16
REGS_MASK = 0xFFFF
FLAGS_MASK = 0x3F << FLAGS_SHIFT
ALL_MASK = REGS_MASK | FLAGS_MASK


class Flow(IntEnum):
    """How an instruction continues."""

    NEXT = 0
    JUMP = 1
    BRANCH = 2  # conditional
    CALL = 3
    RETURN = 4
    INDIRECT_JUMP = 5
    INDIRECT_CALL = 6
    TRAP = 7  # ud2, int3: a handler decides
    LEAVE = 8  # iret, sysret and what else leaves for good
    INVALID = 9


class Trait(IntFlag):
    """Properties that decide whether an instruction may be displaced."""

    NOP = 1
    INT3 = 2
    ENDBR = 4
    LOCK = 8  # a lock prefix, or the one that replaces it on one CPU
    SHADOW = 16  # sti, mov ss, pop ss: the next instruction is special
    SWAPGS = 32  # changes the gs base
    RIP = 64  # rip-relative memory operand
    POPF = 128
    UD2 = 256
    WAIT = 512  # hlt, mwait: a parked CPU wakes up behind it
    NEAR = 1024  # loop, jrcxz, xbegin: reaches 128 bytes, or means its own address


_FLOW = {
    iced.FlowControl.NEXT: Flow.NEXT,
    iced.FlowControl.UNCONDITIONAL_BRANCH: Flow.JUMP,
    iced.FlowControl.CONDITIONAL_BRANCH: Flow.BRANCH,
    iced.FlowControl.CALL: Flow.CALL,
    iced.FlowControl.RETURN: Flow.RETURN,
    iced.FlowControl.INDIRECT_BRANCH: Flow.INDIRECT_JUMP,
    iced.FlowControl.INDIRECT_CALL: Flow.INDIRECT_CALL,
    iced.FlowControl.INTERRUPT: Flow.TRAP,
    iced.FlowControl.EXCEPTION: Flow.TRAP,
    iced.FlowControl.XBEGIN_XABORT_XEND: Flow.LEAVE,
}
_LEAVING = {
    iced.Mnemonic.IRET, iced.Mnemonic.IRETD, iced.Mnemonic.IRETQ, iced.Mnemonic.SYSRET,
    iced.Mnemonic.SYSRETQ, iced.Mnemonic.SYSEXIT, iced.Mnemonic.SYSEXITQ, iced.Mnemonic.RETF,
    iced.Mnemonic.ERETS, iced.Mnemonic.ERETU,
}  # fmt: skip
#: whoever is behind them may read any register: a hypervisor or firmware, a handler of the trap
_ASKING = {
    iced.Mnemonic.IN, iced.Mnemonic.INSB, iced.Mnemonic.INSW, iced.Mnemonic.INSD,
    iced.Mnemonic.OUT, iced.Mnemonic.OUTSB, iced.Mnemonic.OUTSW, iced.Mnemonic.OUTSD,
    iced.Mnemonic.UD0, iced.Mnemonic.UD1,
    iced.Mnemonic.VMCALL, iced.Mnemonic.VMMCALL, iced.Mnemonic.VMGEXIT, iced.Mnemonic.TDCALL,
    iced.Mnemonic.SEAMCALL,
}  # fmt: skip
#: their destination or flags stay as they were when the count or source is zero
_MAY_KEEP_FLAGS = {
    iced.Mnemonic.SHL, iced.Mnemonic.SHR, iced.Mnemonic.SAR, iced.Mnemonic.SAL,
    iced.Mnemonic.ROL, iced.Mnemonic.ROR, iced.Mnemonic.RCL, iced.Mnemonic.RCR,
    iced.Mnemonic.SHLD, iced.Mnemonic.SHRD,
}  # fmt: skip
_MAY_KEEP_DEST = {iced.Mnemonic.BSF, iced.Mnemonic.BSR}
_NOPS = {iced.Mnemonic.NOP, iced.Mnemonic.FNOP}
_WAITS = {
    iced.Mnemonic.HLT, iced.Mnemonic.MWAIT, iced.Mnemonic.MWAITX, iced.Mnemonic.UMWAIT,
    iced.Mnemonic.TPAUSE,
}  # fmt: skip
_NEAR = {
    iced.Mnemonic.LOOP, iced.Mnemonic.LOOPE, iced.Mnemonic.LOOPNE, iced.Mnemonic.JRCXZ,
    iced.Mnemonic.JECXZ, iced.Mnemonic.XBEGIN,
}  # fmt: skip

_READS = {
    iced.OpAccess.READ,
    iced.OpAccess.COND_READ,
    iced.OpAccess.READ_WRITE,
    iced.OpAccess.READ_COND_WRITE,
    iced.OpAccess.COND_WRITE,  # what it does not write shows through
}
_KILLS = {iced.OpAccess.WRITE, iced.OpAccess.READ_WRITE}
_info = iced.InstructionInfoFactory()


@cache
def _register(number: int) -> tuple[int, int]:
    """(bit, bytes) of a general register, (-1, 0) of any other."""
    register: iced.Register_ = number  # type: ignore[assignment]
    full = iced.RegisterExt.full_register(register)
    first = iced.Register.RAX
    if not first <= full < first + 16:
        return -1, 0
    return full - first, iced.RegisterExt.size(register)


def _register_masks(ins: iced.Instruction) -> tuple[int, int]:
    reads = writes = 0
    for used in _info.info(ins).used_registers():
        bit, size = _register(used.register)
        if bit < 0:
            continue
        if used.access in _READS or (used.access in _KILLS and size < 4):
            reads |= 1 << bit
        if used.access in _KILLS and size >= 4:
            writes |= 1 << bit
    return reads, writes


def _masks(ins: iced.Instruction) -> tuple[int, int]:
    reads, writes = _register_masks(ins)
    if ins.mnemonic in _ASKING:
        reads |= REGS_MASK
    repeats = ins.has_rep_prefix or ins.has_repne_prefix
    reads |= (ins.rflags_read & 0x3F) << FLAGS_SHIFT
    variable = ins.mnemonic in _MAY_KEEP_FLAGS and ins.op_count > 1
    if not repeats and not variable:
        writes |= (ins.rflags_modified & 0x3F) << FLAGS_SHIFT
    if ins.mnemonic in _MAY_KEEP_DEST or repeats:
        reads |= writes & REGS_MASK
        writes &= ~REGS_MASK
    return reads, writes


def _traits(ins: iced.Instruction, code: bytes) -> int:
    trait = 0
    mnemonic = ins.mnemonic
    if mnemonic in _NOPS:
        trait |= Trait.NOP
    if mnemonic == iced.Mnemonic.INT3:
        trait |= Trait.INT3
    if mnemonic == iced.Mnemonic.ENDBR64:
        trait |= Trait.ENDBR
    if ins.has_lock_prefix or code[0] == 0x3E:
        trait |= Trait.LOCK
    writes_ss = ins.op_count and ins.op0_register == iced.Register.SS
    if mnemonic == iced.Mnemonic.STI or (
        writes_ss and mnemonic in (iced.Mnemonic.MOV, iced.Mnemonic.POP)
    ):
        trait |= Trait.SHADOW
    writes_gs = ins.op_count and ins.op0_register == iced.Register.GS
    if mnemonic == iced.Mnemonic.SWAPGS or (writes_gs and mnemonic == iced.Mnemonic.MOV):
        trait |= Trait.SWAPGS
    if ins.is_ip_rel_memory_operand:
        trait |= Trait.RIP
    if mnemonic in (iced.Mnemonic.POPFQ, iced.Mnemonic.POPF):
        trait |= Trait.POPF
    if mnemonic == iced.Mnemonic.UD2:
        trait |= Trait.UD2
    if mnemonic in _WAITS:
        trait |= Trait.WAIT
    if mnemonic in _NEAR:
        trait |= Trait.NEAR
    return trait


#: flow, trait, reads, writes, then the bytes' places: displacement of a memory operand (0:
#: none), its size, last immediate or branch displacement, its size
Effect = tuple[int, int, int, int, int, int, int, int]


def effect_of(code: bytes) -> Effect:
    """Decode one instruction; whatever is not exactly one becomes `INVALID`."""
    decoder = iced.Decoder(64, code, ip=_SOMEWHERE)
    ins = decoder.decode()
    if ins.is_invalid or ins.len != len(code):
        return Flow.INVALID, 0, ALL_MASK, 0, 0, 0, 0, 0
    reads, writes = _masks(ins)
    flow = _FLOW.get(ins.flow_control, Flow.LEAVE)
    if ins.mnemonic in _LEAVING:
        flow = Flow.LEAVE
    at = decoder.get_constant_offsets(ins)
    return (
        flow,
        _traits(ins, code),
        reads,
        writes,
        at.displacement_offset if at.has_displacement else 0,
        at.displacement_size if at.has_displacement else 0,
        at.immediate_offset if at.has_immediate else 0,
        at.immediate_size if at.has_immediate else 0,
    )


_SOMEWHERE = 0xFFFF_FFFF_8100_0000
