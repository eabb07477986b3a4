# SPDX-License-Identifier: GPL-2.0-or-later
"""The real driver keeps the same contract as the fake, in a lab."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from contract import DriverContract
from kernweave.driver.link import Link
from kernweave.errors import UnsupportedError
from kernweave.lab.machine import Lab
from kernweave.session.target import driver_kmod


class LabTarget:
    """A lab as the contract sees a target."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def connect(self) -> Link:
        return self._lab.connect()

    def close(self, session: Link) -> None:
        # The agent closes the driver when it sees the end of the connection, or the start of the
        # next one: that one is on the same port, the first free, as sessions close in reverse.
        session.close()
        self._lab.connect().close()


@pytest.fixture(scope="module")
def target() -> Iterator[LabTarget]:
    """A lab with the driver; its kernel has nothing to complain about in the end."""
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    lab = Lab(f"contract-{os.getpid()}", kernel="6.1")
    try:
        try:
            lab.up(kmod=driver_kmod(lab.series, print), progress=print)
        except UnsupportedError as error:
            if wanted == "1":
                raise
            pytest.skip(f"no lab on this machine: {error}")
        yield LabTarget(lab)
        trouble = lab.trouble()
    finally:
        lab.down()
    assert not trouble


class TestRealDriver(DriverContract):
    pass
