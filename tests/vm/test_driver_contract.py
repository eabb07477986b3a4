# SPDX-License-Identifier: GPL-2.0-or-later
"""The real driver keeps the same contract as the fake, in a lab."""

from __future__ import annotations

import time

import pytest
from guest import LONGEST_S

from contract import DriverContract
from contract_group import commit_groups
from contract_splice import MANY, make_splice
from kernweave.driver.client import Driver
from kernweave.driver.link import Link
from kernweave.driver.records import Type
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

    def vanish(self, session: Link, request: bytes) -> None:
        session._send(Type.CALL, request, None)
        self.close(session)


@pytest.fixture
def target(machine: Lab) -> LabTarget:
    return LabTarget(machine)


class TestRealDriver(DriverContract):
    pass


def test_commit_is_done_though_records_come_meanwhile(target: LabTarget) -> None:
    """Each of them interrupts the agent, which then asks the driver again."""
    link = target.connect()
    driver = Driver(link.call)
    splice = make_splice(driver, MANY)
    tag = link._send(Type.CALL, commit_groups(splice), None)
    for rows in range(10):
        link.resize(rows, 80)
    answer = link._receive(time.monotonic() + LONGEST_S)
    assert answer is not None
    assert (answer.type, answer.tag) == (Type.REPLY, tag)
    assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
    target.close(link)
