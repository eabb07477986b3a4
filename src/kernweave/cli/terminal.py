# SPDX-License-Identifier: GPL-2.0-or-later
"""A command of a lab at this process's standard streams, or at its terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from types import FrameType

from kernweave.driver.link import Link
from kernweave.driver.records import CHUNK_MAX, ExitStatus

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def run_piped(link: Link, argv: Sequence[str], *, stdin: bool) -> int:
    """Run a command with this process's output, and its input if `stdin`; return its status."""
    link.exec_start(argv, stdin=stdin, fresh=True)
    while True:
        try:
            return _relay(link, 0 if stdin else None, None)
        except KeyboardInterrupt:
            link.signal(signal.SIGINT)
            stdin = False


def run_terminal(link: Link, argv: Sequence[str]) -> int:
    """Run a command in a terminal of the lab shown in this one; return its status."""
    with _raw_mode(), _resizes() as resized:
        link.exec_start(argv, fresh=True, pty=_window())
        return _relay(link, 0, resized)


def _relay(link: Link, stdin: int | None, resized: int | None) -> int:
    """Carry bytes both ways until the command ends."""
    hungry = True  # the command has taken all it was given
    while True:
        for kind, data in _arrived(link):
            if isinstance(data, ExitStatus):
                return data.exit
            if kind == "fed":
                hungry = True
            else:
                _write(1 if kind == "stdout" else 2, data)
        wanted = [link.fileno(), *(fd for fd in (resized,) if fd is not None)]
        if hungry and stdin is not None:
            wanted.append(stdin)
        ready = select.select(wanted, [], [])[0]
        if resized in ready and resized is not None:
            os.read(resized, 64)
            link.resize(*_window())
        if stdin in ready and stdin is not None:
            data = os.read(stdin, CHUNK_MAX)
            link.feed(data)
            hungry = False
            stdin = stdin if data else None


def _arrived(link: Link) -> Iterator[tuple[str, bytes | ExitStatus]]:
    with contextlib.suppress(TimeoutError):
        yield from link.exec_events(0)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _window() -> tuple[int, int]:
    columns, rows = os.get_terminal_size(0)
    return rows, columns


@contextlib.contextmanager
def _raw_mode() -> Iterator[None]:
    """Give every key to the block; the terminal is as before after it, also at a signal's end."""
    before = termios.tcgetattr(0)
    handlers = {signo: signal.signal(signo, _leave) for signo in _ENDING}
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already is kept
        yield
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)  # a drain may wait for ever
        for signo, handler in handlers.items():
            signal.signal(signo, handler)


def _leave(signo: int, frame: FrameType | None) -> None:
    sys.exit(128 + signo)


@contextlib.contextmanager
def _resizes() -> Iterator[int]:
    """Give a file descriptor that becomes readable when the terminal's size changes."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(signo: int, frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writing, b"r")

    before = signal.signal(signal.SIGWINCH, note)
    try:
        yield reading
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(reading)
        os.close(writing)
