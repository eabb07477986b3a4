# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness itself: it loads what it is given, reports what happened, survives crashes."""

from __future__ import annotations

import random
import signal

import iced_x86 as iced
import pytest
from iced_x86 import Code, Instruction, Register

from exec.asm import assemble, mem
from exec.cpu import COPY, DATA, FLAGS, NATIVE, PAGE, STACK, Cpu, Map, code_map, random_state

SEEDS = range(20)


def stack_and_data() -> list[Map]:
    return [Map(STACK, bytes(PAGE)), Map(DATA, bytes(range(256)) * 16)]


@pytest.mark.parametrize("seed", SEEDS)
def test_cpu_of_no_code_ends_in_the_start_state(cpu: Cpu, seed: int) -> None:
    state = random_state(random.Random(seed), NATIVE + 7)
    outcome = cpu.arrive([code_map(NATIVE), *stack_and_data()], state)
    assert outcome.state == state
    assert outcome.memory == tuple(m.data for m in stack_and_data())


def test_cpu_start_states_have_every_flag_set_and_clear() -> None:
    states = [random_state(random.Random(seed), NATIVE) for seed in SEEDS]
    either = all_set = 0
    for state in states:
        either |= state.flags
        all_set |= ~state.flags
    assert either == FLAGS
    assert all_set & FLAGS == FLAGS


def test_cpu_reports_registers_and_memory_that_change(cpu: Cpu) -> None:
    code = assemble(
        NATIVE,
        Instruction.create_mem_reg(Code.MOV_RM64_R64, mem(disp=DATA + 8), Register.R9),
        Instruction.create_reg_i32(Code.MOV_RM64_IMM32, Register.R9, -2),
    )
    state = random_state(random.Random(0), NATIVE).with_reg(9, 0x1122334455667788)
    outcome = cpu.arrive([code_map(NATIVE, (NATIVE, code)), *stack_and_data()], state)
    assert outcome.state.regs == state.with_reg(9, -2).regs
    assert outcome.state.rip == NATIVE + len(code)
    assert outcome.memory[1][8:16] == (0x1122334455667788).to_bytes(8, "little")


def test_cpu_uses_gs_base(cpu: Cpu) -> None:
    load = Instruction.create_reg_mem(
        Code.MOV_R64_RM64, Register.RAX, mem(disp=0x10, segment=Register.GS)
    )
    code = assemble(NATIVE, load)
    state = random_state(random.Random(0), NATIVE)
    outcome = cpu.arrive([code_map(NATIVE, (NATIVE, code)), *stack_and_data()], state, gs=DATA)
    assert outcome.state.regs[0] == int.from_bytes(bytes(range(16, 24)), "little")


def test_cpu_crash_fails_with_bytes_and_state(cpu: Cpu) -> None:
    load = Instruction.create_reg_mem(Code.MOV_R64_RM64, Register.RAX, mem(disp=COPY))
    maps = [code_map(NATIVE, (NATIVE, assemble(NATIVE, load))), *stack_and_data()]
    state = random_state(random.Random(0), NATIVE)
    with pytest.raises(AssertionError, match=rf"signal 11 at {NATIVE:#x} about {COPY:#x}") as error:
        cpu.arrive(maps, state)
    assert assemble(NATIVE, load).hex(" ") in str(error.value)
    assert str(state) in str(error.value)


def test_cpu_killed_by_code_is_reported_and_next_job_runs(cpu: Cpu) -> None:
    exit_group = assemble(
        NATIVE,
        Instruction.create_reg_i32(Code.MOV_R32_IMM32, Register.EAX, 231),
        Instruction.create(Code.SYSCALL),
    )
    state = random_state(random.Random(0), NATIVE).with_reg(7, 9)
    maps = [code_map(NATIVE, (NATIVE, exit_group)), *stack_and_data()]
    assert cpu.run(maps, state).signal == -1009
    assert cpu.run([code_map(NATIVE), *stack_and_data()], state).signal == signal.SIGTRAP


def test_cpu_code_cannot_be_written(cpu: Cpu) -> None:
    store = Instruction.create_mem_reg(Code.MOV_RM64_R64, mem(disp=NATIVE), Register.RAX)
    maps = [code_map(NATIVE, (NATIVE, assemble(NATIVE, store))), *stack_and_data()]
    assert cpu.run(maps, random_state(random.Random(0), NATIVE)).signal == signal.SIGSEGV


def test_assembler_takes_addresses_into_account() -> None:
    jump = Instruction.create_branch(Code.JMP_REL32_64, NATIVE)
    decoded = iced.Decoder(64, assemble(COPY, jump), ip=COPY).decode()
    assert decoded.near_branch_target == NATIVE
