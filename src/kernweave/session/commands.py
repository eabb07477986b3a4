# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens while counters are in: a command runs on the target, or time passes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernweave.driver.records import ExitStatus
from kernweave.errors import KernweaveError
from kernweave.session.target import AnyLink

Sink = Callable[[bytes], None]

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended.

    Attributes:
        argv: as it was started.
        exit: status, 128 + n after signal n.
        signal: number of the signal that ended it, or None.
        duration_ns: from start to end, on the target.
        stdout: what it wrote, if that was captured.
        stderr: the same for standard error.
    """

    argv: tuple[str, ...]
    exit: int
    signal: int | None
    duration_ns: int
    stdout: bytes = b""
    stderr: bytes = b""


class CommandError(KernweaveError):
    """A command that `Session.run(check=True)` started did not end with status 0."""


class Commands:
    """Runs one command at a time on the target of a session."""

    def __init__(self, link: AnyLink) -> None:
        """Remember the link; nothing is started yet."""
        self._link = link
        self._fresh = True

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool,
        capture: bool,
        env: Mapping[str, str] | None,
        cwd: str | None,
        limit_s: float | None,
    ) -> Completed:
        """Run a command to its end; everything is as for `Session.run`."""
        kept: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        sinks: dict[str, Sink] = (
            {name: parts.append for name, parts in kept.items()}
            if capture
            else {"stdout": _passer("stdout"), "stderr": _passer("stderr")}
        )
        # the host's files may have changed since an earlier session looked at them
        fresh, self._fresh = self._fresh, False
        self._link.exec_start(list(argv), env=env, cwd=cwd, fresh=fresh)
        status = self._follow(sinks, limit_s)
        done = Completed(
            tuple(argv),
            status.exit,
            status.signal or None,
            status.duration_ns,
            b"".join(kept["stdout"]),
            b"".join(kept["stderr"]),
        )
        if check and done.exit:
            raise CommandError(f"{argv[0]} ended with status {done.exit}")
        return done

    def _follow(self, sinks: Mapping[str, Sink], limit_s: float | None) -> ExitStatus:
        """Hand output on until the command ends; an interrupt goes to the command."""
        pending = [signal.SIGTERM, signal.SIGKILL] if limit_s is not None else []
        wait = limit_s
        while True:
            try:
                for kind, data in self._link.exec_events(wait):
                    if isinstance(data, ExitStatus):
                        return data
                    sinks[kind](data)
            except TimeoutError:
                if not pending:
                    raise
                self._link.signal(pending.pop(0))
                wait = _GRACE_S
            except KeyboardInterrupt:
                self._link.signal(signal.SIGINT)


def _passer(name: str) -> Sink:
    """Write bytes to a standard stream as they come."""

    def write(data: bytes) -> None:
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if raw is None:  # a notebook's stream takes text only
            stream.write(data.decode(errors="replace"))
        else:
            stream.flush()
            raw.write(data)
            raw.flush()

    return write


def sleep(seconds: float | None) -> None:
    """Return after so long, or at an interrupt, which is no error."""
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        while deadline is None or time.monotonic() < deadline:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            time.sleep(max(0.0, min(1.0, left)))
    except KeyboardInterrupt:
        pass
