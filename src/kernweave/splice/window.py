# SPDX-License-Identifier: GPL-2.0-or-later
"""Windows: which consecutive instructions one jump replaces, so that chosen ones are displaced."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.image.sites import Sites, contains
from kernweave.x86.decode import Flow, Trait

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

SITE_BYTES = 5
SHORT_BYTES = 2
MOST_BYTES = 24  # of a window; four bytes, one instruction, and less than five at a run's end

_GOES_ON = (Flow.NEXT, Flow.BRANCH)
_NEVER_GOES_ON = (Flow.RETURN, Flow.JUMP, Flow.INDIRECT_JUMP)


@dataclass(frozen=True)
class Runs:
    """Maximal stretches of instructions that can be replaced together.

    Control enters a run only at its first instruction, and no task sleeps but in that, which may
    fault, and in its last one: calls come back behind it.

    Attributes:
        first: int64[n], row of the first instruction of each row's run; -1: not movable.
        end: int64[n], row behind its last one.
        at: int64[n + 1], bytes before each row; within a run differences are distances.
        stop: int64[n], where its room ends: its last byte, or that of the filler behind it.
        glued: bool[n + 1], must not be parted from the instruction before.
    """

    first: Rows
    end: Rows
    at: Rows
    stop: Rows
    glued: Mask


@dataclass(frozen=True)
class Windows:
    """Consecutive rows that are replaced by one jump; ascending, disjoint.

    Attributes:
        first: int64[w], row of the first instruction.
        end: int64[w], row behind the last.
    """

    first: Rows
    end: Rows

    def of(self, rows: Rows) -> Rows:
        """int64[m]: window that each row is in, -1 if it is in none."""
        if not len(self.first):
            return np.full(len(rows), -1)
        found = np.searchsorted(self.first, rows, side="right") - 1
        inside = (found >= 0) & (rows < self.end[np.maximum(found, 0)])
        return np.where(inside, found, -1)


def find_runs(code: Code, movable: Mask, sites: Sites, grouped: bool) -> Runs:
    """Divide code into runs.

    Args:
        code: the functions.
        movable: bool[n], instructions that can be displaced at all.
        sites: the kernel's tables.
        grouped: whether several instructions may be replaced by one jump; if not, every
            instruction is a run.
    """
    shadow = (code.trait & Trait.SHADOW) != 0
    joins = _joins(code, movable, sites) if grouped else np.zeros(len(code.addr), bool)
    # an instruction that keeps interrupts off behind it needs the next one in the same window
    movable = movable & ~(shadow & ~np.append(joins[1:], False))
    movable &= ~(np.append(False, shadow[:-1]) & ~joins)
    joins &= movable
    joins[1:] &= movable[:-1]
    count = len(joins)
    numbers = np.arange(count)
    first = np.maximum.accumulate(np.where(joins, 0, numbers))
    last = np.append(~joins[1:], True) if count else np.zeros(0, bool)
    end = np.minimum.accumulate(np.where(last, numbers + 1, count)[::-1])[::-1]
    at = np.zeros(count + 1, np.int64)
    np.cumsum(code.length, out=at[1:])
    tail = np.maximum(end - 1, 0)
    filler = code.room[tail].astype(np.int64) - code.length[tail]
    over = np.isin(code.flow, _NEVER_GOES_ON) | contains(sites.fatal_bugs, code.addr)
    stop = at[end] + np.where(over[tail], filler, 0)
    glued = np.zeros(count + 1, bool)
    glued[1:count] = joins[1:] & shadow[:-1]
    return Runs(np.where(movable, first, -1), end, at, stop, glued)


def _joins(code: Code, movable: Mask, sites: Sites) -> Mask:
    """bool[n]: rows that may follow the row before in a window."""
    joins = movable & ~code.landing & ~contains(sites.exceptions, code.addr)
    goes_on = np.isin(code.flow, _GOES_ON) | contains(sites.bugs, code.addr)
    goes_on &= ~contains(sites.fatal_bugs, code.addr)
    before = movable & goes_on & ((code.trait & Trait.WAIT) == 0)
    joins[:1] = False
    joins[1:] &= before[:-1] & (code.part[1:] == code.part[:-1])
    joins[1:] &= code.addr[:-1] + code.length[:-1] == code.addr[1:]
    return np.asarray(joins)


def cover(runs: Runs, wanted: Rows) -> Windows:
    """The windows of at least five bytes that displace what is wanted, as few bytes as can be.

    From each wanted row to the first boundary five bytes on; at the end of a run it begins
    earlier, or the window before is made longer.  All runs take one step at a time.

    Args:
        runs: of the code.
        wanted: int64[m], rows, ascending; those in runs without room are left out.
    """
    rows = wanted[runs.first[wanted] >= 0]
    rows = rows[runs.stop[rows] - runs.at[runs.first[rows]] >= SITE_BYTES]
    opens = np.flatnonzero(np.diff(runs.first[rows], prepend=-1))
    closes = np.append(opens[1:], len(rows))
    free = runs.first[rows[opens]]  # first row of each run that no window has
    latest = np.full(len(opens), -1)  # window that each run got last
    at, active = opens.copy(), np.arange(len(opens))
    firsts, ends, count = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64), 0
    while len(active):
        first, end = _step(runs, rows[at[active]])
        late = first < free[active]
        ends[latest[active[late]]] = end[late]
        new = active[~late]
        number = count + np.arange(len(new))
        firsts[number], ends[number] = first[~late], end[~late]
        latest[new] = number
        count += len(new)
        free[active] = end
        at[active] = np.searchsorted(rows, end)
        active = active[at[active] < closes[active]]
    order = np.argsort(firsts[:count])
    return Windows(firsts[:count][order], ends[:count][order])


def _step(runs: Runs, row: Rows) -> tuple[Rows, Rows]:
    """The window that begins at each row; where the run has no room, one that ends with it."""
    start, stop, run_end = runs.at[row], runs.stop[row], runs.end[row]
    end = np.searchsorted(runs.at, start + SITE_BYTES)
    end = np.minimum(end, run_end)
    end += (end < run_end) & runs.glued[end]
    back = np.searchsorted(runs.at, stop - SITE_BYTES, side="right") - 1
    back -= runs.glued[back]
    tail = stop - start < SITE_BYTES
    return np.where(tail, back, row), np.where(tail, run_end, end)


def cover_short(runs: Runs, wanted: Rows) -> Windows:
    """The windows of two to four bytes in runs that have no room for five.

    Args:
        runs: of the code.
        wanted: int64[m], rows, ascending; those in runs with more or less room are left out.
    """
    rows = wanted[runs.first[wanted] >= 0]
    room = runs.stop[rows] - runs.at[runs.first[rows]]
    rows = rows[(room >= SHORT_BYTES) & (room < SITE_BYTES)]
    rows = rows[np.flatnonzero(np.diff(runs.first[rows], prepend=-1))]
    back = np.searchsorted(runs.at, runs.stop[rows] - SHORT_BYTES, side="right") - 1
    first = np.minimum(rows, back)
    return Windows(first - runs.glued[first], runs.end[rows])
