# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded transfers of control between instructions of the kernel half, as columns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

TRANSFER = np.dtype(
    [
        ("from", "<u8"),
        ("to", "<u8"),
        ("count", "<u8"),
        ("cls", "u1"),
        ("from_length", "u1"),
        ("pad", "u1", 6),
    ]
)
_KEY = ["from", "to", "from_length", "cls"]


class TransferClass(IntEnum):
    """What a pair is, told from the instruction it starts at and the IDT; see transfer.c."""

    SYNC = 0  # the instruction completed and control went on: a jump, or a fall-through
    ENTER = 1  # user mode to the kernel; `from` is 0
    DELIVER = 2  # exception or interrupt after kernel code: `to` is the entry of a gate
    # iretq or sysretq to the kernel: back to what was interrupted on this or another CPU, to a
    # fix-up, or, of the iretq in sync_core(), to the instruction behind it
    RESUME = 3
    LEAVE = 4  # the kernel to user mode; `to` is 0


@dataclass(frozen=True, slots=True)
class Transfers:
    """Transfers of all CPUs since recording began; rows ascending by (from_, to).

    Attributes:
        from_: uint64[n], the instruction begun last before; 0 = user mode. Of a DELIVER it is
            the one that faulted, or the one after which an interrupt was taken: an iretq or
            sysretq too, when it came before the first instruction of what they return to.
        to: uint64[n], the instruction begun next; 0 = user mode.
        count: uint64[n], how often.
        cls: uint8[n], a TransferClass.
        from_length: uint8[n], bytes of the instruction at `from_` (0 = user mode); an address
            that held several instructions may have several rows for one `to`.
        dropped: transfers that were not recorded, for want of memory; 0 = the set is complete.
    """

    from_: U64
    to: U64
    count: U64
    cls: U8
    from_length: U8
    dropped: int

    @property
    def total(self) -> int:
        """Number of transfers recorded."""
        return int(self.count.sum())

    def of(self, cls: TransferClass) -> Mask:
        """Return which rows have that class: bool[n]."""
        result: Mask = self.cls == np.uint8(cls)
        return result

    def falls(self) -> Mask:
        """Return which rows are SYNC to the instruction behind, by whatever means: bool[n]."""
        behind = self.from_ + self.from_length.astype(np.uint64)
        result: Mask = self.of(TransferClass.SYNC) & (self.to == behind)
        return result

    def since(self, earlier: Transfers) -> Transfers:
        """Return what was recorded after `earlier`, of the same machine; rows with a count."""
        before, now = _rows(earlier), _rows(self)
        before["count"] = np.uint64(0) - before["count"]  # modulo 2**64: the sum is exact
        return _sum_up(np.concatenate([now, before]), self.dropped - earlier.dropped)


def transfers_from_rows(rows: npt.NDArray[np.void], dropped: int) -> Transfers:
    """Return the columns of records (dtype TRANSFER), one per pair: CPUs are added up."""
    return _sum_up(rows, dropped)


def _rows(transfers: Transfers) -> npt.NDArray[np.void]:
    rows = np.zeros(len(transfers.from_), TRANSFER)
    for name in (*_KEY, "count"):
        rows[name] = getattr(transfers, "from_" if name == "from" else name)
    return rows


def _sum_up(rows: npt.NDArray[np.void], dropped: int) -> Transfers:
    """Add up the counts of rows with the same key; leave out those that come to 0."""
    rows = rows[np.lexsort([rows[name] for name in reversed(_KEY)])]
    is_first = np.zeros(len(rows), bool)
    is_first[:1] = True
    for name in _KEY:
        is_first[1:] |= rows[name][1:] != rows[name][:-1]
    starts = np.flatnonzero(is_first)
    count = np.add.reduceat(rows["count"], starts) if len(rows) else rows["count"]
    kept = rows[starts][count > 0]
    return Transfers(
        from_=kept["from"].copy(),
        to=kept["to"].copy(),
        count=count[count > 0],
        cls=kept["cls"].copy(),
        from_length=kept["from_length"].copy(),
        dropped=dropped,
    )
