# SPDX-License-Identifier: GPL-2.0-or-later
"""Lab machines for tests: two boots for nearly all of them, names of their own, gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from guest import booted

from kernweave.driver.link import Link
from kernweave.errors import UnsupportedError
from kernweave.lab.machine import Lab

# whoever runs the tests in the background may have them ignore interrupts, and their children too
signal.signal(signal.SIGINT, signal.default_int_handler)


#: files that take longest begin first, so that none of them runs alone in the end
LONGEST = ("test_torture.py", "test_weave_live.py", "test_weave_events.py", "test_going.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Boot a lab, or skip as KERNWEAVE_VM says: unset = if possible, 1 = must, 0 = never."""
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    machine = Lab(f"test-{os.getpid()}", kernel="6.1")
    try:
        try:
            # its tests are in several files, between which other files may take long
            state = machine.up(progress=print, kernel_args=["kernweave.idle=3600"])
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


class Shared:
    """A lab with the driver, for all tests that leave it as it was; after a failure a fresh one."""

    def __init__(self) -> None:
        self._boot = ExitStack()
        self._lab: Lab | None = None
        self._failed = 0

    def lab(self, failed: int) -> Lab:
        """The lab, booted unless it runs, which it does not when idle, and no test failed since."""
        if self._lab is None or not self._lab.running() or failed != self._failed:
            self.discard()
            self._lab, self._failed = self._boot.enter_context(booted("shared")), failed
        return self._lab

    def discard(self) -> None:
        self._lab = None
        with suppress(AssertionError):  # its log was read after each module
            self._boot.close()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.discard()


@pytest.fixture(scope="module")
def machine(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab with the driver, shared by tests that leave it as it was; its log stays clean."""
    machine = shared.lab(request.session.testsfailed)
    yield machine
    assert not machine.trouble()
