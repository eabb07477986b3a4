# SPDX-License-Identifier: GPL-2.0-or-later
"""From resolved points to counters in the kernel: place, lay out, commit."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.liveness import live_before
from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, CommitError, Driver
from kernweave.driver.uapi import Fact
from kernweave.errors import Reason, RefusedError
from kernweave.image.sites import Sites
from kernweave.model.plan import Plan, Point, Refused, Tactic
from kernweave.session.attachment import Placed
from kernweave.session.resolve import Resolved
from kernweave.splice.layout import COUNTER_BYTES, Site, bind, draft
from kernweave.splice.place import SITE_BYTES, Rules, place
from kernweave.x86.decode import ALL_MASK

_PER_CHUNK = uapi.MAX_PERCPU // COUNTER_BYTES

#: changes a plan before it is committed: tests seed faults with it
Amend = Callable[[Plan], Plan]


@dataclass(frozen=True, slots=True)
class Choice:
    """The verdict on a request: what to splice, and which points each site serves.

    Attributes:
        points: points that can be placed.
        sites: what to splice, ascending by address.
        site: int64[m], row in `sites` of each point.
        refused: the others.
    """

    points: tuple[Point, ...]
    sites: tuple[Site, ...]
    site: npt.NDArray[np.int64]
    refused: tuple[Refused, ...]


def choose(resolved: Resolved, sites: Sites, rules: Rules) -> Choice:
    """Place what can be placed, refuse the rest with a reason each."""
    code = resolved.code
    rows, back = np.unique(resolved.rows, return_inverse=True)
    placement = place(code, rows, sites, rules)
    live = live_before(code, sites)
    refused = list(resolved.refused)
    kept: list[int] = []
    for i, row in enumerate(back.tolist()):
        reason = placement.reason[row]
        if reason is None:
            kept.append(i)
        else:
            refused.append(Refused(resolved.points[i].text, reason, placement.detail[row]))
    used = np.unique(back[kept]) if kept else np.zeros(0, np.int64)
    made = [
        _site(code, int(rows[row]), placement.tactic[row], int(live[rows[row]]))
        for row in used.tolist()
    ]
    order = np.argsort([site.addr for site in made], kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    site = rank[np.searchsorted(used, back[kept])] if kept else np.zeros(0, np.int64)
    return Choice(
        tuple(resolved.points[i] for i in kept),
        tuple(made[i] for i in order.tolist()),
        site,
        tuple(refused),
    )


def _site(code: Code, row: int, tactic: Tactic | None, live: int) -> Site:
    assert tactic is not None
    part = code.parts[int(code.part[row])]
    at = int(code.addr[row]) - part.start
    length = int(code.length[row])
    text = part.code[at : at + max(length, SITE_BYTES)]
    return Site(int(code.addr[row]), text, length, tactic, ALL_MASK & ~live)


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
    layout = draft(choice.sites)
    area = driver.area(layout.size)
    try:
        chunks = _alloc_counters(driver, area, len(choice.sites))
        offsets = np.concatenate(
            [chunk.offset + np.arange(0, size, COUNTER_BYTES) for chunk, size in chunks]
        ).astype(np.uint64)
        plan = bind(layout, area.addr, offsets)
        if amend:
            plan = amend(plan)
        txn = _write(driver, area, plan)
    except CommitError as error:
        _drop(driver, area)
        raise _explain(error, choice) from error
    except BaseException:
        _drop(driver, area)
        raise
    return Placed(choice.points, choice.site, plan, area, tuple(chunks), txn)


def _write(driver: Driver, area: Area, plan: Plan) -> int:
    driver.write(area, 0, plan.code)
    driver.seal(area)
    return driver.commit(area, make_pokes(plan))


def make_pokes(plan: Plan) -> npt.NDArray[np.void]:
    """The plan's sites as rows of the driver's interface."""
    pokes = np.zeros(len(plan.addr), uapi.POKE)
    pokes["addr"] = plan.addr
    pokes["len"] = plan.old.shape[1]
    pokes["old"][:, : plan.old.shape[1]] = plan.old
    pokes["new_"][:, : plan.new.shape[1]] = plan.new
    return pokes


def _alloc_counters(driver: Driver, area: Area, count: int) -> list[tuple[Chunk, int]]:
    sizes = [
        COUNTER_BYTES * min(_PER_CHUNK, count - first) for first in range(0, count, _PER_CHUNK)
    ]
    return [(driver.percpu(area, size), size) for size in sizes]


def _drop(driver: Driver, area: Area) -> None:
    """Free an area whose commit failed; tasks may have been inside."""
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
