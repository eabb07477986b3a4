# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab machine that the oracle watches: boot, stopped snapshots, the console's bad news."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_qemu
from kernweave.session.target import driver_kmod
from oracle.oracle import Counts, Oracle, build_plugin, qemu_args

SERIES = "6.1"
ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}

_TROUBLE = re.compile(r"WARNING:|BUG:|Oops|ftrace bug|rcu:.*stall")
_STORM = Path(__file__).parents[1] / "vm" / "csrc" / "storm.c"


@dataclass(frozen=True)
class OracleLab:
    """A running lab and the oracle in its QEMU.

    Attributes:
        release: of the kernel.
        qemu: version.
    """

    lab: Lab
    oracle: Oracle
    release: str
    qemu: str

    @property
    def target(self) -> str:
        """What `kernweave.connect` takes."""
        return f"lab:{self.lab.name}"

    def snapshot(self) -> Counts:
        """Return all counters at one moment: the machine is stopped meanwhile."""
        with self.stopped():
            return self.oracle.snapshot()

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """Hold all virtual CPUs meanwhile: what is fetched then is of one moment."""
        return _stopped(self.lab.folder / "qmp")

    def trouble(self) -> list[str]:
        """Return the console's lines that no test may cause."""
        return [line for line in self.lab.log().splitlines() if _TROUBLE.search(line)]


@contextlib.contextmanager
def oracle_lab(
    name: str,
    folder: Path,
    kernel_args: Sequence[str] = (),
    cflags: tuple[str, ...] = (),
    options: Sequence[str] = (),
    series: str = SERIES,
) -> Iterator[OracleLab]:
    """Boot a lab under the oracle; or skip as KERNWEAVE_VM says.

    Args:
        name: of the lab, made unique by the process id.
        folder: for the plug-in and its socket.
        kernel_args: added to the kernel's command line.
        cflags: for the driver: faults to be seeded.
        options: of the plug-in.
        series: of the kernel.
    """
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    machine = Lab(f"oracle-{os.getpid()}-{name}", kernel=series)
    try:
        try:
            fetch_qemu(print)
            kmod = driver_kmod(series, print, cflags)
        except UnsupportedError as error:
            if wanted == "1":
                raise
            pytest.skip(f"no lab on this machine: {error}")
        plugin = qemu_args(build_plugin(folder), folder / "ctl", *options)
        state = machine.up(kmod=kmod, qemu_args=plugin, kernel_args=kernel_args, progress=print)
        with Oracle(folder / "ctl") as oracle:
            yield OracleLab(machine, oracle, state.kernel, state.qemu)
    finally:
        machine.down()


@contextlib.contextmanager
def no_trouble(machine: OracleLab) -> Iterator[None]:
    """Fail if the kernel complains on its console meanwhile."""
    before = len(machine.trouble())
    yield
    assert machine.trouble()[before:] == []


def storm(seed: int, rounds: int, spawns: int) -> list[str]:
    """Return the command of the mixed workload, compiled at the first call."""
    program = build_static(_STORM, cflags=("-pthread",))
    return [str(program), str(seed), str(rounds), str(spawns)]


# ---- QEMU's monitor --------------------------------------------------------------------------


@contextlib.contextmanager
def _stopped(qmp: Path) -> Iterator[None]:
    """Hold all virtual CPUs, and the machine's clock with them."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(qmp))
        with sock.makefile("rw") as lines:
            lines.readline()  # the greeting

            def tell(command: str) -> None:
                lines.write(json.dumps({"execute": command}) + "\n")
                lines.flush()
                _wait_return(lines.readline)

            tell("qmp_capabilities")
            tell("stop")
            try:
                yield
            finally:
                tell("cont")


def _wait_return(read_line: Callable[[], str]) -> None:
    """Skip events up to the answer of a command."""
    while line := read_line():
        answer = json.loads(line)
        if "event" not in answer:
            assert "return" in answer, answer
            return
    raise RuntimeError("QEMU's monitor hung up")
