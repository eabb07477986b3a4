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
from kernweave.errors import KernweaveError, LabError, UnsupportedError, UsageError
from kernweave.lab.accel import choose_accel
from kernweave.lab.cache import Progress, disk_errors, silent
from kernweave.lab.console import (
    TAIL_LINES,
    driver_refusal,
    panic_lines,
    power_off_reason,
    read_console,
    trouble_lines,
)
from kernweave.lab.initramfs import build_initramfs
from kernweave.lab.packages import KernelTree, QemuTree, fetch_kernel, fetch_qemu
from kernweave.lab.qemu import (
    PORTS,
    TRACE_FILE,
    WATCHDOG_EVENT,
    Hardware,
    check_version,
    command_line,
    launch,
    own_words,
)
from kernweave.lab.state import (
    State,
    is_stopped,
    lab_folder,
    locked,
    read_state,
    start_ticks,
    try_lock,
    write_state,
)

READY = "kernweave: GUEST-UP"

_BOOT_LIMIT_S = 120.0
_DYING_S = 3.0  # between the end of a connection and that of a dying QEMU


class QemuError(LabError):
    """QEMU's own fault before the guest was up: it ended, or the guest stood still."""


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
            kernel: series to boot; None: that of the lab of this name if there is one, else
                the name itself, or 6.1 if that is no series.
        """
        self.name = name
        self.folder = lab_folder(name)
        known = read_state(self.folder)
        usual = name if re.fullmatch(r"\d+\.\d+", name) else "6.1"
        self.series = kernel or (known.series if known else usual)

    # ---- up and down ---------------------------------------------------------------------------

    def up(
        self,
        *,
        progress: Progress = silent,
        kmod: Path | None = None,
        no_driver: str | None = None,
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
            kmod: the driver to load; None: none, or whatever the running lab has. A driver that
                does not load leaves the lab without one; the state's `no_driver` says why.
            no_driver: why there is no `kmod`, for those who then miss it.
            qemu_args: added to QEMU's command line, before those of KERNWEAVE_QEMU_ARGS.
            kernel_args: added to the kernel's, before those of KERNWEAVE_KERNEL_ARGS.
            smp: CPUs.
            memory_mib: of the machine.

        Raises:
            LabError: it does not boot; the notes are the last console lines. Or the disk is full.
            UnsupportedError: a tool is missing or too old.
            UsageError: the lab runs another kernel.
        """
        hardware = Hardware(smp, memory_mib, tuple(qemu_args), tuple(kernel_args))
        with disk_errors(), locked(self.folder / "lock"):
            state = self._booted()
            if state is not None and state.series != self.series:
                raise UsageError(
                    f"lab {self.name} runs kernel {state.series}, not {self.series}",
                    help=f"use a lab of another name, or: kernweave lab down {self.name}",
                )
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
            if kmod is None:
                no_driver = no_driver or "the lab was booted without the driver"
            return self._boot(kernel, initramfs, hardware, progress, no_driver)

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
        return read_console(self.folder / "console.log")

    def trouble(self) -> list[str]:
        """Return the lines of the kernel log that tell of a warning, bug, oops or stall."""
        return trouble_lines(self.log())

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

    def connect(self, timeout: float = 30.0) -> Link:
        """Open a session on a free port.

        Raises:
            LabError: the lab is down, all ports are taken, or its agent does not answer.
                A driver request to a lab without the driver raises UnsupportedError.
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
            return Link(
                sock,
                timeout=timeout,
                explain=self._explain,
                on_close=lease.close,
                no_driver=self._no_driver(state),
            )
        raise LabError(
            f"all {state.ports} ports of lab {self.name} are in use",
            help="end a session, or use a lab of another name",
        )

    def _no_driver(self, state: State) -> UnsupportedError | None:
        if state.no_driver is None:
            return None
        return UnsupportedError(
            state.no_driver,
            notes=[f"lab {self.name} runs kernel {state.kernel} without the driver"],
            help=f"use another kernel, or boot it anew: kernweave lab down {self.name}",
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
        no_driver: str | None,
    ) -> State:
        qemu = fetch_qemu(progress)
        check_version(qemu)
        accel = choose_accel(qemu, kernel, hardware.qemu_args, progress)
        hardware = replace(hardware, accel=accel)
        argv = command_line(qemu, kernel, initramfs, self.folder, hardware)
        progress(f"booting {kernel.release} in QEMU {qemu.version}")
        try:
            state = self._start(qemu, argv, kernel, initramfs, hardware, no_driver)
        except QemuError as fault:  # the guest has not done anything yet: once more
            progress(": ".join(("booting again", fault.message, *fault.notes[-1:])))
            state = self._start(qemu, argv, kernel, initramfs, hardware, no_driver)
        refusal = None if no_driver else driver_refusal(self.log())
        if refusal is not None:
            state = replace(
                state, no_driver=f"the driver does not load in {kernel.release}: {refusal}"
            )
        write_state(self.folder, state)
        return state

    def _start(
        self,
        qemu: QemuTree,
        argv: Sequence[str],
        kernel: KernelTree,
        initramfs: Path,
        hardware: Hardware,
        no_driver: str | None,
    ) -> State:
        """Launch QEMU and wait until the guest is up."""
        for file in ("console.log", TRACE_FILE):
            (self.folder / file).unlink(missing_ok=True)
        began = time.monotonic()
        try:
            pid = launch(qemu, argv, self.folder, hardware.smp)
            ticks = start_ticks(pid)
            if ticks is None:
                raise self._explain("QEMU ended at once")
            state = State(
                pid, ticks, kernel.release, qemu.version, PORTS, initramfs.name,
                series=kernel.series, accel=hardware.accel, no_driver=no_driver,
            )  # fmt: skip
            write_state(self.folder, state)
            self._wait_until_up(state)
        except BaseException:
            self._clear()
            raise
        return replace(state, booted_at=time.time(), boot_seconds=time.monotonic() - began)

    def _wait_until_up(self, state: State) -> None:
        """Wait; a guest that stands still until then does so by QEMU's fault: timers get lost."""
        try:
            self.wait_console(READY, _BOOT_LIMIT_S)
        except LabError as error:
            if state.alive() and not panic_lines(self.log()):
                raise QemuError(error.message, notes=error.notes, help=error.help) from error
            raise

    # ---- what went wrong -----------------------------------------------------------------------

    def _explain(self, cause: str) -> KernweaveError:
        """Return the error for a lost connection: the reason, if the machine is going."""
        state = read_state(self.folder)
        deadline = time.monotonic() + _DYING_S
        lost = "connection" in cause or "QEMU" in cause
        while lost and state is not None and state.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        log = self.log()
        panic = panic_lines(log)
        if panic:
            return self._lab_error("the lab's kernel panicked", panic)
        off = power_off_reason(log)
        if off is not None:
            return self._lab_error(f"the lab has powered itself off: {off}")
        if state is None or not state.alive():
            if WATCHDOG_EVENT in read_console(self.folder / TRACE_FILE):
                return self._lab_error("the guest hung, and its watchdog ended it")
            words = own_words(self.folder)
            if words:
                return self._lab_error("QEMU ended by a fault of its own", words, QemuError)
            return self._lab_error(f"the lab's QEMU is gone ({cause})")
        if "answer" in cause or "takes nothing" in cause:
            return self._hung(cause, state)
        return self._lab_error(cause)

    def _hung(self, cause: str, state: State) -> LabError:
        how = "is stopped" if is_stopped(state.pid) else "runs"
        error = self._lab_error(f"the guest hangs: {cause}; QEMU (pid {state.pid}) {how}")
        error.help = f"kernweave lab down {self.name}"
        return error

    def _lab_error(
        self, message: str, lines: Sequence[str] | None = None, kind: type[LabError] = LabError
    ) -> LabError:
        return kind(
            f"lab {self.name}: {message}",
            notes=self.log().splitlines()[-TAIL_LINES:] if lines is None else lines,
            help=f"the whole console: kernweave lab log {self.name}",
        )
