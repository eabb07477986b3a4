# SPDX-License-Identifier: GPL-2.0-or-later
"""What indirect-branch tracking would have said: QEMU does not emulate it.

A near indirect jump or call without a notrack prefix must arrive at an endbr64, or the CPU raises
a control-protection exception; returns are not tracked.

References:
    Intel SDM, volume 1, 17.3 (indirect branch tracking)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oracle.oracle import Counts
from oracle.transfers import TransferClass, Transfers

U64 = npt.NDArray[np.uint64]

ENDBR64 = bytes.fromhex("f30f1efa")
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3))
_NOTRACK = 0x3E
_GROUP5 = 0xFF
_NEAR_INDIRECT = (2, 4)  # call, jmp


@dataclass(frozen=True)
class Tracked:
    """Indirect branches that were taken and that the CPU would have tracked.

    Attributes:
        from_: uint64[n], the jump or call.
        to: uint64[n], where it went.
        lawful: bool[n], whether an endbr64 was there.
    """

    from_: U64
    to: U64
    lawful: npt.NDArray[np.bool_]


def is_tracked(code: bytes) -> bool:
    """Whether an instruction is an indirect branch that must arrive at an endbr64."""
    at = 0
    while code[at] in _PREFIXES:
        at += 1
    notrack = _NOTRACK in code[:at]
    at += 0x40 <= code[at] < 0x50
    is_group = code[at] == _GROUP5
    return is_group and (code[at + 1] >> 3 & 7) in _NEAR_INDIRECT and not notrack


def tracked(transfers: Transfers, counts: Counts) -> Tracked:
    """Judge all transfers that completed.

    Args:
        transfers: what was recorded.
        counts: what was executed meanwhile; an address may have held something else before.
    """
    rows = np.flatnonzero(transfers.of(TransferClass.SYNC))
    from_, to, length = transfers.from_[rows], transfers.to[rows], transfers.from_length[rows]
    sources, targets = _codes_at(counts, from_), _codes_at(counts, to)
    chosen = np.array(
        [
            any(len(code) == size and is_tracked(code) for code in sources[addr])
            for addr, size in zip(from_.tolist(), length.tolist(), strict=True)
        ],
        bool,
    )
    lawful = np.array([ENDBR64 in targets[addr] for addr in to[chosen].tolist()], bool)
    return Tracked(from_[chosen], to[chosen], lawful)


def _codes_at(counts: Counts, addrs: U64) -> dict[int, list[bytes]]:
    """Every instruction that was executed at each of some addresses."""
    found: dict[int, list[bytes]] = {addr: [] for addr in addrs.tolist()}
    for row in np.flatnonzero(np.isin(counts.vaddr, addrs) & (counts.count > 0)).tolist():
        code = counts.code[row, : counts.length[row]].tobytes()
        found[int(counts.vaddr[row])].append(code)
    return found
