# SPDX-License-Identifier: GPL-2.0-or-later
"""From resolved points to counters in the kernel: place, lay out, commit."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.liveness import live_before
from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, CommitError, Driver
from kernweave.driver.uapi import Fact
from kernweave.errors import KernweaveError, Reason, RefusedError
from kernweave.image.sites import Sites
from kernweave.model.plan import Plan, Point, Refused, Tactic
from kernweave.session.attachment import Placed
from kernweave.session.resolve import Resolved
from kernweave.splice.layout import COUNTER_BYTES, Site, add_traps, bind, draft
from kernweave.splice.place import SITE_BYTES, Placement, Rules, place
from kernweave.x86.decode import ALL_MASK

MAX_TRAPS = 4000
_TRAPS_AT_ONCE = 64
_PER_CHUNK = uapi.MAX_PERCPU // COUNTER_BYTES

#: what to overwrite before a counter, from its address and the mask of what is dead there
Clobber = Callable[[int, int], int]
#: changes a plan before it is committed: tests seed faults with it
Amend = Callable[[Plan], Plan]


@dataclass(frozen=True, slots=True)
class Choice:
    """The verdict on a request: what to change, and which points each site serves.

    Attributes:
        points: points that can be placed.
        sites: what to change: jumps ascending by address, then traps ascending.
        site: int64[m], row in `sites` of each point.
        refused: the others.
    """

    points: tuple[Point, ...]
    sites: tuple[Site, ...]
    site: npt.NDArray[np.int64]
    refused: tuple[Refused, ...]


def choose(
    resolved: Resolved,
    sites: Sites,
    rules: Rules,
    live_of: Callable[[Code], npt.NDArray[np.uint32]],
) -> Choice:
    """Place what can be placed, refuse the rest with a reason each.

    Args:
        resolved: what was asked for.
        sites: the kernel's tables.
        rules: what the kernel allows.
        live_of: finds what is live before each instruction of some functions.
    """
    code = resolved.code
    rows, back = np.unique(resolved.rows, return_inverse=True)
    placement = place(code, rows, sites, rules)
    # a function's ftrace site tells by itself what is dead there, and a trap needs nothing dead
    alone = Tactic.JMP32 not in placement.tactic
    live = live_before(code, sites) if alone else live_of(code)
    refused = list(resolved.refused)
    too_many = _traps_beyond(placement)
    kept: list[int] = []
    for i, row in enumerate(back.tolist()):
        reason, detail = placement.reason[row], placement.detail[row]
        if row in too_many:
            reason, detail = Reason.TOO_SHORT, f"only {MAX_TRAPS:,} points may trap at once"
        if reason is None:
            kept.append(i)
        else:
            refused.append(Refused(resolved.points[i].text, reason, detail))
    used = np.unique(back[kept]) if kept else np.zeros(0, np.int64)
    made = [
        _site(code, int(rows[row]), placement.tactic[row], int(live[rows[row]]))
        for row in used.tolist()
    ]
    order = np.lexsort(
        ([site.addr for site in made], [site.tactic is Tactic.INT3 for site in made])
    )
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    site = rank[np.searchsorted(used, back[kept])] if kept else np.zeros(0, np.int64)
    return Choice(
        tuple(resolved.points[i] for i in kept),
        tuple(made[i] for i in order.tolist()),
        site,
        tuple(refused),
    )


def _traps_beyond(placement: Placement) -> set[int]:
    """Rows that would trap beyond what the kernel bears: it looks kprobes up in 64 lists."""
    traps = [i for i, tactic in enumerate(placement.tactic) if tactic is Tactic.INT3]
    return set(traps[MAX_TRAPS:])


def _site(code: Code, row: int, tactic: Tactic | None, live: int) -> Site:
    assert tactic is not None
    part = code.parts[int(code.part[row])]
    at = int(code.addr[row]) - part.start
    length = int(code.length[row])
    text = part.code[at : at + max(length, SITE_BYTES)]
    return Site(int(code.addr[row]), text, length, tactic, ALL_MASK & ~live)


def clobbering(choice: Choice, clobber: Clobber) -> Choice:
    """The same choice with code before each counter that jumps, which overwrites registers."""
    sites = tuple(
        site if site.tactic is Tactic.INT3 else replace(site, clobber=clobber(site.addr, site.dead))
        for site in choice.sites
    )
    return replace(choice, sites=sites)


def rules_for(flags: Fact, tactics: Sequence[Tactic]) -> Rules:
    """What this kernel allows, as its driver says."""
    return Rules(
        locks_live=bool(flags & Fact.LOCKS_LIVE),
        calls_counted=bool(flags & Fact.CALL_DEPTH),
        tactics=tuple(tactics),
    )


def check_refusals(choice: Choice, resolved: Resolved, partial: bool) -> None:
    """Explicitly named points are all or nothing unless `partial`; nothing at all is an error.

    Raises:
        RefusedError: with every refused point.
    """
    explicit = {
        point.text for point, named in zip(resolved.points, resolved.explicit, strict=True) if named
    }
    strict = resolved.refused_explicit > 0 or any(one.point in explicit for one in choice.refused)
    if choice.points and (partial or not strict):
        return
    triples = [(one.point, one.reason, one.detail) for one in choice.refused]
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
    wanted = len(triples) + len(choice.points)
    raise RefusedError(
        f"cannot place {len(triples)} of {wanted} points",
        triples,
        notes=notes,
        help="add --partial to count the others" if choice.points else None,
    )


_HELP = {
    Reason.NO_SUCH_NAME: "check the spelling; globs are allowed",
    Reason.AMBIGUOUS: "choose one by its number",
    Reason.NOT_BOUNDARY: "choose one of the boundaries",
    Reason.TOO_SHORT: "probe a neighbouring instruction of at least 5 bytes",
    Reason.BUSY_FTRACE: "end the other tracer, or probe an instruction behind the entry",
    Reason.BUSY_KPROBE: "remove the kprobe",
}


def commit(driver: Driver, choice: Choice, amend: Amend | None = None) -> Placed:
    """Write the plan into the kernel; on failure nothing is left behind.

    Raises:
        RefusedError: text changed since it was read.
        DriverError: no memory, or the driver refuses.
    """
    jumps = [site for site in choice.sites if site.tactic is not Tactic.INT3]
    traps = choice.sites[len(jumps) :]
    layout = draft(jumps)
    area = driver.area(max(layout.size, 1))
    trap_sets: list[int] = []
    try:
        chunks = _alloc_counters(driver, area, len(choice.sites))
        offsets = np.concatenate(
            [chunk.offset + np.arange(0, size, COUNTER_BYTES) for chunk, size in chunks]
        ).astype(np.uint64)
        plan = add_traps(bind(layout, area.addr, offsets[: len(jumps)]), traps)
        if amend:
            plan = amend(plan)
        failed = _arm(driver, area, plan, chunks, trap_sets)
        txn = _write(driver, area, plan) if jumps else None
    except CommitError as error:
        _drop(driver, area, trap_sets)
        raise _explain(error, choice) from error
    except BaseException:
        _drop(driver, area, trap_sets)
        raise
    placed = Placed(choice.points, choice.site, plan, area, tuple(chunks), txn, tuple(trap_sets))
    return _without(placed, failed)


def _write(driver: Driver, area: Area, plan: Plan) -> int:
    driver.write(area, 0, plan.code)
    driver.seal(area)
    return driver.commit(area, make_pokes(plan))


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


def make_pokes(plan: Plan) -> npt.NDArray[np.void]:
    """The plan's jumps as rows of the driver's interface."""
    rests = plan.rest[: plan.jumps]
    pokes = np.zeros(plan.jumps, uapi.POKE)
    pokes["addr"] = plan.addr[: plan.jumps]
    pokes["len"] = [SITE_BYTES + len(rest) for rest in rests]
    for field, head, filler in (("old", plan.old, None), ("new_", plan.new, b"\xcc")):
        pokes[field][:, :SITE_BYTES] = head[: plan.jumps]
        room = uapi.POKE_BYTES - SITE_BYTES
        tails = [(filler * len(rest) if filler else rest).ljust(room, b"\0") for rest in rests]
        pokes[field][:, SITE_BYTES:] = np.frombuffer(b"".join(tails), np.uint8).reshape(-1, room)
    return pokes


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


def _explain(error: CommitError, choice: Choice) -> Exception:
    if error.errno != errno.ESTALE:
        return error
    names = [
        p.text for p, row in zip(choice.points, choice.site, strict=True) if row == error.index
    ]
    where = names[0] if names else f"{choice.sites[error.index].addr:#x}"
    return RefusedError(
        f"cannot place probe at {where}: its bytes changed while it was being placed",
        [(where, Reason.BUSY_PLAN, "text changed")],
        notes=["everything was taken back"],
        help="somebody else is patching this kernel; try again",
    )
