# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters come and go in the idle loop; `tests/vm/test_quiescence.py` is the short version.

An emulated CPU may stay at an int3 that is gone (docs/design/0007): three of four such labs on two
cores stood still within 800 rounds before the driver wrote first bytes twice.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from guest import booted
from parked import come_and_go

LABS = 3  # more than cores, so that virtual CPUs lose theirs at any instruction
ROUNDS = 500


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_no_cpu_stays_in_the_idle_loop(kernel: str) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(LABS) as pool:
        machines = [stack.enter_context(booted(f"parked-{n}", kernel=kernel)) for n in range(LABS)]
        for seen in pool.map(lambda machine: come_and_go(machine, ROUNDS), machines):
            assert seen["group"] > 0
