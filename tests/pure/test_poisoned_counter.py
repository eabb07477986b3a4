# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that overwrites what is dead, and the counter behind it: where the stack is at each byte."""

from __future__ import annotations

import random

import capstone
import pytest

from kernweave.x86.counter import counter_snippet
from kernweave.x86.decode import ALL_MASK
from kernweave.x86.poison import poison_code, poisoned_counter

_MOVES = {"pushfq": 8, "push": 8, "popfq": -8, "pop": -8}


def depths_of(code: bytes) -> tuple[tuple[int, int], ...]:
    """(byte position, bytes pushed) behind each instruction that moves the stack pointer."""
    found, depth = [], 0
    for insn in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, 0):
        if insn.mnemonic in _MOVES:
            depth += _MOVES[insn.mnemonic]
            found.append((insn.address + insn.size, depth))
    return tuple(found)


@pytest.mark.parametrize("seed", range(40))
def test_poisoned_counter_says_where_the_stack_is(seed: int) -> None:
    rng = random.Random(seed)
    dead = rng.getrandbits(32) & rng.getrandbits(32) & ALL_MASK
    snippet = poisoned_counter(dead, dead & rng.getrandbits(32))
    assert snippet.depths == depths_of(snippet.code)


def test_poisoned_counter_is_the_counter_behind_the_poison() -> None:
    dead = ALL_MASK & ~0xF
    plain, snippet = counter_snippet(dead), poisoned_counter(dead, dead)
    poison = poison_code(dead)
    assert poison and snippet.code == poison + plain.code
    assert snippet.hole == len(poison) + plain.hole and snippet.spills == plain.spills
    assert poisoned_counter(dead, 0) == plain
