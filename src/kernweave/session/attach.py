# SPDX-License-Identifier: GPL-2.0-or-later
"""From resolved points to counters in the kernel: place, lay out, commit."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.liveness import live_before
from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, CommitError, Driver
from kernweave.driver.uapi import Fact, PokeFlag
from kernweave.errors import KernweaveError, Reason, RefusedError
from kernweave.image.sites import Sites, contains
from kernweave.model.plan import Copies, Plan, Point, Pokes, Refused, Tactic
from kernweave.session.attachment import Placed
from kernweave.session.resolved import Resolved
from kernweave.splice.board import Boards
from kernweave.splice.layout import (
    COUNTER_BYTES,
    Displaced,
    Entries,
    Site,
    add_traps,
    bind,
    draft,
    make_entries,
)
from kernweave.splice.place import (
    Placement,
    Rules,
    explain,
    is_searched,
    jumps_in,
    place,
)
from kernweave.splice.window import SHORT_BYTES, SITE_BYTES
from kernweave.x86.decode import ALL_MASK

MAX_TRAPS = 4000
_TRAPS_AT_ONCE = 64
_PER_CHUNK = uapi.MAX_PERCPU // COUNTER_BYTES

#: what to overwrite before a counter, from its address and the mask of what is dead there
Clobber = Callable[[int, int], int]
#: changes a plan before it is committed: tests seed faults with it
Amend = Callable[[Plan], Plan]


def overwrite_dead(addr: int, dead: int) -> int:
    """A `Clobber`: all that is dead, wherever that is."""
    del addr
    return dead


class Known(Protocol):
    """What the whole kernel tells of some functions."""

    def live(self, code: Code) -> npt.NDArray[np.uint32]:
        """uint32[n]: what is live before each instruction."""

    def landing(self, code: Code) -> npt.NDArray[np.bool_]:
        """bool[n]: where control may arrive otherwise than from the instruction before."""


@dataclass(frozen=True)
class Decision:
    """The verdict on a request, as columns.

    Attributes:
        resolved: what was asked for.
        code: its functions, with every landing that is known.
        alone: nothing but the functions' own ftrace sites is asked for.
        back: int64[m], row of `placement` that each point has.
        placement: of each instruction asked for, and behind them of each edge, which has none.
        beyond: bool[u], instructions that would trap, of which the kernel bears only so many.
    """

    resolved: Resolved
    code: Code
    alone: bool
    back: npt.NDArray[np.int64]
    placement: Placement
    beyond: npt.NDArray[np.bool_]

    @property
    def placed(self) -> npt.NDArray[np.bool_]:
        """bool[m]: which points can be placed."""
        free = np.array([reason is None for reason in self.placement.reason], bool)
        return np.asarray(free[self.back])

    def refused(self, i: int) -> Refused:
        """Why a point cannot be placed."""
        row = int(self.back[i])
        reason = self.placement.reason[row]
        detail = explain(self.code, int(self.placement.rows[row]), reason)
        if self.beyond[row]:
            detail = f"only {MAX_TRAPS:,} points may trap at once"
        return Refused(self.resolved.point(i).text, reason, detail)

    def all_refused(self) -> list[Refused]:
        """Everything that cannot be placed; points that do not exist first."""
        rows = np.flatnonzero(~self.placed).tolist()
        return [*self.resolved.refused, *(self.refused(i) for i in rows)]


def decide(
    resolved: Resolved,
    sites: Sites,
    rules: Rules,
    known: Known,
    can_translate: Callable[[], bool],
) -> Decision:
    """Find out what can be placed, and why the rest cannot.

    Args:
        resolved: what was asked for.
        sites: the kernel's tables.
        rules: what the kernel allows.
        known: what the whole kernel tells of some functions.
        can_translate: whether searches by address can be hooked; asked only if it matters, as the
            answer needs the whole kernel's text.
    """
    code = resolved.code
    edges = resolved.edges
    rows, number = np.unique(resolved.counted[~edges], return_inverse=True)
    back = np.empty(len(edges), np.int64)
    back[~edges], back[edges] = number, len(rows) + np.arange(edges.sum())
    # a function's ftrace site tells by itself what is dead there, and no jump leads behind it
    alone = not jumps_in(rules.tactics) or bool(contains(sites.ftrace, code.addr[rows]).all())
    if not alone:
        code = replace(code, landing=code.landing | known.landing(code))
        rules = replace(rules, translates=can_translate())
    placement = _with_edges(place(code, rows, sites, rules), resolved.rows[edges])
    beyond = np.zeros(len(placement.rows), bool)
    beyond[np.flatnonzero(placement.tactic == Tactic.INT3)[MAX_TRAPS:]] = True
    placement.reason[beyond] = Reason.TOO_SHORT
    placement.tactic[beyond] = None
    return Decision(resolved, code, alone, back, placement, beyond)


def _with_edges(placement: Placement, rows: npt.NDArray[np.int64]) -> Placement:
    """The placement with rows behind it that no tactic fits: the edges that leave them."""
    return replace(
        placement,
        rows=np.append(placement.rows, rows),
        tactic=np.append(placement.tactic, np.full(len(rows), None, object)),
        reason=np.append(placement.reason, np.full(len(rows), Reason.EDGE, object)),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """What is going to be placed, and which points each site serves.

    Attributes:
        points: points that can be placed.
        entries: nops of ftrace to change.
        sites: what else to change, ascending by address.
        traps: what is to trap, ascending by address.
        row: int64[m], row in the plan of each point: its instruction among those counted.
        refused: the others.
    """

    points: tuple[Point, ...]
    entries: Entries
    sites: tuple[Site, ...]
    traps: tuple[Site, ...]
    row: npt.NDArray[np.int64]
    refused: tuple[Refused, ...]


def choose(decision: Decision, sites: Sites, known: Known) -> Choice:
    """Make sites of what can be placed.

    Args:
        decision: the verdict.
        sites: the kernel's tables.
        known: what the whole kernel tells of some functions.
    """
    code, placement = decision.code, decision.placement
    kept = np.flatnonzero(decision.placed)
    used = np.unique(decision.back[kept])
    live = live_before(code, sites) if decision.alone else known.live(code)
    chosen = replace(placement, rows=placement.rows[used])
    made = make_sites(code, sites, live, chosen, placement.tactic[used])
    return Choice(
        tuple(decision.resolved.point(i) for i in kept.tolist()),
        made.entries,
        made.sites,
        made.traps,
        made.row[np.searchsorted(used, decision.back[kept])],
        tuple(decision.all_refused()),
    )


def make_sites(
    code: Code,
    sites: Sites,
    live: npt.NDArray[np.uint32],
    placement: Placement,
    tactic: npt.NDArray[np.object_],
) -> Made:
    """Sites of rows that are all placed.

    Args:
        code: the functions.
        sites: the kernel's tables.
        live: uint32[n], what is live before each instruction.
        placement: rows and windows; its other columns are not looked at.
        tactic: object[u], of each of the rows.
    """
    return Made(code, sites, live, placement.rows, tactic, placement.boards)


class Made:
    """Sites of rows that are placed.

    Attributes:
        entries, sites, traps: as in `Choice`.
        row: int64[u], row in the plan of each row given.
    """

    def __init__(
        self,
        code: Code,
        sites: Sites,
        live: npt.NDArray[np.uint32],
        rows: npt.NDArray[np.int64],
        tactic: npt.NDArray[np.object_],
        boards: Boards,
    ) -> None:
        self._code, self._live = code, live
        self._searched = is_searched(code, sites)
        trapped = tactic == Tactic.INT3
        nops = tactic == Tactic.NOP5
        self._counted = set(rows[~trapped & ~nops].tolist())
        self.entries = make_entries(code.addr[rows[nops]], ALL_MASK & ~live[rows[nops]])
        windows, shorts = boards.windows, boards.shorts
        single = windows.end - windows.first == 1
        of_single = Tactic.GROUP if (tactic != Tactic.JMP32).all() else Tactic.JMP32
        made = [
            self._site(first, end, of_single if one else Tactic.GROUP)
            for first, end, one in zip(
                windows.first.tolist(), windows.end.tolist(), single.tolist(), strict=True
            )
        ]
        made += [
            self._site(first, end, Tactic.SPRINGBOARD, board)
            for first, end, board in zip(
                shorts.first.tolist(), shorts.end.tolist(), boards.addr.tolist(), strict=True
            )
        ]
        traps = [self._site(row, row + 1, Tactic.INT3) for row in rows[trapped].tolist()]
        self.sites = tuple(sorted(made, key=lambda site: site.addr))
        self.traps = tuple(sorted(traps, key=lambda site: site.addr))
        order = np.lexsort((code.addr[rows], trapped))
        self.row = np.empty(len(rows), np.int64)
        self.row[order] = np.arange(len(rows))

    def _site(self, first: int, end: int, tactic: Tactic, board: int | None = None) -> Site:
        code = self._code
        addr, last = int(code.addr[first]), end - 1
        part = code.parts[int(code.part[first])]
        insns = tuple(
            Displaced(
                int(code.addr[row]),
                code.raw(row),
                row in self._counted,
                ALL_MASK & ~int(self._live[row]),
                bool(self._searched[row]),
            )
            for row in range(first, end)
        )
        size = int(code.addr[last]) + int(code.length[last]) - addr
        if tactic is not Tactic.INT3:
            size = max(size, SITE_BYTES if board is None else SHORT_BYTES)
        text = part.code[addr - part.start : addr - part.start + size]
        return Site(addr, text, insns, tactic, board)


def clobbering(choice: Choice, clobber: Clobber) -> Choice:
    """The same choice with code before each counter that jumps, which overwrites registers."""

    def changed(insn: Displaced) -> Displaced:
        return replace(insn, clobber=clobber(insn.addr, insn.dead)) if insn.counted else insn

    entries = choice.entries
    places = zip(entries.addr.tolist(), entries.dead.tolist(), strict=True)
    masks = np.array([clobber(addr, dead) for addr, dead in places], np.uint32)
    sites = tuple(
        replace(site, insns=tuple(changed(insn) for insn in site.insns)) for site in choice.sites
    )
    return replace(choice, entries=replace(entries, clobber=masks), sites=sites)


def rules_for(flags: Fact, tactics: Sequence[Tactic]) -> Rules:
    """What this kernel allows, as its driver says."""
    return Rules(
        locks_live=bool(flags & Fact.LOCKS_LIVE),
        calls_counted=bool(flags & Fact.CALL_DEPTH),
        tactics=tuple(tactics),
    )


class Verdict(Protocol):
    """What is going to be placed, however that is done."""

    @property
    def resolved(self) -> Resolved:
        """What was asked for."""

    @property
    def placed(self) -> npt.NDArray[np.bool_]:
        """bool[m]: which points can be placed."""

    def all_refused(self) -> list[Refused]:
        """Everything that cannot be placed; points that do not exist first."""


def check_refusals(decision: Verdict, partial: bool) -> None:
    """Explicitly named points are all or nothing unless `partial`; nothing at all is an error.

    Raises:
        RefusedError: with every refused point.
    """
    placed, resolved = decision.placed, decision.resolved
    strict = resolved.refused_explicit > 0 or bool((resolved.explicit & ~placed).any())
    if placed.any() and (partial or not strict):
        return
    refused = decision.all_refused()
    triples = [(one.point, one.reason, one.detail) for one in refused]
    if len(triples) == 1:
        point, reason, detail = triples[0]
        raise RefusedError(
            f"cannot place probe at {point}: {detail}",
            triples,
            notes=[f"reason: {reason}"],
            help=_HELP.get(reason),
        )
    notes = [f"{point}: {detail} ({reason})" for point, reason, detail in triples[:8]]
    if len(triples) > 8:
        notes.append(f"and {len(triples) - 8} more")
    wanted = len(triples) + int(placed.sum())
    if not wanted:
        raise RefusedError(
            "what is named has no such points", [], help="see what it has: kernweave show FUNCTION"
        )
    raise RefusedError(
        f"cannot place {len(triples)} of {wanted} points",
        triples,
        notes=notes,
        help="add --partial to count the others" if placed.any() else None,
    )


_HELP = {
    Reason.NO_SUCH_NAME: "check the spelling; globs are allowed",
    Reason.AMBIGUOUS: "choose one by its number",
    Reason.NOT_BOUNDARY: "choose one of the boundaries",
    Reason.TOO_SHORT: "probe a neighbouring instruction of at least 5 bytes",
    Reason.BUSY_FTRACE: "end the other tracer, or probe an instruction behind the entry",
    Reason.BUSY_KPROBE: "remove the kprobe",
    Reason.EDGE: "let it be woven: --engine auto or weave",
    Reason.NO_EDGE: "choose an edge of function@edges",
}


def commit(driver: Driver, choice: Choice, amend: Amend | None = None) -> Placed:
    """Write the plan into the kernel; on failure nothing is left behind.

    Raises:
        RefusedError: text changed since it was read.
        DriverError: no memory, or the driver refuses.
    """
    traps = choice.traps
    layout = draft(choice.entries, choice.sites)
    area = driver.area(max(layout.size, 1))
    trap_sets: list[int] = []
    try:
        chunks = _alloc_counters(driver, area, layout.counted + len(traps))
        offsets = np.concatenate(
            [chunk.offset + np.arange(0, size, COUNTER_BYTES) for chunk, size in chunks]
        ).astype(np.uint64)
        plan = bind(layout, area.addr, offsets[: layout.counted])
        plan = add_traps(
            plan, [site.addr for site in traps], b"".join(site.code[:1] for site in traps)
        )
        if amend:
            plan = amend(plan)
        failed = _arm(driver, area, plan, chunks, trap_sets)
        txn = _write(driver, area, plan) if plan.jumps else None
    except CommitError as error:
        _drop(driver, area, trap_sets)
        raise _explain(error, choice, plan) from error
    except BaseException:
        _drop(driver, area, trap_sets)
        raise
    placed = Placed(choice.points, choice.row, plan, area, tuple(chunks), txn, tuple(trap_sets))
    return _without(placed, failed)


def _write(driver: Driver, area: Area, plan: Plan) -> int:
    driver.write(area, 0, plan.code)
    if len(plan.copies.addr):
        driver.copies(area, make_copies(plan.copies))
    driver.seal(area)
    return driver.commit(area, make_pokes(plan.pokes))


def _arm(
    driver: Driver,
    area: Area,
    plan: Plan,
    chunks: Sequence[tuple[Chunk, int]],
    trap_sets: list[int],
) -> dict[int, int]:
    """Arm the traps, a few per request: each takes milliseconds of the guest's time.

    Args:
        driver: the session's.
        area: holds the counters.
        plan: whose last sites trap.
        chunks: the counters.
        trap_sets: receives the sets' numbers as they are armed, so that a failure can undo them.

    Returns:
        The errno of each site that the kernel refused, by its row in the plan.
    """
    failed: dict[int, int] = {}
    for first in range(plan.jumps, len(plan.addr), _TRAPS_AT_ONCE):
        rows = np.arange(first, min(first + _TRAPS_AT_ONCE, len(plan.addr)))
        traps = np.zeros(len(rows), uapi.TRAP)
        traps["addr"] = plan.addr[rows]
        traps["chunk"] = [chunks[row // _PER_CHUNK][0].index for row in rows.tolist()]
        traps["off"] = rows % _PER_CHUNK * COUNTER_BYTES
        number, status = driver.arm(area, traps)
        trap_sets.append(number)
        failed |= {int(rows[i]): -int(status[i]) for i in np.flatnonzero(status)}
    return failed


def _without(placed: Placed, failed: dict[int, int]) -> Placed:
    """Take the points out whose kprobe the kernel refused."""
    if not failed:
        return placed
    kept = [i for i, row in enumerate(placed.site.tolist()) if row not in failed]
    refused = tuple(
        Refused(
            placed.points[i].text,
            Reason.DENYLIST,
            f"the kernel refuses a kprobe here ({errno.errorcode.get(failed[row], failed[row])})",
        )
        for i, row in enumerate(placed.site.tolist())
        if row in failed
    )
    points = tuple(placed.points[i] for i in kept)
    return replace(placed, points=points, site=placed.site[kept], refused=refused)


def make_pokes(pokes: Pokes) -> npt.NDArray[np.void]:
    """What is written as rows of the driver's interface."""
    rows = np.zeros(len(pokes.addr), uapi.POKE)
    rows["addr"] = pokes.addr
    rows["len"] = [len(old) for old in pokes.old]
    flags = (
        (pokes.group, PokeFlag.GROUP),
        (pokes.host, PokeFlag.HOST),
        (pokes.keep, PokeFlag.KEEP),
        (pokes.stay, PokeFlag.STAY),
    )
    for mask, flag in flags:
        rows["flags"] |= mask * np.uint32(flag)
    for field, column in (("old", pokes.old), ("new_", pokes.new)):
        data = b"".join(one.ljust(uapi.POKE_BYTES, b"\0") for one in column)
        rows[field] = np.frombuffer(data, np.uint8).reshape(-1, uapi.POKE_BYTES)
    return rows


def make_copies(copies: Copies) -> npt.NDArray[np.void]:
    """The copies that may fault as rows of the driver's interface."""
    rows = np.zeros(len(copies.addr), uapi.COPY)
    rows["addr"], rows["native"] = copies.addr, copies.native
    return rows


def _alloc_counters(driver: Driver, area: Area, count: int) -> list[tuple[Chunk, int]]:
    sizes = [
        COUNTER_BYTES * min(_PER_CHUNK, count - first) for first in range(0, count, _PER_CHUNK)
    ]
    return [(driver.percpu(area, size), size) for size in sizes]


def _drop(driver: Driver, area: Area, trap_sets: Sequence[int]) -> None:
    """Free an area whose commit failed; tasks may have been inside.

    The session's end does the same, so a second failure must not hide the first.
    """
    with contextlib.suppress(KernweaveError):
        for number in trap_sets:
            driver.disarm(number)
        driver.quiesce()
        driver.free(area)


_CHANGED = {
    errno.ESTALE: ("its bytes changed while it was being placed", "text changed"),
    errno.EBUSY: ("somebody comes back into it from an earlier trampoline", "in flight"),
}


def _explain(error: CommitError, choice: Choice, plan: Plan) -> Exception:
    if error.errno not in _CHANGED:
        return error
    why, detail = _CHANGED[error.errno]
    rows = plan.poke[choice.row]
    names = [p.text for p, row in zip(choice.points, rows, strict=True) if row == error.index]
    where = names[0] if names else f"{int(plan.pokes.addr[error.index]):#x}"
    return RefusedError(
        f"cannot place probe at {where}: {why}",
        [(where, Reason.BUSY_PLAN, detail)],
        notes=["everything was taken back"],
        help="somebody else is patching this kernel; try again"
        if error.errno == errno.ESTALE
        else "try again when the task that sleeps in a fault has woken",
    )
