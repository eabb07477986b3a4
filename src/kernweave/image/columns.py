# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's tables about its own text, one by one: their columns and how their rows are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError
from kernweave.image.rows import Addrs, Fields, Span, pick_layout

_RELATIVE = np.dtype([("addr", "<i4")])
_ABSOLUTE = np.dtype([("addr", "<u8")])
_EXCEPTION = np.dtype([("addr", "<i4"), ("fixup", "<i4"), ("data", "<u4")])
_JUMP_LABEL = np.dtype([("addr", "<i4"), ("target", "<i4"), ("key", "<i8")])
_STATIC_CALL = np.dtype([("addr", "<i4"), ("key", "<i4")])

# struct bug_entry by its size: without DEBUG_BUGVERBOSE; with it; with it and a format string
_BUG = {
    8: np.dtype([("addr", "<i4"), ("flags", "<u2"), ("pad", "<u2")]),
    12: np.dtype([("addr", "<i4"), ("file", "<i4"), ("line", "<u2"), ("flags", "<u2")]),
    16: np.dtype(
        [("addr", "<i4"), ("format", "<i4"), ("file", "<i4"), ("line", "<u2"), ("flags", "<u2")]
    ),
}

# struct alt_instr by its size: until 6.2, and since 5d1dd961e743 ("x86/alternatives: Add
# alt_instr.flags")
_ALTERNATIVE = {
    12: np.dtype(
        [("addr", "<i4"), ("repl", "<i4"), ("cpuid", "<u2"), ("length", "u1"), ("size", "u1")]
    ),
    14: np.dtype(
        [
            ("addr", "<i4"),
            ("repl", "<i4"),
            ("cpuid", "<u2"),
            ("flags", "<u2"),
            ("length", "u1"),
            ("size", "u1"),
        ]
    ),
}
_CPUID_NOT = 1 << 15  # in rows of 12 bytes

#: of load_unaligned_zeropad(): ex_handler_zeropad() decodes what it faulted at, and goes on only if
#: the fix-up is right behind that
EX_TYPE_ZEROPAD = 20

BUG_WARNING = 1 << 0
BUG_ONCE = 1 << 1
BUG_DONE = 1 << 2
BUG_ARGS = 1 << 4  # the trap is not at `addr` but at the call of __WARN_trap behind it

ALTERNATIVE_NOT = 1 << 0  # replaced where the CPU does not have the feature
ALTERNATIVE_DIRECT_CALL = 1 << 1


@dataclass(frozen=True)
class Exceptions:
    """Instructions that may fault, and what happens then.

    Attributes:
        addr: uint64[n], the instruction.
        fixup: uint64[n], where it goes on after a fault.
        type: uint8[n], EX_TYPE_*: what the handler does.
        reg: uint8[n], the register it does it to, by its hardware number; with POP_REG, 8..11 are
            ds, es, fs, gs.
        flags: uint8[n], EX_FLAG_*.
        imm: int16[n].

    References:
        arch/x86/include/asm/extable_fixup_types.h: type in bits 0..7 of `data`, reg 8..11,
        flags 12..15, imm 16..31
    """

    addr: Addrs
    fixup: Addrs
    type: npt.NDArray[np.uint8]
    reg: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    imm: npt.NDArray[np.int16]


@dataclass(frozen=True)
class Bugs:
    """BUG() and WARN() sites.

    Attributes:
        addr: uint64[n], the trapping instruction, except where `flags` has BUG_ARGS.
        flags: uint16[n], BUG_*; the taint in the upper byte.
        file: uint64[n], address of the file's name, 0 where the kernel does not keep it.
        line: uint16[n], 0 where the kernel does not keep it.
        text: uint64[n], address of what a warning says, 0 where the kernel does not keep it.
    """

    addr: Addrs
    flags: npt.NDArray[np.uint16]
    file: Addrs
    line: npt.NDArray[np.uint16]
    text: Addrs


@dataclass(frozen=True)
class JumpLabels:
    """Static-key branches.

    Attributes:
        addr: uint64[n], the nop or jump.
        target: uint64[n], where the jump leads.
        key: uint64[n], the static_key.
        branch: bool[n], the site is a jump while the key's value differs from this.
        init: bool[n], in init text; only a running kernel says so, in a file it has another use.
    """

    addr: Addrs
    target: Addrs
    key: Addrs
    branch: npt.NDArray[np.bool_]
    init: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StaticCalls:
    """Static-call sites.

    Attributes:
        addr: uint64[n], the call or jump.
        key: uint64[n], the static_call_key.
        tail: bool[n], a tail call: a jump.
        init: bool[n], in init text; only a running kernel says so.
    """

    addr: Addrs
    key: Addrs
    tail: npt.NDArray[np.bool_]
    init: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Alternatives:
    """Instructions replaced at boot, by the CPU's features; several rows for one site possible.

    Attributes:
        addr: uint64[n], the instructions.
        replacement: uint64[n], what replaces them.
        feature: uint16[n], X86_FEATURE_*.
        flags: uint16[n], ALTERNATIVE_*.
        length: uint8[n], bytes at `addr`.
        replacement_length: uint8[n], bytes at `replacement`; the rest becomes nops.
    """

    addr: Addrs
    replacement: Addrs
    feature: npt.NDArray[np.uint16]
    flags: npt.NDArray[np.uint16]
    length: npt.NDArray[np.uint8]
    replacement_length: npt.NDArray[np.uint8]


def _order(addr: Addrs) -> npt.NDArray[np.intp]:
    return np.argsort(addr, kind="stable")


def decode_exceptions(span: Span) -> Exceptions:
    """The exception table."""
    rows = span.rows(_EXCEPTION)
    addr = span.check(span.relative(rows, "addr"))
    fixup = span.check(span.relative(rows, "fixup"))
    order = _order(addr)
    data = rows["data"][order]
    return Exceptions(
        addr[order],
        fixup[order],
        (data & 0xFF).astype(np.uint8),
        (data >> 8 & 15).astype(np.uint8),
        (data >> 12 & 15).astype(np.uint8),
        (data >> 16).astype(np.uint16).view(np.int16),
    )


def decode_jump_labels(span: Span) -> JumpLabels:
    """The jump table; its keys may be in another image."""
    rows = span.rows(_JUMP_LABEL)
    addr = span.check(span.relative(rows, "addr"))
    target = span.check(span.relative(rows, "target"))
    key = span.relative(rows, "key")
    order = _order(addr)
    flags = (key & np.uint64(3))[order]
    key = (key & ~np.uint64(3))[order]
    return JumpLabels(addr[order], target[order], key, (flags & 1) > 0, (flags & 2) > 0)


def decode_static_calls(span: Span) -> StaticCalls:
    """The static-call sites; their keys may be in another image."""
    rows = span.rows(_STATIC_CALL)
    addr = span.check(span.relative(rows, "addr"))
    key = span.relative(rows, "key")
    order = _order(addr)
    flags = (key & np.uint64(3))[order]
    key = (key & ~np.uint64(3))[order]
    return StaticCalls(addr[order], key, (flags & 1) > 0, (flags & 2) > 0)


def decode_sites(span: Span, *, empty: bool = False) -> tuple[Addrs, int]:
    """A table of nothing but 32-bit addresses relative to their place.

    Args:
        span: the table.
        empty: whether rows of 0 are padding; elsewhere they are an error.

    Returns:
        The addresses, ascending, and the number of rows left out.
    """
    rows = span.rows(_RELATIVE)
    used = rows["addr"] != 0
    return _sites(span, span.relative(rows, "addr"), used, empty)


def decode_addresses(span: Span, *, empty: bool = False) -> tuple[Addrs, int]:
    """A table of 64-bit absolute addresses; otherwise like `decode_sites`.

    In a kernel file they are link addresses.
    """
    addr = span.rows(_ABSOLUTE)["addr"].astype(np.uint64)
    return _sites(span, addr, addr != 0, empty)


def _sites(span: Span, addr: Addrs, used: npt.NDArray[np.bool_], empty: bool) -> tuple[Addrs, int]:
    left_out = len(addr) - int(used.sum())
    if left_out and not empty:
        raise UnsupportedError(
            f"{left_out} of {len(addr)} rows in the kernel's table {span.name} are empty"
        )
    return np.sort(span.check(addr[used])), left_out


# ---- tables whose rows differ between kernels ----------------------------------------------------


def bug_bytes(span: Span) -> int:
    """The size of a row of the bug table: that at which all addresses lead into the image.

    A warning must be among the rows (in the form with a format string and no line, which is not
    known here, the flags of 12-byte rows would all be zero), and padding must be zero.

    Raises:
        UnsupportedError: no size fits, or several.
    """
    return pick_layout(span, [size for size in _BUG if _bugs_fit(span, size)], list(_BUG))


def _bugs_fit(span: Span, size: int) -> bool:
    rows = _try_rows(span, _BUG[size])
    if rows is None or not (rows["flags"] & BUG_WARNING).any():
        return False
    if size == 8:
        return span.holds(span.relative(rows, "addr")) and not rows["pad"].any()
    return all(span.holds(span.relative(rows, field)) for field in ("addr", "file"))


def _try_rows(span: Span, dtype: np.dtype[Any]) -> Fields | None:
    return None if len(span.data) % dtype.itemsize else span.rows(dtype)


def decode_bugs(span: Span, size: int) -> Bugs:
    """The bug table, with rows of `size` bytes."""
    rows = span.rows(_BUG[size])
    addr = span.check(span.relative(rows, "addr"))
    order = _order(addr)
    file, line = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint16)
    if size > 8:
        file, line = span.check(span.relative(rows, "file")), rows["line"].astype(np.uint16)
    text = span.check(span.relative(rows, "format")) if size > 12 else np.zeros_like(file)
    flags = rows["flags"].astype(np.uint16)
    return Bugs(addr[order], flags[order], file[order], line[order], text[order])


def alternative_bytes(span: Span) -> int:
    """The size of a row of the alternatives: that at which all rows are possible.

    Raises:
        UnsupportedError: no size fits, or several.
    """
    fitting = [size for size in _ALTERNATIVE if _alternatives_fit(span, size)]
    return pick_layout(span, fitting, list(_ALTERNATIVE))


def _alternatives_fit(span: Span, size: int) -> bool:
    rows = _try_rows(span, _ALTERNATIVE[size])
    return (
        rows is not None
        and span.holds(span.relative(rows, "addr"))
        and span.holds(span.relative(rows, "repl"))
        and bool((rows["size"] <= rows["length"]).all())
    )


def decode_alternatives(span: Span, size: int) -> Alternatives:
    """The alternatives, with rows of `size` bytes."""
    rows = span.rows(_ALTERNATIVE[size])
    addr = span.check(span.relative(rows, "addr"))
    replacement = span.check(span.relative(rows, "repl"))
    order = _order(addr)
    feature = rows["cpuid"].astype(np.uint16)
    if size == 12:
        flags = np.where(feature & _CPUID_NOT, ALTERNATIVE_NOT, 0).astype(np.uint16)
        feature = feature & np.uint16(_CPUID_NOT - 1)
    else:
        flags = rows["flags"].astype(np.uint16)
    return Alternatives(
        addr[order],
        replacement[order],
        feature[order],
        flags[order],
        rows["length"][order],
        rows["size"][order],
    )
