# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions in quick succession on one port: the guest learns late of the earlier one's end."""

from __future__ import annotations

from kernweave.lab.machine import Lab


def test_port_closed_and_opened_at_once_answers_every_session(lab: Lab) -> None:
    for _ in range(300):
        with lab.connect() as link:
            assert link.identify()[1].startswith("6.1")
