# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a user waits: lab up, a whole count, attach and detach of 5,000 points.

Points that trap are apart: the kernel arms and removes kprobes one by one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import record, summary

import kernweave
from kernweave.lab.machine import Lab
from kernweave.model.plan import Tactic
from kernweave.session.session import Session

_LAB = "bench-latency"
_POINTS = 5000
_RUNS = 5
_JUMPS = [tactic.value for tactic in Tactic if tactic is not Tactic.INT3]


def _kernweave(*args: str) -> float:
    """Seconds that one command line takes."""
    command = [str(Path(sys.executable).with_name("kernweave")), "--target", f"lab:{_LAB}", *args]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _cold_labs() -> list[float]:
    """From nothing to the end of the first guest command."""
    times = []
    for _ in range(3):
        Lab(_LAB).down()
        times.append(_kernweave("lab", "exec", "--", "true"))
    return times


def _attach(session: Session, points: Sequence[str], tactics: Sequence[str]) -> dict[str, Any]:
    """Seconds to attach and to detach all that the tactics can place of some points."""
    attach, detach, placed = [], [], 0
    for _ in range(_RUNS):
        began = time.monotonic()
        hits = session.count(*points, partial=True, tactics=tactics)
        attach.append(time.monotonic() - began)
        placed = len(hits.placed)
        began = time.monotonic()
        hits.detach()
        detach.append(time.monotonic() - began)
    return {"points": placed, "attach_s": summary(attach), "detach_s": summary(detach)}


def main() -> None:
    """Measure in a lab of its own and write results/latency.json."""
    try:
        labs = _cold_labs()
        counts = [_kernweave("count", "vfs_read", "--", "true") for _ in range(_RUNS)]
        with kernweave.connect(f"lab:{_LAB}") as session:
            # entries, blocks, instructions
            jumps = _attach(session, ("a*", "vfs_*@blocks", "tcp_v4_*@insns"), _JUMPS)
            assert jumps["points"] >= _POINTS, jumps["points"]
            traps = _attach(session, ("vfs_read@insns", "vfs_write@insns"), ["int3"])
            kernel = session.kernel
    finally:
        Lab(_LAB).down()
    record(
        "latency",
        kernel,
        {
            "lab_to_first_command_s": summary(labs),
            "count_vfs_read_true_s": summary(counts),
            "jumps": jumps,
            "traps": traps,
        },
    )


if __name__ == "__main__":
    main()
