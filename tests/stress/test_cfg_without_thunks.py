# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of `tests/vm/test_cfg_transfers.py` on a kernel whose indirect calls use no thunks."""

from __future__ import annotations

import pytest
from test_cfg_transfers import *  # noqa: F403
from test_cfg_transfers import NO_THUNKS, Recording, record


@pytest.fixture(scope="module")
def recording(  # type: ignore[no-redef]
    tmp_path_factory: pytest.TempPathFactory,
) -> Recording:
    return record(tmp_path_factory.mktemp("cfg"), NO_THUNKS)
