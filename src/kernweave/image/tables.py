# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's tables about its own text: where they are, and all of them read at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernweave.errors import UnsupportedError
from kernweave.image.columns import (
    Alternatives,
    Bugs,
    Exceptions,
    JumpLabels,
    StaticCalls,
    alternative_bytes,
    bug_bytes,
    decode_addresses,
    decode_alternatives,
    decode_bugs,
    decode_exceptions,
    decode_jump_labels,
    decode_sites,
    decode_static_calls,
)
from kernweave.image.orc import NO_ORC, Orc, OrcFormat, decode_orc, orc_format
from kernweave.image.rows import Addrs, Read, Span, read_span

#: (symbol of the first byte, symbol after the last byte) of each table of the kernel image
TABLE_SYMBOLS = {
    "exceptions": ("__start___ex_table", "__stop___ex_table"),
    "orc_header": ("__start_orc_header", "__stop_orc_header"),
    "orc_ips": ("__start_orc_unwind_ip", "__stop_orc_unwind_ip"),
    "orc_entries": ("__start_orc_unwind", "__stop_orc_unwind"),
    "bugs": ("__start___bug_table", "__stop___bug_table"),
    "jump_labels": ("__start___jump_table", "__stop___jump_table"),
    "static_calls": ("__start_static_call_sites", "__stop_static_call_sites"),
    "lock_prefixes": ("__smp_locks", "__smp_locks_end"),
    "return_sites": ("__return_sites", "__return_sites_end"),
    "retpoline_sites": ("__retpoline_sites", "__retpoline_sites_end"),
    "call_sites": ("__call_sites", "__call_sites_end"),
    "endbr_seals": ("__ibt_endbr_seal", "__ibt_endbr_seal_end"),
    "alternatives": ("__alt_instructions", "__alt_instructions_end"),
    "ftrace": ("__start_mcount_loc", "__stop_mcount_loc"),
    "denylist": ("__start_kprobe_blacklist", "__stop_kprobe_blacklist"),
}

#: tables whose memory a running kernel has given back: all in init memory, and the lock prefixes,
#: which it keeps only if it booted with one CPU present and more of them possible
#:
#: References: arch/x86/kernel/alternative.c, alternative_instructions(), uniproc_patched
FREED_AFTER_BOOT = frozenset(
    (
        "lock_prefixes", "return_sites", "retpoline_sites", "call_sites", "endbr_seals",
        "alternatives", "ftrace", "denylist",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What differs between kernels; found in the kernel's own tables, then valid for its kmods.

    Attributes:
        bug_bytes: of a row of the bug table: 8, 12 or 16; None: find out.
        alternative_bytes: of a row of the alternatives: 12 or 14; None: find out.
        orc: of the unwind table; None: find out.
    """

    bug_bytes: int | None = None
    alternative_bytes: int | None = None
    orc: OrcFormat | None = None


@dataclass(frozen=True)
class Tables:
    """All tables of one image; addresses uint64, each table ascending by `addr`.

    Attributes:
        return_sites: `ret`s, or jumps to the return thunk.
        retpoline_sites: calls and jumps through retpolines.
        call_sites: direct calls, for call-depth tracking.
        endbr_seals: endbr64 that nothing reaches indirectly.
        lock_prefixes: lock prefixes that become nops on one CPU.
        ftrace: entry nops (at rest: calls of __fentry__) of functions.
        denylist: functions that kprobes refuse.
        empty_rows: how many rows hold no address, by table, where there are any: padding of the
            lock prefixes, and functions that another definition replaced in `ftrace`.
        missing: names of the tables for which no span was given.
        layout: what was found or given.
    """

    exceptions: Exceptions
    orc: Orc
    bugs: Bugs
    jump_labels: JumpLabels
    static_calls: StaticCalls
    alternatives: Alternatives
    return_sites: Addrs
    retpoline_sites: Addrs
    call_sites: Addrs
    endbr_seals: Addrs
    lock_prefixes: Addrs
    ftrace: Addrs
    denylist: Addrs
    empty_rows: Mapping[str, int]
    missing: tuple[str, ...]
    layout: Layout


def find_spans(
    lookup: Callable[[Sequence[str]], Sequence[int]], *, live: bool
) -> dict[str, tuple[int, int]]:
    """Where a kernel image has its tables: (start, end) addresses by the names of TABLE_SYMBOLS.

    Args:
        lookup: address of each symbol, 0 where there is none.
        live: whether the kernel runs: what it freed after boot is then left out.
    """
    names = [name for name in TABLE_SYMBOLS if not (live and name in FREED_AFTER_BOOT)]
    addrs = lookup([symbol for name in names for symbol in TABLE_SYMBOLS[name]])
    pairs = zip(names, addrs[::2], addrs[1::2], strict=True)
    return {name: (start, end) for name, start, end in pairs if start and end}


def read_tables(
    read: Read,
    spans: Mapping[str, tuple[int, int]],
    bounds: tuple[int, int],
    layout: Layout | None = None,
) -> Tables:
    """Read all tables of one image.

    Args:
        read: memory of the kernel, or of a kernel file.
        spans: (start, end) of the tables, by the names of TABLE_SYMBOLS; those not in it come
            out empty and in `missing`.
        bounds: (start, end) of the image.
        layout: what differs between kernels, where it is known: for kmods that of their kernel,
            as one kmod may have too few rows to tell.

    Raises:
        UnsupportedError: a table is not of its length, leads outside the image, or has a layout
            that is not known.
    """
    unknown = sorted(spans.keys() - TABLE_SYMBOLS.keys())
    if unknown:
        raise UnsupportedError(f"no kernel table is called {unknown[0]}")
    found = {name: read_span(read, name, spans.get(name, (0, 0)), bounds) for name in TABLE_SYMBOLS}
    missing = tuple(name for name in TABLE_SYMBOLS if name not in spans and name != "orc_header")
    return _decode(found, missing, layout or Layout())


def _decode(found: dict[str, Span], missing: tuple[str, ...], known: Layout) -> Tables:
    layout = _complete(found, known)
    ips, entries = found["orc_ips"], found["orc_entries"]
    has_orc = bool(ips.data or entries.data)
    locks, lock_padding = decode_sites(found["lock_prefixes"], empty=True)
    ftrace, replaced = decode_addresses(found["ftrace"], empty=True)
    empty_rows = {"lock_prefixes": lock_padding, "ftrace": replaced}
    return Tables(
        exceptions=decode_exceptions(found["exceptions"]),
        orc=decode_orc(ips, entries, layout.orc) if has_orc and layout.orc else NO_ORC,
        bugs=decode_bugs(found["bugs"], layout.bug_bytes or 12),
        jump_labels=decode_jump_labels(found["jump_labels"]),
        static_calls=decode_static_calls(found["static_calls"]),
        alternatives=decode_alternatives(found["alternatives"], layout.alternative_bytes or 14),
        return_sites=decode_sites(found["return_sites"])[0],
        retpoline_sites=decode_sites(found["retpoline_sites"])[0],
        call_sites=decode_sites(found["call_sites"])[0],
        endbr_seals=decode_sites(found["endbr_seals"])[0],
        lock_prefixes=locks,
        ftrace=ftrace,
        denylist=decode_addresses(found["denylist"])[0],
        empty_rows={name: count for name, count in empty_rows.items() if count},
        missing=missing,
        layout=layout,
    )


def _complete(found: dict[str, Span], known: Layout) -> Layout:
    """Find out what is not known; nothing can be found out of an empty table."""
    bugs, alternatives, orc = known.bug_bytes, known.alternative_bytes, known.orc
    if bugs is None and found["bugs"].data:
        bugs = bug_bytes(found["bugs"])
    if alternatives is None and found["alternatives"].data:
        alternatives = alternative_bytes(found["alternatives"])
    if orc is None and (found["orc_ips"].data or found["orc_entries"].data):
        orc = orc_format(found["orc_header"].data)
    return Layout(bugs, alternatives, orc)
