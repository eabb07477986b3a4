# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions of a driver, wherever it is, and requests without the client's checks."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest

from kernweave.driver import uapi
from kernweave.driver.client import Driver
from kernweave.errors import DriverError

UNMAPPED = 0xFFFF_FFFF_FFFF_0000  # in the hole at the end of the address space
PAGE = 4096


class Session(Protocol):
    """An open descriptor of the driver, wherever it is."""

    def call(self, request: bytes, /) -> bytes | bytearray | memoryview: ...


S = TypeVar("S", bound=Session)


class Target(Protocol[S]):
    """A kernel with a driver; `close` returns when the session's changes are undone.

    So does `vanish`, which sends a request and closes before it is answered.
    """

    def connect(self) -> S: ...

    def close(self, session: S, /) -> None: ...

    def vanish(self, session: S, request: bytes, /) -> None: ...


class Sessions:
    """Sessions of one test, closed in reverse order at its end."""

    def __init__(self, target: Target[Any]) -> None:
        self._target = target
        self._open: list[Session] = []

    def raw(self) -> Session:
        session: Session = self._target.connect()
        self._open.append(session)
        return session

    def driver(self, *, writer: bool = True) -> Driver:
        return Driver(self.raw().call, writer=writer)

    def close_last(self) -> None:
        self._target.close(self._open.pop())

    def vanish_last(self, request: bytes) -> None:
        self._target.vanish(self._open.pop(), request)

    def close(self) -> None:
        while self._open:
            self.close_last()


@dataclass(frozen=True)
class Reply:
    status: int
    detail: int
    version: int
    body: bytes


def frame(op: int, payload: bytes = b"", *, version: int = uapi.VERSION) -> bytes:
    head = np.zeros(1, uapi.REQ)
    head["magic"], head["version"], head["op"] = uapi.MAGIC, version, op
    head["len"] = len(payload)
    return head.tobytes() + payload


def ask(session: Session, op: int, payload: bytes = b"", *, version: int = uapi.VERSION) -> Reply:
    """Exchange one request without the client's own checks."""
    reply = bytes(session.call(frame(op, payload, version=version)))
    rep = np.frombuffer(reply[: uapi.REP.itemsize], uapi.REP)[0]
    assert rep["magic"] == uapi.MAGIC
    assert rep["op"] == op
    body = reply[uapi.REP.itemsize :]
    assert rep["len"] == len(body)
    return Reply(int(rep["status"]), int(rep["detail"]), int(rep["version"]), body)


def hello(flags: int = 0) -> bytes:
    row = np.zeros(1, uapi.HELLO)
    row["flags"], row["pid"], row["name"] = flags, os.getpid(), b"contract"
    return row.tobytes()


def refusal(error: pytest.ExceptionInfo[DriverError]) -> str:
    return errno.errorcode[error.value.errno]
