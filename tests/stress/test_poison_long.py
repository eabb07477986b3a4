# SPDX-License-Identifier: GPL-2.0-or-later
"""Ten minutes of every kind of load on a kernel in which all that is dead is overwritten."""

from __future__ import annotations

import pytest

from kernweave.lab.machine import Lab
from kernweave.session.target import driver_kmod
from poison import ENOUGH, check_poisoned_kernel

SERIES = "6.1"
SECONDS = 600


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["voluntary", "full"])
def test_kernel_with_everything_dead_overwritten_works_for_ten_minutes(mode: str) -> None:
    machine = Lab(f"poison-{mode}", kernel=SERIES)
    try:
        kmod = driver_kmod(SERIES, print)
        machine.up(kmod=kmod, kernel_args=[f"preempt={mode}"], progress=print)
        assert check_poisoned_kernel(machine, SECONDS) > ENOUGH
        log = machine.log()
        assert not [word for word in ("BUG:", "WARNING:", "Oops", "detected stall") if word in log]
    finally:
        machine.down()
