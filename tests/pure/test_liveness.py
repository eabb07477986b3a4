# SPDX-License-Identifier: GPL-2.0-or-later
"""Liveness: known answers for each rule that the module's docstring calls certain.

That nothing live is ever called dead is checked on the CPU, in exec/test_liveness_cpu.py.
"""

from __future__ import annotations

import iced_x86 as iced
import numpy as np
import pytest

from exec.asm import NOP5, RET, Item, Program, call, jcc, jmp, mem, op, program, reg
from kernweave.analysis.code import Part, build_code
from kernweave.analysis.liveness import live_before
from kernweave.image.sites import Sites
from kernweave.x86.decode import ALL_MASK, FLAG_NAMES, FLAGS_MASK, FLAGS_SHIFT, REG_NAMES, REGS_MASK

ADDR = 0xFFFF_FFFF_8100_1000
CALLEE = 0xFFFF_FFFF_8180_0000  # has an ftrace site
ASSEMBLY = 0xFFFF_FFFF_8190_0000  # has none
THUNK = 0xFFFF_FFFF_81A0_0000

KEPT = {"rbx", "rbp", "rsp", "r12", "r13", "r14", "r15"}
ARGUMENTS = {"rax", "rdi", "rsi", "rdx", "rcx", "r8", "r9", "rsp"}
AT_RETURN = KEPT | {"rax", "rdx"}
FLAGS = set(FLAG_NAMES)
EVERYTHING = set(REG_NAMES) | FLAGS
REGISTERS = set(REG_NAMES)


def addrs(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def names(mask: int) -> set[str]:
    regs = {name for bit, name in enumerate(REG_NAMES) if mask >> bit & 1}
    return regs | {name for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1}


def live(source: Program, sites: Sites | None = None, *, is_c: bool = True) -> list[set[str]]:
    """What is live before each instruction."""
    part = Part("f", "f", None, source.addr, source.code, source.addr, is_c)
    known = sites or Sites(ftrace=addrs(CALLEE), return_thunks=addrs(THUNK))
    code = build_code([part], known)
    assert code.addr.tolist() == list(source.at)
    return [names(int(mask)) for mask in live_before(code, known)]


def before(*items: Item, is_c: bool = True) -> list[set[str]]:
    return live(program(ADDR, *items), is_c=is_c)


def test_masks_are_the_names() -> None:
    assert names(ALL_MASK) == EVERYTHING
    assert (names(REGS_MASK), names(FLAGS_MASK)) == (REGISTERS, FLAGS)


def test_return_of_c_needs_results_and_kept_registers() -> None:
    assert before(RET) == [AT_RETURN]


def test_return_through_thunk_is_a_return() -> None:
    assert before(jmp(THUNK)) == [AT_RETURN]
    assert before(jmp(THUNK), is_c=False) == [EVERYTHING]


def test_return_of_assembly_needs_everything() -> None:
    assert before(RET, is_c=False) == [EVERYTHING]


def test_register_is_dead_until_overwritten() -> None:
    load = op("MOV_R64_RM64", "rax", "rcx")
    assert before(load, RET)[0] == AT_RETURN - {"rax"} | {"rcx"}


def test_partial_write_keeps_the_register_live() -> None:
    assert before(op("MOV_R8_RM8", "al", "cl"), RET)[0] == AT_RETURN | {"rcx"}


def test_zeroing_needs_no_old_value() -> None:
    assert before(op("XOR_R32_RM32", "eax", "eax"), RET)[0] == AT_RETURN - {"rax"}


def test_flags_are_live_between_compare_and_branch() -> None:
    compare = op("CMP_RM64_R64", "rdi", "rsi")
    found = before(compare, jcc("b", "out"), NOP5, "out", RET)
    assert not found[0] & FLAGS
    assert found[1] & FLAGS == {"cf"}
    assert not found[2] & FLAGS


def test_carry_lives_through_increment() -> None:
    found = before(
        op("ADD_R64_RM64", "rax", "rdx"), op("INC_RM64", "rcx"), op("ADC_RM64_IMM8", "rax", 0), RET
    )
    assert found[1] & FLAGS == {"cf"}


def test_register_used_on_one_path_is_live_before_the_branch() -> None:
    source = program(
        ADDR,
        jcc("e", "use"),
        op("XOR_R32_RM32", "ecx", "ecx"),
        RET,
        "use",
        op("MOV_R64_RM64", "rax", "rcx"),
        RET,
    )
    found = live(source)
    assert "rcx" in found[0]
    assert "rcx" not in found[1]


def test_register_used_in_the_next_round_is_live_at_the_end_of_a_loop() -> None:
    source = program(
        ADDR,
        op("MOV_R64_IMM64", "rcx", 8),
        "head",
        op("ADD_R64_RM64", "rax", "rsi"),
        op("DEC_RM64", "rcx"),
        jcc("ne", "head"),
        RET,
    )
    found = live(source)
    assert "rcx" not in found[0]
    assert {"rsi", "rcx"} <= found[1] & found[3]
    assert not {"rsi", "rcx"} & found[4]


def test_ftrace_site_of_the_function_itself_loses_r10_r11_and_flags() -> None:
    source = program(
        ADDR, NOP5, op("MOV_R64_RM64", "rax", "r10"), op("ADC_R64_RM64", "rax", "r11"), RET
    )
    with_site = Sites(ftrace=addrs(ADDR))
    assert live(source, with_site)[0] == AT_RETURN | ARGUMENTS
    assert live(source, Sites())[0] == AT_RETURN - {"rax"} | {"r10", "r11", "cf"}


def test_call_of_ftraced_function_loses_what_is_not_kept() -> None:
    found = before(call(CALLEE), op("MOV_R64_RM64", "rdx", "rcx"), RET)
    assert found[0] == ARGUMENTS | KEPT
    assert "rcx" in found[1]


def test_call_of_ftraced_function_from_assembly_reads_everything() -> None:
    assert before(call(CALLEE), RET, is_c=False)[0] == EVERYTHING


@pytest.mark.parametrize(
    "item",
    [call(ASSEMBLY), op("CALL_RM64", "rax"), op("CALL_RM64", mem(reg("rax")))],
    ids=["assembly", "register", "memory"],
)
def test_call_of_unknown_code_reads_every_register_but_no_flags(item: Item) -> None:
    assert before(item, RET)[0] == REGISTERS
    assert before(item, RET, is_c=False)[0] == EVERYTHING


def test_call_of_unknown_code_overwrites_nothing() -> None:
    found = before(op("CMP_RM64_R64", "rdi", "rsi"), call(ASSEMBLY), RET)
    assert not found[0] & FLAGS
    assert found[0] == REGISTERS


def test_call_in_function_that_pops_flags_reads_them() -> None:
    source = (op("POPFQ"), call(ASSEMBLY), RET)
    assert before(*source)[1] == EVERYTHING


def test_jump_to_ftraced_function_needs_arguments_and_kept_registers() -> None:
    assert before(jmp(CALLEE)) == [ARGUMENTS | KEPT]
    assert before(jmp(CALLEE), is_c=False) == [EVERYTHING]


@pytest.mark.parametrize(
    ("item", "needed"),
    [
        (jmp(ASSEMBLY), EVERYTHING),
        (op("JMP_RM64", "rax"), REGISTERS),
        (jcc("e", ASSEMBLY), EVERYTHING),
        (b"\x06\xc0", EVERYTHING),
    ],
    ids=["jump", "indirect jump", "branch", "invalid"],
)
def test_leaving_for_an_unknown_place_needs_every_register(item: Item, needed: set[str]) -> None:
    assert before(item, RET)[0] == needed
    assert before(item, RET, is_c=False)[0] == EVERYTHING


def test_interrupt_return_needs_every_register_but_loads_the_flags() -> None:
    assert before(op("IRETQ"), RET)[0] == REGISTERS


@pytest.mark.parametrize("item", [op("UD2"), op("CLI"), call(ASSEMBLY)], ids=str)
def test_falling_off_the_end_needs_everything(item: Item) -> None:
    assert before(item)[0] >= REGISTERS
    assert before(op("CLI"), item, is_c=False)[0] == EVERYTHING


def test_static_call_reads_every_register() -> None:
    source = program(ADDR, call(CALLEE), RET)
    ftrace = addrs(CALLEE)
    assert live(source, Sites(ftrace=ftrace))[0] != REGISTERS
    assert live(source, Sites(ftrace=ftrace, static_calls=addrs(ADDR)))[0] == REGISTERS


def test_faulting_load_kills_nothing_and_goes_to_its_fixup() -> None:
    source = program(
        ADDR,
        op("MOV_R64_RM64", "rax", mem(reg("rdi"))),
        RET,
        "fixup",
        op("MOV_R64_RM64", "rdx", "rcx"),
        RET,
    )
    plain = live(source, Sites())
    assert not {"rax", "rcx"} & plain[0]
    sites = Sites(exceptions=addrs(ADDR), fixups=addrs(source.labels["fixup"]))
    assert {"rax", "rcx"} <= live(source, sites)[0]


def test_fault_with_fixup_elsewhere_needs_everything() -> None:
    source = program(ADDR, op("MOV_R64_RM64", "rax", mem(reg("rdi"))), RET)
    sites = Sites(exceptions=addrs(ADDR), fixups=addrs(ASSEMBLY))
    assert live(source, sites)[0] == EVERYTHING


@pytest.mark.parametrize("now", ["nop", "jump"])
def test_jump_label_goes_both_ways_whatever_it_is_now(now: str) -> None:
    source = program(
        ADDR,
        NOP5 if now == "nop" else jmp("slow"),
        op("MOV_R64_RM64", "rax", "rcx"),
        RET,
        "slow",
        op("MOV_R64_RM64", "rax", "rsi"),
        RET,
    )
    sites = Sites(jump_labels=addrs(ADDR), jump_targets=addrs(source.labels["slow"]))
    assert live(source, sites)[0] == AT_RETURN - {"rax"} | {"rcx", "rsi"}


def test_sibling_part_is_followed_by_its_own_code() -> None:
    hot = program(ADDR, jmp(CALLEE + 0x40))
    cold = program(CALLEE + 0x40, op("MOV_R64_RM64", "rax", "r9"), RET)
    parts = [
        Part("f", "f", None, hot.addr, hot.code, ADDR, True),
        Part("f.cold", "f.cold", None, cold.addr, cold.code, ADDR, True),
    ]
    code = build_code(parts, Sites())
    assert names(int(live_before(code, Sites())[0])) == AT_RETURN - {"rax"} | {"r9"}


def test_padding_is_not_fallen_into() -> None:
    int3 = iced.Instruction.create(iced.Code.INT3)
    source = program(ADDR, RET, int3, int3)
    part = Part("f", "f", None, ADDR, source.code, ADDR, True)
    code = build_code([part], Sites())
    assert [names(int(mask)) for mask in live_before(code, Sites())] == [AT_RETURN]


def test_no_code_has_no_rows() -> None:
    assert live_before(build_code([], Sites()), Sites()).tolist() == []
