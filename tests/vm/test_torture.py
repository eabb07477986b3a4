# SPDX-License-Identifier: GPL-2.0-or-later
"""A minute of torture; `make stress` has the long version, for every kernel and boot mode."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import torture
from kernweave.errors import KernweaveError, UnsupportedError
from kernweave.lab.machine import Lab
from kernweave.model.plan import Plan

SERIES = "6.1"
SEED = int(os.environ.get("KERNWEAVE_SEED", "0")) or 20_261_122
SECONDS = 60
UD2 = b"\x0f\x0b"


@contextmanager
def booted(*kernel_args: str) -> Iterator[Lab]:
    if os.environ.get("KERNWEAVE_VM") == "0":
        pytest.skip("KERNWEAVE_VM=0")
    try:
        with torture.booted(SERIES, "voluntary", kernel_args) as lab:
            yield lab
    except UnsupportedError as error:
        if os.environ.get("KERNWEAVE_VM") == "1":
            raise
        pytest.skip(f"no lab on this machine: {error}")


def test_random_counters_come_and_go_under_load_and_nothing_is_left() -> None:
    print(f"KERNWEAVE_SEED={SEED}")
    tally = torture.Tally()
    with booted() as lab:
        problems = torture.torture(lab, SEED, SECONDS, tally)
    print(tally)
    assert not problems
    assert tally.rounds >= torture.LEAST_ROUNDS
    assert tally.placed.total() > 500
    assert {"nop5", "jmp32", "group", "int3"} <= set(tally.placed)
    assert tally.hits > 1000


def break_copies(plan: Plan) -> Plan:
    """Every displaced instruction's copy becomes one that the kernel dies of."""
    code = bytearray(plan.code)
    for at in (plan.copy[plan.copy > 0] - np.uint64(plan.base)).tolist():
        code[at : at + len(UD2)] = UD2
    return replace(plan, code=bytes(code))


def test_broken_plan_is_found_out() -> None:
    # which hangs, as likely as not
    with booted("kernweave.watchdog=20") as lab, pytest.raises(KernweaveError) as caught:
        torture.torture(
            lab, SEED, SECONDS, torture.Tally(), partial(torture.play_splices, amend=break_copies)
        )
    words = torture.describe_death(lab, caught.value)
    print(words)
    # as the first fault goes; what is broken may be what would tell of it
    how = re.search("the lab's kernel panicked|the guest hung|QEMU is gone", words)
    assert how
    told = re.search("invalid opcode|double fault|stack guard page", lab.log())
    assert told or how[0] != "the lab's kernel panicked"
