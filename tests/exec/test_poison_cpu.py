# SPDX-License-Identifier: GPL-2.0-or-later
"""Poison: exactly what it is told to overwrite changes, on the CPU."""

from __future__ import annotations

import random

import pytest

from exec.cpu import FLAGS, GS_DATA, NATIVE, STACK, Cpu, Map, code_map, random_bytes, random_state
from exec.test_counter import FLAG_BITS
from kernweave.x86.decode import FLAG_NAMES, FLAGS_SHIFT, REG_NAMES
from kernweave.x86.poison import poison_code

RSP = REG_NAMES.index("rsp")


@pytest.mark.parametrize("seed", range(300))
def test_poison_changes_what_it_is_told_and_nothing_else(cpu: Cpu, seed: int) -> None:
    rng = random.Random(seed)
    mask = rng.getrandbits(len(REG_NAMES)) | rng.getrandbits(len(FLAG_NAMES)) << FLAGS_SHIFT
    stack, state = random_bytes(rng), random_state(rng, NATIVE)
    maps = [code_map(NATIVE, (NATIVE, poison_code(mask))), Map(STACK, stack)]
    after = cpu.arrive(maps, state, GS_DATA)
    changed = [after.state.regs[bit] != state.regs[bit] for bit in range(len(REG_NAMES))]
    wanted = [bool(mask >> bit & 1) and bit != RSP for bit in range(len(REG_NAMES))]
    assert changed == wanted, (seed, hex(mask))
    flags = sum(
        FLAG_BITS[name] for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1
    )
    assert (after.state.flags ^ state.flags) & FLAGS == flags, (seed, hex(mask))
    top = state.regs[RSP] - STACK
    assert after.memory[0][top:] == stack[top:]


def test_poison_of_nothing_is_no_code() -> None:
    assert poison_code(0) == b""
    assert poison_code(1 << RSP) == b""
