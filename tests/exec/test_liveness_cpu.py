# SPDX-License-Identifier: GPL-2.0-or-later
"""What liveness calls dead may be overwritten: random programs on the CPU show no difference.

Per instruction of a program: stop there at the first arrival (an int3 in its place), then go on
once as it is and once with everything dead overwritten.  Both must end at the same place, with
the same memory and the same registers that the end needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from iced_x86 import Register

from exec.asm import RET, Item, Program, call, jcc, jmp, mem, op, program
from exec.cpu import (
    DATA,
    FLAGS,
    INT3,
    NATIVE,
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
from exec.test_counter import FLAG_BITS
from kernweave.analysis.code import Part, build_code
from kernweave.analysis.liveness import live_before
from kernweave.image.sites import Sites
from kernweave.x86.decode import ALL_MASK, FLAG_NAMES, FLAGS_SHIFT, REG_NAMES

CALLEE = NATIVE + 0xC00  # C, with an ftrace site
ASSEMBLY = NATIVE + 0xD00  # reads and keeps whatever it likes
HOME = NATIVE + 0xF00  # where the program returns to
RESULTS = ("rax", "rdx", "rbx", "rbp", "rsp", "r12", "r13", "r14", "r15")
FREE = [name for name in REG_NAMES if name != "rsp"]
SITES = Sites(ftrace=np.array([CALLEE], np.uint64))


def callee() -> Program:
    """Mixes its arguments into rax, then overwrites all that a C function may."""
    mix = [op("ADD_R64_RM64", "rax", name) for name in ("rdi", "rsi", "rdx", "rcx", "r8", "r9")]
    lost = ("rdi", "rsi", "rdx", "rcx", "r8", "r9", "r10", "r11")
    lose = [op("MOV_R64_IMM64", name, 0x5EED_0000 + i) for i, name in enumerate(lost)]
    return program(CALLEE, *mix, *lose, RET)


def assembly() -> Program:
    """Mixes every register into rdx and keeps the others."""
    names = [name for name in FREE if name != "rdx"]
    return program(ASSEMBLY, *[op("ADD_R64_RM64", "rdx", name) for name in names], RET)


# ---- random programs ----------------------------------------------------------------------------

BELOW = mem(Register.RSP, disp=-0x100)  # in the middle of the stack's page


def sized(name: str, bits: int) -> str:
    """The 8- or 32-bit part of a register."""
    if name[1:].isdigit():
        return name + {8: "l", 32: "d"}[bits]
    if bits == 32:
        return "e" + name[1:]
    return name[1] + "l" if name[2] == "x" else name[1:] + "l"


def random_insns(rng: random.Random) -> list[Item]:
    """One instruction; where it leaves flags undefined, a compare defines them again."""
    a, b = rng.choice(FREE), rng.choice(FREE)
    imm, cc = rng.randrange(-128, 128), rng.choice(("E", "B", "S", "O", "P", "LE", "A"))
    byte, low, low_b = sized(a, 8), sized(a, 32), sized(b, 32)
    defined: list[Item] = [
        op("MOV_R64_RM64", a, b),
        op("MOV_R32_RM32", low, low_b),
        op("MOV_R8_RM8", byte, sized(b, 8)),
        op("MOV_R64_IMM64", a, imm),
        op("XOR_R32_RM32", low, low),
        op("SBB_R64_RM64", a, a),
        op("ADD_R64_RM64", a, b),
        op("ADC_R64_RM64", a, b),
        op("SUB_R32_RM32", low, low_b),
        op("CMP_RM64_R64", a, b),
        op("TEST_RM8_R8", byte, sized(b, 8)),
        op("INC_RM64", a),
        op("DEC_RM8", byte),
        op("NEG_RM64", a),
        op(f"CMOV{cc}_R64_RM64", a, b),
        op(f"CMOV{cc}_R32_RM32", low, low_b),
        op(f"SET{cc}_RM8", byte),
        op("XCHG_RM64_R64", a, b),
        op("CMPXCHG_RM64_R64", a, b),
        op("XADD_RM64_R64", a, b),
        op("MOVSX_R64_RM8", a, sized(b, 8)),
        op("CDQE"),
        op("CQO"),
        op("LEA_R64_M", a, mem(Register.RAX + REG_NAMES.index(b), disp=0x1234)),
        op("MOV_RM64_R64", BELOW, a),
        op("MOV_R64_RM64", a, BELOW),
        op("CMC"),
        op("LAHF"),
        op("SAHF"),
        call(CALLEE),
        call(ASSEMBLY),
    ]
    undefined: list[Item] = [
        op("SHL_RM64_CL", a, "cl"),
        op("ROR_RM32_CL", low, "cl"),
        op("SHR_RM64_IMM8", a, imm & 3),
        op("BSF_R64_RM64", a, b),
        op("MUL_RM64", a),
        op("IMUL_R64_RM64", a, b),
    ]
    index = rng.randrange(len(defined) + len(undefined))
    if index < len(defined):
        return [defined[index]]
    return [undefined[index - len(defined)], op("CMP_RM64_R64", a, b)]


def random_program(rng: random.Random) -> Program:
    """Blocks that end in branches to later blocks, then a return."""
    count = rng.randrange(2, 6)
    items: list[Item] = []
    for block in range(count):
        items.append(f"block{block}")
        for _ in range(rng.randrange(1, 5)):
            items += random_insns(rng)
        target = f"block{rng.randrange(block + 1, count + 1)}"
        items += rng.choice(([], [jcc(rng.choice(("e", "b", "s", "o", "p", "g")), target)]))
        items += [jmp(target)] if rng.random() < 0.15 else []
    return program(NATIVE, *items, f"block{count}", RET)


# ---- the check ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One program with its liveness and one start state."""

    cpu: Cpu
    source: Program
    is_c: bool
    seed: int

    def live(self) -> dict[int, int]:
        """Mask of what is live, by address."""
        part = Part("f", "f", None, NATIVE, self.source.code, NATIVE, self.is_c)
        code = build_code([part], SITES)
        masks = live_before(code, SITES)
        return {int(addr): int(mask) for addr, mask in zip(code.addr, masks, strict=True)}

    def start(self) -> tuple[State, tuple[bytes, bytes]]:
        rng = random.Random(self.seed)
        state = random_state(rng, NATIVE)
        stack = bytearray(random_bytes(rng))
        top = state.regs[RSP] - STACK
        stack[top : top + 8] = HOME.to_bytes(8, "little")
        return state, (bytes(stack), random_bytes(rng))

    def run(self, state: State, memory: tuple[bytes, ...], stop: int | None = None) -> Outcome:
        pieces = [(p.addr, p.code) for p in (self.source, callee(), assembly())]
        if stop is not None:
            pieces.append((stop, INT3))
        stack, data = memory
        maps = [code_map(NATIVE, *pieces), Map(STACK, stack), Map(DATA, data)]
        return self.cpu.arrive(maps, state)

    def result(self, outcome: Outcome) -> object:
        """What the caller of the program can see of its end."""
        if not self.is_c:
            return outcome
        regs = [outcome.state.regs[REG_NAMES.index(name)] for name in RESULTS]
        return outcome.state.rip, regs, outcome.memory

    def check(self, live: dict[int, int]) -> int:
        """Overwrite what is dead at each instruction; the number of bits that were overwritten."""
        state, memory = self.start()
        overwritten = 0
        for addr in self.source.at:
            here = self.run(state, memory, stop=addr)
            if here.state.rip != addr:
                continue  # not on this path
            dead = ALL_MASK & ~live[addr]
            overwritten += dead.bit_count()
            plain = self.result(self.run(here.state, here.memory))
            other = self.result(self.run(overwrite(here.state, dead), here.memory))
            assert other == plain, (
                f"seed {self.seed}, is_c {self.is_c}, at +{addr - NATIVE:#x}, dead {dead:#x}, "
                f"{self.source.code.hex(' ')}"
            )
        return overwritten


def overwrite(state: State, dead: int) -> State:
    """Invert every dead register and flag."""
    for bit in range(len(REG_NAMES)):
        if dead >> bit & 1:
            state = state.with_reg(bit, ~state.regs[bit])
    flags = sum(FLAG_BITS[n] for i, n in enumerate(FLAG_NAMES) if dead >> FLAGS_SHIFT + i & 1)
    return replace(state, flags=(state.flags ^ flags) & FLAGS)


@pytest.mark.parametrize("is_c", [True, False])
@pytest.mark.parametrize("group", range(8))
def test_liveness_of_random_programs_is_sound(cpu: Cpu, group: int, is_c: bool) -> None:
    overwritten = 0
    for seed in range(25 * group, 25 * group + 25):
        trial = Trial(cpu, random_program(random.Random(seed)), is_c, seed)
        overwritten += trial.check(trial.live())
    assert overwritten > 100  # something was dead, so something was checked


LOOP = program(
    NATIVE,
    op("MOV_R64_IMM64", "rsi", 3),
    op("MOV_R64_IMM64", "rcx", 5),
    "head",
    op("ADD_R64_RM64", "rax", "rsi"),
    op("ADC_R64_RM64", "rdx", "rbx"),
    op("DEC_RM8", "cl"),
    jcc("ne", "head"),
    RET,
)


@pytest.mark.parametrize("is_c", [True, False])
def test_liveness_of_a_loop_is_sound(cpu: Cpu, is_c: bool) -> None:
    trial = Trial(cpu, LOOP, is_c, 0)
    assert trial.check(trial.live()) > 0


@pytest.mark.parametrize("name", ["rcx", "rsi", "rdx", "rbx"])
def test_check_of_live_register_called_dead_fails(cpu: Cpu, name: str) -> None:
    trial = Trial(cpu, LOOP, True, 0)
    live = trial.live()
    at = LOOP.labels["head"]
    assert live[at] >> REG_NAMES.index(name) & 1
    live[at] &= ~(1 << REG_NAMES.index(name))
    with pytest.raises(AssertionError, match="seed 0"):
        trial.check(live)


@pytest.mark.parametrize(("row", "name"), [(3, "cf"), (5, "zf")])
def test_check_of_live_flag_called_dead_fails(cpu: Cpu, row: int, name: str) -> None:
    trial = Trial(cpu, LOOP, True, 0)
    live = trial.live()
    bit = 1 << FLAGS_SHIFT + FLAG_NAMES.index(name)
    assert live[LOOP.at[row]] & bit
    live[LOOP.at[row]] &= ~bit
    with pytest.raises(AssertionError, match="seed 0"):
        trial.check(live)


def test_check_of_everything_called_dead_fails(cpu: Cpu) -> None:
    rsp = 1 << RSP
    for seed in range(20):
        trial = Trial(cpu, random_program(random.Random(seed)), True, seed)
        with pytest.raises(AssertionError, match=f"seed {seed}"):
            trial.check(dict.fromkeys(trial.live(), rsp))


SHIFTS = {
    "shift by no bits keeps flags": (
        op("MOV_R64_IMM64", "rcx", 32 * 2),
        op("SHL_RM32_CL", "ebx", "cl"),
        op("SETB_RM8", "al"),
        op("SETE_RM8", "dl"),
    ),
    "rotate through carry": (op("RCL_RM64_IMM8", "rax", 1), op("SETB_RM8", "dl")),
    "scan of zero keeps the destination": (
        op("XOR_R32_RM32", "ecx", "ecx"),
        op("BSF_R64_RM64", "rax", "rcx"),
    ),
}


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("is_c", [True, False])
def test_liveness_of_conditional_writes_is_sound(cpu: Cpu, name: str, is_c: bool) -> None:
    source = program(NATIVE, *SHIFTS[name], RET)
    for seed in range(4):
        trial = Trial(cpu, source, is_c, seed)
        trial.check(trial.live())
