# SPDX-License-Identifier: GPL-2.0-or-later
"""Which registers and flags are live at each instruction, across calls.

Sound first; what is taken for granted:

- At an ftrace site the kernel itself may call a C function that keeps every argument but
  neither r10, r11 nor the status flags (ftrace_caller, arch/x86/kernel/ftrace_64.S).  So these
  are dead there, and the arguments are not: ftrace, BPF and livepatch read them.
- A function with an ftrace site was compiled with profiling on, where gcc knows no register use
  beyond the calling convention (-fipa-ra is off); function-graph tracing relies on the same.  So
  at its `ret` only rax, rdx and the callee-saved registers are live, and a call of it loses the
  others.
- gcc takes the status flags as lost by every call and every asm statement.
- A call of any other function keeps what that function does not overwrite on every path to its
  return, and reads what it may read: both follow from its code.  Calls from inline assembly rely
  on that.
- A function without an ftrace site whose callers are all known returns to these: live at its
  `ret` is what is live behind their calls.
- Everything else - indirect calls, static calls, jumps to unknown places, returns of other
  functions without an ftrace site - reads every register and overwrites none.

- But what nothing has written since a C function was entered or called is garbage by the calling
  convention (r10, r11; after a call all but the results and what is kept): no indirect call or
  jump reads it.

One equation per stretch holds two masks at once: what may be read from here on before the
function returns (low half), and what may reach the return unchanged (high half).  A callee's
entry stretch is thereby its summary.  The least solution is found for all stretches together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.convention import ARGUMENTS, KEPT, LOST_AT_ENTRY, LOST_BY_CALL, RESULTS
from kernweave.analysis.defined import solve_defined
from kernweave.analysis.flow import CALLS, Beyond, FlowGraph, build_flow
from kernweave.image.sites import Sites
from kernweave.x86.decode import ALL_MASK, REGS_MASK, Trait

I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


_RETURNS = 1 << 31  # of the high half: some path reaches the return
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFF_FFFF)
_PASS_ALL = (ALL_MASK | _RETURNS) << 32

_BEYOND = {
    Beyond.NOWHERE: 0,
    Beyond.RETURN: _PASS_ALL,
    Beyond.C_FUNCTION: ARGUMENTS | _PASS_ALL,  # less what any C function may overwrite
    Beyond.UNKNOWN: ALL_MASK | _PASS_ALL,
    Beyond.UNKNOWN_REGS: REGS_MASK | _PASS_ALL,
    Beyond.INDIRECT: REGS_MASK | _PASS_ALL,
    Beyond.NEUTRAL: _PASS_ALL,
}


class Closed(IntEnum):
    """Who calls a part."""

    OPEN = 0  # nobody knows
    INSIDE = 1  # only the code at hand
    CONVENTION = 2  # the code at hand, and others by the calling convention


@dataclass(frozen=True)
class Liveness:
    """What may still be read, for all of `code`.

    Attributes:
        code: the instructions.
        sites: the kernel's tables that were used.
        graph: their stretches.
        reads: uint32[n], read by each instruction, calls of known functions apart.
        writes: uint32[n], overwritten by each whatever happens.
        after: uint32[s], live behind each stretch, but before what its call overwrites or keeps.
        at: uint32[s], live before each stretch.
        holds: uint32[s], what may hold a value behind each stretch, before its call.
        returns: bool[s], whether control that arrives at a stretch may reach a return.
    """

    code: Code
    sites: Sites
    graph: FlowGraph
    reads: U32
    writes: U32
    after: U32
    at: U32
    holds: U32
    returns: Mask

    def before(self, rows: Rows) -> U32:
        """uint32[m]: mask of what is live before each of these instructions."""
        stretch = self.graph.stretch_of(rows)
        last = self.graph.last[stretch]
        return walk_back((self.reads, self.writes), self.after[stretch], last, rows)


def walk_back(effects: tuple[U32, U32], after: U32, last: Rows, rows: Rows) -> U32:
    """What is live before instructions, from what is live behind a later one.

    Args:
        effects: reads and writes of all instructions.
        after: uint32[m], live behind the later ones.
        last: int64[m], rows of the later ones; control goes straight to them.
        rows: int64[m], rows asked for.
    """
    reads, writes = effects
    live, row = after.copy(), last.copy()
    active = np.arange(len(rows))
    while len(active):
        here = row[active]
        live[active] = reads[here] | (live[active] & ~writes[here])
        active = active[here > rows[active]]
        row[active] -= 1
    return live


def live_before(code: Code, sites: Sites) -> U32:
    """uint32[n]: mask of what may still be read, before each instruction of `code`."""
    return solve_liveness(code, sites).before(np.arange(len(code.addr)))


def solve_liveness(
    code: Code, sites: Sites, closed: npt.NDArray[np.uint8] | None = None
) -> Liveness:
    """Find what is live everywhere in `code`; code outside it is taken by the rules above.

    Args:
        code: the instructions.
        sites: the kernel's tables.
        closed: uint8[parts], `Closed`; None: all parts are open.
    """
    graph = build_flow(code, sites)
    reads, writes = effects(code, sites)
    to_c = _calls_c(code, sites, graph)
    holds = solve_defined(code, sites, graph, to_c)
    system = System(graph, *_summarise(reads, writes, graph), to_c, _beyond(graph, holds))
    state = _solve(system)
    count = len(graph.first)
    every = np.arange(count)
    part = code.part[graph.first]
    exits = _at_returns(code, system, state, closed)[part] if count else np.zeros(0, np.uint32)
    after = _flatten(_out(state, system, every), exits)
    returns = (state[:count] >> np.uint64(63)).astype(bool)
    at = _flatten(state[:count], exits)
    return Liveness(code, sites, graph, reads, writes, after, at, holds, returns)


def _flatten(both: U64, exits: U32) -> U32:
    """What is live, given what is live at the return of each stretch's part."""
    return np.asarray(both.astype(np.uint32) | ((both >> _HALF).astype(np.uint32) & exits))


def _at_returns(
    code: Code, system: System, state: U64, closed: npt.NDArray[np.uint8] | None
) -> U32:
    """uint32[parts]: what is live where each part returns.

    By the calling convention for functions with an ftrace site.  For others everything, unless
    all callers are known: then what is live behind their calls, and what the convention says.
    """
    graph = system.graph
    is_c = np.array([part.is_c for part in code.parts], bool)
    exits = np.where(is_c, RESULTS | KEPT, ALL_MASK).astype(np.uint32)
    if closed is None:
        return exits
    part = code.part[graph.first].astype(np.int64)
    known = (closed != Closed.OPEN) & ~is_c
    calls = np.flatnonzero(graph.callee >= 0)
    calls = calls[known[part[graph.callee[calls]]]]
    links = [(part[calls], part[graph.callee[calls]])]
    for column in (graph.falls, graph.taken, graph.other):
        rows = np.flatnonzero(column >= 0)
        source, target = part[rows], part[column[rows]]
        crosses = (source != target) & known[target]
        links.append((source[crosses], target[crosses]))
    entered = np.zeros(len(exits), bool)
    entered[np.concatenate([target for _, target in links])] = True
    entered |= closed == Closed.CONVENTION
    exits[known & entered] = RESULTS | KEPT
    behind = _behind(state, system, calls)
    (caller, callee), *jumps = links
    while True:
        before = exits.copy()
        np.bitwise_or.at(exits, callee, _flatten(behind, exits[caller]))
        for source, target in jumps:
            np.bitwise_or.at(exits, target, exits[source])
        if (exits == before).all():
            return exits


@dataclass(frozen=True)
class System:
    """The equations, one per stretch.

    Attributes:
        graph: what follows what.
        gen: uint64[s], read before it is overwritten; the high half is 0.
        keep: uint64[s], not overwritten, in both halves.
        to_c: bool[s], whether it ends in a call from C of a C function.
        beyond: uint64[s], what an indirect call or jump may read here; high half all ones.
    """

    graph: FlowGraph
    gen: U64
    keep: U64
    to_c: Mask
    beyond: U64

    @cached_property
    def call_keep(self) -> U64:
        """uint64[s]: what the call does not lose by the calling convention, in both halves."""
        keep = _both(np.uint64(~LOST_BY_CALL & 0xFFFF_FFFF))
        return np.where(self.to_c, keep, ~np.uint64(0))


def effects(code: Code, sites: Sites) -> tuple[U32, U32]:
    """Reads and writes of each instruction; what a callee does is left to its stretch."""
    reads, writes = code.reads.copy(), code.writes.copy()
    writes[np.isin(code.flow, CALLS)] = 0
    writes[code.index.mark(sites.exceptions, sites.static_calls)] = 0
    entries = code.index.mark(sites.ftrace)
    reads[entries] |= ARGUMENTS
    writes[entries] |= LOST_AT_ENTRY
    return reads, writes


def _calls_c(code: Code, sites: Sites, graph: FlowGraph) -> Mask:
    """bool[s]: which stretches end in a call from C of a function with an ftrace site."""
    ftraced = graph.callee == Beyond.C_FUNCTION
    inside = graph.callee >= 0
    entries = code.index.mark(sites.ftrace)
    ftraced[inside] = entries[_entry_rows(code, graph.first[graph.callee[inside]])]
    return np.asarray(ftraced & code.is_c[graph.last])


def _beyond(graph: FlowGraph, holds: U32) -> U64:
    """What an indirect call or jump may read: what holds a value."""
    indirect = (graph.callee == Beyond.INDIRECT) | (graph.taken == Beyond.INDIRECT)
    return np.where(indirect, holds | ~_LOW, ~np.uint64(0))


def _entry_rows(code: Code, rows: Rows) -> Rows:
    """Behind the endbr64 where a call arrives, if there is one."""
    behind = np.minimum(rows + 1, len(code.addr) - 1)
    return np.where((code.trait[rows] & Trait.ENDBR) != 0, behind, rows)


def _both(mask: U64 | np.uint64) -> U64:
    """A mask in both halves."""
    return np.asarray(mask | (mask << _HALF), np.uint64)


def _summarise(reads: U32, writes: U32, graph: FlowGraph) -> tuple[U64, U64]:
    """What each stretch reads before it writes it, and what it leaves alone in both halves."""
    first, last = graph.first, graph.last
    gen = np.zeros(len(first), np.uint32)
    kill = np.zeros(len(first), np.uint32)
    size = last - first + 1
    active = np.arange(len(first))
    back = 0
    while len(active):
        row = last[active] - back
        gen[active] = reads[row] | (gen[active] & ~writes[row])
        kill[active] |= writes[row]
        back += 1
        active = active[size[active] > back]
    return gen.astype(np.uint64), ~_both(kill.astype(np.uint64))


def _initial(count: int) -> U64:
    """Zero for every stretch; behind them the places beyond, found by negative numbers."""
    state = np.zeros(count + len(_BEYOND), np.uint64)
    for place, value in _BEYOND.items():
        state[place] = value
    return state


def _out(state: U64, system: System, rows: Rows) -> U64:
    """What holds behind each of these stretches, before their calls."""
    summary = state[system.graph.callee[rows]] & system.beyond[rows]
    behind = _behind(state, system, rows)
    return (summary & _LOW) | (behind & _both(summary >> _HALF) & system.call_keep[rows])


def _behind(state: U64, system: System, rows: Rows) -> U64:
    """What holds behind each of these stretches, after their calls."""
    graph = system.graph
    found = state[graph.falls[rows]] | (state[graph.taken[rows]] & system.beyond[rows])
    return np.asarray(found | state[graph.other[rows]])


def _solve(system: System) -> U64:
    """The least solution: only stretches are looked at whose successors changed."""
    count = len(system.gen)
    state = _initial(count)
    sources, bounds = _predecessors(system.graph)
    active: Rows = np.arange(count)
    marked = np.zeros(count, bool)
    while len(active):
        new = system.gen[active] | (_out(state, system, active) & system.keep[active])
        changed = active[new != state[active]]
        state[active] = new
        marked[_gather(sources, bounds, changed)] = True
        active = np.flatnonzero(marked)
        marked[active] = False
    return state


def _predecessors(graph: FlowGraph) -> tuple[I32, Rows]:
    """Stretches that depend on each stretch, callers included: rows, and where each begins."""
    count = len(graph.first)
    columns = (graph.falls, graph.taken, graph.other, graph.callee)
    targets = np.concatenate(columns)
    sources = np.tile(np.arange(count, dtype=np.int32), len(columns))
    real = targets >= 0
    targets, sources = targets[real], sources[real]
    order = np.argsort(targets, kind="stable")
    bounds = np.append(0, np.cumsum(np.bincount(targets, minlength=count)))
    return sources[order], bounds


def _gather(values: I32, bounds: Rows, rows: Rows) -> I32:
    """All values of some rows of a CSR table."""
    start, size = bounds[rows], bounds[rows + 1] - bounds[rows]
    ends = np.cumsum(size)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(values[np.arange(total) + np.repeat(start - (ends - size), size)])
