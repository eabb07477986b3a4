# SPDX-License-Identifier: GPL-2.0-or-later
"""One session with an agent over a connected socket: driver requests, commands, files."""

from __future__ import annotations

import os
import signal as signals
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from kernweave.driver.channel import Channel, Explain
from kernweave.driver.records import (
    CHUNK_MAX,
    FRESH,
    PTY,
    STDIN_NULL,
    ExitStatus,
    Record,
    Type,
    pack_exec,
    pack_resize,
    parse_exited,
    split_status,
)
from kernweave.errors import DriverError, KernweaveError, LabError, UsageError

Sink = Callable[[bytes], object]
Event = tuple[str, bytes | ExitStatus]

_DYING_S = 5.0  # a command that is killed has so long to end
_STREAMS: dict[int, str] = {Type.STDOUT: "stdout", Type.STDERR: "stderr"}


class Link:
    """A session; one thread at a time, closed by `close` or by leaving a with block.

    Any failure of the connection itself breaks the link for good: every later use raises.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout: float = 10.0,
        explain: Explain = LabError,
        on_close: Callable[[], object] = lambda: None,
        no_driver: KernweaveError | None = None,
    ) -> None:
        """Start a session on a connected stream socket, which the link then owns.

        Args:
            sock: connected to a port of the agent.
            timeout: seconds for the handshake, and for small requests later.
            explain: makes the error of a lost connection from a short message.
            on_close: is called once, after the socket is closed.
            no_driver: is raised by `call`, if the target is known to have no driver.

        Raises:
            KernweaveError: what `explain` returns, if no agent answers in time.
        """
        self._timeout = timeout
        self._explain = explain
        self._on_close = on_close
        self._no_driver = no_driver
        self._events: deque[Record] = deque()
        self._tag = 0
        self._command_tag: int | None = None
        self._closed = False
        try:
            self._channel = Channel(sock, timeout, explain)
        except BaseException:
            sock.close()
            on_close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session: the agent closes the driver, a running command is left to itself."""
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        self._on_close()

    # ---- requests ------------------------------------------------------------------------------

    def call(self, request: bytes | memoryview, timeout: float | None = 300.0) -> memoryview:
        """Return the driver's reply to one request; works while a command runs.

        Args:
            request: at most 128 MiB.
            timeout: seconds, or None to wait as long as it takes; a commit of 100,000 groups
                takes a minute in an idle lab.

        Raises:
            DriverError: the driver cannot be opened or refuses; `errno` says why.
            KernweaveError: the connection is lost, or there is no answer in time.
        """
        if self._no_driver is not None:
            raise self._no_driver
        error, reply = split_status(self._ask(Type.CALL, request, Type.REPLY, timeout))
        if error:
            raise DriverError(f"the driver refused a request: {os.strerror(error)}", error)
        return reply

    def read_file(self, path: str, timeout: float | None = 60.0) -> bytes:
        """Return the contents of a file of the target, at most 128 MiB.

        Raises:
            DriverError: it cannot be read; `errno` says why.
        """
        payload = self._ask(Type.READFILE, os.fsencode(path) + b"\0", Type.FILE, timeout)
        error, contents = split_status(payload)
        if error:
            raise DriverError(f"cannot read {path} of the target: {os.strerror(error)}", error)
        return bytes(contents)

    def load_kmod(self, file: bytes, timeout: float | None = 60.0) -> None:
        """Load a kmod, given its file.

        Raises:
            DriverError: the kernel refuses; `errno` says why, its log more.
        """
        error, _ = split_status(self._ask(Type.LOAD, file, Type.DONE, timeout))
        if error:
            raise DriverError(f"the kernel refuses a kmod: {os.strerror(error)}", error)

    def unload_kmod(self, name: str, timeout: float | None = 60.0) -> None:
        """Unload a kmod.

        Raises:
            DriverError: ENOENT, if there is none of that name; EAGAIN, if it is in use.
        """
        payload = self._ask(Type.UNLOAD, name.encode() + b"\0", Type.DONE, timeout)
        error, _ = split_status(payload)
        if error:
            raise DriverError(f"kmod {name} cannot be unloaded: {os.strerror(error)}", error)

    def identify(self) -> tuple[int, str]:
        """Return (pid of the agent, release of the kernel)."""
        payload = self._ask(Type.GETPID, b"", Type.PID, self._timeout)
        return struct.unpack_from("<I", payload)[0], bytes(payload[8:]).decode()

    # ---- commands ------------------------------------------------------------------------------

    def exec_start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
        fresh: bool = False,
        pty: tuple[int, int] | None = None,
    ) -> None:
        """Start a command; `exec_events` tells its output and end.

        Args:
            argv: looked up along PATH of `env`.
            env: the whole environment; None: that of this process.
            cwd: working directory, / if the target has none of that name; None: the current one.
            stdin: expect `feed`; otherwise its standard input is empty.
            fresh: look at the host's files anew, in case they changed since they were last read.
            pty: run it in a terminal of its own of so many (rows, columns); expects `feed`.
        """
        flags = (FRESH if fresh else 0) | (0 if pty is None else PTY)
        flags |= 0 if stdin or pty is not None else STDIN_NULL
        variables = os.environ if env is None else env
        payload = pack_exec(
            [os.fsencode(arg) for arg in argv],
            {os.fsencode(name): os.fsencode(value) for name, value in variables.items()},
            os.fsencode(cwd if cwd is not None else os.getcwd()),  # noqa: PTH109, a plain string
            flags=flags,
            size=pty or (0, 0),
        )
        if self._command_tag is not None:
            raise UsageError("a command is already running in this session")
        self._command_tag = self._send(Type.EXEC, payload, time.monotonic() + self._timeout)

    def exec_events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield ("stdout" | "stderr", bytes) as they come and last ("exit", ExitStatus).

        Args:
            timeout: seconds for all of it, or None.

        Raises:
            KernweaveError: the connection is lost, or time is up; the command still runs.
        """
        deadline = _deadline(timeout)
        while self._command_tag is not None:
            record = self._next_event(deadline)
            if record.type == Type.EXITED:
                self._command_tag = None
                yield "exit", parse_exited(record.payload)
            elif record.type in _STREAMS:
                yield _STREAMS[record.type], bytes(record.payload)
            elif record.type == Type.STDIN:
                yield "fed", b""

    def feed(self, data: bytes | memoryview) -> None:
        """Send at most 64 KiB to the command's standard input; nothing: its end.

        Wait for the event ("fed", b"") before the next: then the command has taken it.
        """
        if len(data) > CHUNK_MAX:
            raise UsageError(f"{len(data)} bytes at once, {CHUNK_MAX} are allowed")
        self._send(Type.STDIN, data, time.monotonic() + self._timeout)

    def signal(self, signo: int) -> None:
        """Send a signal to the process group of the running command, if there is one."""
        payload = struct.pack("<i", signo)
        self._send(Type.SIGNAL, payload, time.monotonic() + self._timeout)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size; the command gets SIGWINCH."""
        self._send(Type.RESIZE, pack_resize(rows, columns), time.monotonic() + self._timeout)

    def fileno(self) -> int:
        """Return the socket's file descriptor, to wait for it together with others.

        What has been received already does not show there: take it with `exec_events(0)` first.
        """
        return self._channel.fileno()

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | None = None,
        stdout: Sink = lambda _: None,
        stderr: Sink = lambda _: None,
        timeout: float | None = None,
        fresh: bool = False,
    ) -> ExitStatus:
        """Run a command to its end, handing its output on as it comes.

        Raises:
            LabError: it ran longer than `timeout` seconds and was killed.
            KernweaveError: the connection is lost.
        """
        self.exec_start(argv, env=env, cwd=cwd, stdin=stdin is not None, fresh=fresh)
        sinks = {"stdout": stdout, "stderr": stderr}
        food = memoryview(stdin or b"")
        if stdin is not None:
            self.feed(food[:CHUNK_MAX])
        try:
            for kind, data in self.exec_events(timeout):
                if isinstance(data, ExitStatus):
                    return data
                if kind != "fed":
                    sinks[kind](data)
                elif food:
                    food = food[CHUNK_MAX:]
                    self.feed(food[:CHUNK_MAX])
        except TimeoutError:
            self._kill_command()
            raise LabError(f"{argv[0]} did not end within {timeout:g} s and was killed") from None
        raise AssertionError("a command ended without an exit status")

    def _kill_command(self) -> None:
        for signo in (signals.SIGTERM, signals.SIGKILL):
            self.signal(signo)
            try:
                for _ in self.exec_events(_DYING_S):
                    pass
                return
            except TimeoutError:
                continue

    # ---- records -------------------------------------------------------------------------------

    def _send(self, kind: Type, payload: bytes | memoryview, deadline: float | None) -> int:
        self._tag = self._tag % 0xFFFF + 1
        self._channel.send(kind, self._tag, payload, deadline)
        return self._tag

    def _ask(
        self, request: Type, payload: bytes | memoryview, answer: Type, timeout: float | None
    ) -> memoryview:
        """Return the payload of the answer to a request; output of a command waits meanwhile."""
        deadline = _deadline(timeout)
        tag = self._send(request, payload, deadline)
        while True:
            try:
                record = self._receive(deadline)
            except TimeoutError:
                raise self._explain(f"no answer to {request.name} within {timeout:g} s") from None
            if record is None or record.tag != tag:
                continue  # of the command, or the late answer to a request given up
            if record.type == Type.ERROR:
                raise DriverError(f"the agent refused a request: {_text(record)}")
            if record.type != answer:
                raise self._channel.broken(f"{request.name} was answered by type {record.type}")
            return record.payload

    def _receive(self, deadline: float | None) -> Record | None:
        """Return the next record, or None if it was one of the command and is kept for later."""
        record = self._channel.receive(deadline)
        if record.type == Type.ERROR and record.tag == 0:
            raise self._channel.broken(f"the agent gave up the session: {_text(record)}")
        if record.tag != self._command_tag:
            return record
        self._events.append(record)
        return None

    def _next_event(self, deadline: float | None) -> Record:
        while not self._events:
            self._receive(deadline)
        record = self._events.popleft()
        if record.type == Type.ERROR:
            self._command_tag = None
            raise DriverError(f"cannot run the command: {_text(record)}")
        return record


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _text(record: Record) -> str:
    return bytes(record.payload).decode(errors="replace")
