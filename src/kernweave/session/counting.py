# SPDX-License-Identifier: GPL-2.0-or-later
"""From points as the user wrote them to counters of a session, by the engine that fits each."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kernweave.driver.client import Driver
from kernweave.errors import DriverError, UnsupportedError, UsageError
from kernweave.model.plan import Tactic
from kernweave.model.point import PointSpec, parse_point
from kernweave.session.analysis import Analysis
from kernweave.session.attach import (
    Amend,
    Choice,
    Clobber,
    Decision,
    check_refusals,
    choose,
    clobbering,
    commit,
    decide,
    rules_for,
)
from kernweave.session.attachment import Attachment
from kernweave.session.counts import Counts
from kernweave.session.engines import BothCounts, Joint, choose_woven, find_engine, lacks_jump
from kernweave.session.hooks import Hooks
from kernweave.session.resolve import Resolver
from kernweave.session.resolved import Resolved
from kernweave.session.survey import Survey
from kernweave.session.view import KernelView
from kernweave.session.woven import CLONE, Clonable, Weaver, WovenCounts, poison_counters

_TRIES = 5
_TOO_FAST = "this kernel's text changes too fast to weave it"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be counted; see `Session.count` and `Session.splice`.

    Attributes:
        points: as in the point grammar.
        partial: place what can be placed even of explicitly named points.
        tactics: allowed tactics, in order; None: all. Weaving does not look at them.
        clobber: says what to overwrite before each counter.
        amend: changes the plan before it is committed; only splicing has one.
    """

    points: tuple[str, ...]
    partial: bool = False
    tactics: Sequence[str] | None = None
    clobber: Clobber | None = None
    amend: Amend | None = None


class Counting:
    """Decides for one session what can be counted, and puts the counters in.

    Attributes:
        attachments: what was put in, in that order.
    """

    def __init__(
        self, driver: Driver, weaver: Weaver, seen: tuple[KernelView, Analysis, Hooks]
    ) -> None:
        """Remember where to look; nothing is changed yet."""
        self._driver, self._weaver = driver, weaver
        self._view, self._analysis, self._hooks = seen
        self.attachments: list[Counts] = []

    # ---- what would be done --------------------------------------------------------------------

    def decide(self, points: Sequence[str], tactics: Sequence[str] | None) -> Decision:
        """The verdict on points, spliced.

        Raises:
            UsageError: not a point, or not a tactic.
            DriverError: EBUSY, the text did not hold still.
        """
        specs = _parse(points)
        for _ in range(_TRIES):
            self._view.refresh()
            resolved = self._resolve(specs)
            if self._view.is_current():
                return self._decide_on(resolved, tactics)
        raise DriverError("kprobes come and go too fast to read this kernel's text", errno.EBUSY)

    def survey(self, points: Sequence[str], tactics: Sequence[str] | None) -> Survey:
        """The verdict on points, edges woven if all tactics are allowed."""
        decision = self.decide(points, tactics)
        edges = decision.resolved.edges
        woven = tactics is None and bool(edges.any())
        return Survey(decision, self._weaver.find(decision.resolved.only(edges)) if woven else None)

    def clonable(self, points: Sequence[str]) -> Clonable:
        """The verdict on points, woven."""
        self._view.refresh()
        return self._weaver.find(self._resolve(_parse(points)))

    def _resolve(self, specs: Sequence[PointSpec]) -> Resolved:
        return Resolver(self._view, self._analysis.comes_back).resolve(specs)

    def _decide_on(self, resolved: Resolved, tactics: Sequence[str] | None) -> Decision:
        rules = rules_for(self._driver.facts.flags, self._tactics(tactics))
        return decide(resolved, self._view.sites, rules, self._analysis, self._hooks.can_translate)

    def _tactics(self, names: Sequence[str] | None) -> list[Tactic]:
        known = {tactic.value: tactic for tactic in Tactic}
        wanted = list(known) if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise UsageError(
                    f"no tactic {name!r}",
                    help=f"use {', '.join(known)}, separated by commas; to weave, {CLONE} alone",
                )
        can_yield = self._hooks.can_yield_to_ftrace()
        return [known[name] for name in wanted if can_yield or known[name] is not Tactic.NOP5]

    # ---- in and out ----------------------------------------------------------------------------

    def count(self, request: Request, engine: str) -> Counts:
        """Count by the engine that is named, or `auto`; raises what `Session.count` does."""
        engine = find_engine(engine, request.tactics)
        if engine == "weave":
            return self.weave(request)
        if engine == "splice":
            return self.splice(request)
        if request.tactics is not None:
            jumps = [name for name in request.tactics if name != CLONE]
            request = replace(request, tactics=jumps)
        return self._count_auto(request)

    def splice(self, request: Request) -> Attachment:
        """Count at the points themselves; raises what `Session.splice` does."""
        return self._splice(lambda: self.decide(request.points, request.tactics), request)

    def weave(self, request: Request) -> WovenCounts:
        """Count in clones; raises what `Session.weave` does."""
        specs = _parse(request.points)
        self._view.refresh()
        self._weaver.prepare()
        for _ in range(_TRIES):
            self._view.refresh()
            found = self._weaver.find(self._resolve(specs))
            if not self._view.is_current():
                continue
            check_refusals(found, request.partial)
            woven = self._weave(found, request.clobber)
            if woven:
                return woven
        raise DriverError(_TOO_FAST, errno.EBUSY)

    def detach(self) -> None:
        """Take everything out, the last first."""
        try:
            for attachment in reversed(self.attachments):
                if attachment.attached:
                    attachment.detach()
        finally:
            self.attachments.clear()

    def _remember(self, counts: Counts) -> None:
        """What is out is forgotten: a session may attach for days."""
        self.attachments[:] = [each for each in self.attachments if each.attached]
        self.attachments.append(counts)

    # ---- engines -------------------------------------------------------------------------------

    def _splice(
        self, decide: Callable[[], Decision], request: Request, first: Decision | None = None
    ) -> Attachment:
        choice = self._choose(decide, request.partial, first)
        if request.clobber:
            choice = clobbering(choice, request.clobber)
        with _undivided():
            placed = commit(self._driver, choice, request.amend)
            attachment = Attachment(self._driver, placed, choice.refused)
            self._remember(attachment)
        return attachment

    def _choose(
        self, decide: Callable[[], Decision], partial: bool, first: Decision | None
    ) -> Choice:
        """Decide; and again if what the choice needs in the kernel took a place it has."""
        while True:
            decision, first = first or decide(), None
            check_refusals(decision, partial)
            choice = choose(decision, self._view.sites, self._analysis)
            if not self._hooks.prepare(choice):
                return choice

    def _weave(self, found: Clonable, clobber: Clobber | None) -> WovenCounts | None:
        """Enter; None if the text changed meanwhile."""
        source, scope, counters = found.source, found.scope, found.counters
        if clobber:
            counters = poison_counters(source, scope, counters, clobber)
        with _undivided():
            live = self._weaver.enter(source, scope, counters)
            if live is None:
                return None
            counts = WovenCounts(self._driver, found, live)
            self._remember(counts)
        return counts

    def _count_auto(self, request: Request) -> Counts:
        def decide_again() -> Decision:
            return self.decide(request.points, request.tactics)

        first = decide_again()
        if not lacks_jump(first).any():
            return self._splice(decide_again, request, first)
        try:
            self._weaver.prepare()
        except UnsupportedError:  # splicing is what remains
            return self._splice(decide_again, request, first)
        for _ in range(_TRIES):
            decision = decide_again()
            clonable = self._weaver.find(decision.resolved)
            if not self._view.is_current():
                continue
            joint = Joint(decision, clonable, choose_woven(decision, clonable))
            check_refusals(joint, request.partial)
            if not (joint.woven | joint.resolved.edges).any():
                return self._splice(decide_again, request, decision)
            if not joint.woven.any():
                return self._count_rest(joint, [], request)
            found = self._weaver.find(joint.resolved.only(joint.woven))
            woven = self._weave(found, request.clobber)
            if woven:
                return self._count_rest(joint, [woven], request)
        raise DriverError(_TOO_FAST, errno.EBUSY)

    def _count_rest(self, joint: Joint, woven: list[WovenCounts], request: Request) -> Counts:
        """Splice what is not woven, and put both together."""
        parts: list[Counts] = [*woven]
        rest = joint.resolved.only(joint.spliced)
        try:
            if len(rest.rows):
                whole = replace(request, partial=False)
                parts.append(self._splice(lambda: self._decide_on(rest, request.tactics), whole))
        except BaseException:
            for part in woven:
                part.detach()
            raise
        both = BothCounts(parts, joint)
        self._remember(both)
        return both


def _parse(points: Sequence[str]) -> list[PointSpec]:
    if not points:
        raise UsageError("no point given", help="name a function, for instance vfs_read")
    return [parse_point(point) for point in points]


@contextlib.contextmanager
def _undivided() -> Iterator[None]:
    """Hold an interrupt back until the block is through, so that what it made is known."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signo, frame: held.append(signo))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
