# SPDX-License-Identifier: GPL-2.0-or-later
"""Lab machines for tests: one boot for all of them, a name of its own, taken down at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kernweave.driver.link import Link
from kernweave.errors import UnsupportedError
from kernweave.lab.machine import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Boot a lab, or skip as KERNWEAVE_VM says: unset = if possible, 1 = must, 0 = never."""
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    machine = Lab(f"test-{os.getpid()}", kernel="6.1")
    try:
        try:
            state = machine.up(progress=print)
        except UnsupportedError as error:
            if wanted == "1":
                raise
            pytest.skip(f"no lab on this machine: {error}")
        print(f"booted {state.kernel} in {state.boot_seconds:.1f} s")
        yield machine
    finally:
        machine.down()


@pytest.fixture
def link(lab: Lab) -> Iterator[Link]:
    """Open a session of the shared lab."""
    with lab.connect() as session:
        yield session
