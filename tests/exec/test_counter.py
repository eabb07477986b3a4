# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in counter on the CPU: it counts one and changes nothing that is live."""

from __future__ import annotations

import random
import struct

import pytest

from exec.cpu import (
    ADJUST,
    CARRY,
    FLAGS,
    GS_DATA,
    NATIVE,
    OVERFLOW,
    PARITY,
    RSP,
    SIGN,
    STACK,
    ZERO,
    Cpu,
    Map,
    code_map,
    random_bytes,
    random_state,
)
from kernweave.x86.counter import SCRATCH_ORDER, Snippet, counter_snippet
from kernweave.x86.decode import ALL_MASK, FLAG_NAMES, FLAGS_MASK, FLAGS_SHIFT, REG_NAMES

FLAG_BITS = {"of": OVERFLOW, "sf": SIGN, "zf": ZERO, "af": ADJUST, "cf": CARRY, "pf": PARITY}
COUNTER = 0x128  # its place in the page at GS_DATA
VALUES = (0, 1, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
GS_BASES = (0, GS_DATA, GS_DATA + COUNTER + 8, 0x7FFF_0000_0000)

DEAD_MASKS = {
    "all": ALL_MASK,
    "none": 0,
    "flags": FLAGS_MASK,
    "registers": ALL_MASK & ~FLAGS_MASK,
    **{f"{name}": 1 << bit for bit, name in enumerate(REG_NAMES)},
    **{f"{name}+flags": 1 << bit | FLAGS_MASK for bit, name in enumerate(REG_NAMES)},
    **{f"all-{name}": ALL_MASK & ~(1 << bit) for bit, name in enumerate(REG_NAMES)},
    **{f"all-{name}": ALL_MASK & ~(1 << FLAGS_SHIFT + bit) for bit, name in enumerate(FLAG_NAMES)},
}


def dead_flags(dead: int) -> int:
    """The processor's bits of the dead flags; the carry flag is never touched, dead or not."""
    bits = [FLAG_BITS[name] for i, name in enumerate(FLAG_NAMES) if dead >> FLAGS_SHIFT + i & 1]
    return sum(bits) & ~CARRY


def bind(snippet: Snippet, offset: int) -> bytes:
    code = bytearray(snippet.code)
    struct.pack_into("<Q", code, snippet.hole, offset % (1 << 64))
    return bytes(code)


def check_counter(cpu: Cpu, snippet: Snippet, dead: int, seed: int) -> None:
    """Run once; the counter grows by one and nothing else changes but what is dead."""
    rng = random.Random(seed)
    gs, value = rng.choice(GS_BASES), rng.choice(VALUES)
    code = bind(snippet, GS_DATA + COUNTER - gs)
    percpu = bytearray(random_bytes(rng))
    struct.pack_into("<Q", percpu, COUNTER, value)
    stack = random_bytes(rng)
    state = random_state(rng, NATIVE)
    maps = [code_map(NATIVE, (NATIVE, code)), Map(STACK, stack), Map(GS_DATA, bytes(percpu))]
    after = cpu.arrive(maps, state, gs)

    case = f"seed {seed}, code {code.hex(' ')}, {state}"
    changed = [
        name
        for bit, name in enumerate(REG_NAMES)
        if after.state.regs[bit] != state.regs[bit] and not dead >> bit & 1
    ]
    assert not changed, case
    assert after.state.regs[RSP] == state.regs[RSP], case
    assert (after.state.flags ^ state.flags) & FLAGS & ~dead_flags(dead) == 0, case
    assert after.state.rip == NATIVE + len(code), case
    struct.pack_into("<Q", percpu, COUNTER, (value + 1) % (1 << 64))
    assert after.memory[1] == bytes(percpu), case
    top = state.regs[RSP] - STACK
    free = top - 8 * len(snippet.spills)  # what is below the stack pointer is nobody's
    assert after.memory[0][top:] == stack[top:], case
    assert after.memory[0][:free] == stack[:free], case


@pytest.mark.parametrize("name", DEAD_MASKS)
def test_counter_counts_one_and_keeps_what_is_live(cpu: Cpu, name: str) -> None:
    dead = DEAD_MASKS[name]
    for seed in range(12):
        check_counter(cpu, counter_snippet(dead), dead, seed)


def test_counter_of_random_masks_keeps_what_is_live(cpu: Cpu) -> None:
    for seed in range(200):
        dead = random.Random(seed).getrandbits(22)
        check_counter(cpu, counter_snippet(dead), dead, seed)


@pytest.mark.parametrize(
    ("name", "spills"),
    [
        ("all", ()),
        ("none", ("flags", "r11")),
        ("flags", ("r11",)),
        ("registers", ("flags",)),
        ("rsp+flags", ("r11",)),
        ("r12+flags", ("r11",)),
        ("rbp+flags", ()),
        ("all-cf", ()),
        ("all-af", ("flags",)),
    ],
)
def test_counter_saves_only_what_it_must(name: str, spills: tuple[str, ...]) -> None:
    assert counter_snippet(DEAD_MASKS[name]).spills == spills


def test_counter_of_any_scratch_register_has_the_same_size() -> None:
    sizes = {len(counter_snippet(1 << bit | FLAGS_MASK).code) for bit in SCRATCH_ORDER}
    assert len(sizes) == 1


@pytest.mark.parametrize("register", SCRATCH_ORDER)
def test_check_of_live_register_marked_dead_fails(cpu: Cpu, register: int) -> None:
    snippet = counter_snippet(1 << register | FLAGS_MASK)
    with pytest.raises(AssertionError, match=REG_NAMES[register]):
        check_counter(cpu, snippet, FLAGS_MASK, seed=0)


def test_check_of_live_flags_marked_dead_fails(cpu: Cpu) -> None:
    with pytest.raises(AssertionError):
        for seed in range(12):
            check_counter(cpu, counter_snippet(ALL_MASK), ALL_MASK & ~FLAGS_MASK, seed)


@pytest.mark.parametrize("fault", ["dropped", "doubled", "neighbour", "add", "leaks"])
def test_check_of_broken_counter_fails(cpu: Cpu, fault: str) -> None:
    good = counter_snippet(ALL_MASK)
    increment = good.code[good.hole + 8 :]
    broken = {
        "dropped": good.code[: -len(increment)],
        "doubled": good.code + increment,
        "neighbour": good.code[:-1] + b"\x08",
        "add": good.code[: -len(increment)] + bytes.fromhex("65 49 83 43 00 01"),
        "leaks": b"\x9c" + good.code,
    }[fault]
    hole = good.hole + len(broken) - len(good.code) if fault == "leaks" else good.hole
    with pytest.raises(AssertionError):
        for seed in range(12):
            check_counter(cpu, Snippet(broken, hole, ()), ALL_MASK, seed)
