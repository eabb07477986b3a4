# SPDX-License-Identifier: GPL-2.0-or-later
"""`make demo` as a newcomer meets it: in a fresh clone with an empty cache, and once more."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from _record import record

from kernweave.lab.machine import Lab

_ROOT = Path(__file__).parent.parent


def _demo(folder: Path, cache: Path) -> float:
    """Seconds of `make demo` in a checkout."""
    began = time.monotonic()
    env = {**os.environ, "KERNWEAVE_CACHE": str(cache)}
    subprocess.run(["make", "-C", str(folder), "demo"], check=True, env=env)
    return round(time.monotonic() - began, 1)


def main() -> None:
    """Clone, run twice, write results/demo.json."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        clone = Path(folder) / "kernweave"
        subprocess.run(["git", "clone", "-q", str(_ROOT), str(clone)], check=True)
        cold = _demo(clone, Path(folder) / "cache")
        warm = [_demo(clone, Path(folder) / "cache") for _ in range(3)]
        state = Lab("demo").status().state
        Lab("demo").down()
    assert state is not None
    record("demo", state.kernel, {"cold_s": cold, "warm_s": warm})


if __name__ == "__main__":
    main()
