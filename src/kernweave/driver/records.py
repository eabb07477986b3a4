# SPDX-License-Identifier: GPL-2.0-or-later
"""The records between a host session and the agent: numbers of agent.h, packing, parsing."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from kernweave.errors import UsageError

PAYLOAD_MAX = 128 << 20
CHUNK_MAX = 64 << 10
MAGIC_LEN = 16
END = 0x0A
STDIN_NULL = 0x1
FRESH = 0x2
PTY = 0x4

HEADER = struct.Struct("<IHH")
STATUS = struct.Struct("<iI")
_EXEC = struct.Struct("<IIIHH")
_RESIZE = struct.Struct("<HH")
_EXITED = struct.Struct("<iiQ")


class Type(IntEnum):
    """Record types; agent.h says what each carries."""

    CALL = 1
    REPLY = 2
    EXEC = 3
    STDOUT = 4
    STDERR = 5
    EXITED = 6
    STDIN = 7
    SIGNAL = 8
    READFILE = 9
    FILE = 10
    GETPID = 11
    PID = 12
    ERROR = 13
    RESIZE = 14
    LOAD = 15
    UNLOAD = 16
    DONE = 17


def magic(kind: int) -> bytes:
    """Return the 16 bytes of a magic; computed, so that no file of ours holds them literally."""
    return bytes(kind ^ ((i * 29 + 0x93) & 0xFF) for i in range(MAGIC_LEN))


RESET = magic(0xC1)
ACK = magic(0xC2)
RESTARTED = magic(0xC4)


@dataclass(frozen=True, slots=True)
class Record:
    """One received record; the payload is a view of a buffer of its own."""

    type: int
    tag: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a command ended.

    Attributes:
        exit: 0..255; 128 + signal if a signal ended it; 127 not found, 126 not executable.
        signal: number, or None.
        duration_ns: from before its fork to its exit, by the target's clock.
    """

    exit: int
    signal: int | None
    duration_ns: int


def pack_exec(
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    cwd: bytes,
    *,
    flags: int = 0,
    size: tuple[int, int] = (0, 0),
) -> bytes:
    """Return the payload of an EXEC; `size` is (rows, columns) with the flag PTY.

    Raises:
        UsageError: there is no argument, or a string holds a NUL.
    """
    if not argv:
        raise UsageError("no command given")
    strings = [cwd, *argv, *(name + b"=" + value for name, value in env.items())]
    if any(b"\0" in string for string in strings):
        raise UsageError("a NUL byte in an argument, a variable or the working directory")
    return _EXEC.pack(flags, len(argv), len(env), *size) + b"\0".join(strings) + b"\0"


def pack_resize(rows: int, columns: int) -> bytes:
    """Return the payload of a RESIZE."""
    return _RESIZE.pack(rows, columns)


def parse_exited(payload: memoryview) -> ExitStatus:
    """Return the content of an EXITED."""
    status, signal, duration_ns = _EXITED.unpack(payload)
    return ExitStatus(status, signal or None, duration_ns)


def split_status(payload: memoryview) -> tuple[int, memoryview]:
    """Return (positive errno or 0, the bytes behind) of a REPLY or a FILE."""
    error, _ = STATUS.unpack_from(payload)
    return -error, payload[STATUS.size :]
