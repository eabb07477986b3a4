# SPDX-License-Identifier: GPL-2.0-or-later
"""The long version of `tests/vm/test_weave_events.py`."""

from __future__ import annotations

import pytest
from weave_events import events_while_scopes_come_and_go


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("series", ["6.1", "6.12"])
def test_10000_faults_warnings_and_stacks_while_scopes_come_and_go(series: str) -> None:
    events_while_scopes_come_and_go(series, number=10_000, rounds=50)
