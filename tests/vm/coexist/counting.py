# SPDX-License-Identifier: GPL-2.0-or-later
"""What these tests count: one function of known calls, by every tactic, and its refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from guest import JUMPS, program, target, until

import kernweave
from kernweave.errors import Reason, RefusedError
from kernweave.lab.machine import Lab
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session

SUBJECT = "sched_rr_get_interval"  # called by one system call, and by nobody but the workload
CALLS = 23
ALL = (*JUMPS, "int3")


def call(session: Session) -> None:
    """Call the subject so many times."""
    session.run([program("calls"), str(CALLS)], check=True)


def count_all(session: Session, *more: str, tactics: Sequence[str] = JUMPS) -> Attachment:
    """Count every instruction of the subject, and other points, as far as possible."""
    return session.splice(f"{SUBJECT}@insns", *more, partial=True, tactics=tactics)


def refusals(caught: pytest.ExceptionInfo[RefusedError]) -> list[Reason]:
    """Why each point was refused."""
    return [reason for _, reason, _ in caught.value.refused]


def until_unpinned(lab: Lab) -> None:
    """Wait until what somebody stood on is taken out."""

    def pinned() -> int:
        with kernweave.connect(target(lab), writer=False) as reader:
            return reader.driver.facts.pinned

    until("nothing is pinned", lambda: pinned() == 0)
