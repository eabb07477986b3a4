# SPDX-License-Identifier: GPL-2.0-or-later
"""Lab machines for tests: one boot for all of them, a name of its own, taken down at the end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator

import pytest

from kernweave.driver.link import Link
from kernweave.errors import UnsupportedError
from kernweave.lab.machine import Lab
from kernweave.session.target import driver_kmod

# whoever runs the tests in the background may have them ignore interrupts, and their children too
signal.signal(signal.SIGINT, signal.default_int_handler)


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
        discard(machine)


def discard(machine: Lab) -> None:
    """Take a lab down and remove what it leaves."""
    machine.down()
    shutil.rmtree(machine.folder)


@pytest.fixture
def new_lab() -> Iterator[Callable[[str], Lab]]:
    """Make labs of a test's own, not booted; they are taken down at its end."""
    made: list[Lab] = []

    def make(suffix: str) -> Lab:
        made.append(Lab(f"test-{os.getpid()}-{suffix}", kernel="6.1"))
        return made[-1]

    yield make
    for machine in made:
        discard(machine)


@pytest.fixture
def link(lab: Lab) -> Iterator[Link]:
    """Open a session of the shared lab."""
    with lab.connect() as session:
        yield session


@pytest.fixture(scope="session")
def machine(lab: Lab) -> Iterator[Lab]:
    """A lab with the driver, shared by tests that leave it as it was; its log stays clean."""
    machine = Lab(f"{lab.name}-driver", kernel="6.1")
    try:
        machine.up(kmod=driver_kmod(machine.series, print), progress=print)
        yield machine
        assert not machine.trouble()
    finally:
        discard(machine)
