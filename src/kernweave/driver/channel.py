# SPDX-License-Identifier: GPL-2.0-or-later
"""Records over a connected socket: handshake, sending while receiving, loss of the other end."""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from kernweave.driver.records import (
    ACK,
    END,
    HEADER,
    MAGIC_LEN,
    PAYLOAD_MAX,
    RESET,
    RESTARTED,
    Record,
    Type,
)
from kernweave.errors import KernweaveError, UsageError

Explain = Callable[[str], KernweaveError]

_RESEND_S = 2.0  # a RESET may get lost with an agent that is being replaced
_SETTLE_S = 0.1  # silence after which a RESTARTED at the end is no piece of a payload
_JOIN_MAX = 64 << 10  # below, one copy is cheaper than three writes


class Channel:
    """The two byte streams of a session, cut into records.

    A loss breaks it for good: every later use raises what `explain` makes of the first cause.
    """

    def __init__(self, sock: socket.socket, timeout: float, explain: Explain) -> None:
        """Take a connected stream socket and start a session within `timeout` seconds."""
        self._sock = sock
        self._explain = explain
        self._broken: str | None = None
        self._arrived: deque[Record] = deque()
        self._header = bytearray(HEADER.size)
        self._body: bytearray | None = None  # payload and END of the record under way
        self._got = 0  # bytes of the header, or of the body once there is one
        self._last = b""  # the last MAGIC_LEN bytes received
        self._poll = select.poll()
        sock.setblocking(False)
        self._handshake(time.monotonic() + timeout, timeout)

    def close(self) -> None:
        """Close the socket; may be repeated."""
        self._broken = self._broken or "the session is closed"
        self._sock.close()

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._sock.fileno()

    def broken(self, cause: str) -> KernweaveError:
        """Break the channel and return the error to raise."""
        self._broken = self._broken or cause
        return self._explain(cause)

    # ---- sending -------------------------------------------------------------------------------

    def send(
        self, kind: Type, tag: int, payload: bytes | memoryview, deadline: float | None
    ) -> None:
        """Send one record, receiving meanwhile so that neither end waits for the other."""
        if len(payload) > PAYLOAD_MAX:
            raise UsageError(f"a request of {len(payload)} bytes, {PAYLOAD_MAX} are allowed")
        header = HEADER.pack(len(payload), kind, tag)
        parts: list[bytes | memoryview] = [header, payload, bytes([END])]
        if len(payload) < _JOIN_MAX:
            parts = [b"".join(parts)]
        self._check()
        try:
            for part in parts:
                self._send_all(part, deadline)
        except BaseException:  # a record cut short cannot be continued
            self._broken = self._broken or "a request was interrupted half-sent"
            raise

    def _send_all(self, data: bytes | memoryview, deadline: float | None) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, deadline, "cannot send")
                if (record := self._take()) is not None:
                    self._arrived.append(record)
            except OSError as error:
                raise self.broken(f"the connection to the target is lost: {error}") from error

    # ---- receiving -----------------------------------------------------------------------------

    def receive(self, deadline: float | None) -> Record:
        """Return the next record.

        Raises:
            TimeoutError: none was complete at `deadline`; the channel is still usable.
            KernweaveError: the other end is gone, was restarted, or sends garbage.
        """
        self._check()
        while not self._arrived:
            if (record := self._take()) is not None:
                return record
            self._wait(select.POLLIN, deadline, None)
        return self._arrived.popleft()

    def _take(self) -> Record | None:
        """Receive what is there without waiting; a record as soon as one is complete."""
        while True:
            target = self._header if self._body is None else self._body
            count = self._receive_into(memoryview(target)[self._got :])
            if count == 0:
                self._check_restarted()
                return None
            self._got += count
            if self._got == len(target):
                self._got = 0
                if self._body is not None:
                    return self._finish(self._body)
                self._begin()

    def _begin(self) -> None:
        length, kind, _ = HEADER.unpack(self._header)
        if length > PAYLOAD_MAX:
            raise self._garbage(f"a record of {length} bytes, type {kind}")
        self._body = bytearray(length + 1)

    def _finish(self, body: bytearray) -> Record:
        _, kind, tag = HEADER.unpack(self._header)
        self._body = None
        if body[-1] != END:
            raise self._garbage(f"a record of type {kind} without its end")
        return Record(kind, tag, memoryview(body)[:-1])

    def _receive_into(self, view: memoryview) -> int:
        """Return how many bytes came, 0 if none are there yet."""
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.broken(f"the connection to the target is lost: {error}") from error
        if count == 0:
            raise self.broken("the target closed the connection")
        self._last = (self._last + bytes(view[max(0, count - MAGIC_LEN) : count]))[-MAGIC_LEN:]
        return count

    def _check_restarted(self) -> None:
        if self._last == RESTARTED and not self._readable(_SETTLE_S):
            raise self.broken("the agent died and was restarted")

    def _garbage(self, what: str) -> KernweaveError:
        """Break the channel; the garbage may be the RESTARTED of a new agent."""
        scrap = bytearray(4096)
        for _ in range(64):
            if self._last == RESTARTED or not self._readable(_SETTLE_S):
                break
            self._receive_into(memoryview(scrap))
        if self._last == RESTARTED:
            return self.broken("the agent died and was restarted")
        return self.broken(f"the agent sent garbage: {what}")

    # ---- waiting -------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._broken is not None:
            raise self._explain(self._broken)

    def _readable(self, seconds: float) -> bool:
        self._poll.register(self._sock, select.POLLIN)
        return bool(self._poll.poll(seconds * 1000))

    def _wait(self, events: int, deadline: float | None, cause: str | None) -> None:
        """Wait for the socket; at the deadline break with `cause`, or just raise TimeoutError."""
        left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        self._poll.register(self._sock, events)
        if self._poll.poll(left_ms):
            return
        if cause is None:
            raise TimeoutError
        raise self.broken(f"{cause}: the agent takes nothing")

    def _handshake(self, deadline: float, timeout: float) -> None:
        expected, seen, resend = b"", b"", 0.0
        scrap = bytearray(1 << 18)
        while (now := time.monotonic()) < deadline:
            if now >= resend:
                # A fresh nonce each time: only the last ACK, after which all is quiet, counts.
                nonce = secrets.token_bytes(MAGIC_LEN)
                self._send_all(RESET + nonce, deadline)
                expected, resend = ACK + nonce, now + _RESEND_S
            self._readable(min(deadline, resend) - now)
            count = self._receive_into(memoryview(scrap))
            seen = (seen + bytes(scrap[:count]))[-len(expected) - count :]
            if seen.endswith(expected):
                self._last = b""
                return
        raise self.broken(f"no agent answered within {timeout:g} s")
