# SPDX-License-Identifier: GPL-2.0-or-later
"""The exception tree: every failure has a message, notes, one thing to do, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Reason(StrEnum):
    """Why a point was refused; stable codes of the JSON contract, only ever added to."""

    NO_SUCH_NAME = "no_such_name"
    AMBIGUOUS = "ambiguous"
    NOT_BOUNDARY = "not_boundary"
    TOO_SHORT = "too_short"
    DENYLIST = "denylist"
    NOINSTR = "noinstr"
    JUMP_LABEL = "jump_label"
    STATIC_CALL = "static_call"
    LOCK_PREFIX = "lock_prefix"
    RETURN_SITE = "return_site"
    RETPOLINE_SITE = "retpoline_site"
    EXCEPTION_ENTRY = "exception_entry"
    BUG_ENTRY = "bug_entry"
    STI_SHADOW = "sti_shadow"
    SWAPGS = "swapgs"
    BUSY_FTRACE = "busy_ftrace"
    BUSY_KPROBE = "busy_kprobe"
    BUSY_PLAN = "busy_plan"
    EVICTED = "evicted"
    NO_CLONE = "no_clone"
    EDGE = "edge"
    NO_EDGE = "no_edge"


class KernweaveError(Exception):
    """Root of all errors kernweave raises on purpose.

    Attributes:
        message: what failed; lower case, no final period, names and numbers in it.
        notes: context, one line each.
        help: one action for the reader, or None.
        exit_code: status of the command line when this error ends it.
    """

    exit_code = 1

    def __init__(self, message: str, *, notes: Iterable[str] = (), help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.notes = tuple(notes)
        self.help = help

    def __str__(self) -> str:
        lines = [self.message, *(f"  note: {note}" for note in self.notes)]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class UsageError(KernweaveError):
    """The request contradicts itself or asks for something that does not exist."""

    exit_code = 2


class RefusedError(KernweaveError):
    """At least one explicitly named point cannot be placed; nothing was changed.

    Attributes:
        refused: (point, reason, detail) of every refused point.
    """

    def __init__(
        self,
        message: str,
        refused: Iterable[tuple[str, Reason, str]] = (),
        *,
        notes: Iterable[str] = (),
        help: str | None = None,
    ) -> None:
        super().__init__(message, notes=notes, help=help)
        self.refused = tuple(refused)


class UnsupportedError(KernweaveError):
    """This machine, kernel or tool set lacks something kernweave needs."""

    exit_code = 3


class LabError(KernweaveError):
    """The lab machine did not boot, hung, or went away."""


class DriverError(KernweaveError):
    """The driver refused a request or cannot be reached.

    Attributes:
        errno: positive Linux error number the driver answered, or 0.
    """

    def __init__(
        self,
        message: str,
        errno: int = 0,
        *,
        notes: Iterable[str] = (),
        help: str | None = None,
    ) -> None:
        super().__init__(message, notes=notes, help=help)
        self.errno = errno


class InternalError(KernweaveError):
    """A bug in kernweave: a check that must hold did not."""

    exit_code = 4
