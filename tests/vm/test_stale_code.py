# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's QEMU may run code that another CPU has changed: docs/design/0007."""

from __future__ import annotations

import pytest
from guest import program, target

import kernweave
from kernweave.lab.machine import Lab

MOST = 30  # times; a loaded host may run both CPUs by turns for long, and then there is none


def test_emulated_cpu_runs_what_another_one_has_changed(machine: Lab) -> None:
    state = machine.status().state
    assert state is not None
    if state.accel != "tcg":
        pytest.skip("real CPUs do not")
    stale = 0
    with kernweave.connect(target(machine)) as session:
        for _ in range(MOST):
            done = session.run([program("stale"), "2000"], capture=True, check=True)
            stale = int(done.stdout)
            if stale:
                break
    # once this fails, QEMU is mended: record 0007 can go
    assert stale > 0
