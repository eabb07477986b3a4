# SPDX-License-Identifier: GPL-2.0-or-later
"""This machine as a target: its own /dev/kernweave and its own processes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import selectors
import signal as signals
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kernweave.driver import uapi
from kernweave.driver.link import Event
from kernweave.driver.records import ExitStatus
from kernweave.errors import DriverError, UnsupportedError, UsageError

DEVICE = "/dev/kernweave"
LOCKDOWN = "/sys/kernel/security/lockdown"

_IOWR = 3 << 30
_CALL = _IOWR | uapi.CALL.itemsize << 16 | ord("K") << 8 | 0x57
_CHUNK = 1 << 16
_INIT_MODULE, _DELETE_MODULE = 175, 176  # of x86-64; the C library has no such functions
_LINGER_S = 0.2  # a grandchild may hold the pipes of a command that has ended


class LocalLink:
    """A session with this machine's driver; the same methods as `Link`."""

    def __init__(self) -> None:
        """Open the device.

        Raises:
            UnsupportedError: it is not there, this is not root, or the kernel is locked down.
        """
        self._fd = _open_device()
        self._reply = ctypes.create_string_buffer(0)
        self._process: subprocess.Popen[bytes] | None = None
        self._began_ns = 0

    def close(self) -> None:
        """Close the device, which undoes the session; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def call(self, request: bytes) -> memoryview:
        """The driver's reply to one request.

        Raises:
            DriverError: the request is malformed, or the device is closed.
        """
        if not len(self._reply):
            self._reply = ctypes.create_string_buffer(uapi.MAX_REPLY)
        source = ctypes.create_string_buffer(request, len(request))
        fields = (ctypes.c_uint64 * 5)(
            ctypes.addressof(source),
            len(request),
            ctypes.addressof(self._reply),
            uapi.MAX_REPLY,
            0,
        )
        try:
            while not _is_done(self._fd, fields):
                pass
        except OSError as error:
            raise DriverError(f"{DEVICE}: {error.strerror}", error.errno or 0) from error
        return memoryview(bytes(memoryview(self._reply)[: fields[4]]))

    def load_kmod(self, file: bytes) -> None:
        """Load a kmod, given its file.

        Raises:
            DriverError: the kernel refuses; `errno` says why, its log more.
        """
        _call_kernel("the kernel refuses a kmod", _INIT_MODULE, file, len(file), b"")

    def unload_kmod(self, name: str) -> None:
        """Unload a kmod.

        Raises:
            DriverError: ENOENT, if there is none of that name; EAGAIN, if it is in use.
        """
        what = f"kmod {name} cannot be unloaded"
        _call_kernel(what, _DELETE_MODULE, name.encode(), os.O_NONBLOCK)

    def exec_start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        fresh: bool = False,
    ) -> None:
        """Start a command in a process group of its own; `exec_events` tells how it goes on."""
        del fresh  # nothing lies between this process and its files
        if self._process is not None:
            raise UsageError("a command is already running in this session")
        self._began_ns = time.monotonic_ns()
        try:
            self._process = subprocess.Popen(
                list(argv),
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._process = _failed(argv[0], error)

    def exec_events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield ("stdout" | "stderr", bytes) as they come and last ("exit", ExitStatus).

        Raises:
            TimeoutError: time is up; the command still runs.
        """
        process = self._process
        if process is None:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        yield from _output(process, deadline)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        self._process = None
        duration_ns = time.monotonic_ns() - self._began_ns
        signo = -code if code < 0 else 0
        yield "exit", ExitStatus(128 + signo if signo else code, signo or None, duration_ns)

    def signal(self, signo: int) -> None:
        """Send a signal to the process group of the running command, if there is one."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signals.Signals(signo))


def _is_done(fd: int, fields: ctypes.Array[ctypes.c_uint64]) -> bool:
    """Call the driver; false if a signal interrupted it, whose handler then did not raise."""
    try:
        fcntl.ioctl(fd, _CALL, fields)
    except InterruptedError:
        return False
    return True


def _call_kernel(what: str, number: int, *args: object) -> None:
    if ctypes.CDLL(None, use_errno=True).syscall(number, *args):
        error = ctypes.get_errno()
        raise DriverError(f"{what}: {os.strerror(error)}", error)


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _why_not(error) from error


def _why_not(error: OSError) -> UnsupportedError:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return UnsupportedError(
            f"the kernweave driver is not loaded on this machine: no {DEVICE}",
            help="build driver/csrc/kmod for this kernel and insmod kernweave.ko",
        )
    if os.geteuid() != 0:
        return UnsupportedError(f"only root may open {DEVICE}", help="run it as root, or use a lab")
    if "[none]" not in _lockdown():
        return UnsupportedError(
            f"this kernel is locked down: {_lockdown()}",
            help="boot without lockdown (secure boot turns it on), or use a lab",
        )
    return UnsupportedError(f"cannot open {DEVICE}: {error.strerror}")


def _lockdown() -> str:
    try:
        return Path(LOCKDOWN).read_text().strip()
    except OSError:
        return "[none]"


def _failed(name: str, error: OSError) -> subprocess.Popen[bytes]:
    """A process that says why the command could not be started: 127 not found, 126 otherwise."""
    status = 127 if error.errno == errno.ENOENT else 126
    words = f"kernweave: {name}: {error.strerror}"
    return subprocess.Popen(
        ["/bin/sh", "-c", f'printf "%s\\n" "$1" >&2; exit {status}', "sh", words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _output(process: subprocess.Popen[bytes], deadline: float | None) -> Iterator[Event]:
    """Both streams until they end, or until the command has ended and only others hold them."""
    with selectors.DefaultSelector() as selector:
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            if pipe and not pipe.closed:
                selector.register(pipe, selectors.EVENT_READ, name)
        ended: float | None = None
        while selector.get_map():
            if ended is None and process.poll() is not None:
                ended = time.monotonic()
            if ended is not None and time.monotonic() > ended + _LINGER_S:
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            for key, _ in selector.select(0.05):
                data = os.read(key.fd, _CHUNK)
                if data:
                    yield key.data, data
                else:
                    selector.unregister(key.fd)
