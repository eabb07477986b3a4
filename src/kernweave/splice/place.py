# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tactic fits each instruction, or the reason why none does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.errors import Reason
from kernweave.image.sites import Sites, contains
from kernweave.model.plan import Tactic
from kernweave.x86.decode import Flow, Trait

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

SITE_BYTES = 5
_FILL_BYTES = 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What the kernel at hand allows.

    Attributes:
        locks_live: lock prefixes may still be patched (CPUs come and go).
        calls_counted: `push; jmp` must not stand for a call (call-depth tracking).
        tactics: tactics to try, in order.
    """

    locks_live: bool = False
    calls_counted: bool = False
    tactics: tuple[Tactic, ...] = tuple(Tactic)


@dataclass(frozen=True)
class Placement:
    """The verdict on each row asked for; one of the two is None.

    Attributes:
        rows: int64[m], rows of the code table.
        tactic: m tactics.
        reason: m reasons.
        detail: m explanations of the reasons, "" where placed.
    """

    rows: Rows
    tactic: tuple[Tactic | None, ...]
    reason: tuple[Reason | None, ...]
    detail: tuple[str, ...]


def place(code: Code, rows: Rows, sites: Sites, rules: Rules) -> Placement:
    """Choose a tactic for the instructions in `rows`, all at once."""
    reasons = np.full(len(rows), None, object)
    for reason, hit in _refusals(code, rows, sites, rules):
        reasons[hit & (reasons == None)] = reason  # noqa: E711  (elementwise)
    tactics = np.full(len(rows), None, object)
    for tactic in rules.tactics:
        fits = _FITS[tactic](code, rows, sites)
        tactics[fits & (tactics == None)] = tactic  # noqa: E711
    free = reasons == None  # noqa: E711
    short = free & (tactics == None)  # noqa: E711
    reasons[short] = Reason.TOO_SHORT
    tactics[~free] = None
    details = [
        "" if reason is None else explain(code, int(row), reason)
        for row, reason in zip(rows, reasons, strict=True)
    ]
    return Placement(rows, tuple(tactics), tuple(reasons), tuple(details))


def _refusals(code: Code, rows: Rows, sites: Sites, rules: Rules) -> list[tuple[Reason, Mask]]:
    """(reason, bool[m]) in order of precedence."""
    addr, trait, flow = code.addr[rows], code.trait[rows], code.flow[rows]
    ends = addr + np.maximum(code.length[rows], 1)
    touched = addr + np.maximum(code.length[rows], SITE_BYTES)
    found = [
        (ranges.reason, ranges.overlap(addr, ends))
        for ranges in sites.ranges
        if ranges.reason not in _IN_USE
    ]
    # what is in use now matters for every byte that would be written
    found += [
        (ranges.reason, ranges.overlap(addr, touched) & _could_be_written(code, rows))
        for ranges in sites.ranges
        if ranges.reason in _IN_USE
    ]
    found += [
        (Reason.BUSY_FTRACE, contains(sites.ftrace_busy, addr)),
        (Reason.JUMP_LABEL, contains(sites.jump_labels, addr)),
        (Reason.STATIC_CALL, contains(sites.static_calls, addr)),
        (Reason.EXCEPTION_ENTRY, contains(sites.exceptions, addr)),
        (Reason.BUG_ENTRY, contains(sites.bugs, addr)),
        (Reason.STI_SHADOW, _follows(code, rows, Trait.SHADOW)),
        (Reason.SWAPGS, _part_has(code, rows, Trait.SWAPGS)),
        (Reason.DENYLIST, _calls_behind_itself(code, rows)),
        (Reason.NOT_BOUNDARY, flow == Flow.INVALID),
    ]
    if rules.locks_live:
        found.append((Reason.LOCK_PREFIX, (trait & Trait.LOCK) != 0))
    if rules.calls_counted:
        found.append((Reason.RETPOLINE_SITE, np.isin(flow, (Flow.CALL, Flow.INDIRECT_CALL))))
    return found


_IN_USE = (Reason.BUSY_KPROBE, Reason.BUSY_PLAN)


def _could_be_written(code: Code, rows: Rows) -> Mask:
    return np.asarray(code.room[rows] >= SITE_BYTES)


def _follows(code: Code, rows: Rows, trait: Trait) -> Mask:
    before = np.maximum(rows - 1, 0)
    adjacent = (code.addr[before] + code.length[before] == code.addr[rows]) & (rows > 0)
    return np.asarray(adjacent & ((code.trait[before] & trait) != 0))


def _calls_behind_itself(code: Code, rows: Rows) -> Mask:
    """Calls that only fill the return predictor: without a real call the mitigation is gone."""
    end = code.addr[rows] + code.length[rows]
    target = code.target[rows]
    near = (target >= end) & (target < end + np.uint64(_FILL_BYTES))
    return np.asarray((code.flow[rows] == Flow.CALL) & near)


def _part_has(code: Code, rows: Rows, trait: Trait) -> Mask:
    """Whether any instruction of the same part has the trait: gs may be foreign all through."""
    marked = np.zeros(len(code.parts), bool)
    np.logical_or.at(marked, code.part, (code.trait & trait) != 0)
    return np.asarray(marked[code.part[rows]])


def _fits_nop5(code: Code, rows: Rows, sites: Sites) -> Mask:
    """The ftrace nop of a function that ftrace does not use at the moment."""
    nop = (code.trait[rows] & Trait.NOP) != 0
    five = code.length[rows] == SITE_BYTES
    return np.asarray(nop & five & contains(sites.ftrace, code.addr[rows]))


def _fits_jmp32(code: Code, rows: Rows, sites: Sites) -> Mask:
    """One instruction of five bytes, or a shorter end of flow with int3 filler behind it.

    Only `call rel32` and calls of a thunk can be displaced without a trampoline address on
    the stack; other far or memory calls cannot.
    """
    del sites
    flow, length = code.flow[rows], code.length[rows]
    ends = np.isin(flow, (Flow.RETURN, Flow.JUMP))
    long_enough = (length >= SITE_BYTES) | (ends & (code.room[rows] >= SITE_BYTES))
    movable = ~np.isin(flow, (Flow.INDIRECT_CALL, Flow.LEAVE, Flow.TRAP, Flow.INVALID))
    return np.asarray(long_enough & movable)


def _fits_int3(code: Code, rows: Rows, sites: Sites) -> Mask:
    """Any instruction but those that leave for good, and ftrace's own sites."""
    flow = code.flow[rows]
    leaves = np.isin(flow, (Flow.LEAVE, Flow.INVALID)) | ((code.trait[rows] & Trait.INT3) != 0)
    return np.asarray(~leaves & ~contains(sites.ftrace, code.addr[rows]))


_FITS: dict[Tactic, Callable[[Code, Rows, Sites], Mask]] = {
    Tactic.NOP5: _fits_nop5,
    Tactic.JMP32: _fits_jmp32,
    Tactic.INT3: _fits_int3,
}

_DETAILS = {
    Reason.DENYLIST: "the kernel allows no probe here",
    Reason.NOINSTR: "runs where per-CPU data or the stack may not be usable",
    Reason.JUMP_LABEL: "the kernel rewrites this instruction when a static key flips",
    Reason.STATIC_CALL: "the kernel rewrites this instruction when a static call changes",
    Reason.LOCK_PREFIX: "the kernel may rewrite the lock prefix when CPUs come and go",
    Reason.RETPOLINE_SITE: "this kernel counts calls, a displaced one would be missed",
    Reason.EXCEPTION_ENTRY: "a fault here is fixed up by its address",
    Reason.BUG_ENTRY: "a warning or bug is reported by this address",
    Reason.STI_SHADOW: "interrupts stay off for exactly this instruction",
    Reason.SWAPGS: "this function changes the gs base, which the counter needs",
    Reason.BUSY_FTRACE: "ftrace uses this site",
    Reason.BUSY_KPROBE: "a kprobe is armed here",
    Reason.BUSY_PLAN: "already changed by kernweave",
    Reason.NOT_BOUNDARY: "not a decodable instruction",
}


def explain(code: Code, row: int, reason: Reason) -> str:
    """The reason in one line, with numbers where there are any."""
    if reason is Reason.TOO_SHORT:
        if code.length[row] >= SITE_BYTES:
            return "no tactic can displace this kind of instruction"
        return f"site needs {SITE_BYTES} bytes, the instruction has {code.length[row]}"
    return _DETAILS[reason]
