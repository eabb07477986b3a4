# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a user calls it, against a lab of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

Done = subprocess.CompletedProcess[str]


class Kernweave:
    """`kernweave --target lab:NAME ...` in a process of its own."""

    def __init__(self, name: str) -> None:
        self.argv = [sys.executable, "-m", "kernweave", "--target", f"lab:{name}"]

    def __call__(self, *args: str, status: int = 0, **kwargs: Any) -> Done:
        done = subprocess.run(
            [*self.argv, *args], capture_output=True, text=True, check=False, **kwargs
        )
        assert done.returncode == status, done.stderr
        return done


def rows(done: Done) -> list[dict[str, Any]]:
    """The JSON lines of standard output."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
