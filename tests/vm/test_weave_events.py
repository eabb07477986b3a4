# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults, warnings and stacks in woven code are as native; `tests/stress` has it longer."""

from __future__ import annotations

import pytest
from weave_events import events_while_scopes_come_and_go


@pytest.mark.parametrize("series", ["6.1", "6.12"])
def test_faults_warnings_and_stacks_while_scopes_come_and_go(series: str) -> None:
    events_while_scopes_come_and_go(series, number=1000, rounds=8)
