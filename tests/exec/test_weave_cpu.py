# SPDX-License-Identifier: GPL-2.0-or-later
"""Woven functions on the CPU: they do what the native ones do, and counters show every step.

Random programs of several C functions with a `.cold` part, loops, calls of each other and of code
that is not woven, rip-relative data, jump labels and static calls.  Natively a program is stepped
through; then it runs with all entries redirected to the clones.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import iced_x86 as iced
import numpy as np
import pytest
from iced_x86 import Register

from exec.asm import NOP5, RET, Branch, Item, Program, call, jcc, jmp, jmp_short, mem, op, program
from exec.cpu import (
    COPY,
    DATA,
    GS_DATA,
    INT3,
    NATIVE,
    PAGE,
    RSP,
    STACK,
    Cpu,
    Map,
    Outcome,
    State,
    random_bytes,
    random_state,
)
from exec.test_liveness_calls_cpu import KEPT, THUNK, THUNK_CODE, lose
from exec.test_liveness_cpu import CALLEE, HOME, RESULTS, assembly, callee, random_insns
from kernweave.analysis.code import Part
from kernweave.analysis.kernel import Hints, KernelTables, analyse
from kernweave.image.sites import Sites
from kernweave.weave.clonemap import make_entries
from kernweave.weave.counters import (
    Place,
    select_blocks,
    select_calls,
    select_edges,
    select_entries,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from kernweave.weave.scope import Rules, Why, find_scope
from kernweave.weave.source import Source, make_source
from kernweave.x86.decode import REG_NAMES, Flow
from kernweave.x86.relocate import encode_jump
from woven import FIRST_OFFSET, Select, Woven, weave

SLOTS = tuple(NATIVE + PAGE * page for page in (1, 2, 3))
COLD = NATIVE + PAGE * 4
ENDBR = op("ENDBR64")
NOP2 = b"\x66\x90"
NOP5_BYTES = bytes.fromhex("0f1f440000")
ROUNDS = 3  # of every loop
FIELDS = 0x400  # in DATA, behind the loops' counts
CONDITIONS = ("e", "b", "s", "o", "p", "g", "ne", "ae")
GS = GS_DATA - FIRST_OFFSET
PROGRAMS, STEPPED = 40, 25
ALL = (
    select_blocks, select_edges, select_entries, select_insns, select_calls, select_returns,
    select_loads, select_stores,
)  # fmt: skip


@dataclass
class Writer:
    """Writes one C function; labels of patchable places are kept apart."""

    rng: random.Random
    number: int
    later: Sequence[int]
    bails: bool
    items: list[Item] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    static: list[str] = field(default_factory=list)
    _names: int = 0

    def name(self) -> str:
        self._names += 1
        return f"label{self._names}"

    def add_prologue(self) -> None:
        self.items += self.rng.choice(([ENDBR, NOP5], [NOP5]))
        self.items += [op("PUSH_R64", name) for name in KEPT]
        self.items += [op("MOV_R64_RM64", name, "rdi") for name in ("r10", "r11")]
        self.items.append(op("CMP_RM64_R64", "rdi", "rsi"))

    def add_call(self) -> None:
        if not self.later:
            return
        target = self.rng.choice(self.later)
        place = self.name()
        passed = [op("MOV_R64_RM64", a, self.rng.choice(KEPT)) for a in ("rdi", "rsi", "rdx")]
        passed += [op("MOV_R64_IMM64", a, 77) for a in ("rcx", "r8", "r9", "rax", "r10", "r11")]
        ways: list[list[Item]] = [
            [call(target)],
            [op("MOV_R64_IMM64", "rax", target), op("CALL_RM64", "rax")],
            [op("MOV_R64_IMM64", "rax", target), b"\x2e", call(THUNK)],
            [place, call(target)],
        ]
        way = self.rng.choice(ways)
        if way[0] == place:
            self.static.append(place)
        self.items += [*passed, *way, *lose()]

    def add_data(self) -> None:
        place = mem(Register.RIP, disp=DATA + FIELDS + 8 * self.rng.randrange(16))
        name = self.rng.choice([name for name in REG_NAMES if name != "rsp"])
        self.items.append(
            self.rng.choice(
                [
                    op("MOV_R64_RM64", name, place),
                    op("MOV_RM64_R64", place, name),
                    op("XADD_RM64_R64", place, name),
                    op("MOV_RM64_IMM32", place, -5),
                    op("CMP_RM64_IMM8", place, 3),
                    op("LEA_R64_M", name, place),
                ]
            )
        )

    def add_loop(self, back: str) -> None:
        over = self.name()
        count = mem(disp=DATA + 8 * (16 * self.number + self._names % 16))
        self.items += [op("DEC_RM64", count), jcc("le", over), jmp(back), over]

    def add_label(self, target: str, near: bool) -> None:
        place = self.name()
        self.labels[place] = target
        on = jmp_short(target) if near else jmp(target)
        self.items += [place, self.rng.choice((NOP2 if near else NOP5, on))]

    def add_something(self, end: str) -> None:
        kind = self.rng.random()
        if kind < 0.2:
            self.add_call()
        elif kind < 0.4:
            self.add_data()
        elif kind < 0.5:
            self.add_label(end, near=False)
        else:
            self.items += random_insns(self.rng)

    def add_blocks(self, count: int) -> None:
        for block in range(count):
            self.items.append(f"block{block}")
            for _ in range(self.rng.randrange(1, 4)):
                self.add_something(f"block{count}")
            if self.rng.random() < 0.5:  # never to what follows at once: the steps tell them apart
                later = self.name()
                condition = self.rng.choice(CONDITIONS)
                branch = jcc(condition, later)
                short = Branch(getattr(iced.Code, f"J{condition.upper()}_REL8_64"), later)
                self.items += [self.rng.choice((branch, short)), *random_insns(self.rng), later]
            if self.rng.random() < 0.2:
                self.add_label(f"block{block + 1}", near=True)
                self.items += random_insns(self.rng)
            if self.rng.random() < 0.3:
                self.add_loop(f"block{self.rng.randrange(block + 1)}")
            if self.bails and self.rng.random() < 0.3:
                over = self.name()
                self.items += [Branch(iced.Code.JRCXZ_REL8_64, over), *random_insns(self.rng), over]
        self.items.append(f"block{count}")

    def add_epilogue(self) -> None:
        self.items += [*[op("POP_R64", name) for name in reversed(KEPT)], RET, INT3]


@dataclass(frozen=True)
class Functions:
    """A program: functions, the first one with a cold part."""

    sources: tuple[Program, ...]
    cold: Program
    sites: Sites

    @property
    def every(self) -> tuple[Program, ...]:
        return (*self.sources, self.cold)

    @cached_property
    def text(self) -> bytes:
        others = (*self.every, callee(), assembly(), THUNK_CODE)
        text = bytearray(INT3 * PAGE * 5)
        for one in others:
            assert len(one.code) <= PAGE
            text[one.addr - NATIVE : one.addr - NATIVE + len(one.code)] = one.code
        return bytes(text)

    @cached_property
    def tables(self) -> KernelTables:
        homes = [*SLOTS, SLOTS[0]]
        parts = [
            Part("f", "f", None, source.addr, source.code, home, True)
            for source, home in zip(self.every, homes, strict=True)
        ]
        return analyse(parts, self.sites, Hints(np.zeros(0, np.uint64), {}))

    def source(self, tables: KernelTables | None = None) -> Source:
        return make_source(tables or self.tables, self.text, NATIVE, self.sites)


def random_functions(rng: random.Random, bails: bool) -> Functions:
    """Three functions that call later ones; the first has a cold part."""
    writers, sources = [], []
    for number in reversed(range(len(SLOTS))):
        writer = Writer(rng, number, SLOTS[number + 1 :], bails)
        writer.add_prologue()
        if not number:
            writer.items += [jcc(rng.choice(CONDITIONS), COLD), *random_insns(rng), "back"]
        writer.add_blocks(rng.randrange(2, 4))
        writer.add_epilogue()
        writers.append(writer)
        sources.append(program(SLOTS[number], *writer.items))
    sources.reverse()
    writers.reverse()
    cold = program(COLD, *random_insns(rng), *random_insns(rng), jmp(sources[0].labels["back"]))
    return Functions(tuple(sources), cold, _sites(sources, writers))


def _sites(sources: Sequence[Program], writers: Sequence[Writer]) -> Sites:
    labels, static, ftrace = [], [], []
    for source, writer in zip(sources, writers, strict=True):
        at = source.labels
        labels += [(at[place], at[target]) for place, target in writer.labels.items()]
        static += [at[place] for place in writer.static]
        ftrace.append(source.at[1] if writer.items[0] is ENDBR else source.at[0])
    labels.sort()
    return Sites(
        ftrace=np.array(sorted([*ftrace, CALLEE]), np.uint64),
        jump_labels=np.array([place for place, _ in labels], np.uint64),
        jump_targets=np.array([target for _, target in labels], np.uint64),
        static_calls=np.array(sorted(static), np.uint64),
        thunks=(THUNK, THUNK + 0x10),
    )


# ---- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One program and one start state."""

    cpu: Cpu
    functions: Functions
    seed: int

    @cached_property
    def start(self) -> tuple[State, bytes, bytes]:
        rng = random.Random(self.seed)
        state = random_state(rng, SLOTS[0])
        stack, data = bytearray(random_bytes(rng)), bytearray(random_bytes(rng))
        top = state.regs[RSP] - STACK
        stack[top : top + 8] = HOME.to_bytes(8, "little")
        data[:FIELDS] = ROUNDS.to_bytes(8, "little") * (FIELDS // 8)
        return state, bytes(stack), bytes(data)

    def native(self) -> Outcome:
        state, stack, data = self.start
        text = Map(NATIVE, self.functions.text, code=True)
        return self.cpu.arrive([text, Map(STACK, stack), Map(DATA, data)], state)

    def steps(self) -> list[int]:
        """Addresses of woven instructions in the order in which they run."""
        state, stack, data = self.start
        instructions = self.functions.tables.instructions
        spans = dict(zip(instructions.addr.tolist(), instructions.length.tolist(), strict=True))
        blank = bytearray(self.functions.text)
        for addr in spans:
            blank[addr - NATIVE] = INT3[0]
        found = []
        while state.rip in spans:
            found.append(state.rip)
            text, at = bytearray(blank), state.rip - NATIVE
            text[at : at + spans[state.rip]] = self.functions.text[at : at + spans[state.rip]]
            maps = [Map(NATIVE, bytes(text), code=True), Map(STACK, stack), Map(DATA, data)]
            outcome = self.cpu.arrive(maps, state)
            state, (stack, data) = outcome.state, outcome.memory
        return found

    def woven(
        self, woven: Woven, out: bytes | None = None, closed: Sequence[int] = ()
    ) -> tuple[Outcome, list[int]]:
        """The end with all entries redirected but those of `closed`, and what was counted."""
        state, stack, data = self.start
        text = bytearray(self.functions.text)
        entries = make_entries(woven.source, woven.layout, woven.base)
        for site in set(woven.source.sites.ftrace.tolist()) - set(closed):
            row = np.flatnonzero((site - entries.native < 5) & (site >= entries.native))
            for clone in entries.clone[row].tolist():
                text[site - NATIVE : site - NATIVE + 5] = encode_jump(site, clone)
        code = (out or woven.out.tobytes()).ljust(-(-woven.layout.total // PAGE) * PAGE, INT3)
        maps = [
            Map(NATIVE, bytes(text), code=True),
            Map(COPY, code, code=True),
            Map(STACK, stack),
            Map(DATA, data),
            Map(GS_DATA, bytes(2 * PAGE)),
        ]
        outcome = self.cpu.arrive(maps, state, GS)
        counts = np.frombuffer(outcome.memory[2], "<u8")
        assert not counts[len(woven.counters.insn) :].any()
        short = replace(outcome, memory=outcome.memory[:2])
        return short, counts[: len(woven.counters.insn)].tolist()

    def seen(self, outcome: Outcome) -> object:
        """What the caller of the program can see of its end."""
        regs = [outcome.state.regs[REG_NAMES.index(name)] for name in RESULTS]
        above = outcome.state.regs[RSP] - STACK
        return outcome.state.rip, regs, outcome.memory[0][above:], outcome.memory[1]

    def everything(self, outcome: Outcome) -> object:
        return self.seen(outcome), outcome.state


def expected_counts(woven: Woven, steps: list[int]) -> list[int | None]:
    """What each counter must show, from the steps alone; None if they do not tell."""
    instructions = woven.source.tables.instructions
    sites = woven.source.sites
    labels = dict(zip(sites.jump_labels.tolist(), sites.jump_targets.tolist(), strict=True))
    times, pairs = Counter(steps), Counter(itertools.pairwise(steps))
    found: list[int | None] = []
    for row, place in zip(woven.counters.insn.tolist(), woven.counters.place.tolist(), strict=True):
        addr = int(instructions.addr[row])
        behind = addr + int(instructions.length[row])
        calls = instructions.flow[row] in (Flow.CALL, Flow.INDIRECT_CALL)
        target = labels.get(addr, int(instructions.target[row]))
        if place == Place.BEFORE or calls:
            found.append(times[addr])
        elif target == behind:
            found.append(None)
        else:
            found.append(pairs[addr, behind if place == Place.BEHIND else target])
    return found


def trial(cpu: Cpu, seed: int, bails: bool = False) -> Trial:
    return Trial(cpu, random_functions(random.Random(seed), bails), seed)


def everything_live(tables: KernelTables) -> KernelTables:
    full = np.uint32(0xFFFF_FFFF)
    blocks = replace(tables.blocks, live=np.full_like(tables.blocks.live, full))
    stretches = replace(tables.stretches, after=np.full_like(tables.stretches.after, full))
    return replace(tables, blocks=blocks, stretches=stretches)


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bails", [False, True])
def test_plain_clones_leave_everything_as_native_code_does(cpu: Cpu, bails: bool) -> None:
    for seed in range(PROGRAMS):
        one = trial(cpu, seed, bails)
        end, _ = one.woven(weave(one.functions.source(), COPY))
        assert one.everything(end) == one.everything(one.native()), f"seed {seed}"


def test_counters_that_save_all_leave_everything_as_native_code_does(cpu: Cpu) -> None:
    for seed in range(PROGRAMS):
        one = trial(cpu, seed)
        source = one.functions.source(everything_live(one.functions.tables))
        end, _ = one.woven(weave(source, COPY, select_blocks, select_edges))
        assert one.everything(end) == one.everything(one.native()), f"seed {seed}"


@pytest.mark.parametrize("bails", [False, True])
@pytest.mark.parametrize("select", ALL)
def test_counted_clones_do_what_native_code_does(cpu: Cpu, select: Select, bails: bool) -> None:
    for seed in range(PROGRAMS):
        one = trial(cpu, seed, bails)
        end, _ = one.woven(weave(one.functions.source(), COPY, select))
        assert one.seen(end) == one.seen(one.native()), f"seed {seed}"


def test_counters_count_what_was_stepped_through(cpu: Cpu) -> None:
    total = 0
    for seed in range(STEPPED):
        one = trial(cpu, seed)
        woven = weave(one.functions.source(), COPY, *ALL)
        assert not len(woven.impossible)
        end, counts = one.woven(woven)
        assert one.seen(end) == one.seen(one.native()), f"seed {seed}"
        expected = expected_counts(woven, one.steps())
        assert expected.count(None) < 0.1 * len(expected)
        known = [count for count, other in zip(counts, expected, strict=True) if other is not None]
        assert known == [count for count in expected if count is not None], f"seed {seed}"
        total += sum(counts)
    assert total > 2000


def test_programs_have_bail_outs_where_they_are_wanted(cpu: Cpu) -> None:
    woven = [weave(trial(cpu, seed, True).functions.source(), COPY) for seed in range(20)]
    reasons = [Why(why) for one in woven for why in one.scope.block[one.scope.bail_outs].tolist()]
    assert set(reasons) == {Why.NEAR}
    assert len(reasons) > 5


def test_clones_whose_returns_stay_native_do_what_native_code_does(cpu: Cpu) -> None:
    for seed in range(PROGRAMS):
        one = trial(cpu, seed)
        source = one.functions.source()
        scope = find_scope(source, Rules(line_matters=True))
        end, _ = one.woven(weave(source, COPY, select_blocks, scope=scope))
        assert one.seen(end) == one.seen(one.native()), f"seed {seed}"


def test_slot_that_is_a_jump_leaves_for_the_native_body(cpu: Cpu) -> None:
    for seed in range(20):
        one = trial(cpu, seed)
        woven = weave(one.functions.source(), COPY, select_entries)
        entries = make_entries(woven.source, woven.layout, woven.base)
        out = bytearray(woven.out.tobytes())
        slot, body = int(entries.slot[-1]), int(entries.body[-1])
        out[slot - COPY : slot - COPY + 5] = encode_jump(slot, body)
        end, counts = one.woven(woven, bytes(out), closed=[body])
        assert one.seen(end) == one.seen(one.native()), f"seed {seed}"
        assert counts[-1] == 0


@pytest.mark.parametrize("fault", ["branch", "counter"])
def test_seeded_fault_is_found(cpu: Cpu, fault: str) -> None:
    differs = 0
    for seed in range(30):
        one = trial(cpu, seed)
        woven = weave(one.functions.source(), COPY, select_blocks)
        out = bytearray(woven.out.tobytes())
        if fault == "branch":
            flow = woven.source.tables.instructions.flow[woven.map.insn]
            row = int(np.flatnonzero(flow == Flow.BRANCH)[0])
            out[int(woven.map.clone[row]) - COPY + 1] ^= 1
        else:
            at = int(woven.layout.snippets.at[0])
            out[at : at + 15] = NOP5_BYTES * 3
        try:
            end, counts = one.woven(woven, bytes(out))
            _, good = one.woven(woven)
            differs += one.seen(end) != one.seen(one.native()) or counts != good
        except AssertionError:
            differs += 1
    assert differs >= 25
