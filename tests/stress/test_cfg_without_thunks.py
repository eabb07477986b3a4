# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of `tests/vm/test_cfg_transfers.py` on a kernel whose indirect calls use no thunks."""

from __future__ import annotations

import pytest
import test_cfg_transfers as checks

globals().update({name: check for name, check in vars(checks).items() if name.startswith("test_")})


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> checks.Recording:
    return checks.record(tmp_path_factory.mktemp("cfg"), checks.NO_THUNKS)
