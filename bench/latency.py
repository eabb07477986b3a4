# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a user waits: lab up, a whole count, attach and detach of 5,000 points."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from _record import record, summary

import kernweave
from kernweave.lab.machine import Lab
from kernweave.session.session import Session

_LAB = "bench-latency"
_POINTS = 5000
_RUNS = 5


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


def _attach(session: Session) -> tuple[list[float], list[float], int]:
    """Seconds to attach and detach at least 5,000 points: entries, blocks, instructions."""
    points = ("a*", "vfs_*@blocks", "tcp_v4_*@insns")
    attach, detach, placed = [], [], 0
    for _ in range(_RUNS):
        began = time.monotonic()
        hits = session.count(*points, partial=True)
        attach.append(time.monotonic() - began)
        placed = len(hits.placed)
        began = time.monotonic()
        hits.detach()
        detach.append(time.monotonic() - began)
    assert placed >= _POINTS, placed
    return attach, detach, placed


def main() -> None:
    """Measure in a lab of its own and write results/latency.json."""
    try:
        labs = _cold_labs()
        counts = [_kernweave("count", "vfs_read", "--", "true") for _ in range(_RUNS)]
        with kernweave.connect(f"lab:{_LAB}") as session:
            attach, detach, placed = _attach(session)
            kernel = session.kernel
    finally:
        Lab(_LAB).down()
    record(
        "latency",
        kernel,
        {
            "lab_to_first_command_s": summary(labs),
            "count_vfs_read_true_s": summary(counts),
            "attach_s": summary(attach) | {"points": placed},
            "detach_s": summary(detach) | {"points": placed},
        },
    )


if __name__ == "__main__":
    main()
