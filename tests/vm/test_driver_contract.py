# SPDX-License-Identifier: GPL-2.0-or-later
"""The real driver keeps the same contract as the fake, in a lab."""

from __future__ import annotations

import pytest

from contract import DriverContract
from kernweave.driver.link import Link
from kernweave.lab.machine import Lab


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


@pytest.fixture
def target(machine: Lab) -> LabTarget:
    return LabTarget(machine)


class TestRealDriver(DriverContract):
    pass
