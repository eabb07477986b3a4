# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach and detach latency of one point, p50 and p99: a minute, where hit_cost takes ten."""

from __future__ import annotations

from _one_point import one_point
from _record import record

import kernweave
from kernweave.lab.machine import Lab

_LAB = "bench-one-point"
_RUNS = 300


def main() -> None:
    """Measure in a lab of its own and write results/one_point.json."""
    try:
        with kernweave.connect(f"lab:{_LAB}", progress=print) as session:
            record("one_point", session.kernel, {"ms": one_point(session, "vfs_read+0x13", _RUNS)})
    finally:
        Lab(_LAB).down()


if __name__ == "__main__":
    main()
