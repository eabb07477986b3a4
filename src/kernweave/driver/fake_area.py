# SPDX-License-Identifier: GPL-2.0-or-later
"""Areas of the fake driver: executable memory, per-CPU chunks, quiescence: area.c, fault.c."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kernweave.driver import uapi
from kernweave.driver.fake_memory import Memory, RefusalError, refuse_if

PAGE = 4096
_FIRST_CHUNK = 0xFFFF_FFFF_8703_0000  # gs-relative, as where per-CPU memory is not at zero


@dataclass
class FakeArea:
    """`struct kw_code`.

    Attributes:
        id: driver's number.
        addr: run-time address.
        size: bytes, whole pages.
        sealed: read-only and executable.
        users: transactions whose jumps lead here and are not undone.
        stamp: when it became unreachable, 0: never was reachable.
        chunks: per chunk uint64[cpus, bytes // 8].
        copies: native address by that of the copy; of an area that is not freed.
        visitors: tasks that sleep in a fault of a copy; given by the test.
    """

    id: int
    addr: int
    size: int
    sealed: bool = False
    users: int = 0
    stamp: int = 0
    chunks: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)
    visitors: int = 0


class Areas:
    """All areas of a kernel and the stamps that tell when they may be freed."""

    def __init__(self, memory: Memory, start: int, cpus: int) -> None:
        self._memory = memory
        self._next_addr = start
        self._next_offset = _FIRST_CHUNK
        self._next_id = 1
        self._cpus = cpus
        self._stamp = 1
        self._quiesced = 0
        self._retired: list[FakeArea] = []
        self._copied: list[FakeArea] = []
        self._by_offset: dict[int, npt.NDArray[np.uint64]] = {}

    def alloc(self, size: int) -> FakeArea:
        """Writable memory filled with int3: `kw_area_alloc`."""
        refuse_if(not 0 <= size <= uapi.MAX_CODE, errno.E2BIG)
        area = FakeArea(self._next_id, self._next_addr, -(-size // PAGE) * PAGE)
        self._memory.map(area.addr, b"\xcc" * area.size)
        self._next_id += 1
        self._next_addr += area.size + PAGE
        return area

    def add_chunk(self, area: FakeArea, size: int) -> tuple[int, int]:
        """(number in the area, gs-relative address) of zeroed counters: `kw_area_percpu`."""
        refuse_if(not 0 < size <= uapi.MAX_PERCPU or size % 8 != 0, errno.E2BIG)
        chunk = np.zeros((self._cpus, size // 8), np.uint64)
        area.chunks.append(chunk)
        offset = self._next_offset
        self._by_offset[offset] = chunk
        self._next_offset += size
        return len(area.chunks) - 1, offset

    def write(self, area: FakeArea, off: int, size: int, data: bytes) -> None:
        """Fill a part of an area that is not sealed: `kw_area_write`."""
        refuse_if(area.sealed, errno.EPERM)
        refuse_if(size != len(data) or off > area.size - len(data), errno.E2BIG)
        if data:
            self._memory.write(area.addr + off, data)

    def counters(self, area: FakeArea, index: int, size: int) -> bytes:
        """The first `size` bytes of a chunk, per CPU: `kw_area_counters`."""
        refuse_if(index >= len(area.chunks), errno.ENOENT)
        chunk = area.chunks[index]
        refuse_if(size > 8 * chunk.shape[1] or size % 8 != 0, errno.E2BIG)
        return chunk[:, : size // 8].astype("<u8").tobytes()

    def add_hits(self, offset: int, hits: int, cpu: int) -> None:
        """Add to one 64-bit counter, given by its gs-relative address."""
        offset %= 1 << 64
        for start, chunk in self._by_offset.items():
            if start <= offset < start + 8 * chunk.shape[1]:
                chunk[cpu, (offset - start) // 8] += np.uint64(hits)
                return
        raise ValueError(f"no counter at gs:{offset:#x}")

    def unreachable(self, area: FakeArea) -> None:
        """One transaction less leads here: `kw_area_unreachable`."""
        area.users -= 1
        if not area.users:
            area.stamp = self._stamp

    def quiesce(self) -> None:
        """Nobody is in code that was made unreachable before: `kw_quiesce`."""
        self._quiesced = max(self._quiesced, self._stamp)
        self._stamp += 1

    @property
    def have_copies(self) -> bool:
        """Whether any area has copies that are looked up: `kw_copies_exist`."""
        return bool(self._copied)

    def set_copies(self, area: FakeArea, rows: bytes, count: int, asked: bool) -> None:
        """The copies of an area that is not sealed, once: `kw_copies_set`."""
        wrong = not count or len(rows) != count * uapi.COPY.itemsize
        table = np.frombuffer(
            rows[: len(rows) // uapi.COPY.itemsize * uapi.COPY.itemsize], uapi.COPY
        )
        addrs = table["addr"]
        wrong |= bool((addrs < area.addr).any() or (addrs >= area.addr + area.size).any())
        wrong |= bool((addrs[1:] <= addrs[:-1]).any())
        refuse_if(wrong, errno.EINVAL)
        refuse_if(bool(area.copies) or area.sealed, errno.EPERM)
        refuse_if(not asked, errno.ENOLINK)
        area.copies = dict(zip(addrs.tolist(), table["native"].tolist(), strict=True))
        self._copied.append(area)

    def free(self, area: FakeArea) -> int:
        """Unmap an unreachable, quiescent area without visitors, else tell how many there are."""
        refuse_if(area.users > 0, errno.EBUSY)
        refuse_if(area.stamp > self._quiesced, errno.EAGAIN)
        if area in self._copied:
            if area.visitors:
                self.retire(area)
                return area.visitors
            self._copied.remove(area)
        self._unmap(area)
        return 0

    def _unmap(self, area: FakeArea) -> None:
        self._memory.unmap(area.addr)
        for offset, chunk in list(self._by_offset.items()):
            if any(chunk is own for own in area.chunks):
                del self._by_offset[offset]

    def retire(self, area: FakeArea) -> None:
        """Hand an area over to be freed when nobody can be in it: `kw_area_retire`."""
        if area not in self._retired:
            self._retired.append(area)

    def reap(self) -> None:
        """One pass of the worker `kw_reap`."""
        self.quiesce()
        for area in list(self._retired):
            try:
                visitors = self.free(area)
            except RefusalError:
                continue
            if not visitors:
                self._retired.remove(area)
