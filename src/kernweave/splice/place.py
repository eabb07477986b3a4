# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tactic fits each instruction, or the reason why none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.errors import Reason
from kernweave.image.sites import Sites, contains
from kernweave.model.plan import Tactic
from kernweave.splice.board import Boards, find_boards, no_boards
from kernweave.splice.window import (
    SITE_BYTES,
    Mask,
    Rows,
    Windows,
    cover,
    cover_short,
    find_runs,
)
from kernweave.x86.decode import Flow, Trait
from kernweave.x86.relocate import can_relocate

_FILL_BYTES = 16
_LFENCE = bytes.fromhex("0faee8")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the kernel at hand allows.

    Attributes:
        locks_live: lock prefixes may still be patched (CPUs come and go).
        calls_counted: `push; jmp` must not stand for a call (call-depth tracking).
        translates: the kernel's searches by address find the native one for that of a copy;
            zeropads stay at home even so.
        tactics: tactics to try, in order.
    """

    locks_live: bool = False
    calls_counted: bool = False
    translates: bool = False
    tactics: tuple[Tactic, ...] = tuple(Tactic)


@dataclass(frozen=True)
class Placement:
    """The verdict on each row asked for; tactic or reason is None.

    Attributes:
        rows: int64[m], rows of the code table.
        tactic: object[m], a `Tactic` each.
        reason: object[m], a `Reason` each.
        boards: the windows that displace them.
    """

    rows: Rows
    tactic: npt.NDArray[np.object_]
    reason: npt.NDArray[np.object_]
    boards: Boards


def place(code: Code, rows: Rows, sites: Sites, rules: Rules) -> Placement:
    """Choose a tactic for the instructions in `rows`, all at once.

    Args:
        code: the functions.
        rows: int64[m], ascending.
        sites: the kernel's tables.
        rules: what the kernel allows.
    """
    reasons = np.full(len(rows), None, object)
    one_trap_more = _is_trapped(code, rows, sites) & (code.room[rows] < SITE_BYTES)
    for reason, hit in _refusals(code, rows, sites, rules):
        if reason in _IN_USE:
            hit &= ~one_trap_more
        reasons[hit & (reasons == None)] = reason  # noqa: E711  (elementwise)
    tactics = np.full(len(rows), None, object)
    boards = no_boards(Windows(rows[:0], rows[:0]))
    wanted = rules.tactics
    jumps = jumps_in(wanted)
    left = reasons == None  # noqa: E711
    if Tactic.NOP5 in wanted:
        tactics[left & _is_nop5(code, rows, sites)] = Tactic.NOP5
        left &= tactics == None  # noqa: E711
    if jumps and left.any():
        boards = _displace(code, rows[left], sites, rules, jumps)
        tactics[left] = _tactics_of(boards, rows[left], jumps)
        left &= tactics == None  # noqa: E711
    if Tactic.INT3 in wanted:
        tactics[left & _may_trap(code, rows, sites)] = Tactic.INT3
        left &= tactics == None  # noqa: E711
    reasons[left] = Reason.TOO_SHORT
    for reason, hit in [
        *_by_address(code, rows, sites),
        *(one for one in _refusals(code, rows, sites, rules) if one[0] in _IN_USE),
    ]:
        reasons[left & hit] = reason
    return Placement(rows, tactics, reasons, boards)


#: by a kprobe of somebody else, or by kernweave itself
_IN_USE = (Reason.BUSY_KPROBE, Reason.BUSY_PLAN)
_JUMPS = (Tactic.JMP32, Tactic.GROUP, Tactic.SPRINGBOARD)


def jumps_in(tactics: tuple[Tactic, ...]) -> list[Tactic]:
    """Tactics that displace instructions, as far as they are tried before a trap."""
    end = tactics.index(Tactic.INT3) if Tactic.INT3 in tactics else len(tactics)
    return [one for one in tactics[:end] if one in _JUMPS]


def _displace(
    code: Code, rows: Rows, sites: Sites, rules: Rules, jumps: Sequence[Tactic]
) -> Boards:
    """The windows and springboards for some rows."""
    grouped = Tactic.GROUP in jumps
    runs = find_runs(code, movable(code, sites, rules), sites, grouped)
    windows = cover(runs, rows)
    if Tactic.SPRINGBOARD not in jumps:
        return no_boards(windows)
    return find_boards(code, runs, windows, cover_short(runs, rows), grouped)


def _tactics_of(boards: Boards, rows: Rows, jumps: Sequence[Tactic]) -> npt.NDArray[np.object_]:
    """object[m]: the tactic of each row, None where it is not displaced."""
    found = np.full(len(rows), None, object)
    window = boards.windows.of(rows)
    single = np.append(boards.windows.end - boards.windows.first == 1, False)
    found[window >= 0] = Tactic.GROUP
    if Tactic.JMP32 in jumps:
        found[(window >= 0) & single[window]] = Tactic.JMP32
    found[boards.shorts.of(rows) >= 0] = Tactic.SPRINGBOARD
    return found


def movable(code: Code, sites: Sites, rules: Rules) -> Mask:
    """bool[n]: instructions that can run somewhere else, whoever asks.

    Only `call rel32` and calls through a register or memory can be displaced without the
    trampoline's address on the stack; far calls cannot, and what means its own address, as a trap
    does unless it is translated. endbr64 stays, as indirect calls must find it.
    """
    rows = np.arange(len(code.addr))
    known = contains(sites.bugs, code.addr) & rules.translates
    fixed = (code.flow == Flow.INVALID) | ((code.flow == Flow.TRAP) & ~known)
    fixed |= ((code.trait & Trait.NEAR) != 0) | code.in_force
    fixed |= contains(sites.ftrace, code.addr) | _behind_lfence(code)
    calls = (code.flow == Flow.INDIRECT_CALL) | ((code.flow == Flow.CALL) & (code.target == 0))
    for row in np.flatnonzero(calls).tolist():
        fixed[row] |= not can_relocate(code.raw(row))
    for reason, hit in _refusals(code, rows, sites, rules):
        if reason is not Reason.STI_SHADOW:  # it moves with the instruction before
            fixed |= hit
    return np.asarray(~fixed)


def _behind_lfence(code: Code) -> Mask:
    """Indirect calls and jumps that a fence protects: what is pushed would come between."""
    found = np.zeros(len(code.addr), bool)
    indirect = np.isin(code.flow, (Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP))
    for row in np.flatnonzero(indirect[1:] & (code.length[:-1] == len(_LFENCE))).tolist():
        found[row + 1] = code.raw(row) == _LFENCE
    return found


def _refusals(code: Code, rows: Rows, sites: Sites, rules: Rules) -> list[tuple[Reason, Mask]]:
    """(reason, bool[m]) in order of precedence."""
    addr, trait, flow = code.addr[rows], code.trait[rows], code.flow[rows]
    ends = addr + np.maximum(code.length[rows], 1)
    found = [(ranges.reason, ranges.overlap(addr, ends)) for ranges in sites.ranges]
    found += [
        (Reason.BUSY_FTRACE, contains(sites.ftrace_busy, addr)),
        (Reason.JUMP_LABEL, contains(sites.jump_labels, addr)),
        (Reason.STATIC_CALL, contains(sites.static_calls, addr)),
        (Reason.EXCEPTION_ENTRY, contains(sites.zeropads, addr)),
        *([] if rules.translates else _by_address(code, rows, sites)),
        (Reason.STI_SHADOW, _follows(code, rows, Trait.SHADOW)),
        (Reason.SWAPGS, _part_has(code, rows, Trait.SWAPGS)),
        (Reason.DENYLIST, _calls_behind_itself(code, rows)),
        (Reason.NOT_BOUNDARY, (flow == Flow.INVALID) | ((trait & Trait.INT3) != 0)),
    ]
    if rules.locks_live:
        found.append((Reason.LOCK_PREFIX, (trait & Trait.LOCK) != 0))
    if rules.calls_counted:
        found.append((Reason.RETPOLINE_SITE, np.isin(flow, (Flow.CALL, Flow.INDIRECT_CALL))))
    return found


def _by_address(code: Code, rows: Rows, sites: Sites) -> list[tuple[Reason, Mask]]:
    """What the kernel looks up by its address when it faults or traps."""
    return [
        (Reason.EXCEPTION_ENTRY, contains(sites.exceptions, code.addr[rows])),
        (Reason.BUG_ENTRY, contains(sites.bugs, code.addr[rows])),
    ]


def is_searched(code: Code, sites: Sites) -> Mask:
    """bool[n]: the same of all instructions, whichever the table."""
    return contains(sites.exceptions, code.addr) | contains(sites.bugs, code.addr)


def _is_trapped(code: Code, rows: Rows, sites: Sites) -> Mask:
    """What only kprobes are on."""
    addr = code.addr[rows]
    ends = addr + np.maximum(code.length[rows], 1)
    found = {True: np.zeros(len(rows), bool), False: np.zeros(len(rows), bool)}
    for ranges in sites.ranges:
        if ranges.reason in _IN_USE:
            found[ranges.traps] |= ranges.overlap(addr, ends)
    return found[True] & ~found[False]


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


def _is_nop5(code: Code, rows: Rows, sites: Sites) -> Mask:
    """The ftrace nop of a function that ftrace does not use at the moment."""
    nop = (code.trait[rows] & Trait.NOP) != 0
    five = code.length[rows] == SITE_BYTES
    return np.asarray(nop & five & contains(sites.ftrace, code.addr[rows]))


def _may_trap(code: Code, rows: Rows, sites: Sites) -> Mask:
    """Any instruction but those that leave for good, and ftrace's own sites.

    Nor what keeps interrupts off behind it: after a trap it does so no longer. Nor endbr64: the
    kernel puts such a trap behind it, where ftrace has its site. Nor what the kernel looks up by
    its address: a kprobe runs it elsewhere, and again after a fault.
    """
    leaves = np.isin(code.flow[rows], (Flow.LEAVE, Flow.INVALID))
    leaves |= (code.trait[rows] & (Trait.SHADOW | Trait.ENDBR)) != 0
    leaves |= is_searched(code, sites)[rows]
    return np.asarray(~leaves & ~contains(sites.ftrace, code.addr[rows]))


_DETAILS = {
    Reason.DENYLIST: "the kernel allows no probe here",
    Reason.NOINSTR: "runs where per-CPU data or the stack may not be usable",
    Reason.JUMP_LABEL: "the kernel rewrites this instruction when a static key flips",
    Reason.STATIC_CALL: "the kernel rewrites this instruction when a static call changes",
    Reason.LOCK_PREFIX: "the kernel may rewrite the lock prefix when CPUs come and go",
    Reason.RETPOLINE_SITE: "this kernel counts calls, a displaced one would be missed",
    Reason.EXCEPTION_ENTRY: "a fault here is fixed up by its address, and it cannot be displaced",
    Reason.BUG_ENTRY: "a warning is reported by this address, and no jump is possible",
    Reason.STI_SHADOW: "interrupts stay off for exactly this instruction",
    Reason.SWAPGS: "this function changes the gs base, which the counter needs",
    Reason.BUSY_FTRACE: "ftrace uses this site",
    Reason.BUSY_KPROBE: "a kprobe is armed here",
    Reason.BUSY_PLAN: "already changed by kernweave",
    Reason.NOT_BOUNDARY: "not a decodable instruction",
    Reason.EDGE: "no instruction is run on this edge alone: it is counted in a clone only",
}


def explain(code: Code, row: int, reason: Reason) -> str:
    """The reason in one line, with numbers where there are any."""
    if reason is Reason.TOO_SHORT:
        if code.length[row] >= SITE_BYTES:
            return "no tactic can displace this kind of instruction"
        return f"site needs {SITE_BYTES} bytes, the instruction has {code.length[row]}"
    return _DETAILS[reason]
