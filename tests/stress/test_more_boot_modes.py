# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot modes that `tests/vm/test_boot_modes.py` leaves out."""

from __future__ import annotations

import pytest
from test_boot_modes import MORE_MODES, Mode, check_mode


@pytest.mark.parametrize("mode", MORE_MODES, ids=lambda mode: mode.name)
def test_boot_mode_counts_and_restores(mode: Mode) -> None:
    check_mode(mode)
