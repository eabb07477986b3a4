# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of a kernel table as fields: relative and absolute addresses, checked against the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError

Read = Callable[[int, int], bytes]
Addrs = npt.NDArray[np.uint64]
Fields = npt.NDArray[Any]  # structured

NO_ADDRS: Addrs = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Span:
    """One table in memory.

    Attributes:
        name: of the table, for messages.
        start: address of its first byte.
        data: its bytes.
        bounds: (start, end) of the image, in which the addresses of its rows must lie.
    """

    name: str
    start: int
    data: bytes
    bounds: tuple[int, int]

    def rows(self, dtype: np.dtype[Any]) -> Fields:
        """The table as rows.

        Raises:
            UnsupportedError: its length is not a multiple of a row's.
        """
        if len(self.data) % dtype.itemsize:
            raise UnsupportedError(
                f"the kernel's table {self.name} has {len(self.data)} bytes, not a multiple of "
                f"its rows of {dtype.itemsize}"
            )
        return np.frombuffer(self.data, dtype)

    def relative(self, rows: Fields, field: str) -> Addrs:
        """Addresses that a field holds relative to its own place."""
        dtype = rows.dtype
        off = dtype.fields[field][1] if dtype.fields else 0
        row = np.arange(len(rows), dtype=np.uint64)
        place = np.uint64(self.start + off) + row * np.uint64(dtype.itemsize)
        return place + rows[field].astype(np.int64).view(np.uint64)

    def _inside(self, addrs: Addrs) -> npt.NDArray[np.bool_]:
        start, end = self.bounds
        image = (addrs >= np.uint64(start)) & (addrs < np.uint64(end))
        own = (addrs - np.uint64(self.start)) < np.uint64(len(self.data))
        return np.asarray(image & ~own)

    def holds(self, addrs: Addrs) -> bool:
        """Whether all addresses are inside the image, and none inside the table itself."""
        return bool(self._inside(addrs).all())

    def check(self, addrs: Addrs) -> Addrs:
        """The addresses.

        Raises:
            UnsupportedError: at least one is outside the image or inside the table itself.
        """
        out = addrs[~self._inside(addrs)]
        if len(out):
            start, end = self.bounds
            raise UnsupportedError(
                f"{len(out)} of {len(addrs)} rows in the kernel's table {self.name} lead outside "
                f"{start:#x}..{end:#x} or into the table, the first to {int(out[0]):#x}"
            )
        return addrs


def read_span(read: Read, name: str, span: tuple[int, int], bounds: tuple[int, int]) -> Span:
    """Read one table.

    Raises:
        UnsupportedError: its end is before its start, or fewer bytes came than asked for.
    """
    start, end = span
    if end < start:
        raise UnsupportedError(f"the kernel's table {name} ends at {end:#x}, before {start:#x}")
    data = read(start, end - start) if end > start else b""
    if len(data) != end - start:
        raise UnsupportedError(
            f"the kernel's table {name} has {end - start} bytes, {len(data)} were read"
        )
    return Span(name, start, data, bounds)


def pick_layout(span: Span, fitting: Sequence[int], tried: Sequence[int]) -> int:
    """The one row size that fits.

    Raises:
        UnsupportedError: none fits, or several.
    """
    if len(fitting) != 1:
        sizes = ", ".join(map(str, fitting or tried))
        found = "fit all of" if fitting else "fit none of"
        raise UnsupportedError(
            f"the {len(span.data)} bytes of the kernel's table {span.name} {found} the known row "
            f"sizes {sizes}",
            help="pass the kernel's own layout" if fitting else None,
        )
    return fitting[0]
