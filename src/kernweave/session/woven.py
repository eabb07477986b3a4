# SPDX-License-Identifier: GPL-2.0-or-later
"""Points that are counted in clones: chosen, woven in, taken out."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.driver.client import CommitError, Driver, Rows, no_orc
from kernweave.driver.uapi import Fact
from kernweave.errors import Reason
from kernweave.image.tables import find_spans, read_tables
from kernweave.lab.cache import cache_dir
from kernweave.model.plan import Refused
from kernweave.session.analysis import Analysis
from kernweave.session.attach import Clobber
from kernweave.session.counts import Counts
from kernweave.session.generations import Kernel, Left, Live, unload_left
from kernweave.session.hooks import Hooks
from kernweave.session.resolved import Resolved
from kernweave.session.target import AnyLink
from kernweave.session.view import KernelView
from kernweave.weave.counters import Counters, make_counters
from kernweave.weave.generation import read_template
from kernweave.weave.layout import live_at
from kernweave.weave.scope import Rules, Scope, Why, find_scope, native_blocks
from kernweave.weave.source import Addrs, Source
from kernweave.x86.decode import ALL_MASK

CLONE = "clone"  # the tactic of all that is woven
_EVERYTHING = (0, (1 << 64) - 1)

#: why there is no clone of a function or a block: code and words
_WORDS = {
    Why.NO_ENTRY: (Reason.NO_CLONE, "its function has no ftrace site to be entered by"),
    Why.DENIED: (Reason.DENYLIST, "its function is one of those in which nothing may be placed"),
    Why.BUSY_FTRACE: (Reason.BUSY_FTRACE, "ftrace uses its function's entry"),
    Why.SWAPGS: (Reason.SWAPGS, "its function changes the gs base"),
    Why.CHANGED: (Reason.NO_CLONE, "its function has been changed since the kernel was analysed"),
    Why.ENTRY_BLOCK: (Reason.NO_CLONE, "the first block of its function cannot be cloned"),
    Why.LOCK: (Reason.LOCK_PREFIX, "its block has a lock prefix that may still be patched"),
    Why.SHADOW: (Reason.STI_SHADOW, "its block must stay with the one behind it"),
}
#: whose range may be in a function that is denied, the one that passes first
_DENIED = (
    (Reason.BUSY_KPROBE, "somebody has a kprobe in its function"),
    (Reason.BUSY_PLAN, "kernweave has points in its function already"),
    (Reason.NOINSTR, "its function must not be instrumented"),
)
_PARTED = (Reason.STI_SHADOW, "nothing may come between it and the instruction before")


@dataclass(frozen=True)
class Clonable:
    """The verdict on a request.

    Attributes:
        resolved: what was asked for.
        source: the kernel's text.
        scope: the functions concerned.
        counters: what is counted.
        insn: int64[m], row of the instruction that each point counts, -1: not of the kernel itself.
        counter: int64[m], row of `counters` that each point has, -1: none.
    """

    resolved: Resolved
    source: Source
    scope: Scope
    counters: Counters
    insn: npt.NDArray[np.int64]
    counter: npt.NDArray[np.int64]

    @property
    def placed(self) -> npt.NDArray[np.bool_]:
        """bool[m]: which points can be counted."""
        return self.counter >= 0

    @property
    def changed(self) -> bool:
        """Whether any function concerned is another one than was analysed."""
        functions = self.source.tables.functions
        insn = self.insn[self.insn >= 0]
        asked = functions.parent[self.source.tables.instructions.function[insn]]
        changed = functions.parent[np.flatnonzero(self.source.changed)]
        return bool(np.isin(asked, changed).any())

    @cached_property
    def complete(self) -> npt.NDArray[np.bool_]:
        """bool[m]: which points are counted whenever control arrives there."""
        native = native_blocks(self.source, self.scope)
        return self.placed & ~native[self.source.tables.instructions.block[self.insn]]

    def refused(self, i: int) -> Refused:
        """Why a point cannot be counted."""
        reason, detail = self._why(int(self.insn[i]))
        return Refused(self.resolved.point(i).text, reason, detail)

    def all_refused(self) -> list[Refused]:
        """Everything that cannot be counted; points that do not exist first."""
        rows = np.flatnonzero(~self.placed).tolist()
        return [*self.resolved.refused, *(self.refused(i) for i in rows)]

    def _why(self, insn: int) -> tuple[Reason, str]:
        if insn < 0:
            return Reason.NO_CLONE, "only functions of the kernel itself are woven"
        why = Why(int(self.scope.block[self.source.tables.instructions.block[insn]]))
        if why is Why.WOVEN:
            return _PARTED
        if why is Why.DENIED:
            return self._why_denied(int(self.source.tables.instructions.function[insn]))
        plain = f"its block cannot be cloned ({why.name.lower()})"
        return _WORDS.get(why, (Reason.NO_CLONE, plain))

    def _why_denied(self, function: int) -> tuple[Reason, str]:
        home = self.source.tables.functions.parent[function]
        found = (words for words in _DENIED if self._denied[words[0]][home])
        return next(found, _WORDS[Why.DENIED])

    @cached_property
    def _denied(self) -> dict[Reason, npt.NDArray[np.bool_]]:
        """bool[f] for each reason of _DENIED: whose range is in a function, or in a part of it."""
        functions = self.source.tables.functions
        ends = functions.addr + np.maximum(functions.size, 1).astype(np.uint64)
        found = {reason: np.zeros(len(ends), bool) for reason, _ in _DENIED}
        for ranges in self.source.sites.ranges:
            if ranges.reason in found:
                touched = ranges.overlap(functions.addr, ends)
                found[ranges.reason][functions.parent[touched]] = True
        return found


def find_clonable(resolved: Resolved, source: Source, rules: Rules) -> Clonable:
    """Find out what can be counted in clones of the functions concerned."""
    insn = source.index.rows(resolved.code.addr[resolved.counted])
    known = np.flatnonzero(insn >= 0)
    functions = source.tables.functions
    asked = np.zeros(len(functions.addr), bool)
    asked[functions.parent[source.tables.instructions.function[insn[known]]]] = True
    scope = find_scope(source, rules, asked)
    counters, number = make_counters(source, scope, insn[known], resolved.place[known])
    counter = np.full(len(insn), -1, np.int64)
    counter[known] = number
    return Clonable(resolved, source, scope, counters, insn, counter)


def poison_counters(source: Source, scope: Scope, counters: Counters, clobber: Clobber) -> Counters:
    """The same counters with code before each that overwrites registers."""
    addrs = source.tables.instructions.addr[counters.insn].tolist()
    dead = (~live_at(source, scope, counters) & np.uint32(ALL_MASK)).tolist()
    masks = [clobber(addr, mask) for addr, mask in zip(addrs, dead, strict=True)]
    return replace(counters, clobber=np.array(masks, np.uint32))


class Weaver:
    """Makes generations for one session."""

    def __init__(
        self,
        driver: Driver,
        link: AnyLink,
        seen: tuple[KernelView, Analysis, Hooks],
        kmod_file: Callable[[], bytes],
    ) -> None:
        """Remember where to look; nothing is read yet.

        Args:
            driver: of the session.
            link: that loads kmods.
            seen: what the session knows of the kernel.
            kmod_file: reads the file of some kmod of this kernel.
        """
        self._driver, self._link = driver, link
        self._view, self._analysis, self._hooks = seen
        self._kmod_file = kmod_file

    def prepare(self) -> None:
        """Once, before anything is woven: what others patch is patched in clones as well.

        Raises:
            UnsupportedError: this kernel cannot be woven.
        """
        if not {"orc_ips", "orc_entries"} <= self._spans.keys():
            raise no_orc(self._driver.facts.release)
        self._hooks.mirror()
        unload_left(self._driver, self._link.unload_kmod)

    def find(self, resolved: Resolved) -> Clonable:
        """What can be counted; the view is fresh.

        A function that is asked for and has been changed is analysed anew.
        """
        found = find_clonable(resolved, self._analysis.source(), self.rules)
        if not found.changed:
            return found
        self._analysis.renew()
        return find_clonable(resolved, self._analysis.source(), self.rules)

    @property
    def rules(self) -> Rules:
        """What may be cloned on this kernel."""
        flags = self._driver.facts.flags
        return Rules(bool(flags & Fact.LINE), bool(flags & Fact.LOCKS_LIVE))

    def load(self, source: Source, scope: Scope, counters: Counters) -> Live:
        """Clones that nothing leads to yet.

        Args:
            source: `Analysis.source`, since the view was refreshed.
            scope: what is woven.
            counters: what is counted.
        """
        return Live(self._kernel, source, scope, counters)

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        """The kernel's tables."""
        return find_spans(self._driver.lookup, live=True)

    @cached_property
    def _kernel(self) -> Kernel:
        return Kernel(
            self._driver,
            self._link,
            read_template(self._kmod_file()),
            read_tables(self._driver.read, self._spans, _EVERYTHING),
            self._view.images[0],
            cache_dir() / "generations",
        )

    def enter(self, source: Source, scope: Scope, counters: Counters) -> Live | None:
        """Weave; None if the kernel's text changed meanwhile, and nothing was done."""
        live = self.load(source, scope, counters)
        try:
            if self._is_current(live):
                live.enter()
                return live
        except CommitError as error:
            if error.errno not in (errno.ESTALE, errno.EBUSY, errno.EINVAL):
                raise
        live.leave()
        live.free()
        return None

    def _is_current(self, live: Live) -> bool:
        """Whether the text is what was woven; from here on the driver follows it.

        What it mirrors was brought up to date by the handover.  Kprobes that were registered
        meanwhile are told by their list only, if they are disabled.
        """
        parts, mirrors = live.handover.parts, live.handover.mirrors
        starts, ends = parts["start"].astype(np.uint64), parts["end"].astype(np.uint64)
        if self._view.is_probed(starts, ends):
            return False
        differs = _differing(
            self._driver.read_ranges(starts, ends), live.woven.source, starts, ends
        )
        return bool(_is_mirrored(differs, mirrors).all())


def _differing(texts: bytes, source: Source, starts: Addrs, ends: Addrs) -> Addrs:
    """Addresses of bytes that are not those of the source any more.

    Args:
        texts: the bytes that are there, of all ranges.
        source: what was woven.
        starts: of the ranges.
        ends: of the ranges.
    """
    base = np.uint64(source.base)
    pairs = zip((starts - base).tolist(), (ends - base).tolist(), strict=True)
    woven = np.concatenate([np.zeros(0, np.uint8), *(source.text[a:b] for a, b in pairs)])
    at = np.flatnonzero(np.frombuffer(texts, np.uint8) != woven).astype(np.uint64)
    before = np.cumsum(ends - starts) - (ends - starts)  # bytes of the ranges before each
    part = np.searchsorted(before, at, side="right") - 1
    return np.asarray(starts[part] + at - before[part])


def _is_mirrored(addrs: Addrs, mirrors: Rows) -> npt.NDArray[np.bool_]:
    """bool[m]: which bytes are in `uapi.MIRROR` rows."""
    if not len(mirrors):
        return np.zeros(len(addrs), bool)
    row = np.searchsorted(mirrors["native"], addrs, side="right") - 1
    mirror = mirrors[np.maximum(row, 0)]
    return np.asarray((row >= 0) & (addrs - mirror["native"] < mirror["len"]))


class WovenCounts(Counts):
    """Counters of one `Session.count` that are woven in.

    Attributes:
        live: the clones, while attached.
    """

    def __init__(self, driver: Driver, found: Clonable, live: Live) -> None:
        """Take over what was entered; made by `Session.count`."""
        kept = np.flatnonzero(found.placed)
        points = tuple(found.resolved.point(i) for i in kept.tolist())
        super().__init__(points, tuple(found.all_refused()))
        self.live = live
        self._driver = driver
        self._counter = found.counter[kept]
        functions = live.woven.source.tables.functions
        function = live.woven.source.tables.instructions.function[found.insn[kept]]
        self._function = functions.parent[function]
        self._hits: npt.NDArray[np.uint64] | None = None
        self._left: Left | None = None
        self._partly: npt.NDArray[np.bool_] = ~found.complete[kept]  # not each hit is counted

    @property
    def attached(self) -> bool:
        """Whether the clones are still entered."""
        return self._hits is None

    def detach(self) -> None:
        """Leave the clones, read the final counts, free everything; idempotent."""
        if self._hits is not None:
            return
        self._duration_ns = self.duration_ns
        self._left = left = self.live.leave()
        self._hits = self.live.hits()
        self._partly |= np.isin(self._function, self.live.functions[left.closed])
        if left.visitors or left.stuck or self.live.outside:
            self._partly[:] = True
        self.unrestored, self.in_flight = left.stuck, left.visitors
        self.text_restored = not left.stuck
        if not left.stuck and not left.visitors:
            self.live.free()
        del self.live  # its tables are some 100 MB

    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: hits of each placed point; still rising while attached."""
        found = self.live.hits() if self._hits is None else self._hits
        return np.asarray(found[self._counter])

    def missed(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: zeros; whoever comes to a clone is counted."""
        return np.zeros(len(self._counter), np.uint64)

    def exact(self) -> npt.NDArray[np.bool_]:
        """bool[m]: whether each count is final and complete.

        That of a function which was given back is not, nor what may run natively behind a
        bail-out, and nothing is while tasks are inside, or if some may have stayed natively.
        """
        if self._left is None:
            return np.zeros(len(self._partly), bool)
        return ~self._partly

    @property
    def evicted(self) -> int:
        """Functions given back, as somebody else patched them."""
        return int(self._left.closed.sum()) if self._left else 0

    @property
    def tactic_of(self) -> list[str]:
        """The tactic of each placed point."""
        return [CLONE] * len(self._counter)

    @property
    def engine_of(self) -> list[str]:
        """The engine of each placed point."""
        return ["weave"] * len(self._counter)
