# SPDX-License-Identifier: GPL-2.0-or-later
"""What the parts of the fake driver share: memory, replies, refusals."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

_KERNEL_HALF = 0xFFFF_8000_0000_0000


class RefusalError(Exception):
    """A handler's negative return value; `errno` is positive."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode.get(code, str(code)))
        self.errno = code


def refuse_if(wrong: bool, code: int) -> None:
    """Answer `-code` if `wrong`.

    Raises:
        RefusalError: it is.
    """
    if wrong:
        raise RefusalError(code)


def row_bytes(dtype: np.dtype[np.void], **fields: Any) -> bytes:
    """One row of a structure; fields left out are zero."""
    row = np.zeros(1, dtype)
    for name, value in fields.items():
        row[name] = value
    return row.tobytes()


class Out:
    """One reply under construction: `struct kw_out`; a refusal carries what was reserved.

    Attributes:
        payload: bytes after the header.
        detail: index of the item the status is about.
    """

    def __init__(self, cap: int) -> None:
        """Take the number of payload bytes the caller has room for."""
        self._cap = cap
        self.payload = b""
        self.detail = 0

    def reserve(self, size: int) -> None:
        """Make room, zeroed: `kw_reserve`.

        Raises:
            RefusalError: ENOSPC, the caller's buffer is too small.
        """
        refuse_if(size > self._cap, errno.ENOSPC)
        self.payload = bytes(size)

    def put(self, data: bytes) -> None:
        """Reserve and fill."""
        self.reserve(len(data))
        self.payload = data


class Memory:
    """Mapped ranges of an address space."""

    def __init__(self) -> None:
        self._ranges: dict[int, bytearray] = {}

    def map(self, addr: int, data: bytes) -> None:
        """Map `data` at `addr`, where nothing may be mapped yet."""
        for start, held in self._ranges.items():
            if start < addr + len(data) and addr < start + len(held):
                raise ValueError(f"{addr:#x} is mapped already")
        self._ranges[addr] = bytearray(data)

    def unmap(self, addr: int) -> None:
        """Unmap what was mapped at `addr`."""
        del self._ranges[addr]

    def read(self, addr: int, size: int) -> bytes:
        """`size` bytes: `copy_from_kernel_nofault`.

        Raises:
            RefusalError: EFAULT, one of them is not mapped; ERANGE, it is no kernel address.
        """
        refuse_if(size > 0 and addr < _KERNEL_HALF, errno.ERANGE)
        found = bytearray()
        while len(found) < size:
            held, at = self._held(addr + len(found))
            found += held[at : at + size - len(found)]
        return bytes(found)

    def matches(self, addr: int, data: bytes) -> bool:
        """Whether these bytes are there: `kw_text_matches`."""
        try:
            return self.read(addr, len(data)) == data
        except RefusalError:
            return False

    def write(self, addr: int, data: bytes) -> None:
        """Overwrite mapped bytes, all in one range."""
        held, at = self._held(addr)
        if at + len(data) > len(held):
            raise ValueError(f"{addr:#x}+{len(data)} is not mapped")
        held[at : at + len(data)] = data

    def _held(self, addr: int) -> tuple[bytearray, int]:
        for start, held in self._ranges.items():
            if start <= addr < start + len(held):
                return held, addr - start
        raise RefusalError(errno.EFAULT)
