# SPDX-License-Identifier: GPL-2.0-or-later
"""Springboards: room for a five-byte jump within reach of a two-byte one.

There is room in int3 filler between functions, and behind the jump of every window of ten bytes
and more.  Where there is neither, instructions nearby are displaced to make some (eviction).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.splice.window import MOST_BYTES, SHORT_BYTES, SITE_BYTES, Runs, Windows

_BACK, _AHEAD = SHORT_BYTES - 128, SHORT_BYTES + 127
_HOST_BYTES = 2 * SITE_BYTES
_INT3 = 0xCC


@dataclass(frozen=True)
class Boards:
    """Where the short windows jump to.

    Attributes:
        windows: all windows of five bytes and more, those made for room included.
        shorts: windows of less, those without a springboard left out.
        addr: uint64[s], run-time address of the springboard of each.
    """

    windows: Windows
    shorts: Windows
    addr: npt.NDArray[np.uint64]


def no_boards(windows: Windows) -> Boards:
    """Windows without any short ones."""
    none = np.zeros(0, np.int64)
    return Boards(windows, Windows(none, none), np.zeros(0, np.uint64))


def find_boards(code: Code, runs: Runs, windows: Windows, shorts: Windows, evict: bool) -> Boards:
    """Find a springboard for each short window.

    Args:
        code: the functions.
        runs: of the code.
        windows: that are there anyway.
        shorts: windows that are too short for a jump.
        evict: whether more instructions may be displaced to make room.
    """
    room = _Room(code, runs, windows)
    kept, addrs = [], []
    for i, row in enumerate(shorts.first.tolist()):
        start = int(code.addr[row])
        addr = room.take(start + _BACK, start + _AHEAD)
        if addr is None and evict and room.evict(row, start + _BACK, start + _AHEAD, shorts):
            addr = room.take(start + _BACK, start + _AHEAD)
        if addr is not None:
            kept.append(i)
            addrs.append(addr)
    found = Windows(shorts.first[kept], shorts.end[kept])
    return Boards(room.windows(), found, np.array(addrs, np.uint64))


class _Room:
    """Bytes that nobody executes, and windows that can be made to have some."""

    def __init__(self, code: Code, runs: Runs, windows: Windows) -> None:
        self._code, self._runs = code, runs
        self._ends = dict(zip(windows.first.tolist(), windows.end.tolist(), strict=True))
        self._owner = np.full(len(code.addr) + 1, -1, np.int64)  # first row of its window
        size = windows.end - windows.first
        rows = np.repeat(windows.first - np.append(0, np.cumsum(size)[:-1]), size)
        self._owner[rows + np.arange(len(rows))] = np.repeat(windows.first, size)
        self._used: set[int] = set()  # windows with springboards, by first row
        self._spaces: list[tuple[int, int, int]] = sorted(
            [*self._filler(windows), *self._slack(windows)]
        )

    def windows(self) -> Windows:
        """All windows as they are now."""
        firsts = sorted(self._ends)
        ends = [self._ends[first] for first in firsts]
        return Windows(np.array(firsts, np.int64), np.array(ends, np.int64))

    def take(self, low: int, high: int) -> int | None:
        """The address of a springboard in [low, high]; the room is taken."""
        i = bisect_left(self._spaces, (low - MOST_BYTES, 0, 0))
        while i < len(self._spaces) and self._spaces[i][0] <= high:
            start, end, window = self._spaces[i]
            at = start + -(-max(low - start, 0) // SITE_BYTES) * SITE_BYTES
            if at <= high and at + SITE_BYTES <= end:
                del self._spaces[i]
                for left in ((start, at), (at + SITE_BYTES, end)):
                    if left[1] - left[0] >= SITE_BYTES:
                        insort(self._spaces, (*left, window))
                self._used.add(window)
                return at
            i += 1
        return None

    def evict(self, row: int, low: int, high: int, shorts: Windows) -> bool:
        """Displace instructions near a row, so that there is room in [low, high]."""
        code, runs = self._code, self._runs
        part = code.part[row]
        first, end = max(row - 128, 0), min(row + 128, len(code.addr))
        away = (code.addr[first:end] - code.addr[row]).astype(np.int64)
        base = int(code.addr[row]) + SITE_BYTES
        near = (code.part[first:end] == part) & (runs.first[first:end] >= 0)
        near &= (away >= low - base) & (away <= high - base)
        rows = np.flatnonzero(near) + first
        for start in rows[np.argsort(np.abs(rows - row), kind="stable")].tolist():
            stop = self._stretch(start)
            if stop and (shorts.of(np.arange(start, stop)) < 0).all():
                self._merge(start, stop)
                return True
        return False

    def _stretch(self, start: int) -> int:
        """End of a window of ten bytes or more that could begin at a row; 0: none can."""
        runs = self._runs
        owner = int(self._owner[start])
        if owner not in (-1, start) or runs.glued[start] or start in self._used:
            return 0
        run_end = int(runs.end[start])
        stop = int(np.searchsorted(runs.at, runs.at[start] + _HOST_BYTES))
        if stop > run_end:
            return 0
        stop += bool(stop < run_end and runs.glued[stop])
        last = int(self._owner[stop - 1])
        if last >= 0:
            stop = self._ends[last]
        inside = {one for one in self._owner[start:stop].tolist() if one >= 0}
        fits = runs.at[stop] - runs.at[start] <= MOST_BYTES and not inside & self._used
        return stop if fits and stop <= run_end else 0

    def _merge(self, start: int, stop: int) -> None:
        code, runs = self._code, self._runs
        for one in {one for one in self._owner[start:stop].tolist() if one >= 0}:
            del self._ends[one]
            space = bisect_left(self._spaces, (int(code.addr[one]), 0, 0))
            if space < len(self._spaces) and self._spaces[space][2] == one:
                del self._spaces[space]
        self._owner[start:stop] = start
        self._ends[start] = stop
        addr = int(code.addr[start])
        size = int(runs.at[stop] - runs.at[start])
        insort(self._spaces, (addr + SITE_BYTES, addr + size, start))

    def _slack(self, windows: Windows) -> list[tuple[int, int, int]]:
        """(start, end, window) of what is behind the jump of each window."""
        runs, code = self._runs, self._code
        size = runs.at[windows.end] - runs.at[windows.first]
        big = np.flatnonzero(size >= _HOST_BYTES)
        addr = code.addr[windows.first[big]].tolist()
        return [
            (start + SITE_BYTES, start + bytes_, window)
            for start, bytes_, window in zip(
                addr, size[big].tolist(), windows.first[big].tolist(), strict=True
            )
        ]

    def _filler(self, windows: Windows) -> list[tuple[int, int, int]]:
        """The same of int3 filler; its window is below all others."""
        code = self._code
        ends = code.addr + code.length
        last = np.append(code.part[1:] != code.part[:-1], True)
        following = np.append(code.addr[1:], 0)
        limit = np.array([part.end for part in code.parts], np.uint64)
        if len(ends):
            following = np.where(last, limit[code.part], following)
        gaps = np.flatnonzero((following > ends) & (following - ends >= SITE_BYTES))
        used = windows.of(gaps)
        found = []
        for row, window in zip(gaps.tolist(), used.tolist(), strict=True):
            start, end = int(ends[row]), int(following[row])
            if window >= 0:  # it may need some of the filler itself
                first = int(code.addr[windows.first[window]])
                start = max(start, first + SITE_BYTES)
            part = code.parts[int(code.part[row])]
            text = part.code[start - part.start : end - part.start]
            if end - start >= SITE_BYTES and text.count(_INT3) == len(text):
                found.append((start, end, -1 - row))
        return found
