# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab machine: boot it, open sessions to it, take it down."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernweave.driver.link import Link
from kernweave.errors import KernweaveError, LabError
from kernweave.lab.cache import Progress, silent
from kernweave.lab.initramfs import build_initramfs
from kernweave.lab.packages import KernelTree, fetch_kernel, fetch_qemu
from kernweave.lab.qemu import PORTS, Hardware, check_version, command_line, launch
from kernweave.lab.state import (
    State,
    lab_folder,
    locked,
    read_state,
    start_ticks,
    try_lock,
    write_state,
)

READY = "kernweave: GUEST-UP"

_TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|ftrace bug|general protection|rcu:.*stall|soft lockup|Call Trace"
    r"|Kernel panic"
)
_BOOT_LIMIT_S = 60.0
_DYING_S = 3.0  # between the end of a connection and that of a dying QEMU
_TAIL_LINES = 15
_TROUBLE = re.compile(r"BUG: |Oops: |general protection|sysrq: Trigger|invalid opcode|double fault")


@dataclass(frozen=True, slots=True)
class Status:
    """What is known about a lab.

    Attributes:
        name: of the lab.
        running: QEMU runs and the guest has booted.
        state: of the running QEMU, or of the last one, or None.
        sessions: ports in use.
    """

    name: str
    running: bool
    state: State | None
    sessions: int


class Lab:
    """A throw-away machine that runs a stock kernel, addressed by its name.

    It survives the process that boots it; any process of the same user may use it.
    """

    def __init__(self, name: str = "6.1", kernel: str | None = None) -> None:
        """Name a lab; nothing is started.

        Args:
            name: of the lab.
            kernel: series to boot; None: the name itself, or 6.1 if that is no series.
        """
        self.name = name
        self.series = kernel or (name if re.fullmatch(r"\d+\.\d+", name) else "6.1")
        self.folder = lab_folder(name)

    # ---- up and down ---------------------------------------------------------------------------

    def up(
        self,
        *,
        progress: Progress = silent,
        kmod: Path | None = None,
        qemu_args: Sequence[str] = (),
        kernel_args: Sequence[str] = (),
        smp: int = 2,
        memory_mib: int = 1024,
    ) -> State:
        """Boot the lab unless it runs; a second caller waits for the first.

        A lab that runs with another driver than `kmod` is booted anew if it has no session. The
        other arguments count at boot only.

        Args:
            progress: is called with one line per step.
            kmod: the driver to load; None: none, or whatever the running lab has.
            qemu_args: added to QEMU's command line, before those of KERNWEAVE_QEMU_ARGS.
            kernel_args: added to the kernel's, before those of KERNWEAVE_KERNEL_ARGS.
            smp: CPUs.
            memory_mib: of the machine.

        Raises:
            LabError: it does not boot; the notes are the last console lines.
            UnsupportedError: a tool is missing or too old.
        """
        hardware = Hardware(smp, memory_mib, tuple(qemu_args), tuple(kernel_args))
        with locked(self.folder / "lock"):
            state = self._booted()
            if state is not None and kmod is None:
                return state
            kernel = fetch_kernel(self.series, progress)
            initramfs = build_initramfs(kernel, kmod)
            if state is not None and state.initramfs == initramfs.name:
                return state
            if state is not None and self._sessions():
                raise LabError(
                    f"lab {self.name} runs another build of the driver and is in use",
                    help=f"end its sessions, or: kernweave lab down {self.name}",
                )
            self._clear()
            return self._boot(kernel, initramfs, hardware, progress, kmod is not None)

    def down(self) -> bool:
        """Power the lab off at once; return whether it ran."""
        with locked(self.folder / "lock"):
            return self._clear()

    def running(self) -> bool:
        """Return whether the lab has booted and its QEMU is alive."""
        return self._booted() is not None

    def status(self) -> Status:
        """Return what is known about the lab."""
        state = read_state(self.folder)
        return Status(self.name, self.running(), state, self._sessions())

    def log(self) -> str:
        """Return the console so far, which holds the whole kernel log; of the last boot if down."""
        try:
            return (self.folder / "console.log").read_text(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    def trouble(self) -> list[str]:
        """Return the lines of the kernel log that tell of a warning, bug, oops or stall."""
        return [line for line in self.log().splitlines() if _TROUBLE.search(line)]

    def wait_console(self, text: str, timeout: float = 10.0) -> None:
        """Wait until the console shows a text.

        Raises:
            LabError: it does not within `timeout` seconds, or QEMU ends first.
        """
        deadline = time.monotonic() + timeout
        while text not in self.log():
            state = read_state(self.folder)
            if state is None or not state.alive():
                if text in self.log():
                    return
                raise self._explain("QEMU ended")
            if time.monotonic() > deadline:
                raise self._lab_error(f"no {text!r} on the console within {timeout:g} s")
            time.sleep(0.02)

    # ---- sessions ------------------------------------------------------------------------------

    def connect(self, timeout: float = 10.0) -> Link:
        """Open a session on a free port.

        Raises:
            LabError: the lab is down, all ports are taken, or its agent does not answer.
        """
        state = self._booted()
        if state is None:
            raise LabError(f"lab {self.name} is down", help=f"kernweave lab up {self.name}")
        for port in range(state.ports):
            lease = try_lock(self._port_lock(port))
            if lease is None:
                continue
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(timeout)
                sock.connect(str(self.folder / f"port{port}"))
            except OSError as error:
                sock.close()
                lease.close()
                raise self._explain(f"cannot connect to port {port}: {error}") from error
            return Link(sock, timeout=timeout, explain=self._explain, on_close=lease.close)
        raise LabError(
            f"all {state.ports} ports of lab {self.name} are in use",
            help="end a session, or use a lab of another name",
        )

    def _port_lock(self, port: int) -> Path:
        return self.folder / f"port{port}.lock"

    def _sessions(self) -> int:
        leases = [try_lock(self._port_lock(port)) for port in range(PORTS)]
        for lease in leases:
            if lease is not None:
                lease.close()
        return leases.count(None)

    # ---- boot ----------------------------------------------------------------------------------

    def _booted(self) -> State | None:
        state = read_state(self.folder)
        return state if state is not None and state.booted_at and state.alive() else None

    def _clear(self) -> bool:
        """End this lab's QEMU, booted or half started, and forget its sockets."""
        state = read_state(self.folder) or self._stray()
        ran = state is not None and state.alive()
        if state is not None:
            state.kill()
        for file in ("state.json", "qemu.pid", "qmp", *(f"port{port}" for port in range(PORTS))):
            (self.folder / file).unlink(missing_ok=True)
        return ran

    def _stray(self) -> State | None:
        """Return a QEMU whose starter died before it wrote the state file."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / "qemu.pid").read_text())
            ticks = start_ticks(pid)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if ticks is not None and os.fsencode(self.folder / "qemu.pid") in command:
                return State(pid, ticks, "", "", 0, "")
        return None

    def _boot(
        self,
        kernel: KernelTree,
        initramfs: Path,
        hardware: Hardware,
        progress: Progress,
        with_driver: bool,
    ) -> State:
        qemu = fetch_qemu(progress)
        check_version(qemu)
        (self.folder / "console.log").unlink(missing_ok=True)
        progress(f"booting {kernel.release} in QEMU {qemu.version}")
        began = time.monotonic()
        try:
            argv = command_line(qemu, kernel, initramfs, self.folder, hardware)
            pid = launch(qemu, argv, self.folder, hardware.smp)
            ticks = start_ticks(pid)
            if ticks is None:
                raise self._lab_error("QEMU ended at once")
            state = State(pid, ticks, kernel.release, qemu.version, PORTS, initramfs.name)
            write_state(self.folder, state)
            self.wait_console(READY, _BOOT_LIMIT_S)
            if with_driver and "kernweave: cannot load kernweave.ko" in self.log():
                raise self._lab_error("the driver does not load")
        except BaseException:
            self._clear()
            raise
        state = replace(state, booted_at=time.time(), boot_seconds=time.monotonic() - began)
        write_state(self.folder, state)
        return state

    # ---- what went wrong -----------------------------------------------------------------------

    def _explain(self, cause: str) -> KernweaveError:
        """Return the error for a lost connection: the reason, if the machine is going."""
        state = read_state(self.folder)
        deadline = time.monotonic() + _DYING_S
        lost = "connection" in cause or "QEMU" in cause
        while lost and state is not None and state.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        log = self.log()
        if "Kernel panic - not syncing" in log:
            return self._lab_error("the lab's kernel panicked", _panic_lines(log))
        off = re.search(r"kernweave: power off: (.*)", log)
        if off is not None:
            return self._lab_error(f"the lab has powered itself off: {off[1]}")
        if state is None or not state.alive():
            return self._lab_error(f"the lab's QEMU is gone ({cause})")
        return self._lab_error(cause)

    def _lab_error(self, message: str, lines: Sequence[str] | None = None) -> LabError:
        return LabError(
            f"lab {self.name}: {message}",
            notes=self.log().splitlines()[-_TAIL_LINES:] if lines is None else lines,
            help=f"the whole console: kernweave lab log {self.name}",
        )


def _panic_lines(log: str) -> list[str]:
    """Return the console from the first sign of trouble before a panic."""
    lines = log.splitlines()
    panic = next(i for i, line in enumerate(lines) if "Kernel panic - not syncing" in line)
    early = range(max(0, panic - 100), panic)
    first = next((i for i in early if _TROUBLE.search(lines[i])), panic)
    return lines[first : first + 2 * _TAIL_LINES]
