# SPDX-License-Identifier: GPL-2.0-or-later
"""What any driver must do: the same tests for the fake and for the real one.

A test module subclasses `DriverContract` and gives it a fixture `target`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from contract_areas import AreaContract
from contract_commit import CommitContract
from contract_copies import CopiesContract
from contract_group import GroupContract
from contract_hello import HelloContract
from contract_sessions import Sessions, Target
from contract_text import TextContract
from contract_traps import TrapContract
from contract_undo import UndoContract
from contract_weave import WeaveContract


class DriverContract(
    HelloContract,
    TextContract,
    AreaContract,
    CommitContract,
    UndoContract,
    TrapContract,
    GroupContract,
    CopiesContract,
    WeaveContract,
):
    """All of it; a subclass adds the fixture `target`."""

    @pytest.fixture
    def sessions(self, target: Target[Any]) -> Iterator[Sessions]:
        opened = Sessions(target)
        yield opened
        opened.close()
