# SPDX-License-Identifier: GPL-2.0-or-later
"""Which engine counts which points of a request, and both engines' numbers as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kernweave.errors import UsageError
from kernweave.model.plan import Refused, Tactic
from kernweave.session.attach import Decision
from kernweave.session.counts import Counts
from kernweave.session.resolved import Resolved
from kernweave.session.woven import CLONE, Clonable

Mask = npt.NDArray[np.bool_]

Number = TypeVar("Number", np.uint64, np.bool_)
ENGINES = ("auto", "splice", "weave")


def find_engine(engine: str, tactics: Sequence[str] | None) -> str:
    """The engine that tactics ask for, if any are given.

    Raises:
        UsageError: no such engine, or the tactics are not of this one.
    """
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", help=f"use one of {', '.join(ENGINES)}")
    if tactics is None:
        return engine
    others = [tactic for tactic in tactics if tactic != CLONE]
    asked = "splice" if CLONE not in tactics else "auto" if others else "weave"
    if engine not in ("auto", asked):
        named = ", ".join(tactics)
        raise UsageError(f"engine {engine} and tactic {named} contradict each other")
    return asked


def lacks_jump(decision: Decision) -> Mask:
    """bool[m]: points that would trap, or that cannot be spliced at all."""
    traps = decision.placement.tactic[decision.back] == Tactic.INT3
    return np.asarray(traps | ~decision.placed)


def choose_woven(decision: Decision, clonable: Clonable) -> Mask:
    """bool[m]: points whose function is woven; it is spliced or woven, never both.

    Those are functions in which a jump does not fit everywhere that is asked for, if all that is
    asked for is counted in its clone whenever control arrives there. Edges are counted nowhere
    else: a function of which any can be counted is woven, and what else is asked for in it is
    counted there, too, or refused.
    """
    resolved = decision.resolved
    function = _function_of(resolved)
    lacking = np.unique(function[lacks_jump(decision)])
    impossible = np.unique(function[~clonable.complete])
    parted = np.unique(function[resolved.edges & clonable.placed])
    return np.isin(function, np.append(np.setdiff1d(lacking, impossible), parted))


def _function_of(resolved: Resolved) -> npt.NDArray[np.uint64]:
    """uint64[m]: address of the function of each point; its cold parts are the same function."""
    code = resolved.code
    groups = np.array([part.group for part in code.parts], np.uint64)
    return np.asarray(groups[code.part[resolved.rows]])


@dataclass(frozen=True)
class Joint:
    """The verdict on a request that both engines share.

    Attributes:
        decision: on all of it, spliced.
        clonable: on all of it, woven.
        chosen: bool[m], points whose function is woven.
    """

    decision: Decision
    clonable: Clonable
    chosen: Mask

    @property
    def resolved(self) -> Resolved:
        """What was asked for."""
        return self.decision.resolved

    @property
    def woven(self) -> Mask:
        """bool[m]: what is woven."""
        return np.asarray(self.clonable.placed & self.chosen)

    @property
    def spliced(self) -> Mask:
        """bool[m]: what is spliced."""
        return np.asarray(self.decision.placed & ~self.chosen)

    @property
    def placed(self) -> Mask:
        """bool[m]: what is counted."""
        return np.asarray(self.spliced | self.woven)

    def all_refused(self) -> list[Refused]:
        """Everything that is not counted; points that do not exist first."""
        by_clone = self.chosen | self.resolved.edges
        rows = np.flatnonzero(~self.placed).tolist()
        verdicts = (self.clonable if by_clone[i] else self.decision for i in rows)
        refused = (one.refused(i) for one, i in zip(verdicts, rows, strict=True))
        return [*self.resolved.refused, *refused]


class BothCounts(Counts):
    """Counters of one `Session.count` of which some are woven and some spliced in."""

    def __init__(self, parts: Sequence[Counts], joint: Joint) -> None:
        """Join them.

        Args:
            parts: what is woven, then what is spliced, if anything is.
            joint: the verdict they follow.
        """
        points = [point for part in parts for point in part.placed]
        place = np.zeros(len(joint.woven), np.int64)
        place[joint.woven] = np.arange(joint.woven.sum())
        place[joint.spliced] = np.arange(joint.woven.sum(), len(points))
        self._order = place[joint.placed]
        super().__init__(tuple(points[i] for i in self._order.tolist()), tuple(joint.all_refused()))
        self.parts = tuple(parts)

    @property
    def attached(self) -> bool:
        """Whether any counters are still in the kernel."""
        return any(part.attached for part in self.parts)

    def detach(self) -> None:
        """Take the counters out and read them for the last time; idempotent."""
        if not self.attached:
            return
        self._duration_ns = self.duration_ns
        for part in self.parts:
            part.detach()
        self.unrestored = tuple(addr for part in self.parts for addr in part.unrestored)
        self.text_restored = all(part.text_restored for part in self.parts)
        self.in_flight = sum(part.in_flight for part in self.parts)

    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: hits of each placed point; still rising while attached."""
        return self._joined([part.hits() for part in self.parts])

    def missed(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: arrivals at each placed point that could not be counted; known at detach."""
        return self._joined([part.missed() for part in self.parts])

    def exact(self) -> Mask:
        """bool[m]: whether each count is final and complete."""
        return self._joined([part.exact() for part in self.parts])

    @property
    def evicted(self) -> int:
        """Sites and functions given back to others while they were counted."""
        return sum(part.evicted for part in self.parts)

    @property
    def tactic_of(self) -> list[str]:
        """The tactic of each placed point."""
        return self._ordered([tactic for part in self.parts for tactic in part.tactic_of])

    @property
    def engine_of(self) -> list[str]:
        """The engine of each placed point."""
        return self._ordered([engine for part in self.parts for engine in part.engine_of])

    def _joined(self, columns: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
        return np.asarray(np.concatenate(columns)[self._order])

    def _ordered(self, values: list[str]) -> list[str]:
        return [values[i] for i in self._order.tolist()]
