# SPDX-License-Identifier: GPL-2.0-or-later
"""One runner of machine code for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from exec.cpu import Cpu


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cpu]:
    """Compile and start the runner."""
    runner = Cpu(tmp_path_factory.mktemp("cpu"))
    yield runner
    runner.close()
