# SPDX-License-Identifier: GPL-2.0-or-later
"""Decoding: lengths, flow, targets, traits, and what each instruction reads and kills."""

from __future__ import annotations

import iced_x86 as iced
import pytest
from iced_x86 import Instruction, Register

from exec.asm import INT3, NOP, NOP5, RET, assemble, call, jcc, jmp, jmp_short, mem, op, program
from kernweave.x86.decode import (
    ALL_MASK,
    FLAG_NAMES,
    FLAGS_MASK,
    FLAGS_SHIFT,
    REG_NAMES,
    Decoded,
    Flow,
    Trait,
    decode,
)

ADDR = 0xFFFF_FFFF_8123_4560
MEMORY = mem(Register.RSI, disp=0x1000)
RIP_MEMORY = mem(Register.RIP, disp=ADDR + 0x1000)


def decoded(code: bytes, addr: int = ADDR) -> Decoded:
    return decode([(addr, code)])


def names(mask: int) -> str:
    """A mask as words: registers in encoding order, then flags."""
    regs = [name for bit, name in enumerate(REG_NAMES) if mask >> bit & 1]
    flags = [name for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1]
    return " ".join(regs + flags)


ALL_FLAGS = "of sf zf af cf pf"
ALL_REGISTERS = " ".join(REG_NAMES)


def test_masks_cover_registers_and_flags() -> None:
    assert names(ALL_MASK) == " ".join(REG_NAMES) + " " + ALL_FLAGS
    assert names(FLAGS_MASK) == ALL_FLAGS


@pytest.mark.parametrize(
    ("instruction", "reads", "writes"),
    [
        (op("MOV_R64_RM64", "rax", "rbx"), "rbx", "rax"),
        (op("MOV_R32_RM32", "eax", "r9d"), "r9", "rax"),
        (op("MOV_R8_RM8", "al", "bl"), "rax rbx", ""),
        (op("MOV_R16_RM16", "ax", "bx"), "rax rbx", ""),
        (op("MOVZX_R32_RM8", "ecx", "al"), "rax", "rcx"),
        (op("MOV_R64_IMM64", "r15", 5), "", "r15"),
        (op("MOV_R64_RM64", "rax", MEMORY), "rsi", "rax"),
        (op("MOV_RM64_R64", MEMORY, "rax"), "rax rsi", ""),
        (op("LEA_R64_M", "rsi", mem(Register.RSI, Register.RDI, 2)), "rsi rdi", "rsi"),
        (op("ADD_R64_RM64", "rax", "rbx"), "rax rbx", f"rax {ALL_FLAGS}"),
        (op("ADC_R64_RM64", "rax", "rbx"), "rax rbx cf", f"rax {ALL_FLAGS}"),
        (op("XOR_R32_RM32", "eax", "eax"), "", f"rax {ALL_FLAGS}"),
        (op("SUB_R64_RM64", "r8", "r8"), "", f"r8 {ALL_FLAGS}"),
        (op("SBB_R64_RM64", "rax", "rax"), "rax cf", f"rax {ALL_FLAGS}"),
        (op("CMP_RM64_R64", "rax", "rbx"), "rax rbx", ALL_FLAGS),
        (op("TEST_RM64_R64", "rax", "rax"), "rax", ALL_FLAGS),
        (op("INC_RM64", "rax"), "rax", "rax of sf zf af pf"),
        (op("CMOVE_R64_RM64", "rax", "rbx"), "rax rbx zf", ""),
        (op("CMOVE_R32_RM32", "eax", "ebx"), "rax rbx zf", "rax"),
        (op("SETB_RM8", "al"), "rax cf", ""),
        (op("CMPXCHG_RM64_R64", MEMORY, "rbx"), "rax rbx rsi", ALL_FLAGS),
        (op("XCHG_RM64_R64", "rax", "rbx"), "rax rbx", "rax rbx"),
        (op("MUL_RM64", "rbx"), "rax rbx", f"rax rdx {ALL_FLAGS}"),
        (op("SHL_RM64_CL", "rbx", "cl"), "rcx rbx", "rbx"),
        (op("SHL_RM64_IMM8", "rbx", 0), "rbx", "rbx"),
        (op("BSF_R64_RM64", "rax", "rbx"), "rax rbx", ALL_FLAGS),
        (op("PUSH_R64", "rbp"), "rsp rbp", "rsp"),
        (op("POP_R64", "rbp"), "rsp", "rsp rbp"),
        (op("CPUID"), "rax rcx", "rax rcx rdx rbx"),
        (op("VMCALL"), ALL_REGISTERS, ALL_FLAGS),
        (op("IN_EAX_DX", "eax", "dx"), ALL_REGISTERS, "rax"),
        (op("OUT_DX_EAX", "dx", "eax"), ALL_REGISTERS, ""),
        (Instruction.create_rep_outsb(64), ALL_REGISTERS, ""),
        (op("PUSHFQ"), f"rsp {ALL_FLAGS}", "rsp"),
        (op("POPFQ"), "rsp", f"rsp {ALL_FLAGS}"),
        (RET, "rsp", "rsp"),
        (NOP5, "", ""),
    ],
    ids=str,
)
def test_decode_of_instruction_names_what_it_reads_and_kills(
    instruction: Instruction, reads: str, writes: str
) -> None:
    found = decoded(assemble(ADDR, instruction))
    assert (names(found.reads[0]), names(found.writes[0])) == (reads, writes)


def test_decode_of_repeated_string_store_kills_nothing() -> None:
    store = Instruction.create_rep_stosq(64)
    found = decoded(assemble(ADDR, store))
    assert set(names(found.reads[0]).split()) >= {"rax", "rcx", "rdi"}
    assert found.writes[0] == 0


@pytest.mark.parametrize(
    ("instruction", "flow"),
    [
        (op("MOV_R64_RM64", "rax", "rbx"), Flow.NEXT),
        (op("CLI"), Flow.NEXT),
        (RET, Flow.RETURN),
        (op("JMP_RM64", "rax"), Flow.INDIRECT_JUMP),
        (op("CALL_RM64", RIP_MEMORY), Flow.INDIRECT_CALL),
        (op("UD2"), Flow.TRAP),
        (INT3, Flow.TRAP),
        (op("IRETQ"), Flow.LEAVE),
        (op("SYSRETQ"), Flow.LEAVE),
        (op("RETFQ"), Flow.LEAVE),
    ],
    ids=str,
)
def test_decode_tells_how_control_goes_on(instruction: Instruction, flow: Flow) -> None:
    found = decoded(assemble(ADDR, instruction))
    assert (found.flow[0], found.target[0]) == (flow, 0)


def test_decode_gives_targets_as_addresses() -> None:
    code = program(
        ADDR, "top", jmp("end"), jcc("ne", "top"), call("end"), jmp_short("top"), "end", RET
    )
    found = decoded(code.code)
    assert found.flow.tolist() == [Flow.JUMP, Flow.BRANCH, Flow.CALL, Flow.JUMP, Flow.RETURN]
    end = code.labels["end"]
    assert found.target.tolist() == [end, ADDR, end, ADDR, 0]
    assert found.addr.tolist() == list(code.at)
    assert found.length.tolist() == [5, 6, 5, 2, 1]


def test_decode_of_same_bytes_elsewhere_gives_another_target() -> None:
    code = program(ADDR, jmp(ADDR + 0x100)).code
    assert decoded(code).target[0] + 0x40 == decoded(code, ADDR + 0x40).target[0]


@pytest.mark.parametrize(
    ("code", "trait"),
    [
        (assemble(ADDR, NOP), Trait.NOP),
        (assemble(ADDR, NOP5), Trait.NOP),
        (assemble(ADDR, INT3), Trait.INT3),
        (assemble(ADDR, op("ENDBR64")), Trait.ENDBR),
        (assemble(ADDR, op("STI")), Trait.SHADOW),
        (assemble(ADDR, op("MOV_SREG_R32M16", "ss", "eax")), Trait.SHADOW),
        (assemble(ADDR, op("MOV_SREG_R32M16", "ds", "eax")), Trait(0)),
        (assemble(ADDR, op("SWAPGS")), Trait.SWAPGS),
        (assemble(ADDR, op("MOV_SREG_R32M16", "gs", "eax")), Trait.SWAPGS),
        (assemble(ADDR, op("POPFQ")), Trait.POPF),
        (assemble(ADDR, op("UD2")), Trait.UD2),
        (assemble(ADDR, op("MOV_R64_RM64", "rax", RIP_MEMORY)), Trait.RIP),
        (assemble(ADDR, op("MOV_R64_RM64", "rax", MEMORY)), Trait(0)),
        (b"\xf0" + assemble(ADDR, op("INC_RM64", MEMORY)), Trait.LOCK),
        (b"\x3e" + assemble(ADDR, op("INC_RM64", MEMORY)), Trait.LOCK),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else None,
)
def test_decode_tells_traits(code: bytes, trait: Trait) -> None:
    assert decoded(code).trait.tolist() == [trait]


def test_decode_of_invalid_bytes_is_taken_to_read_everything() -> None:
    found = decoded(b"\x06\xc0" + assemble(ADDR, NOP))
    assert found.flow.tolist() == [Flow.INVALID, Flow.NEXT]
    assert (found.reads[0], found.writes[0]) == (ALL_MASK, 0)


def test_decode_of_cut_instruction_is_invalid() -> None:
    code = assemble(ADDR, RET) + assemble(ADDR, op("MOV_R64_IMM64", "rax", 1))[:-1]
    found = decoded(code)
    assert found.flow.tolist()[:2] == [Flow.RETURN, Flow.INVALID]
    assert found.length.sum() == len(code)


@pytest.mark.parametrize("stretches", [[], [(ADDR, b"")]])
def test_decode_of_nothing_is_empty(stretches: list[tuple[int, bytes]]) -> None:
    found = decode(stretches)
    assert {len(column) for column in vars(found).values()} == {0}


def test_decode_rows_follow_each_other_without_gap() -> None:
    code = assemble(ADDR, *[op("ADD_R64_RM64", "rax", "rbx"), NOP5, RET] * 20)
    found = decoded(code)
    ends = found.addr + found.length
    assert ends[:-1].tolist() == found.addr[1:].tolist()
    assert ends[-1] == ADDR + len(code)
    assert [i.len for i in iced.Decoder(64, code)] == found.length.tolist()


def test_decode_of_stretches_numbers_them_and_cuts_between() -> None:
    cut = assemble(ADDR, op("MOV_R64_IMM64", "rax", 1))[:4]
    found = decode([(ADDR, assemble(ADDR, RET) + cut), (ADDR + 64, b""), (ADDR + 128, cut[:1] * 2)])
    assert set(found.stretch.tolist()) == {0, 2}
    assert found.addr[found.stretch == 2][0] == ADDR + 128
    for number, size in ((0, 5), (2, 2)):
        assert found.length[found.stretch == number].sum() == size
