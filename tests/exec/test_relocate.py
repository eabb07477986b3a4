# SPDX-License-Identifier: GPL-2.0-or-later
"""A relocated instruction on the CPU: the same registers, flags, memory and successor."""

from __future__ import annotations

import random
from typing import Any

import iced_x86 as iced
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from iced_x86 import Code, Instruction, Register

from exec.asm import assemble, mem
from exec.cpu import (
    COPY,
    DATA,
    FLAGS,
    GS_DATA,
    NATIVE,
    PAGE,
    RSP,
    STACK,
    Cpu,
    Map,
    Outcome,
    State,
    code_map,
    random_bytes,
    random_state,
)
from kernweave.errors import InternalError
from kernweave.x86.relocate import can_relocate, encode_jump, relocate_insn, way_back

SITE = NATIVE + 0x340
AHEAD, BEHIND = NATIVE + 0x900, NATIVE + 0x40
CLONE = COPY + 0x7B0
GS = 0x0100_0000
FIELD = DATA + 0x208
GS_FIELD = GS_DATA + 0x208 - GS
SEEDS = range(6)


def run_at(cpu: Cpu, addr: int, code: bytes, state: State, seed: int) -> Outcome:
    """Run code at one place; the other page has none, so nothing leads there unseen."""
    rng = random.Random(seed)
    maps = [
        code_map(NATIVE, *[(addr, code)] * (addr == SITE)),
        code_map(COPY, *[(addr, code)] * (addr == CLONE)),
        *(Map(addr, random_bytes(rng)) for addr in (DATA, GS_DATA)),
    ]
    stack = bytearray(random_bytes(rng))
    top = state.regs[RSP] - STACK
    if 0 <= top < PAGE:
        stack[top : top + 8] = AHEAD.to_bytes(8, "little")  # for a ret
    data = bytearray(maps[2].data)
    data[FIELD - DATA : FIELD - DATA + 8] = BEHIND.to_bytes(8, "little")  # for a jump
    maps[2] = Map(DATA, bytes(data))
    moved = State(state.regs, state.flags, addr)
    return cpu.arrive([*maps, Map(STACK, bytes(stack))], moved, GS)


def check_same(cpu: Cpu, code: bytes, copy: bytes, state: State, seed: int) -> Outcome:
    """Run the native instruction and the copy; compare everything there is."""
    native = run_at(cpu, SITE, code, state, seed)
    clone = run_at(cpu, CLONE, copy, state, seed)
    assert clone == native, f"seed {seed}, {code.hex(' ')} became {copy.hex(' ')}, {state}"
    return native


def check_relocation(cpu: Cpu, code: bytes, state: State, seed: int) -> Outcome:
    return check_same(cpu, code, displaced(code), state, seed)


def displaced(code: bytes) -> bytes:
    """An instruction of the site as it is in a trampoline: its copy, and the way back."""
    copy = relocate_insn(code, SITE, CLONE)
    return copy + way_back(code, SITE, CLONE + len(copy))


RIP_FIELD = mem(Register.RIP, disp=FIELD)
GS_RIP_FIELD = mem(Register.RIP, disp=GS_FIELD, segment=Register.GS)
GS_ABSOLUTE = mem(disp=GS_FIELD, segment=Register.GS)


def locked(instruction: Instruction) -> Instruction:
    instruction.has_lock_prefix = True
    return instruction


TABLE: dict[str, bytes] = {
    name: assemble(SITE, instruction)
    for name, instruction in {
        "load": Instruction.create_reg_mem(Code.MOV_R64_RM64, Register.RDI, RIP_FIELD),
        "store": Instruction.create_mem_reg(Code.MOV_RM32_R32, RIP_FIELD, Register.R10D),
        "store imm32": Instruction.create_mem_i32(Code.MOV_RM64_IMM32, RIP_FIELD, -5),
        "store imm8": Instruction.create_mem_u32(Code.MOV_RM8_IMM8, RIP_FIELD, 0xA5),
        "compare imm8": Instruction.create_mem_i32(Code.CMP_RM64_IMM8, RIP_FIELD, -1),
        "test imm32": Instruction.create_mem_i32(Code.TEST_RM32_IMM32, RIP_FIELD, 0x10101),
        "add": Instruction.create_mem_reg(Code.ADD_RM64_R64, RIP_FIELD, Register.RSI),
        "increment": Instruction.create_mem(Code.INC_RM32, RIP_FIELD),
        "locked add": locked(
            Instruction.create_mem_reg(Code.XADD_RM64_R64, RIP_FIELD, Register.RSI)
        ),
        "locked bts": locked(Instruction.create_mem_u32(Code.BTS_RM64_IMM8, RIP_FIELD, 41)),
        "cmpxchg": Instruction.create_mem_reg(Code.CMPXCHG_RM64_R64, RIP_FIELD, Register.RCX),
        "push memory": Instruction.create_mem(Code.PUSH_RM64, RIP_FIELD),
        "pop memory": Instruction.create_mem(Code.POP_RM64, RIP_FIELD),
        "push imm32": Instruction.create_i32(Code.PUSHQ_IMM32, -0x12345678),
        "lea": Instruction.create_reg_mem(Code.LEA_R64_M, Register.R12, RIP_FIELD),
        "movabs": Instruction.create_reg_u64(
            Code.MOV_R64_IMM64, Register.R15, 0xFFFF_8880_1234_5678
        ),
        "mov imm32": Instruction.create_reg_u32(Code.MOV_R32_IMM32, Register.EBP, 0xFFFF_FFFF),
        "move the stack": Instruction.create_reg_i32(Code.SUB_RM64_IMM32, Register.RSP, 0x180),
        "gs load": Instruction.create_reg_mem(Code.MOV_R64_RM64, Register.RAX, GS_ABSOLUTE),
        "gs increment": Instruction.create_mem(Code.INC_RM64, GS_RIP_FIELD),
        "gs rip load": Instruction.create_reg_mem(Code.MOV_R64_RM64, Register.R8, GS_RIP_FIELD),
        "gs store imm8": Instruction.create_mem_u32(Code.MOV_RM8_IMM8, GS_RIP_FIELD, 7),
        "jump ahead": Instruction.create_branch(Code.JMP_REL32_64, AHEAD),
        "jump behind": Instruction.create_branch(Code.JMP_REL32_64, BEHIND),
        "jump through memory": Instruction.create_mem(Code.JMP_RM64, RIP_FIELD),
        "call through memory": Instruction.create_mem(Code.CALL_RM64, RIP_FIELD),
        "call ahead": Instruction.create_branch(Code.CALL_REL32_64, AHEAD),
        "call behind": Instruction.create_branch(Code.CALL_REL32_64, BEHIND),
        "call next": Instruction.create_branch(Code.CALL_REL32_64, SITE + 5),
    }.items()
}
# what room with dead filler makes long enough
TABLE["ret"] = assemble(SITE, Instruction.create(Code.RETNQ))
TABLE["ret imm16"] = assemble(SITE, Instruction.create_u32(Code.RETNQ_IMM16, 0x18))
TABLE["short jump"] = assemble(SITE, Instruction.create_branch(Code.JMP_REL8_64, SITE + 0x70))
# prefixes gcc adds for padding; an encoder has no reason to
TABLE["cs call"] = b"\x2e" + assemble(
    SITE + 1, Instruction.create_branch(Code.CALL_REL32_64, BEHIND)
)
TABLE["cs jump"] = b"\x2e" + assemble(SITE + 1, Instruction.create_branch(Code.JMP_REL32_64, AHEAD))
TABLE["long nop"] = bytes.fromhex("66 66 2e 0f 1f 84 00 00 00 00 00")


@pytest.mark.parametrize("name", TABLE)
def test_relocated_instruction_has_the_same_effect(cpu: Cpu, name: str) -> None:
    for seed in SEEDS:
        check_relocation(cpu, TABLE[name], random_state(random.Random(seed), SITE), seed)


CONDITIONS: list[Any] = [Code.JO_REL32_64 + 3 * i for i in range(16)]


def test_conditions_are_the_sixteen_long_jumps() -> None:
    shown = {str(Instruction.create_branch(code, AHEAD)).split()[0] for code in CONDITIONS}
    assert len(shown) == 16
    assert {len(assemble(SITE, Instruction.create_branch(c, AHEAD))) for c in CONDITIONS} == {6}


@pytest.mark.parametrize("code", CONDITIONS)
def test_relocated_branch_goes_both_ways(cpu: Cpu, code: Any) -> None:
    branch = assemble(SITE, Instruction.create_branch(code, BEHIND))
    went = set()
    for seed in range(24):
        state = random_state(random.Random(seed), SITE)
        went.add(check_relocation(cpu, branch, state, seed).state.rip)
    assert went == {BEHIND, SITE + len(branch)}


@pytest.mark.parametrize("name", ["call ahead", "call behind", "cs call", "call through memory"])
def test_relocated_call_shows_the_native_return_address(cpu: Cpu, name: str) -> None:
    state = random_state(random.Random(0), SITE)
    outcome = run_at(cpu, CLONE, displaced(TABLE[name]), state, 0)
    top = outcome.state.regs[RSP] - STACK
    after = SITE + len(TABLE[name])
    assert outcome.memory[2][top : top + 8] == after.to_bytes(8, "little")


# ---- generated instructions ---------------------------------------------------------------------

WIDTHS = {8: Register.AL, 16: Register.AX, 32: Register.EAX, 64: Register.RAX}


def codes(pattern: str, names: str) -> list[tuple[Any, int]]:
    """(code, bits) of an encoding for each mnemonic and operand size it exists in."""
    found = []
    for name in names.split():
        for bits in WIDTHS:
            code = getattr(Code, f"{name}_" + pattern.format(bits, imm=min(bits, 32)), None)
            if code is not None:
                found.append((code, bits))
    return found


ARITHMETIC = "ADD OR ADC SBB AND SUB XOR CMP"
REG_MEM = codes("R{0}_RM{0}", f"{ARITHMETIC} MOV IMUL CMOVE CMOVB CMOVG BSF")
MEM_REG = codes("RM{0}_R{0}", f"{ARITHMETIC} MOV TEST XCHG XADD CMPXCHG")
MEM_IMM = codes("RM{0}_IMM{imm}", f"{ARITHMETIC} MOV TEST") + codes("RM{0}_IMM8", "SHL ROR BT BTC")
MEM_ONLY = [*codes("RM{0}", "INC DEC NOT NEG MUL"), (Code.SETB_RM8, 8), (Code.SETLE_RM8, 8)]
SHAPES = {"REG_MEM": REG_MEM, "MEM_REG": MEM_REG, "MEM_IMM": MEM_IMM, "MEM_ONLY": MEM_ONLY}
REG_IMM = codes("RM{0}_IMM32", f"{ARITHMETIC} MOV TEST")

Case = tuple[bytes, State]


def register(bits: int, number: int) -> Any:
    """The register of a size; 8-bit ones without REX are skipped as they do not follow it."""
    if bits == 8:
        return Register.R8L + number % 8
    return WIDTHS[bits] + number


@st.composite
def operands(draw: st.DrawFn) -> tuple[iced.MemoryOperand, dict[int, int]]:
    """A memory operand with a 32-bit displacement, and registers that make it hit the data."""
    place = FIELD + draw(st.integers(-0x200, 0x400))
    use_gs = draw(st.booleans())
    if use_gs:
        place += GS_DATA - DATA - GS
    segment = Register.GS if use_gs else Register.NONE
    if draw(st.booleans()):
        return mem(Register.RIP, disp=place, segment=segment), {}
    base, index = draw(st.permutations(range(16)).map(lambda order: order[:2]))
    disp = draw(st.one_of(st.integers(-(1 << 31), -129), st.integers(128, (1 << 31) - 1)))
    scale = draw(st.sampled_from((1, 2, 4, 8)))
    value = draw(st.integers(-(1 << 40), 1 << 40))
    if index == RSP or draw(st.booleans()):
        memory = mem(Register.RAX + base, disp=disp, segment=segment)
        return memory, {base: place - disp}
    memory = mem(Register.RAX + base, Register.RAX + index, scale, disp, segment)
    return memory, {base: place - disp - scale * value, index: value}


@st.composite
def memory_cases(draw: st.DrawFn) -> Case:
    memory, fixed = draw(operands())
    number, imm = draw(st.integers(0, 15)), draw(st.integers(-(1 << 31), (1 << 31) - 1))
    shape = draw(st.sampled_from(sorted(SHAPES)))
    code, bits = draw(st.sampled_from(SHAPES[shape]))
    if shape == "REG_MEM":
        instruction = Instruction.create_reg_mem(code, register(bits, number), memory)
    elif shape == "MEM_REG":
        instruction = Instruction.create_mem_reg(code, memory, register(bits, number))
    elif shape == "MEM_IMM":
        instruction = Instruction.create_mem_i32(code, memory, _cut(imm, code))
    else:
        instruction = Instruction.create_mem(code, memory)
    return assemble(SITE, instruction), draw(states(fixed))


def _cut(imm: int, code: Any) -> int:
    """An immediate of the width its encoding has."""
    for bits in (8, 16):
        if iced.OpCodeInfo(code).op_kind(1) in _SMALL[bits]:
            return imm % (1 << bits) - (1 << bits - 1)
    return imm


_SMALL = {
    8: (iced.OpCodeOperandKind.IMM8, iced.OpCodeOperandKind.IMM8SEX64),
    16: (iced.OpCodeOperandKind.IMM16,),
}


@st.composite
def states(draw: st.DrawFn, fixed: dict[int, int]) -> State:
    state = random_state(random.Random(draw(st.integers(0, 1 << 32))), SITE)
    for number, value in fixed.items():
        state = state.with_reg(number, value)
    return State(state.regs, draw(st.integers(0, FLAGS)) & FLAGS, SITE)


@st.composite
def register_cases(draw: st.DrawFn) -> Case:
    code, bits = draw(st.sampled_from(REG_IMM))
    number, imm = draw(st.integers(0, 15)), draw(st.integers(-(1 << 31), (1 << 31) - 1))
    instruction = Instruction.create_reg_i32(code, register(bits, number), imm)
    return assemble(SITE, instruction), draw(states({}))


@given(case=st.one_of(memory_cases(), memory_cases(), register_cases()), seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_relocated_generated_instruction_has_the_same_effect(
    cpu: Cpu, case: Case, seed: int
) -> None:
    code, state = case
    assert len(code) >= 5
    check_relocation(cpu, code, state, seed)


# ---- what the check must notice -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["load", "store", "lea", "gs increment", "jump ahead", "short jump"]
)
def test_check_of_unrelocated_bytes_fails(cpu: Cpu, name: str) -> None:
    code = TABLE[name]
    copy = code + encode_jump(CLONE + len(code), SITE + len(code))
    with pytest.raises(AssertionError):
        check_same(cpu, code, copy, random_state(random.Random(0), SITE), 0)


@pytest.mark.parametrize("name", ["call ahead", "cs call"])
def test_check_of_call_from_the_copy_fails(cpu: Cpu, name: str) -> None:
    call = iced.Decoder(64, TABLE[name], ip=SITE).decode()
    with pytest.raises(AssertionError):
        check_same(cpu, TABLE[name], assemble(CLONE, call), random_state(random.Random(0), SITE), 0)


def test_check_of_inverted_branch_fails(cpu: Cpu) -> None:
    taken = assemble(SITE, Instruction.create_branch(Code.JE_REL32_64, AHEAD))
    wrong = assemble(SITE, Instruction.create_branch(Code.JNE_REL32_64, AHEAD))
    copy = displaced(wrong)
    with pytest.raises(AssertionError):
        check_same(cpu, taken, copy, random_state(random.Random(0), SITE), 0)


def test_check_of_way_back_to_the_wrong_place_fails(cpu: Cpu) -> None:
    code = TABLE["movabs"]
    copy = code + encode_jump(CLONE + len(code), SITE + len(code) + 1)
    with pytest.raises(AssertionError):
        check_same(cpu, code, copy, random_state(random.Random(0), SITE), 0)


# ---- what cannot be relocated -------------------------------------------------------------------


@pytest.mark.parametrize("distance", [-(1 << 31), (1 << 31) - 1])
def test_jump_in_reach_is_encoded(distance: int) -> None:
    source = 0xFFFF_FFFF_0000_0000
    code = encode_jump(source, source + 5 + distance)
    assert iced.Decoder(64, code, ip=source).decode().near_branch_target == source + 5 + distance


@pytest.mark.parametrize("distance", [-(1 << 31) - 1, 1 << 31])
def test_jump_out_of_reach_is_refused(distance: int) -> None:
    with pytest.raises(InternalError, match="out of reach"):
        encode_jump(1 << 40, (1 << 40) + 5 + distance)


def test_relocation_of_rip_operand_out_of_reach_is_refused() -> None:
    with pytest.raises(InternalError, match="cannot re-encode"):
        relocate_insn(TABLE["load"], SITE, SITE + (1 << 40))


@pytest.mark.parametrize("code", [TABLE["load"][:-1], TABLE["load"] + b"\x90", b"\x06", b""])
def test_relocation_of_other_than_one_instruction_is_refused(code: bytes) -> None:
    with pytest.raises(InternalError, match="is not one instruction"):
        relocate_insn(code, SITE, CLONE)


def test_relocation_of_call_by_the_stack_pointer_is_refused() -> None:
    code = assemble(SITE, Instruction.create_mem(Code.CALL_RM64, mem(Register.RSP, disp=0x208)))
    assert not can_relocate(code)
    assert can_relocate(TABLE["call through memory"])
    with pytest.raises(InternalError, match="cannot displace"):
        relocate_insn(code, SITE, CLONE)


@pytest.mark.parametrize("code", [Code.VMCALL, Code.VMMCALL, Code.VMGEXIT], ids=str)
def test_call_of_the_hypervisor_stays_as_it_is_and_comes_back(code: Any) -> None:
    native = assemble(SITE, Instruction.create(code))
    assert can_relocate(native)
    assert relocate_insn(native, SITE, CLONE) == native
    behind = CLONE + len(native)
    assert way_back(native, SITE, behind) == encode_jump(behind, SITE + len(native))


def test_relocated_code_that_does_not_return_ends_in_int3() -> None:
    for name in ("ret", "jump ahead", "jump through memory", "short jump"):
        assert displaced(TABLE[name])[-1:] == b"\xcc"
