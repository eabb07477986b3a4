# SPDX-License-Identifier: GPL-2.0-or-later
"""Places in the text that must be left alone, as ranges and addresses, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kernweave.errors import Reason
from kernweave.image.columns import BUG_WARNING, EX_TYPE_ZEROPAD, decode_bugs, decode_exceptions
from kernweave.image.rows import Span

Read = Callable[[int, int], bytes]
Addrs = npt.NDArray[np.uint64]

#: (symbol of the first byte, symbol after the last byte, reason)
TEXT_RANGES = (
    ("__noinstr_text_start", "__noinstr_text_end", Reason.NOINSTR),
    ("__entry_text_start", "__entry_text_end", Reason.NOINSTR),
    ("__kprobes_text_start", "__kprobes_text_end", Reason.DENYLIST),
    ("__indirect_thunk_start", "__indirect_thunk_end", Reason.DENYLIST),
    ("__static_call_text_start", "__static_call_text_end", Reason.STATIC_CALL),
)

RETURN_THUNKS = (
    "__x86_return_thunk", "zen_untrain_ret", "srso_return_thunk", "srso_alias_return_thunk",
    "retbleed_return_thunk", "its_return_thunk", "call_depth_return_thunk",
)  # fmt: skip

#: functions that begin in 32-bit mode
OTHER_MODES = ("pvh_start_xen",)

#: calls that ftrace rewrites whenever the tracer is another one
TRACER_CALLS = ("ftrace_call", "ftrace_regs_call")

#: (symbol of the first row, symbol after the last row), both of the kernel image
TABLES = {
    "jump_labels": ("__start___jump_table", "__stop___jump_table"),
    "static_calls": ("__start_static_call_sites", "__stop_static_call_sites"),
    "exceptions": ("__start___ex_table", "__stop___ex_table"),
    "bugs": ("__start___bug_table", "__stop___bug_table"),
}

#: bytes of one row of the tables of which only addresses are read
ROW_BYTES = {"jump_labels": 16, "static_calls": 8}
_ANYWHERE = (1 << 63, (1 << 64) - 1)

_NONE: Addrs = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class Ranges:
    """Half-open address ranges of one reason.

    Attributes:
        reason: why no point may be placed there.
        starts: uint64[n], ascending.
        ends: uint64[n], exclusive.
        traps: they are kprobes: one more does no harm.
    """

    reason: Reason
    starts: Addrs
    ends: Addrs
    traps: bool = False

    def overlap(self, starts: Addrs, ends: Addrs) -> npt.NDArray[np.bool_]:
        """bool[m]: which of the half-open ranges [starts, ends) touch one of these."""
        if not len(self.starts):
            return np.zeros(len(starts), bool)
        reach = np.maximum.accumulate(self.ends)
        row = np.searchsorted(self.starts, ends, side="left") - 1
        return (row >= 0) & (reach[np.maximum(row, 0)] > starts)


@dataclass(frozen=True)
class Sites:
    """The kernel's own tables about its text; run-time addresses, each array ascending.

    Attributes:
        ranges: stretches in which no point may be placed.
        jump_labels: address of each jump-label instruction.
        jump_targets: where it leads when it is a jump, in the same order.
        static_calls: address of each static-call instruction.
        exceptions: address of each instruction with a fix-up.
        fixups: where it continues after a fault, in the same order.
        zeropads: those of `exceptions` that are fixed up only where they are natively: the kernel
            also measures how far it is from where they faulted to the fix-up.
        bugs: address of each `ud2` with a bug-table entry.
        fatal_bugs: those from which control does not come back.
        ftrace: address of each ftrace site.
        ftrace_busy: those that are not a nop at the moment.
        return_thunks: functions that a `jmp` stands for `ret` to.
        thunks: [start, end): a jump or call into it is an indirect one.
        static_text: [start, end) of each stretch of static-call trampolines.
        other_modes: [start, end) of each function that is not 64-bit code.
        tracer_calls: address of each call to a tracer, in ftrace's own code.
    """

    ranges: tuple[Ranges, ...] = ()
    jump_labels: Addrs = field(default_factory=lambda: _NONE)
    jump_targets: Addrs = field(default_factory=lambda: _NONE)
    static_calls: Addrs = field(default_factory=lambda: _NONE)
    exceptions: Addrs = field(default_factory=lambda: _NONE)
    fixups: Addrs = field(default_factory=lambda: _NONE)
    zeropads: Addrs = field(default_factory=lambda: _NONE)
    bugs: Addrs = field(default_factory=lambda: _NONE)
    fatal_bugs: Addrs = field(default_factory=lambda: _NONE)
    ftrace: Addrs = field(default_factory=lambda: _NONE)
    ftrace_busy: Addrs = field(default_factory=lambda: _NONE)
    return_thunks: Addrs = field(default_factory=lambda: _NONE)
    thunks: tuple[int, int] = (0, 0)
    static_text: tuple[tuple[int, int], ...] = ()
    other_modes: tuple[tuple[int, int], ...] = ()
    tracer_calls: Addrs = field(default_factory=lambda: _NONE)


def make_ranges(reason: Reason, starts: Addrs, ends: Addrs, traps: bool = False) -> Ranges:
    """Sort ranges by their start; they may overlap."""
    order = np.argsort(starts, kind="stable")
    return Ranges(reason, starts[order].astype(np.uint64), ends[order].astype(np.uint64), traps)


def contains(table: Addrs, addrs: Addrs) -> npt.NDArray[np.bool_]:
    """bool[m]: which addresses are in an ascending table."""
    if not len(table):
        return np.zeros(len(addrs), bool)
    row = np.minimum(np.searchsorted(table, addrs), len(table) - 1)
    return np.asarray(table[row] == addrs)


def _relative(data: bytes, base: int, stride: int, off: int) -> Addrs:
    """Column of self-relative 32-bit fields at byte `off` of every row."""
    rows = np.frombuffer(data, "<i4").reshape(-1, stride // 4)
    place = base + off + stride * np.arange(len(rows), dtype=np.int64).astype(np.uint64)
    return (place + rows[:, off // 4].astype(np.int64).view(np.uint64)).astype(np.uint64)


def _sorted_pair(keys: Addrs, values: Addrs) -> tuple[Addrs, Addrs]:
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


@dataclass(frozen=True, slots=True)
class SpecialText:
    """Text in which calls and jumps mean something else, as in `Sites`."""

    return_thunks: Addrs
    thunks: tuple[int, int] = (0, 0)
    static_text: tuple[tuple[int, int], ...] = ()
    other_modes: tuple[tuple[int, int], ...] = ()
    tracer_calls: Addrs = field(default_factory=lambda: _NONE)


@dataclass(frozen=True, slots=True)
class TableSpans:
    """(start, end) addresses of one image's tables, by the names of `TABLES`."""

    spans: dict[str, tuple[int, int]]


def _column(read: Read, spans: TableSpans, name: str, off: int) -> Addrs:
    start, end = spans.spans.get(name, (0, 0))
    if end <= start:
        return _NONE
    return _relative(read(start, end - start), start, ROW_BYTES[name], off)


def read_sites(
    read: Read,
    images: Sequence[TableSpans],
    ranges: Sequence[Ranges],
    ftrace: tuple[Addrs, Addrs],
    special: SpecialText,
    bug_bytes: int,
) -> Sites:
    """Read the tables of the kernel and of every kmod into one set of columns.

    Args:
        read: kernel memory.
        images: where each image has its tables.
        ranges: denylist, noinstr text and sites in use.
        ftrace: addresses of all ftrace sites, and of those in use.
        special: text in which calls and jumps mean something else.
        bug_bytes: of a row of the bug tables.
    """

    def column(name: str, off: int) -> Addrs:
        parts = [_column(read, spans, name, off) for spans in images]
        return np.concatenate(parts) if parts else _NONE

    jump_labels, jump_targets = _sorted_pair(column("jump_labels", 0), column("jump_labels", 4))
    bugs, fatal = _read_bugs(read, images, bug_bytes)
    exceptions, fixups, zeropads = _read_exceptions(read, images)
    return Sites(
        ranges=tuple(ranges),
        jump_labels=jump_labels,
        jump_targets=jump_targets,
        static_calls=np.sort(column("static_calls", 0)),
        exceptions=exceptions,
        fixups=fixups,
        zeropads=zeropads,
        bugs=bugs,
        fatal_bugs=fatal,
        ftrace=np.sort(ftrace[0]),
        ftrace_busy=np.sort(ftrace[1]),
        return_thunks=np.sort(special.return_thunks),
        thunks=special.thunks,
        static_text=special.static_text,
        other_modes=special.other_modes,
        tracer_calls=special.tracer_calls,
    )


def _read_spans(read: Read, images: Sequence[TableSpans], name: str) -> list[Span]:
    """The tables of one name, of all images that have it."""
    spans = [one.spans.get(name, (0, 0)) for one in images]
    return [
        Span(name, start, read(start, end - start), _ANYWHERE)
        for start, end in spans
        if end > start
    ]


def _read_exceptions(read: Read, images: Sequence[TableSpans]) -> tuple[Addrs, Addrs, Addrs]:
    """Addresses and fix-ups of all exception-table entries, and addresses of zeropads."""
    tables = [decode_exceptions(span) for span in _read_spans(read, images, "exceptions")]
    addr = np.concatenate([_NONE, *(table.addr for table in tables)])
    fixup = np.concatenate([_NONE, *(table.fixup for table in tables)])
    zeropads = [table.addr[table.type == EX_TYPE_ZEROPAD] for table in tables]
    return *_sorted_pair(addr, fixup), np.sort(np.concatenate([_NONE, *zeropads]))


def _read_bugs(read: Read, images: Sequence[TableSpans], size: int) -> tuple[Addrs, Addrs]:
    """Addresses of all bug-table entries, and of those that do not come back."""
    tables = [decode_bugs(span, size) for span in _read_spans(read, images, "bugs")]
    addr = np.concatenate([_NONE, *(table.addr for table in tables)])
    warns = np.concatenate([np.zeros(0, bool), *(table.flags & BUG_WARNING for table in tables)])
    return np.sort(addr), np.sort(addr[warns == 0])
