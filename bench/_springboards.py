# SPDX-License-Identifier: GPL-2.0-or-later
"""What springboards add, and apart from that what those add who give them room.

A springboard is in filler, or behind the jump of a host: a window of neighbours that was made to
have room, or that is counted itself. Whoever runs through a host pays for that, whether the point
is hit or not, so each plan is measured twice: as it is, and without its short jump.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from _methods import Candidate, candidates, tactics_for
from _workload import Workload

from kernweave.errors import KernweaveError, Reason, RefusedError
from kernweave.model.plan import Plan, Tactic
from kernweave.session.survey import SiteVerdict

_TURNS = 3
_PER_HOST = 10
_JUMP_BYTES = 5
_HOST_BYTES = 2 * _JUMP_BYTES
_SHORT_BYTES = range(2, _JUMP_BYTES)
_INT3 = 0xCC
_FILLER, _MADE, _COUNTED = "in filler", "in a displaced neighbour", "behind another point's jump"


@dataclass(frozen=True, slots=True)
class Springboard:
    """One short point that every call hits once, and what its counter adds.

    Attributes:
        point: counted through a springboard.
        host: where the springboard is: the first instruction displaced, or the filler.
        place: what is there.
        whole: instructions added per call by all that was written.
        host_alone: instructions added by the same without the short jump.
    """

    point: str
    host: str
    place: str
    whole: float
    host_alone: float

    @property
    def kind(self) -> str:
        """Its place, and whether these calls run through that: then the jump there costs them."""
        if self.place == _FILLER or round(self.host_alone, 1):
            return self.place
        return f"{self.place}, not executed"


def measure_springboards(workload: Workload, functions: Sequence[str]) -> list[Springboard]:
    """Points of some functions that need a springboard, each by itself, nothing saved.

    First those that get one anyway, then short ones beside a long instruction, which get one
    behind the jump of that if nothing but it is asked for, too.
    """
    images = workload.session.view.images
    points = [f"{name}@insns" for name in functions if images[0].find(name)]
    found = [one for one in candidates(workload, *points) if not one.spills]
    tactics = tactics_for(Tactic.SPRINGBOARD)
    need = [one for one in found if one.tactic == Tactic.SPRINGBOARD]
    tried = [_measure(workload, one, (), tactics) for one in need]
    for one, host in _beside_hosts(workload, found, points):
        tried.append(_measure(workload, one, (host,), [Tactic.SPRINGBOARD]))
    return [one for one in tried if one is not None]


def by_place(measured: Sequence[Springboard]) -> dict[str, Any]:
    """Figures for each kind, what its hosts add apart."""
    found = {}
    for kind in sorted({one.kind for one in measured}, key=_order):
        mine = [one for one in measured if one.kind == kind]
        own = [round(one.whole - one.host_alone, 2) for one in mine]
        hosts = [round(one.host_alone, 2) for one in mine]
        found[f"springboard, {kind}"] = {
            "points": len(mine),
            "median": statistics.median(own),
            "max": max(own),
            "rounded_max": max(round(value) for value in own),
            "host_median": statistics.median(hosts),
            "host_max": max(hosts),
            "whole_max": round(max(one.whole for one in mine), 2),
        }
    return found


def _order(kind: str) -> tuple[bool, bool, str]:
    return not kind.startswith(_FILLER), not kind.endswith("not executed"), kind


# ---- places ------------------------------------------------------------------------------------


def _beside_hosts(
    workload: Workload, found: Sequence[Candidate], points: Sequence[str]
) -> Iterator[tuple[Candidate, str]]:
    """Short points that one call hits once, spread over the reach of each long instruction."""
    known = list(workload.session.survey(*points, tactics=[Tactic.SPRINGBOARD]))
    short = {one.point for one in known if _is_short(one)}
    for host in known:
        if host.tactic not in (Tactic.JMP32, Tactic.GROUP) or _length(host) < _HOST_BYTES:
            continue
        board = int(host.addr or "0", 16) + _JUMP_BYTES
        near = [one for one in found if one.point in short and _reaches(one.addr, board)]
        for one in near[:: -(-len(near) // _PER_HOST) or 1]:
            yield one, host.point


def _is_short(one: SiteVerdict) -> bool:
    wanted = one.tactic == Tactic.SPRINGBOARD or one.reason == Reason.TOO_SHORT
    return wanted and _length(one) in _SHORT_BYTES


def _length(one: SiteVerdict) -> int:
    return len(bytes.fromhex(one.site_bytes or ""))


def _reaches(addr: int, board: int) -> bool:
    """Whether a jump of two bytes does."""
    return -128 <= board - addr - 2 <= 127


# ---- one point ---------------------------------------------------------------------------------


def _measure(
    workload: Workload, one: Candidate, hosts: Sequence[str], tactics: Sequence[str]
) -> Springboard | None:
    """What one adds, in turns with nothing and without its short jump; None: it has none."""
    session, points = workload.session, (one.point, *hosts)
    whole, alone = [], []
    try:
        for _ in range(_TURNS):
            native = workload.cost()
            with session.splice(
                *points, tactics=tactics, amend=partial(_without_jump, one.addr)
            ) as hits:
                alone.append(workload.cost() - native)
                _expect(one.point, int(hits.hits()[0]), 0, 1)
            with session.splice(*points, tactics=tactics) as hits:
                whole.append(workload.cost() - native)
                _expect(one.point, int(hits.hits()[0]), workload.total, 2 * workload.total)
    except RefusedError:
        return None
    place, addr = _find_board(hits.plan, one.addr)
    host = f"{one.point.partition('+')[0]}{addr - one.addr + one.offset:+#x}"
    return Springboard(one.point, host, place, statistics.median(whole), statistics.median(alone))


def _expect(point: str, hits: int, least: int, limit: int) -> None:
    if not least <= hits < limit:
        raise KernweaveError(f"{point}: {hits} hits counted, not {least} to {limit - 1}")


def _without_jump(addr: int, plan: Plan) -> Plan:
    """The plan with all that is written but the jump to the counter of one instruction."""
    gone = _poke_of(plan, addr)
    old, kept = plan.pokes, np.arange(len(plan.pokes.addr)) != gone
    pokes = replace(
        old,
        addr=old.addr[kept],
        old=tuple(text for i, text in enumerate(old.old) if i != gone),
        new=tuple(text for i, text in enumerate(old.new) if i != gone),
        group=old.group[kept],
        host=old.host[kept],
        keep=old.keep[kept],
    )
    poke = np.where(plan.poke == gone, -1, plan.poke - (plan.poke > gone)).astype(np.int32)
    return replace(plan, pokes=pokes, poke=poke)


def _poke_of(plan: Plan, addr: int) -> int:
    return int(plan.poke[plan.addr.tolist().index(addr)])


def _find_board(plan: Plan, addr: int) -> tuple[str, int]:
    """What is where the springboard of an instruction is, and where that begins."""
    pokes, jump = plan.pokes, _poke_of(plan, addr)
    short = pokes.new[jump]
    away = int.from_bytes(short[1:2], "little", signed=True)
    board = int(pokes.addr[jump]) + 2 + away
    host = int(np.searchsorted(pokes.addr, np.uint64(board), side="right")) - 1
    first = int(pokes.addr[host])
    under = pokes.old[host][board - first : board - first + _JUMP_BYTES]
    if set(under) == {_INT3}:
        return _FILLER, board
    return (_COUNTED if host in plan.poke else _MADE), first
