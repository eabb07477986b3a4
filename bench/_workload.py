# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of system calls that all costs are measured with, and the lab it runs in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kernweave
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

CSRC = Path(__file__).parent / "csrc"

#: one CPU whose clock is the number of instructions it has executed
ICOUNT = ("-icount", "shift=0,sleep=off")
#: idle hours pass in seconds then; the host's limit on CPU time still ends the lab
ICOUNT_KERNEL = ("kernweave.idle=1000000000", "kernweave.cap=1000000000")


@contextmanager
def lab_session(name: str, icount: bool = False, kernel: str = "6.1") -> Iterator[Session]:
    """Boot a lab of that name anew, open a session, take the lab down at the end."""
    args, kernel_args, smp = (ICOUNT, ICOUNT_KERNEL, 1) if icount else ((), (), 2)
    lab = Lab(name, kernel=kernel)
    lab.down()
    try:
        kmod = driver_kmod(lab.series, print)
        lab.up(kmod=kmod, qemu_args=args, kernel_args=kernel_args, smp=smp, progress=print)
        with kernweave.connect(f"lab:{name}") as session:
            yield session
    finally:
        lab.down()


@dataclass(frozen=True, slots=True)
class Workload:
    """A loop in the guest.

    Attributes:
        session: where it runs.
        call: `read`, `getppid`, or `mix` (read, write, lseek, getppid).
        calls: per round; fewer than fit between two ticks of the timer, so that the least
            round holds none.
        rounds: of which the least counts.
    """

    session: Session
    call: str = "read"
    calls: int = 1000
    rounds: int = 16

    @property
    def total(self) -> int:
        """Calls in all."""
        return self.calls * self.rounds

    def cost(self, prefix: Sequence[str] = ()) -> float:
        """Guest nanoseconds (with ICOUNT: instructions) per call; `prefix` goes before the loop."""
        program = str(build_static(CSRC / "calls.c"))
        command = [*prefix, program, self.call, str(self.calls), str(self.rounds)]
        return float(self.session.run(command, check=True, capture=True).stdout)
