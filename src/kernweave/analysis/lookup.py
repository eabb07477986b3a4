# SPDX-License-Identifier: GPL-2.0-or-later
"""From addresses to rows of a table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Addrs = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_DENSE_SPAN = 64 << 20  # bytes of text for which a look-up table is worth its memory
_DENSE_ROWS = 4096


class RowIndex:
    """Finds the row of an address: by a table over all bytes of text, or by bisection."""

    def __init__(self, addr: Addrs) -> None:
        """Index uint64[n] distinct addresses in any order."""
        self._count = len(addr)
        self._base = int(addr.min()) if len(addr) else 0
        span = int(addr.max()) - self._base + 1 if len(addr) else 0
        self._dense: npt.NDArray[np.int32] | None = None
        if len(addr) >= _DENSE_ROWS and span <= _DENSE_SPAN:
            self._dense = np.full(span + 1, -1, np.int32)
            self._dense[(addr - np.uint64(self._base)).astype(np.int64)] = np.arange(len(addr))
        else:
            self._order = np.argsort(addr, kind="stable")
            self._sorted = addr[self._order]

    def rows(self, addrs: Addrs) -> Rows:
        """int64[m]: row of each address, -1 if it is in none."""
        if not self._count:
            return np.full(len(addrs), -1)
        if self._dense is not None:
            last = np.uint64(len(self._dense) - 1)  # holds -1
            at = np.minimum(addrs - np.uint64(self._base), last)
            return np.asarray(self._dense[at], np.int64)
        at = np.minimum(np.searchsorted(self._sorted, addrs), self._count - 1)
        return np.where(self._sorted[at] == addrs, self._order[at], -1)

    def mark(self, *tables: Addrs) -> Mask:
        """bool[n]: which rows are in any of the tables."""
        found = np.zeros(self._count + 1, bool)
        for table in tables:
            found[self.rows(table)] = True  # a miss marks the row behind the last
        return found[:-1]
