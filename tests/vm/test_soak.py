# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions side by side and guests killed under a client; `tests/stress` has the long version."""

from __future__ import annotations

import soak


def test_two_labs_with_two_sessions_each_cross_nothing() -> None:
    with soak.labs("soak-a", "soak-b") as machines:
        soak.soak(machines, 4)


def test_client_whose_guest_is_killed_ends_in_time_with_one_error() -> None:
    with soak.labs("soak-kill") as (lab,):
        assert len(soak.kill_guests(lab, 2)) == 2
