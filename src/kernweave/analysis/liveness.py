# SPDX-License-Identifier: GPL-2.0-or-later
"""Which registers and flags are live at each instruction, inside one function at a time.

Only what is certain is used:

- At an ftrace site the kernel itself may call a C function that keeps every argument but
  neither r10, r11 nor the status flags (ftrace_caller, arch/x86/kernel/ftrace_64.S).  So these
  are dead there, and before any direct call or jump to such a site.
- A function with an ftrace site was compiled with profiling on, where gcc knows no register use
  beyond the calling convention (-fipa-ra is off); function-graph tracing relies on the same.  So
  at its `ret` only rax, rdx and the callee-saved registers are live.
- gcc takes the status flags as lost by every call and every asm statement.
- Everything else - calls to assembly, indirect calls, jumps to unknown places, functions
  without an ftrace site - is taken to read every register and to overwrite none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.image.sites import Sites, contains
from kernweave.x86.decode import ALL_MASK, FLAGS_MASK, REG_NAMES, REGS_MASK, Flow, Trait

U32 = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.int64]


def _mask(*names: str) -> int:
    return sum(1 << REG_NAMES.index(name) for name in names)


_ARGUMENTS = _mask("rax", "rdi", "rsi", "rdx", "rcx", "r8", "r9", "rsp")
_KEPT = _mask("rbx", "rbp", "rsp", "r12", "r13", "r14", "r15")
_LOST_BY_CALL = REGS_MASK & ~_KEPT
_LOST_AT_ENTRY = _mask("r10", "r11") | FLAGS_MASK
_RESULTS = _mask("rax", "rdx")


def live_before(code: Code, sites: Sites) -> U32:
    """uint32[n]: mask of what may still be read, before each instruction of `code`."""
    if not len(code.addr):
        return np.zeros(0, np.uint32)
    reads, writes, exits = _effects(code, sites)
    first, last = _split(code, sites)
    gen, kill = _summarise(reads, writes, first, last)
    out = _solve(code, sites, gen, kill, exits, first, last)
    return _spread(reads, writes, out, first, last)


def _effects(code: Code, sites: Sites) -> tuple[U32, U32, U32]:
    """Reads and writes of each instruction, and what is live where flow leaves the function."""
    is_c = np.array([part.is_c for part in code.parts], bool)[code.part]
    reads, writes = code.reads.copy(), code.writes.copy()
    exits = np.full(len(code.addr), ALL_MASK, np.uint32)

    call = np.isin(code.flow, (Flow.CALL, Flow.INDIRECT_CALL))
    known = contains(sites.ftrace, code.target)
    popf = np.zeros(len(code.parts), bool)
    np.logical_or.at(popf, code.part, (code.trait & Trait.POPF) != 0)
    keeps_flags = np.where(is_c & ~popf[code.part], 0, FLAGS_MASK).astype(np.uint32)

    to_known = call & known & is_c
    to_other = call & ~to_known
    reads[to_known] = _ARGUMENTS
    writes[to_known] = _LOST_BY_CALL | FLAGS_MASK
    reads[to_other] = REGS_MASK | keeps_flags[to_other]
    writes[to_other] = 0

    static = contains(sites.static_calls, code.addr)
    reads[static] = REGS_MASK | keeps_flags[static]
    writes[static] = 0
    faults = contains(sites.exceptions, code.addr)
    writes[faults] = 0

    thunk = (code.flow == Flow.JUMP) & contains(sites.return_thunks, code.target)
    ret = ((code.flow == Flow.RETURN) | thunk) & is_c
    exits[ret] = _RESULTS | _KEPT
    leaves = (code.flow == Flow.JUMP) & known & is_c
    exits[leaves] = _ARGUMENTS | _KEPT

    entry = contains(sites.ftrace, code.addr)
    writes[entry] |= _LOST_AT_ENTRY
    return reads, writes, exits


def _split(code: Code, sites: Sites) -> tuple[Rows, Rows]:
    """First and last row of each stretch: blocks, cut after faulting instructions too."""
    starts = code.leader.copy()
    starts[0] = True
    starts[1:] |= contains(sites.exceptions, code.addr)[:-1]
    first = np.flatnonzero(starts)
    return first, np.append(first[1:] - 1, len(code.addr) - 1)


def _summarise(reads: U32, writes: U32, first: Rows, last: Rows) -> tuple[U32, U32]:
    """What each stretch reads before it writes it, and what it overwrites."""
    gen = np.zeros(len(first), np.uint32)
    kill = np.zeros(len(first), np.uint32)
    size = last - first + 1
    active = np.arange(len(first))
    for back in range(int(size.max())):
        active = active[size[active] > back]
        row = last[active] - back
        gen[active] = reads[row] | (gen[active] & ~writes[row])
        kill[active] |= writes[row]
    return gen, kill


def _successors(code: Code, sites: Sites, first: Rows, last: Rows) -> tuple[Rows, Rows, Rows]:
    """Stretches that follow: fall-through, taken, and by fault or jump label; -1: none."""
    count = len(first)
    stretch_of = np.searchsorted(first, np.arange(len(code.addr)), side="right") - 1
    flow = code.flow[last]

    def stretch_at(addrs: npt.NDArray[np.uint64]) -> Rows:
        row = code.rows_at(addrs)
        return np.where(row >= 0, stretch_of[row], -1)

    after = np.minimum(last + 1, len(code.addr) - 1)
    adjacent = (code.part[after] == code.part[last]) & (after > last)
    ends = np.isin(flow, (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE, Flow.INVALID))
    labels = contains(sites.jump_labels, code.addr[last])
    falls = adjacent & (~ends | labels)
    next_stretch = np.where(falls, np.minimum(np.arange(count) + 1, count - 1), -1)

    jumps = np.isin(flow, (Flow.JUMP, Flow.BRANCH))
    taken = np.where(jumps, stretch_at(code.target[last]), -1)

    other = np.full(count, -1)
    for keys, values in ((sites.exceptions, sites.fixups), (sites.jump_labels, sites.jump_targets)):
        hit = contains(keys, code.addr[last])
        if hit.any():
            row = np.searchsorted(keys, code.addr[last[hit]])
            other[hit] = stretch_at(values[row])
    return next_stretch, taken, other


def _solve(
    code: Code, sites: Sites, gen: U32, kill: U32, exits: U32, first: Rows, last: Rows
) -> U32:
    """What is live behind each stretch: the least fixpoint, all stretches at once."""
    falls, taken, other = _successors(code, sites, first, last)
    flow = code.flow[last]
    inside = taken >= 0
    wants_fall = ~np.isin(
        flow, (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE, Flow.INVALID)
    )
    wants_taken = np.isin(flow, (Flow.JUMP, Flow.BRANCH))
    special = contains(sites.exceptions, code.addr[last]) | contains(
        sites.jump_labels, code.addr[last]
    )
    unknown = (
        (wants_fall & (falls < 0))
        | (wants_taken & ~inside)
        | (special & (other < 0))
        | (~wants_fall & ~wants_taken)
    )
    leaving = np.where(unknown, exits[last], 0).astype(np.uint32)
    leaving[(flow == Flow.BRANCH) & unknown] = ALL_MASK
    leaving[special & (other < 0)] = ALL_MASK

    live = np.zeros(len(first) + 1, np.uint32)  # the last row stays 0: no successor
    while True:
        out = leaving | live[falls] | live[taken] | live[other]
        new = gen | (out & ~kill)
        if (new == live[:-1]).all():
            return out.astype(np.uint32)
        live[:-1] = new


def _spread(reads: U32, writes: U32, out: U32, first: Rows, last: Rows) -> U32:
    """From behind each stretch to before each of its instructions."""
    before = np.zeros(len(reads), np.uint32)
    size = last - first + 1
    active = np.arange(len(first))
    live = out.copy()
    for back in range(int(size.max())):
        active = active[size[active] > back]
        row = last[active] - back
        live[active] = reads[row] | (live[active] & ~writes[row])
        before[row] = live[active]
    return before
