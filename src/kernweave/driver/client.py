# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver as Python methods, over any transport that carries one request and its reply."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kernweave.driver import uapi
from kernweave.driver.uapi import Fact, Op, Side
from kernweave.errors import DriverError, UnsupportedError

_BUG_ENTRY = 3  # its place in the sizes of table rows
Transport = Callable[[bytes], bytes | bytearray | memoryview]
Rows = npt.NDArray[np.void]
Addrs = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the driver says about its kernel.

    Attributes:
        text_start: run-time address of `_stext`.
        text_end: run-time address of `_etext`, exclusive.
        yield_addr: function to call before ftrace changes text.
        kprobe_yield_addr: the same before a kprobe is put at its argument.
        text_yield_addr: the same before text is patched: with an address, bytes and their number.
        livepatch_yield_addr: the same before a livepatch looks where tasks are.
        native_addr: function that gives the native address for that of a copy.
        pinned: sites of earlier sessions that wait for somebody else to leave.
        flags: what the brain must respect.
        cpus: possible CPUs, rows of `Driver.counters`.
        release: `uname -r`.
        version: `uname -v`.
        bug_bytes: of a row of the bug table.
    """

    text_start: int
    text_end: int
    yield_addr: int
    kprobe_yield_addr: int
    text_yield_addr: int
    livepatch_yield_addr: int
    native_addr: int
    pinned: int
    flags: Fact
    cpus: int
    release: str
    version: str
    bug_bytes: int


@dataclass(frozen=True, slots=True)
class Area:
    """Executable memory in reach of kernel text: driver's number, address, bytes."""

    id: int
    addr: int
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Per-CPU memory: number within its area, gs-relative address (signed: it may be negative)."""

    index: int
    offset: int


@dataclass(frozen=True, slots=True)
class Undone:
    """What an undo did: numbers of sites, and the addresses that are still not ours."""

    restored: int
    evicted: int
    stuck: int
    stuck_addrs: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What the driver has to know of clones in a loaded kmod.

    Attributes:
        kmod: its name.
        entries: `uapi.ENTRY` rows, ascending by site.
        parts: `uapi.PART` rows: native text of functions and their parts, ascending.
        mirrors: `uapi.MIRROR` rows, ascending by native address.
        native_base: run-time address that the native columns of places count from.
        returns: `uapi.PLACE` rows: where calls return to, ascending by both columns.
        insns: the same: where instructions begin.
    """

    kmod: str
    entries: Rows
    parts: Rows
    mirrors: Rows
    native_base: int
    returns: Rows
    insns: Rows


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move of tasks did.

    Attributes:
        places: return addresses and others that were changed.
        visitors: tasks that are in clones still, or may be in native code.
        pid: of one of them.
        stop_ns: nanoseconds the machine was stopped.
    """

    places: int
    visitors: int
    pid: int
    stop_ns: int


class CommitError(DriverError):
    """A transaction was rolled back; `index` names the poke that did not match."""

    def __init__(self, message: str, errno: int, index: int) -> None:
        super().__init__(message, errno)
        self.index = index


class BusyError(DriverError):
    """Another session is changing this kernel; `pid` is its client's, as that announced it."""

    def __init__(self, pid: int, name: str) -> None:
        super().__init__(
            f"another session is changing this kernel: pid {pid} ({name})",
            errno.EBUSY,
            help="wait until it ends, or end it",
        )
        self.pid = pid


def no_orc(release: str) -> UnsupportedError:
    """Why a kernel cannot be woven: nobody could be sent back out of its clones."""
    return UnsupportedError(
        f"kernel {release} cannot be woven: it has no ORC unwinder (CONFIG_UNWINDER_ORC), "
        "by which return addresses into clones are found",
        help="count with --engine splice",
    )


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")


def _rows(dtype: np.dtype[np.void], **fields: Any) -> bytes:
    row = np.zeros(1, dtype)
    for name, value in fields.items():
        row[name] = value
    return row.tobytes()


class Driver:
    """One open session with the driver; methods block, none is thread-safe.

    Raises:
        DriverError: from any method, with the driver's errno.

    References:
        csrc/kmod/kw_uapi.h says what each request does and which locks it takes.
    """

    def __init__(self, transport: Transport, *, writer: bool = True) -> None:
        self._transport = transport
        self.facts = self._hello(writer)

    def _hello(self, writer: bool) -> Facts:
        name = Path(sys.argv[0] or "python").name.encode()[:31]
        hello = _rows(uapi.HELLO, flags=uapi.WRITER if writer else 0, pid=os.getpid(), name=name)
        row = np.frombuffer(self._call(Op.HELLO, hello), uapi.FACTS)[0]
        return Facts(
            text_start=int(row["text_start"]),
            text_end=int(row["text_end"]),
            yield_addr=int(row["yield"]),
            kprobe_yield_addr=int(row["kprobe_yield"]),
            text_yield_addr=int(row["text_yield"]),
            livepatch_yield_addr=int(row["livepatch_yield"]),
            native_addr=int(row["native"]),
            pinned=int(row["pinned"]),
            flags=Fact(int(row["flags"])),
            cpus=int(row["cpus"]),
            release=_text(row["release"]),
            version=_text(row["version"]),
            bug_bytes=int(row["sizes"][_BUG_ENTRY]),
        )

    def _exchange(self, op: Op, payload: bytes) -> tuple[np.void, memoryview]:
        head = _rows(uapi.REQ, magic=uapi.MAGIC, version=uapi.VERSION, op=op, len=len(payload))
        if len(head) + len(payload) > uapi.MAX_REQUEST:
            raise DriverError(f"request of {len(payload)} bytes is too large", errno.EMSGSIZE)
        reply = memoryview(self._transport(head + payload))
        if len(reply) < uapi.REP.itemsize:
            raise DriverError(f"reply of {len(reply)} bytes is too short")
        rep = np.frombuffer(reply[: uapi.REP.itemsize], uapi.REP)[0]
        body = reply[uapi.REP.itemsize :]
        if rep["magic"] != uapi.MAGIC or rep["len"] != len(body):
            raise DriverError("reply is not one of the kernweave driver")
        if rep["version"] != uapi.VERSION:
            raise UnsupportedError(
                f"the loaded driver speaks interface {rep['version']}, "
                f"this kernweave speaks {uapi.VERSION}",
                help="load the driver that belongs to this kernweave "
                "(for a lab: kernweave lab down)",
            )
        return rep, body

    def _call(self, op: Op, payload: bytes = b"") -> memoryview:
        rep, body = self._exchange(op, payload)
        if rep["status"]:
            self._fail(op, -int(rep["status"]), int(rep["detail"]), body)
        return body

    def _fail(self, op: Op, code: int, detail: int, body: memoryview) -> NoReturn:
        if op == Op.HELLO and code == errno.EBUSY and len(body) == uapi.HELLO.itemsize:
            owner = np.frombuffer(body, uapi.HELLO)[0]
            raise BusyError(int(owner["pid"]), _text(owner["name"]))
        what = f"driver refused {op.name.lower()}: {errno.errorcode.get(code, code)}"
        if op == Op.COMMIT:
            raise CommitError(f"{what} at poke {detail}", code, detail)
        raise DriverError(f"{what} (item {detail})" if detail else what, code)

    def lookup(self, names: Sequence[str]) -> list[int]:
        """Run-time addresses of kernel symbols, 0 where there is none; names in order."""
        if not names:
            return []
        body = self._call(Op.LOOKUP, b"".join(name.encode() + b"\0" for name in names))
        return [int(addr) for addr in np.frombuffer(body, "<u8")]

    def read(self, addr: int, size: int) -> bytes:
        """`size` bytes of kernel memory at `addr`; fault-safe, EFAULT if not mapped."""
        parts = []
        for start in range(addr, addr + size, uapi.MAX_READ):
            end = min(start + uapi.MAX_READ, addr + size)
            parts.append(bytes(self._call(Op.READ, _rows(uapi.RANGE, start=start, end=end))))
        return b"".join(parts)

    def read_ranges(self, starts: Addrs, ends: Addrs) -> bytes:
        """Bytes of many ranges, one after the other; at most 32 MiB in all."""
        rows = np.zeros(len(starts), uapi.RANGE)
        rows["start"], rows["end"] = starts, ends
        return bytes(self._call(Op.READ, rows.tobytes())) if len(rows) else b""

    def kmods(self) -> Rows:
        """Loaded kmods as `uapi.KMOD` rows."""
        return np.frombuffer(self._call(Op.KMODS), uapi.KMOD)

    def denylist(self) -> Rows:
        """Address ranges in which the kernel allows no probe, `uapi.RANGE` rows."""
        return np.frombuffer(self._call(Op.DENYLIST), uapi.RANGE)

    def kprobes(self) -> Rows:
        """Armed kprobes with the bytes they cover, `uapi.PATCHED` rows."""
        return np.frombuffer(self._call(Op.KPROBES), uapi.PATCHED)

    def ftrace_records(self) -> Rows:
        """Every ftrace site and its flags, `uapi.RECORD` rows."""
        return np.frombuffer(self._call(Op.FTRACE), uapi.RECORD)

    def placed(self) -> Rows:
        """Sites that any session has changed, with their bytes, `uapi.PATCHED` rows."""
        return np.frombuffer(self._call(Op.PLACED), uapi.PATCHED)

    def returns(self) -> npt.NDArray[np.uint64]:
        """Addresses at which tasks may go on that sleep in copies nothing leads to any more."""
        return np.frombuffer(self._call(Op.RETURNS), "<u8")

    def area(self, size: int) -> Area:
        """Allocate executable memory, writable until `seal`; of no bytes: see `weave`."""
        row = np.frombuffer(self._call(Op.AREA, _rows(uapi.SIZE, value=size)), uapi.AREA)[0]
        return Area(int(row["id"]), int(row["addr"]), int(row["size"]))

    def percpu(self, area: Area, size: int) -> Chunk:
        """Allocate zeroed per-CPU memory that lives as long as `area`; at most 32 KiB."""
        body = self._call(Op.PERCPU, _rows(uapi.SLICE, area=area.id, len=size))
        row = np.frombuffer(body, uapi.CHUNK)[0]
        return Chunk(int(row["index"]), int(row["offset"].astype(np.int64)))

    def write(self, area: Area, off: int, data: bytes) -> None:
        """Fill a part of an area that is not sealed."""
        step = uapi.MAX_REQUEST // 2
        for at in range(0, len(data), step):
            part = data[at : at + step]
            head = _rows(uapi.SLICE, area=area.id, off=off + at, len=len(part))
            self._call(Op.WRITE, head + part)

    def seal(self, area: Area) -> None:
        """Make an area read-only and executable and synchronise all CPUs."""
        self._call(Op.SEAL, _rows(uapi.SLICE, area=area.id))

    def commit(self, area: Area, pokes: Rows) -> int:
        """Apply `uapi.POKE` rows, all or none at return; the transaction's number.

        Raises:
            CommitError: old bytes differ (ESTALE) or a poke is not allowed; rolled back.
        """
        head = _rows(uapi.COMMIT, area=area.id, count=len(pokes))
        return int(np.frombuffer(self._call(Op.COMMIT, head + pokes.tobytes()), "<u8")[0])

    def undo(self, txn: int) -> Undone:
        """Restore a transaction's sites; idempotent, so it also retries stuck ones."""
        body = self._call(Op.UNDO, _rows(uapi.SIZE, value=txn))
        row = np.frombuffer(body[: uapi.UNDONE.itemsize], uapi.UNDONE)[0]
        stuck = np.frombuffer(body[uapi.UNDONE.itemsize :], "<u8")
        return Undone(
            int(row["restored"]), int(row["evicted"]), int(row["stuck"]), tuple(map(int, stuck))
        )

    def states(self, txn: int) -> npt.NDArray[np.uint8]:
        """`uapi.State` of each poke of a transaction."""
        return np.frombuffer(self._call(Op.STATES, _rows(uapi.SIZE, value=txn)), np.uint8)

    def quiesce(self) -> None:
        """Wait until no task can be in code that was made unreachable before."""
        self._call(Op.QUIESCE)

    def counters(self, area: Area, chunk: Chunk, size: int) -> npt.NDArray[np.uint64]:
        """uint64[cpus, size // 8]: a chunk of every possible CPU."""
        request = _rows(uapi.SLICE, area=area.id, off=chunk.index, len=size)
        body = self._call(Op.COUNTERS, request)
        return np.frombuffer(body, "<u8").reshape(self.facts.cpus, -1)

    def free(self, area: Area) -> int:
        """Free an unreachable, quiescent area and its per-CPU memory; EAGAIN if not quiescent.

        Returns:
            Tasks that sleep in a fault and are going to come back into the area; then the driver
            frees it when they have left.
        """
        body = self._call(Op.FREE, _rows(uapi.SLICE, area=area.id))
        return int(np.frombuffer(body, uapi.SIZE)[0]["value"])

    def copies(self, area: Area, rows: Rows) -> None:
        """Tell which copies in an area not yet sealed are looked up by their address.

        Args:
            area: holds them.
            rows: `uapi.COPY` rows, ascending.

        Raises:
            DriverError: ENOLINK, if no poke with `PokeFlag.KEEP` is placed.
        """
        head = _rows(uapi.SLICE, area=area.id, len=len(rows))
        self._call(Op.COPIES, head + rows.tobytes())

    def weave(self, area: Area, generation: Generation) -> None:
        """Make clones in a loaded kmod the code of an area of no bytes.

        From here on what the kernel patches natively is patched in the clones before.

        Raises:
            DriverError: ENOENT without such a kmod, EINVAL for rows that do not fit it.
            UnsupportedError: the kernel has no unwinder that tells where return addresses are.
        """
        parts = generation.entries, generation.parts, generation.mirrors
        places = generation.returns, generation.insns
        names = "entries", "parts", "mirrors", "returns", "insns"
        head = _rows(
            uapi.WEAVE,
            area=area.id,
            native_base=generation.native_base,
            kmod=generation.kmod.encode(),
            **{name: len(rows) for name, rows in zip(names, (*parts, *places), strict=True)},
        )
        try:
            self._call(Op.WEAVE, head + b"".join(rows.tobytes() for rows in (*parts, *places)))
        except DriverError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise no_orc(self.facts.release) from error

    def move(self, area: Area, side: Side) -> Moved:
        """Move tasks that sleep between clones and native code; stops the machine.

        Args:
            area: with clones.
            side: where they are to be; `Side.NATIVE` when nothing leads to the clones any more.
        """
        body = self._call(Op.MOVE, _rows(uapi.SLICE, area=area.id, off=side))
        row = np.frombuffer(body, uapi.MOVED)[0]
        return Moved(*(int(row[name]) for name in ("places", "visitors", "pid", "stop_ns")))

    def closed(self, area: Area) -> npt.NDArray[np.bool_]:
        """bool[entries]: functions given back, as somebody changed their text."""
        body = self._call(Op.CLOSED, _rows(uapi.SLICE, area=area.id))
        return np.asarray(np.frombuffer(body, np.uint8) != 0)

    def forget(self, txn: int) -> None:
        """Drop an undone transaction."""
        self._call(Op.FORGET, _rows(uapi.SIZE, value=txn))

    def arm(self, area: Area, traps: Rows) -> tuple[int, npt.NDArray[np.int64]]:
        """Arm a kprobe per `uapi.TRAP` row, counting in per-CPU memory of `area`.

        Returns:
            The set's number, and int64[n]: 0, or the negative errno with which the kernel refused.
        """
        head = _rows(uapi.COMMIT, area=area.id, count=len(traps))
        found = np.frombuffer(self._call(Op.ARM, head + traps.tobytes()), "<i8")
        return int(found[0]), found[1:]

    def disarm(self, trap_set: int) -> npt.NDArray[np.uint64]:
        """Remove a set's kprobes; uint64[n] hits that each missed. Waits for a grace period."""
        return np.frombuffer(self._call(Op.DISARM, _rows(uapi.SIZE, value=trap_set)), "<u8")
