# SPDX-License-Identifier: GPL-2.0-or-later
"""Two labs used for long, and a lab killed often; `tests/vm/test_soak.py` is the short version."""

from __future__ import annotations

import pytest

import soak


@pytest.mark.timeout(3600)
def test_two_labs_with_two_sessions_each_for_200_rounds_cross_nothing() -> None:
    with soak.labs("soak-a", "soak-b") as machines:
        soak.soak(machines, 200)


@pytest.mark.timeout(3600)
def test_client_whose_guest_is_killed_50_times_ends_in_time() -> None:
    with soak.labs("soak-kill") as (lab,):
        assert len(soak.kill_guests(lab, 50)) == 50
