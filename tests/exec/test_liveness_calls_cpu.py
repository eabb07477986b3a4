# SPDX-License-Identifier: GPL-2.0-or-later
"""What liveness across calls calls dead may be overwritten: random programs of several functions.

As in test_liveness_cpu.py, for every instruction of every function: stop there at its first
arrival, overwrite everything dead, go on.  The end must be that of the undisturbed run.

Assembly functions do what they like.  C functions keep to the calling convention: they give back
what they must keep, take nothing in r10, r11 and the flags, and whoever calls one does not read
afterwards what it may have overwritten.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from iced_x86 import Register

from exec.asm import NOP5, RET, Item, Program, call, jcc, jmp, jmp_short, mem, op, program
from exec.cpu import (
    DATA,
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
from exec.test_liveness_cpu import (
    BELOW,
    CALLEE,
    HOME,
    RESULTS,
    assembly,
    callee,
    overwrite,
    random_insns,
)
from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.liveness import solve_liveness
from kernweave.image.sites import Sites
from kernweave.x86.decode import ALL_MASK, REG_NAMES, Flow, decode

SLOTS = tuple(NATIVE + off for off in (0, 0x400, 0x580, 0x700, 0x880))  # main and assembly
C_SLOT, STOP_SLOT, THUNK = NATIVE + 0xA00, NATIVE + 0xB80, NATIVE + 0xE00
ROUNDS = 2  # of each loop or recursion
CONDITIONS = ("e", "b", "s", "o", "p", "g", "ne", "ae")
KEPT = ("rbx", "rbp", "r12", "r13", "r14", "r15")
LOST = ("rcx", "rsi", "rdi", "r8", "r9", "r10", "r11")
GROUPS, PER_GROUP = 10, 20
THUNK_CODE = program(THUNK, op("JMP_RM64", "rax"))


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a program.

    Attributes:
        source: its code.
        is_c: whether it keeps to the calling convention; with an ftrace site, main apart.
        cut: where its second part begins, None: it has one.
        jump_labels: (address, target) of each.
    """

    source: Program
    is_c: bool
    cut: int | None = None
    jump_labels: tuple[tuple[int, int], ...] = ()


# ---- random functions ---------------------------------------------------------------------------


def lose() -> list[Item]:
    """Overwrite what a C function may have overwritten, its results apart."""
    zeros: list[Item] = [op("MOV_R64_IMM64", name, 0x1057 + i) for i, name in enumerate(LOST)]
    return [*zeros, op("CMP_RM64_R64", "rax", "rdx")]


@dataclass
class Writer:
    """Writes one function.

    Attributes:
        rng: for all choices.
        number: of the function: those of higher numbers may be called, others a few times.
        is_c: whether it keeps to the calling convention.
        later: functions that may be called.
        items: the function so far.
        labels: names of its jump labels' targets, by the names of their places.
    """

    rng: random.Random
    number: int
    is_c: bool
    later: list[Function]
    items: list[Item] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    _names: int = 0

    def name(self) -> str:
        self._names += 1
        return f"label{self._names}"

    def some_callee(self) -> Function | None:
        return self.rng.choice(self.later) if self.later else None

    def place_of(self, function: Function) -> int:
        """An assembly function's start, or one of its blocks."""
        places = [at for name, at in function.source.labels.items() if name.startswith("block")]
        return function.source.addr if function.is_c else self.rng.choice(places)

    def add_call(self) -> None:
        """A call of a later function: direct, into its middle, indirect or through a thunk."""
        target = self.some_callee()
        if target is None:
            return
        if self.is_c and not target.is_c:
            self.items.append(call(self.place_of(target)))
            return
        if self.is_c:  # an indirect call passes whatever an argument register holds
            passed = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
            self.items += [op("MOV_R64_RM64", a, self.rng.choice(KEPT)) for a in passed]
        load = op("MOV_R64_IMM64", "rax", self.place_of(target))
        ways: list[list[Item]] = [
            [call(self.place_of(target))],
            [load, op("CALL_RM64", "rax")],
            [load, call(THUNK)],
        ]
        self.items += self.rng.choice(ways)
        self.items += lose() if target.is_c else []

    def add_limited(self, counter: int, *items: Item) -> None:
        """Something that is done `ROUNDS` times at most."""
        over = self.name()
        count = mem(disp=DATA + 8 * counter)
        self.items += [op("DEC_RM64", count), jcc("le", over), *items, over]

    def add_popped_call(self) -> None:
        """A call for its push alone, in front of a trap: __FILL_RETURN_BUFFER."""
        trap, inside = self.name(), self.name()
        pop = op("LEA_R64_M", "rsp", mem(Register.RSP, disp=8))
        self.items += [call(inside), trap, jmp_short(trap), inside, pop]

    def add_jump_label(self, target: str) -> None:
        place = self.name()
        self.labels[place] = target
        self.items += [place, self.rng.choice((NOP5, jmp(target)))]

    def add_something(self, last: str) -> None:
        kind = self.rng.random()
        if kind < 0.22:
            self.add_call()
        elif kind < 0.26 and not self.is_c:
            self.add_limited(
                self.number,
                call(self.rng.choice(SLOTS[:1] if not self.number else SLOTS[1 : self.number + 1])),
            )
        elif kind < 0.30:
            self.add_popped_call()
        elif kind < 0.34:
            self.add_jump_label(last)
        else:
            self.items += random_insns(self.rng)

    def add_blocks(self, most: int) -> None:
        count = self.rng.randrange(1, most + 1)
        for block in range(count):
            self.items.append(f"block{block}")
            for _ in range(self.rng.randrange(1, 4)):
                self.add_something(f"block{count}")
            if self.rng.random() < 0.5:
                later = f"block{self.rng.randrange(block + 1, count + 1)}"
                self.items.append(jcc(self.rng.choice(CONDITIONS), later))
            if self.rng.random() < 0.15:
                self.add_limited(8 + self.number, jmp(f"block{self.rng.randrange(block + 1)}"))
        self.items.append(f"block{count}")

    def add_tail(self) -> None:
        """A return, behind a conditional tail call or none, or a tail call."""
        target = self.some_callee()
        if target is None or target.is_c:
            self.items.append(RET)
            return
        ends: list[list[Item]] = [
            [RET],
            [jmp(self.place_of(target))],
            [jcc(self.rng.choice(CONDITIONS), self.place_of(target)), RET],
        ]
        self.items += self.rng.choice(ends)

    def finish(self, addr: int, room: int) -> Function:
        source = program(addr, *self.items)
        assert len(source.code) <= room
        at = source.labels
        labels = sorted((at[place], at[target]) for place, target in self.labels.items())
        inner = [at[name] for name in at if name.startswith("block") and at[name] > addr]
        split = not self.is_c and inner and self.rng.random() < 0.3
        cut = self.rng.choice(inner) if split else None
        return Function(source, self.is_c, cut, tuple(labels))


def assembly_function(rng: random.Random, number: int, later: list[Function]) -> Function:
    writer = Writer(rng, number, False, later)
    writer.add_blocks(3)
    writer.add_tail()
    return writer.finish(SLOTS[number], 0x180)


def c_function(rng: random.Random, later: list[Function]) -> Function:
    """Like compiled C: a prologue, a body, an epilogue; results in rax and rdx."""
    writer = Writer(rng, 6, True, later)
    writer.items += [
        NOP5,
        *[op("PUSH_R64", name) for name in KEPT],
        op("CMP_RM64_R64", "rdi", "rsi"),
    ]
    writer.items += [
        op("MOV_R64_RM64", name, rng.choice(("rdi", "rbx"))) for name in ("r10", "r11")
    ]
    writer.add_blocks(2)
    writer.items += [*[op("POP_R64", name) for name in reversed(KEPT)], RET]
    return writer.finish(C_SLOT, 0x180)


def stop_function(rng: random.Random) -> Function:
    """Reads one register, then traps for good."""
    name = rng.choice(REG_NAMES)
    source = program(STOP_SLOT, "block0", op("MOV_RM64_R64", BELOW, name), "stop", op("UD2"))
    return Function(source, False)


def random_functions(rng: random.Random, is_c: bool) -> list[Function]:
    """Main, two to four assembly functions, and often a C function and one that never returns."""
    others = [stop_function(rng)] if rng.random() < 0.35 else []
    if rng.random() < 0.6:
        others.insert(0, c_function(rng, list(others)))
    for number in range(rng.randrange(2, 5), 0, -1):
        others.insert(0, assembly_function(rng, number, list(others)))
    main = Writer(rng, 0, is_c, list(others))
    main.add_blocks(3)
    main.add_call()
    main.items.append(RET)
    return [main.finish(NATIVE, 0x400), *others]


# ---- the check ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One program and one start state."""

    cpu: Cpu
    functions: tuple[Function, ...]
    seed: int

    @property
    def is_c(self) -> bool:
        return self.functions[0].is_c

    def sites(self) -> Sites:
        labels = sorted(label for function in self.functions for label in function.jump_labels)
        ftrace = [f.source.addr for f in self.functions[1:] if f.is_c]
        stops = [f.source.labels["stop"] for f in self.functions if "stop" in f.source.labels]
        return Sites(
            ftrace=np.array([*ftrace, CALLEE], np.uint64),
            jump_labels=np.array([place for place, _ in labels], np.uint64),
            jump_targets=np.array([target for _, target in labels], np.uint64),
            bugs=np.array(stops, np.uint64),
            fatal_bugs=np.array(stops, np.uint64),
            thunks=(THUNK, THUNK + 0x10),
        )

    def code(self) -> Code:
        parts = []
        for function in self.functions:
            start, code = function.source.addr, function.source.code
            cuts = [0, len(code)] if function.cut is None else [0, function.cut - start, len(code)]
            for a, b in itertools.pairwise(cuts):
                at = start + a
                parts.append(Part("f", "f", None, at, code[a:b], start, function.is_c))
        return build_code(parts, self.sites())

    def live(self, sites: Sites | None = None) -> dict[int, int]:
        """Mask of what is live, by address; rsp always is, for interrupts use it."""
        code = self.code()
        masks = solve_liveness(code, sites or self.sites()).before(np.arange(len(code.addr)))
        found = zip(code.addr.tolist(), masks.tolist(), strict=True)
        return {addr: mask | 1 << RSP for addr, mask in found}

    def start(self) -> tuple[State, tuple[bytes, ...]]:
        rng = random.Random(self.seed)
        state = random_state(rng, NATIVE)
        stack, data = bytearray(random_bytes(rng)), bytearray(random_bytes(rng))
        top = state.regs[RSP] - STACK
        stack[top : top + 8] = HOME.to_bytes(8, "little")
        data[:128] = ROUNDS.to_bytes(8, "little") * 16
        return state, (bytes(stack), bytes(data))

    def run(self, state: State, memory: tuple[bytes, ...], stop: int | None = None) -> Outcome:
        sources = [*(f.source for f in self.functions), callee(), assembly(), THUNK_CODE]
        pieces = [(p.addr, p.code) for p in sources]
        if stop is not None:
            pieces.append((stop, INT3))
        stack, data = memory
        maps = [code_map(NATIVE, *pieces), Map(STACK, stack), Map(DATA, data)]
        outcome = self.cpu.run(maps, state)
        assert outcome.signal in (signal.SIGTRAP, signal.SIGILL), f"{self}: {outcome}"
        return outcome

    def result(self, outcome: Outcome) -> object:
        """What can be seen of the program's end: of a fatal trap only the memory."""
        end = outcome.signal, outcome.state.rip, outcome.memory
        if outcome.signal == signal.SIGILL:
            return end
        if not self.is_c:
            return end, outcome.state
        return end, [outcome.state.regs[REG_NAMES.index(name)] for name in RESULTS]

    def check(self, live: dict[int, int]) -> Counter[str]:
        """Overwrite what is dead at each instruction; bits overwritten and instructions met."""
        state, memory = self.start()
        plain = self.result(self.run(state, memory))
        done: Counter[str] = Counter()
        for addr in live:
            here = self.run(state, memory, stop=addr)
            if here.state.rip != addr or here.signal != signal.SIGTRAP:
                continue  # not on this path
            dead = ALL_MASK & ~live[addr]
            done["insns"] += 1
            done["main bits" if addr < SLOTS[1] else "callee bits"] += dead.bit_count()
            if not dead:
                continue
            other = self.result(self.run(overwrite(here.state, dead), here.memory))
            assert other == plain, f"{self}, at {addr:#x}, dead {dead:#x}"
        return done

    def __str__(self) -> str:
        codes = "; ".join(f"{f.source.addr:#x}: {f.source.code.hex(' ')}" for f in self.functions)
        return f"seed {self.seed}, is_c {self.is_c}, {codes}"


def random_trial(cpu: Cpu, seed: int) -> Trial:
    rng = random.Random(seed)
    return Trial(cpu, tuple(random_functions(rng, is_c=bool(seed & 1))), seed)


@pytest.mark.parametrize("group", range(GROUPS))
def test_liveness_of_random_functions_is_sound(cpu: Cpu, group: int) -> None:
    done: Counter[str] = Counter()
    for seed in range(PER_GROUP * group, PER_GROUP * (group + 1)):
        trial = random_trial(cpu, seed)
        done += trial.check(trial.live())
    print(f"group {group}: seeds {PER_GROUP * group} on, {dict(done)}")
    assert done["insns"] > 100
    assert done["main bits"] > 100
    assert done["callee bits"] > 100


def test_random_functions_have_every_way_to_go_elsewhere(cpu: Cpu) -> None:
    """What the generator is for: else the check above would show little."""
    ways: Counter[str] = Counter()
    for seed in range(GROUPS * PER_GROUP):
        trial = random_trial(cpu, seed)
        functions = trial.functions
        starts = {f.source.addr: f for f in functions}
        for function in functions:
            found = decode([(function.source.addr, function.source.code)])
            for flow, target in zip(found.flow.tolist(), found.target.tolist(), strict=True):
                own = (
                    function.source.addr
                    <= target
                    < function.source.addr + len(function.source.code)
                )
                into = "own" if own else "start" if target in starts else "elsewhere"
                ways[f"{Flow(flow).name} {into}"] += 1
            ways["cut"] += function.cut is not None
            ways["label"] += len(function.jump_labels)
            ways["c"] += function.is_c and function is not functions[0]
        end = trial.run(*trial.start())
        ways[signal.Signals(end.signal).name] += 1
    print(dict(ways))
    needed = (
        "CALL start",
        "CALL own",
        "CALL elsewhere",
        "JUMP start",
        "BRANCH start",
        "cut",
        "label",
    )
    assert all(ways[way] >= 10 for way in (*needed, "c", "INDIRECT_CALL elsewhere", "SIGILL")), ways


# ---- seeded faults ------------------------------------------------------------------------------

FAULTY = program(
    NATIVE,
    op("MOV_R64_IMM64", "r9", 1),
    "call",
    call(SLOTS[1]),
    op("ADD_R64_RM64", "rax", "r10"),
    op("SBB_R64_RM64", "rdx", "rdx"),
    RET,
)
#: overwrites r10 on the path that is not taken
KEEPS = program(
    SLOTS[1],
    op("ADD_R64_RM64", "rax", "rdi"),
    op("TEST_RM64_R64", "r9", "r9"),
    jcc("ne", "out"),
    op("MOV_R64_IMM64", "r10", 7),
    "out",
    op("MOV_RM64_R64", BELOW, "rbx"),
    RET,
)


def faulty(cpu: Cpu) -> Trial:
    """A C function that relies on what its assembly callee keeps."""
    return Trial(cpu, (Function(FAULTY, True), Function(KEEPS, False)), 0)


def test_liveness_of_the_program_for_faults_is_sound(cpu: Cpu) -> None:
    trial = faulty(cpu)
    assert trial.check(trial.live())["callee bits"] > 0


@pytest.mark.parametrize("name", ["rax", "rdi", "r10", "rbx", "r12"])
def test_check_of_register_that_a_call_needs_called_dead_fails(cpu: Cpu, name: str) -> None:
    trial = faulty(cpu)
    live, at, bit = trial.live(), FAULTY.labels["call"], 1 << REG_NAMES.index(name)
    assert live[at] & bit
    live[at] &= ~bit
    with pytest.raises(AssertionError, match="seed 0"):
        trial.check(live)


@pytest.mark.parametrize(
    "sites",
    [
        Sites(ftrace=np.array([SLOTS[1]], np.uint64)),
        Sites(fatal_bugs=np.array([FAULTY.labels["call"]], np.uint64)),
    ],
    ids=["assembly taken for C", "call taken for one that does not return"],
)
def test_check_of_liveness_by_a_wrong_rule_fails(cpu: Cpu, sites: Sites) -> None:
    trial = faulty(cpu)
    with pytest.raises(AssertionError, match="seed 0"):
        trial.check(trial.live(sites))


def test_check_of_everything_called_dead_fails(cpu: Cpu) -> None:
    for seed in range(20):
        trial = random_trial(cpu, seed)
        with pytest.raises(AssertionError, match=f"seed {seed}"):
            trial.check(dict.fromkeys(trial.live(), 1 << RSP))
