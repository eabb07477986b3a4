# SPDX-License-Identifier: GPL-2.0-or-later
"""A verified fake of the driver: an in-memory kernel that speaks the same bytes.

The same contract tests run against it and against the real driver.  Each class mirrors a C file:

    FakeSession   csrc/kmod/main.c    sessions, request checking, dispatch
    FakeKernel    csrc/kmod/facts.c   facts, names, memory
                  csrc/kmod/tables.c  the kernel's tables, as rows given by the test
                  csrc/kmod/undo.c    sites that wait for somebody else, in `retry_pinned`
                  csrc/kmod/yield.c   sites given back, in `yield_to_ftrace`
    fake_area.py  csrc/kmod/area.c    areas, per-CPU chunks, quiescence
                  csrc/kmod/fault.c   copies that are looked up by their address
    fake_trap.py  csrc/kmod/trap.c    counters behind kprobes
    fake_text.py  csrc/kmod/text.c    transactions; and their undo, csrc/kmod/undo.c
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import numpy as np

from kernweave.driver import uapi
from kernweave.driver.fake_area import Areas, FakeArea
from kernweave.driver.fake_memory import Memory, Out, RefusalError, refuse_if, row_bytes
from kernweave.driver.fake_text import Batch, FakeTxn, Text
from kernweave.driver.fake_trap import FakeSet, Traps
from kernweave.driver.uapi import Fact, Op, State
from kernweave.errors import DriverError

TEXT_START = 0xFFFF_FFFF_8100_0000
AREA_START = 0xFFFF_FFFF_C000_0000

_RULES: dict[int, tuple[int, bool]] = {  # smallest payload, needs a writer
    Op.HELLO: (uapi.HELLO.itemsize, False),
    Op.LOOKUP: (1, False),
    Op.READ: (uapi.RANGE.itemsize, False),
    Op.KMODS: (0, False),
    Op.DENYLIST: (0, False),
    Op.KPROBES: (0, False),
    Op.FTRACE: (0, False),
    Op.PLACED: (0, False),
    Op.RETURNS: (0, False),
    Op.AREA: (uapi.SIZE.itemsize, True),
    Op.PERCPU: (uapi.SLICE.itemsize, True),
    Op.WRITE: (uapi.SLICE.itemsize, True),
    Op.SEAL: (uapi.SLICE.itemsize, True),
    Op.COMMIT: (uapi.COMMIT.itemsize, True),
    Op.UNDO: (uapi.SIZE.itemsize, True),
    Op.STATES: (uapi.SIZE.itemsize, True),
    Op.QUIESCE: (0, True),
    Op.COUNTERS: (uapi.SLICE.itemsize, True),
    Op.FREE: (uapi.SLICE.itemsize, True),
    Op.FORGET: (uapi.SIZE.itemsize, True),
    Op.ARM: (uapi.COMMIT.itemsize, True),
    Op.DISARM: (uapi.SIZE.itemsize, True),
    Op.COPIES: (uapi.SLICE.itemsize, True),
    Op.WEAVE: (uapi.WEAVE.itemsize, True),
    Op.MOVE: (uapi.SLICE.itemsize, True),
    Op.CLOSED: (uapi.SLICE.itemsize, True),
}


class FakeKernel:
    """A kernel without a CPU: text that can be read and changed, but does not run.

    Attributes:
        memory: everything that is mapped.
        symbols: address by name.
        kmods: `uapi.KMOD` rows.
        denylist: `uapi.RANGE` rows.
        kprobes: `uapi.PATCHED` rows, of others.
        traps: kprobes of all sessions.
        ftrace: `uapi.RECORD` rows.
        areas: executable memory of all sessions.
        text: transactions of all sessions and the log of text writes.
        writer: the session that may change text, if there is one.
        has_orc: whether it has the unwinder that clones need.
    """

    def __init__(
        self,
        text: bytes = b"",
        *,
        text_start: int = TEXT_START,
        symbols: Mapping[str, int] | None = None,
        cpus: int = 2,
        flags: Fact = Fact.FTRACE_YIELD,
    ) -> None:
        """Map `text` as the kernel's own, from `text_start` on; every table is empty."""
        self.memory = Memory()
        self.memory.map(text_start, text)
        self.symbols = dict(symbols or {})
        self.cpus = cpus
        self.flags = flags
        self.kmods = np.zeros(0, uapi.KMOD)
        self.denylist = np.zeros(0, uapi.RANGE)
        self.kprobes = np.zeros(0, uapi.PATCHED)
        self.ftrace = np.zeros(0, uapi.RECORD)
        self.areas = Areas(self.memory, AREA_START, cpus)
        self.text_range = (text_start, text_start + len(text))
        self.traps = Traps(self.memory, self.areas, self._check_probe)
        places = (self._kmod_at, self._has_kprobe)
        self.text = Text(self.memory, self.text_range, self.areas, *places)
        self.writer: FakeSession | None = None
        self.has_orc = True
        self.pinned: list[FakeTxn] = []

    def open(self) -> FakeSession:
        """Start a session, as opening /dev/kernweave does."""
        return FakeSession(self)

    @property
    def log(self) -> list[Batch]:
        """What the driver wrote into text, one entry per time `text_mutex` was held."""
        return self.text.log

    def write_foreign(self, addr: int, data: bytes) -> None:
        """Change memory as somebody else would: not logged."""
        self.memory.write(addr, data)

    def add_hits(self, offset: int, hits: int, cpu: int = 0) -> None:
        """Add to the counter at a gs-relative address, as a snippet that runs would."""
        self.areas.add_hits(offset, hits, cpu)

    def yield_to_ftrace(self, addrs: Iterable[int]) -> None:
        """Give sites back as `kw_ftrace_yield` does for records ftrace is about to change."""
        for addr in addrs:
            self.text.evict(addr)

    def retry_pinned(self) -> None:
        """One pass of the worker `kw_retry`; afterwards areas without visitors are gone."""
        for txn in list(self.pinned):
            area = txn.area
            if self.text.undo(txn).stuck:
                continue
            self.pinned.remove(txn)
            self.text.drop(txn)
            if area is not None:
                self.areas.retire(area)
        self.areas.reap()

    def pinned_sites(self) -> int:
        """Sites that could not be restored yet and whose session is gone."""
        states = [state for txn in self.pinned for state in txn.states]
        return states.count(State.STUCK) + states.count(State.HELD)

    def facts(self) -> bytes:
        """The reply to a hello: `kw_facts`."""
        return row_bytes(
            uapi.FACTS,
            text_start=self.text_range[0],
            text_end=self.text_range[1],
            **{"yield": self.text_range[0]},
            kprobe_yield=self.text_range[0],
            text_yield=self.text_range[0],
            livepatch_yield=self.text_range[0],
            native=self.text_range[0],
            pinned=self.pinned_sites(),
            flags=self.flags,
            cpus=self.cpus,
            sizes=(16, 8, 12, 12, 0, 0),
            release=b"0.0-fake",
            version=b"#1 fake",
        )

    def lookup(self, payload: bytes, out: Out) -> None:
        """Addresses of NUL-terminated names: `kw_lookup`."""
        refuse_if(payload[-1] != 0, errno.EINVAL)
        names = payload[:-1].split(b"\0")
        addrs = [self.symbols.get(name.decode(), 0) for name in names]
        out.put(np.array(addrs, "<u8").tobytes())

    def read(self, payload: bytes, out: Out) -> None:
        """Bytes of ranges: `kw_read`."""
        refuse_if(not payload or len(payload) % uapi.RANGE.itemsize != 0, errno.EINVAL)
        ranges = [(int(r["start"]), int(r["end"])) for r in np.frombuffer(payload, uapi.RANGE)]
        total = 0
        for out.detail, (start, end) in enumerate(ranges):
            refuse_if(end < start or end - start > uapi.MAX_READ - total, errno.E2BIG)
            total += end - start
        out.reserve(total)
        parts = []
        for out.detail, (start, end) in enumerate(ranges):
            parts.append(self.memory.read(start, end - start))
        out.payload = b"".join(parts)

    def _check_probe(self, addr: int) -> bool:
        """What `register_kprobe` checks; whether the probe goes through ftrace."""
        inside = self.text_range[0] <= addr < self.text_range[1] or self._kmod_at(addr)
        denied = (self.denylist["start"] <= addr) & (addr < self.denylist["end"])
        refuse_if(not inside, errno.ENOENT)  # nothing in kallsyms
        refuse_if(bool(denied.any()), errno.EINVAL)
        return bool((self.ftrace["ip"] == addr).any())

    def _has_kprobe(self, addr: int, size: int) -> bool:
        """Whether a kprobe was registered on one of these bytes: `kw_has_kprobe`."""
        others = set(self.kprobes["addr"].tolist())
        return not (self.traps.addrs() | others).isdisjoint(range(addr, addr + size))

    def _kmod_at(self, addr: int) -> str | None:
        """The kmod whose text holds an address: `__module_text_address`."""
        rows = self.kmods
        hits = rows[(rows["text_start"] <= addr) & (addr < rows["text_end"])]
        return bytes(hits[0]["name"]).decode() if len(hits) else None


class FakeSession:
    """One open descriptor; `call` is a transport for `driver.client.Driver`."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._who: bytes | None = None  # kw_hello, once greeted
        self._open = True
        self._areas: dict[int, FakeArea] = {}
        self._txns: dict[int, FakeTxn] = {}
        self._sets: dict[int, FakeSet] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(self, request: bytes | memoryview) -> bytes:
        """Answer one request, as the ioctl does.

        Raises:
            DriverError: what the ioctl itself refuses (EBADF, EMSGSIZE, EBADMSG), or EINTR.
        """
        request = bytes(request)
        _check_frame(self._open, request)
        head = np.frombuffer(request[: uapi.REQ.itemsize], uapi.REQ)[0]
        out, status = Out(uapi.MAX_REPLY - uapi.REP.itemsize), 0
        try:
            self._dispatch(int(head["version"]), int(head["op"]), request[uapi.REQ.itemsize :], out)
        except RefusalError as refusal:
            if refusal.errno == errno.EINTR:
                raise DriverError("a signal is pending", errno.EINTR) from None
            status = -refusal.errno
        rep = row_bytes(
            uapi.REP,
            magic=uapi.MAGIC,
            version=uapi.VERSION,
            op=head["op"],
            status=status,
            detail=out.detail,
            len=len(out.payload),
        )
        return rep + out.payload

    def close(self) -> None:
        """Undo everything this session did, however it ends: `kw_release`; may be repeated."""
        if not self._open:
            return
        self._open = False
        kernel = self._kernel
        for trap_set in self._sets.values():
            kernel.traps.drop(trap_set)
        for txn in reversed(self._txns.values()):
            if txn.area is not None and kernel.text.undo(txn, wait=False).stuck:
                txn.pinned = True
                kernel.pinned.append(txn)
            else:
                kernel.text.drop(txn)
        for area in self._areas.values():
            kernel.areas.retire(area)
        kernel.areas.reap()
        for _ in range(2):  # `kw_undo_settle`
            if any(State.HELD in txn.states for txn in kernel.pinned):
                kernel.retry_pinned()
        if kernel.writer is self:
            kernel.writer = None

    def _dispatch(self, version: int, op: int, payload: bytes, out: Out) -> None:
        refuse_if(version != uapi.VERSION, errno.EPROTO)
        refuse_if(op not in _RULES, errno.EOPNOTSUPP)
        least, writes = _RULES[op]
        refuse_if(len(payload) < least, errno.EINVAL)
        refuse_if(op != Op.HELLO and self._who is None, errno.ENOTCONN)
        refuse_if(writes and self._kernel.writer is not self, errno.EPERM)
        _HANDLERS[Op(op)](self, payload, out)

    def _hello(self, payload: bytes, out: Out) -> None:
        hello = payload[: uapi.HELLO.itemsize]
        flags = int(np.frombuffer(hello, uapi.HELLO)["flags"][0])
        refuse_if(self._who is not None or flags & ~uapi.WRITER != 0, errno.EINVAL)
        owner = self._kernel.writer
        if flags & uapi.WRITER and owner is not None:
            out.put(owner._who or b"")
            raise RefusalError(errno.EBUSY)
        self._who = hello[:-1] + b"\0"
        if flags & uapi.WRITER:
            self._kernel.writer = self
        out.put(self._kernel.facts())

    def _area(self, area_id: int) -> FakeArea:
        refuse_if(area_id not in self._areas, errno.ENOENT)
        return self._areas[area_id]

    def _txn(self, payload: bytes) -> FakeTxn:
        txn = self._txns.get(_value(payload))
        if txn is None:
            raise RefusalError(errno.ENOENT)
        return txn

    def _alloc(self, payload: bytes, out: Out) -> None:
        out.reserve(uapi.AREA.itemsize)
        area = self._kernel.areas.alloc(_value(payload))
        self._areas[area.id] = area
        out.payload = row_bytes(uapi.AREA, id=area.id, addr=area.addr, size=area.size)

    def _percpu(self, payload: bytes, out: Out) -> None:
        out.reserve(uapi.CHUNK.itemsize)
        area_id, _, size = _slice(payload)
        index, offset = self._kernel.areas.add_chunk(self._area(area_id), size)
        out.payload = row_bytes(uapi.CHUNK, index=index, offset=offset)

    def _write(self, payload: bytes, out: Out) -> None:
        area_id, off, size = _slice(payload)
        data = payload[uapi.SLICE.itemsize :]
        self._kernel.areas.write(self._area(area_id), off, size, data)

    def _seal(self, payload: bytes, out: Out) -> None:
        area = self._area(_slice(payload)[0])
        refuse_if(not area.size, errno.EPERM)
        area.sealed = True

    def _counters(self, payload: bytes, out: Out) -> None:
        area_id, index, size = _slice(payload)
        out.put(self._kernel.areas.counters(self._area(area_id), index, size))

    def _weave(self, payload: bytes, out: Out) -> None:
        """Refuse: no kmod of a fake kernel has code, and so none has clones."""
        refuse_if(not self._kernel.has_orc, errno.EOPNOTSUPP)
        head = np.frombuffer(payload[: uapi.WEAVE.itemsize], uapi.WEAVE)[0]
        refuse_if(self._area(int(head["area"])).size > 0, errno.EPERM)
        raise RefusalError(errno.ENOENT)

    def _clones(self, area_id: int) -> None:
        """Refuse: no area has clones."""
        self._area(area_id)
        raise RefusalError(errno.ENOENT)

    def _free(self, payload: bytes, out: Out) -> None:
        area = self._area(_slice(payload)[0])
        out.put(row_bytes(uapi.SIZE, value=self._kernel.areas.free(area)))
        del self._areas[area.id]

    def _copies(self, payload: bytes, out: Out) -> None:
        area_id, _, count = _slice(payload)
        rows = payload[uapi.SLICE.itemsize :]
        asked = any(txn.is_asked() for txn in self._txns.values())
        self._kernel.areas.set_copies(self._area(area_id), rows, count, asked)

    def _commit(self, payload: bytes, out: Out) -> None:
        out.reserve(uapi.SIZE.itemsize)
        size = uapi.COMMIT.itemsize
        request = np.frombuffer(payload[:size], uapi.COMMIT)[0]
        count, rows = int(request["count"]), payload[size:]
        wrong = not 0 < count <= uapi.MAX_POKES or len(rows) != count * uapi.POKE.itemsize
        refuse_if(wrong, errno.EINVAL)
        area = self._areas.get(int(request["area"]))
        if area is None or not area.sealed:
            raise RefusalError(errno.ENOENT)
        txn = self._kernel.text.prepare(area, rows, out)
        self._txns[txn.id] = txn
        out.payload = row_bytes(uapi.SIZE, value=txn.id)
        try:
            self._kernel.text.apply(txn, out)
        except RefusalError:
            if not self._kernel.text.undo(txn).stuck:
                self._kernel.text.drop(self._txns.pop(txn.id))
            raise

    def _undo(self, payload: bytes, out: Out) -> None:
        txn = self._txn(payload)
        done = self._kernel.text.undo(txn)
        row = row_bytes(uapi.UNDONE, restored=done.restored, evicted=done.evicted, stuck=done.stuck)
        out.put(row + np.array(done.stuck_addrs, "<u8").tobytes())

    def _arm(self, payload: bytes, out: Out) -> None:
        size = uapi.COMMIT.itemsize
        request = np.frombuffer(payload[:size], uapi.COMMIT)[0]
        count, rows = int(request["count"]), payload[size:]
        wrong = not 0 < count <= uapi.MAX_POKES or len(rows) != count * uapi.TRAP.itemsize
        refuse_if(wrong, errno.EINVAL)
        made, statuses = self._kernel.traps.arm(self._area(int(request["area"])), rows)
        self._sets[made.id] = made
        out.put(np.array([made.id, *statuses], "<i8").tobytes())

    def _disarm(self, payload: bytes, out: Out) -> None:
        made = self._sets.get(_value(payload))
        if made is None:
            raise RefusalError(errno.ENOENT)
        out.put(self._kernel.traps.disarm(made))

    def _forget(self, payload: bytes, out: Out) -> None:
        txn = self._txn(payload)
        refuse_if(txn.area is not None, errno.EBUSY)
        self._kernel.text.drop(self._txns.pop(txn.id))


Handler = Callable[[FakeSession, bytes, Out], None]

_HANDLERS: dict[Op, Handler] = {
    Op.HELLO: FakeSession._hello,
    Op.LOOKUP: lambda s, payload, out: s._kernel.lookup(payload, out),
    Op.READ: lambda s, payload, out: s._kernel.read(payload, out),
    Op.KMODS: lambda s, _, out: out.put(s._kernel.kmods.tobytes()),
    Op.DENYLIST: lambda s, _, out: out.put(s._kernel.denylist.tobytes()),
    Op.KPROBES: lambda s, _, out: out.put(s._kernel.kprobes.tobytes() + s._kernel.traps.rows()),
    Op.FTRACE: lambda s, _, out: out.put(s._kernel.ftrace.tobytes()),
    Op.PLACED: lambda s, _, out: out.put(s._kernel.text.placed()),
    Op.RETURNS: lambda s, _, out: out.put(b""),  # nobody sleeps here
    Op.AREA: FakeSession._alloc,
    Op.PERCPU: FakeSession._percpu,
    Op.WRITE: FakeSession._write,
    Op.SEAL: FakeSession._seal,
    Op.COMMIT: FakeSession._commit,
    Op.UNDO: FakeSession._undo,
    Op.STATES: lambda s, payload, out: out.put(bytes(s._txn(payload).states)),
    Op.QUIESCE: lambda s, _, out: s._kernel.areas.quiesce(),
    Op.COUNTERS: FakeSession._counters,
    Op.FREE: FakeSession._free,
    Op.FORGET: FakeSession._forget,
    Op.ARM: FakeSession._arm,
    Op.DISARM: FakeSession._disarm,
    Op.COPIES: FakeSession._copies,
    Op.WEAVE: FakeSession._weave,
    Op.MOVE: lambda s, payload, _: s._clones(_slice(payload)[0]),
    Op.CLOSED: lambda s, payload, _: s._clones(_slice(payload)[0]),
}


def _value(payload: bytes) -> int:
    return int(np.frombuffer(payload[: uapi.SIZE.itemsize], uapi.SIZE)["value"][0])


def _slice(payload: bytes) -> tuple[int, int, int]:
    row = np.frombuffer(payload[: uapi.SLICE.itemsize], uapi.SLICE)[0]
    return int(row["area"]), int(row["off"]), int(row["len"])


def _check_frame(is_open: bool, request: bytes) -> None:
    """What the ioctl refuses before there is a reply."""
    if not is_open:
        raise DriverError("the session is closed", errno.EBADF)
    if not uapi.REQ.itemsize <= len(request) <= uapi.MAX_REQUEST:
        raise DriverError(f"a request of {len(request)} bytes", errno.EMSGSIZE)
    head = np.frombuffer(request[: uapi.REQ.itemsize], uapi.REQ)[0]
    if head["magic"] != uapi.MAGIC or head["len"] != len(request) - uapi.REQ.itemsize:
        raise DriverError("not a request of the kernweave driver", errno.EBADMSG)
