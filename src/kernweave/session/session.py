# SPDX-License-Identifier: GPL-2.0-or-later
"""A session: one connection to one kernel, undone as a whole when it ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from kernweave.driver.client import BusyError, Driver
from kernweave.errors import DriverError, UnsupportedError, UsageError
from kernweave.lab.cache import cache_dir
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
from kernweave.session.commands import Commands, Completed, sleep
from kernweave.session.counts import Counts
from kernweave.session.engines import BothCounts, Joint, choose_woven, find_engine, lacks_jump
from kernweave.session.hooks import Hooks
from kernweave.session.listing import InsnInfo, Listing
from kernweave.session.query import open_database
from kernweave.session.resolve import Resolver
from kernweave.session.resolved import Resolved
from kernweave.session.survey import (
    FunctionInfo,
    SiteVerdict,
    Survey,
    list_functions,
    prototype_of,
)
from kernweave.session.tables import FunctionTable, Kernel, Table
from kernweave.session.target import AnyLink, driver_file, open_link
from kernweave.session.view import KernelView
from kernweave.session.woven import CLONE, Clonable, Weaver, WovenCounts, poison_counters

_TRIES = 5
_LEAVING_S = 60.0
_TOO_FAST = "this kernel's text changes too fast to weave it"


def _silent(line: str) -> None:
    """Drop progress."""


class Session:
    """One session with a kernel; use it as a context manager, from one thread."""

    def __init__(
        self,
        target: str = "lab",
        *,
        writer: bool = True,
        progress: Callable[[str], None] = _silent,
    ) -> None:
        """Connect; see `kernweave.connect`."""
        self.target = f"{target}:6.1" if target == "lab" else target
        self._link = open_link(target, progress)
        self._attachments: list[Counts] = []
        self._progress = progress
        self._commands = Commands(self._link)
        self._tables: Kernel | None = None
        try:
            self._driver = _open_driver(self._link, writer)
            self._view = KernelView(self._driver, cache_dir())
            self._analysis = Analysis(self._view, cache_dir(), progress)
            self._hooks = Hooks(self._driver, self._view, self._analysis)
        except BaseException:
            self._link.close()
            raise
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything out and end the session; idempotent."""
        _open.discard(self)
        try:
            for attachment in reversed(self._attachments):
                if attachment.attached:
                    attachment.detach()
        finally:
            self._attachments.clear()
            self._link.close()

    @property
    def kernel(self) -> str:
        """Release of the kernel, as `uname -r` prints it."""
        return self._driver.facts.release

    @property
    def attachments(self) -> tuple[Counts, ...]:
        """What this session has put in, in that order; an interrupted `count` may be among it."""
        return tuple(self._attachments)

    @property
    def driver(self) -> Driver:
        """The driver's client, for tools that need more than counts."""
        return self._driver

    @property
    def analysis(self) -> Analysis:
        """What analysis found, and whether the cache had it."""
        return self._analysis

    @property
    def view(self) -> KernelView:
        """Symbols, patchable sites and native text as this session sees them."""
        return self._view

    def read(self, addr: int, size: int) -> bytes:
        """`size` bytes of kernel memory at run-time address `addr`.

        Raises:
            DriverError: EFAULT, if any of it is not mapped.
        """
        return self._driver.read(addr, size)

    # ---- counting ------------------------------------------------------------------------------

    def sites(
        self,
        *points: str,
        tactics: Sequence[str] | None = None,
    ) -> list[SiteVerdict]:
        """What `count` would do with each point: a tactic or a reason; changes nothing.

        Edges are woven, all else is spliced; see `clonable` for the rest of a function.

        Args:
            points: as in the point grammar.
            tactics: allowed tactics, in order; None: all. With any, edges are refused.

        Raises:
            UsageError: not a point.
        """
        return list(self.survey(*points, tactics=tactics))

    def survey(self, *points: str, tactics: Sequence[str] | None = None) -> Survey:
        """The same for millions of points: numbers at once, a verdict when it is asked for.

        Args:
            points: as in the point grammar.
            tactics: allowed tactics, in order; None: all.

        Raises:
            UsageError: not a point.

        Example:
            >>> with kernweave.connect() as k:  # doctest: +SKIP
            ...     k.survey("*@insns").tally()
        """
        decision = self._decide(points, tactics)
        edges = decision.resolved.edges
        woven = tactics is None and bool(edges.any())
        return Survey(decision, self.weaver.find(decision.resolved.only(edges)) if woven else None)

    def list_functions(self, glob: str = "*") -> list[FunctionInfo]:
        """Functions whose names match, in address order; kmods included."""
        self._view.refresh()
        return list_functions(self._view, parse_point(glob))

    def prototype(self, function: FunctionInfo) -> str | None:
        """C declaration of a listed function; None where BTF has none or several of its name."""
        return prototype_of(self._analysis.btf, function.kmod, function.symbol)

    # ---- tables --------------------------------------------------------------------------------

    @property
    def tables(self) -> Kernel:
        """Every function, block, instruction and edge of the kernel and of the kmods loaded now.

        They are made once per session: what is loaded later is not among them.
        """
        if self._tables is None:
            self._view.refresh()
            symbols = list(self._view.images)
            self._tables = Kernel(self._analysis.tables(), symbols, lambda: self._analysis.btf)
        return self._tables

    @property
    def functions(self) -> FunctionTable:
        """Functions by name: `k.functions["vfs_read"].blocks`; all of them by `columns()`."""
        return self.tables.functions

    @property
    def blocks(self) -> Table:
        """Basic blocks, with what is live before each."""
        return self.tables.blocks

    @property
    def instructions(self) -> Table:
        """Instructions, padding left out."""
        return self.tables.instructions

    @property
    def edges(self) -> Table:
        """Edges of the control-flow graph."""
        return self.tables.edges

    @property
    def calls(self) -> Table:
        """Direct calls and jumps from function to function, one row per site."""
        return self.tables.calls

    def listing(self, function: str) -> list[InsnInfo]:
        """The instructions of a function and its cold parts: text, edges, tactic, what is dead.

        Raises:
            RefusedError: no such function, or several of that name.
        """
        kernel = self.tables
        kernel.find(function)  # a name, not a pattern
        decision = self._decide([f"{function}@insns"], None)
        code = decision.resolved.code
        listing = Listing(kernel, code, self._view.sites)
        return listing.rows(self._analysis.live(code), list(Survey(decision)))

    def database(self) -> Any:
        """A DuckDB connection (duckdb.DuckDBPyConnection) with the tables as views.

        Raises:
            UnsupportedError: DuckDB is not installed.

        Example:
            >>> with kernweave.connect() as k:  # doctest: +SKIP
            ...     k.database().sql("select edge_kind(kind), count(*) from edges group by all")
        """
        return open_database(self.tables)

    def _decide(self, points: Sequence[str], tactics: Sequence[str] | None) -> Decision:
        specs = self._parse(points)
        for _ in range(_TRIES):
            self._view.refresh()
            resolved = self._resolve(specs)
            if self._view.is_current():
                return self._decide_on(resolved, tactics)
        raise DriverError("kprobes come and go too fast to read this kernel's text", errno.EBUSY)

    def _resolve(self, specs: Sequence[PointSpec]) -> Resolved:
        return Resolver(self._view, self._analysis.comes_back).resolve(specs)

    def _decide_on(self, resolved: Resolved, tactics: Sequence[str] | None) -> Decision:
        rules = rules_for(self._driver.facts.flags, self._tactics(tactics))
        return decide(resolved, self._view.sites, rules, self._analysis, self._hooks.can_translate)

    def count(
        self,
        *points: str,
        engine: str = "auto",
        partial: bool = False,
        tactics: Sequence[str] | None = None,
        clobber: Clobber | None = None,
    ) -> Counts:
        """Put a counter at each point; leaving the with block takes them out.

        Args:
            points: as in the point grammar.
            engine: `splice`: at the points themselves; `weave`: in clones of their functions;
                `auto`: weave functions of which edges are asked for, or in which a jump does not
                fit at every point asked for, and splice the others.
            partial: place what can be placed even of explicitly named points.
            tactics: allowed tactics, in order; None: all. Without `clone` nothing is woven, with
                nothing else everything.
            clobber: says which registers and flags to overwrite before each counter, given its
                address and the mask of what is dead there; a check of the analysis.

        Raises:
            UsageError: not a point.
            RefusedError: an explicitly named point cannot be placed, or none at all.
            DriverError: the driver refuses; nothing was changed.

        Example:
            >>> with kernweave.connect() as k, k.count("vfs_read@blocks") as hits:  # doctest: +SKIP
            ...     k.run(["true"])
            >>> hits.rows()  # doctest: +SKIP
        """
        engine = find_engine(engine, tactics)
        if engine == "weave":
            return self.weave(*points, partial=partial, clobber=clobber)
        if engine == "splice":
            return self.splice(*points, partial=partial, tactics=tactics, clobber=clobber)
        jumps = None if tactics is None else [name for name in tactics if name != CLONE]
        return self._count_auto(points, partial, jumps, clobber)

    def splice(
        self,
        *points: str,
        partial: bool = False,
        tactics: Sequence[str] | None = None,
        clobber: Clobber | None = None,
        amend: Amend | None = None,
    ) -> Attachment:
        """Count at the points themselves; for who needs to know how: the plan is in the result.

        Args:
            points: as in the point grammar.
            partial: as for `count`.
            tactics: allowed tactics, in order; None: all of this engine.
            clobber: as for `count`.
            amend: changes the plan before it is committed; for tests that seed faults.

        Raises:
            UsageError: not a point.
            RefusedError: an explicitly named point cannot be placed, or none at all.
            DriverError: the driver refuses; nothing was changed.
        """
        return self._splice(lambda: self._decide(points, tactics), partial, clobber, amend)

    def _splice(
        self,
        decide: Callable[[], Decision],
        partial: bool,
        clobber: Clobber | None,
        amend: Amend | None = None,
        first: Decision | None = None,
    ) -> Attachment:
        choice = self._choose(decide, partial, first)
        if clobber:
            choice = clobbering(choice, clobber)
        with _undivided():
            placed = commit(self._driver, choice, amend)
            attachment = Attachment(self._driver, placed, choice.refused)
            self._attachments.append(attachment)
        return attachment

    def weave(
        self, *points: str, partial: bool = False, clobber: Clobber | None = None
    ) -> WovenCounts:
        """Count points in clones of their functions, where no point needs a trap.

        Args:
            points: as in the point grammar.
            partial: as for `count`.
            clobber: as for `count`.

        Raises:
            UsageError: not a point.
            RefusedError: an explicitly named point cannot be counted, or none at all.
            DriverError: the kernel or the driver refuses; nothing was changed.
        """
        specs = self._parse(points)
        self._view.refresh()
        self.weaver.prepare()
        for _ in range(_TRIES):
            self._view.refresh()
            found = self.weaver.find(self._resolve(specs))
            if not self._view.is_current():
                continue
            check_refusals(found, partial)
            woven = self._weave(found, clobber)
            if woven:
                return woven
        raise DriverError(_TOO_FAST, errno.EBUSY)

    def _weave(self, found: Clonable, clobber: Clobber | None) -> WovenCounts | None:
        """Enter; None if the text changed meanwhile."""
        source, scope, counters = found.source, found.scope, found.counters
        if clobber:
            counters = poison_counters(source, scope, counters, clobber)
        with _undivided():
            live = self.weaver.enter(source, scope, counters)
            if live is None:
                return None
            counts = WovenCounts(self._driver, found, live)
            self._attachments.append(counts)
        return counts

    def _count_auto(
        self,
        points: Sequence[str],
        partial: bool,
        tactics: Sequence[str] | None,
        clobber: Clobber | None,
    ) -> Counts:
        def decide_again() -> Decision:
            return self._decide(points, tactics)

        first = decide_again()
        if not lacks_jump(first).any():
            return self._splice(decide_again, partial, clobber, first=first)
        try:
            self.weaver.prepare()
        except UnsupportedError:  # splicing is what remains
            return self._splice(decide_again, partial, clobber, first=first)
        for _ in range(_TRIES):
            decision = decide_again()
            clonable = self.weaver.find(decision.resolved)
            if not self._view.is_current():
                continue
            joint = Joint(decision, clonable, choose_woven(decision, clonable))
            check_refusals(joint, partial)
            if not (joint.woven | joint.resolved.edges).any():
                return self._splice(decide_again, partial, clobber, first=decision)
            if not joint.woven.any():
                return self._count_rest(joint, [], tactics, clobber)
            woven = self._weave(self.weaver.find(joint.resolved.only(joint.woven)), clobber)
            if woven:
                return self._count_rest(joint, [woven], tactics, clobber)
        raise DriverError(_TOO_FAST, errno.EBUSY)

    def _count_rest(
        self,
        joint: Joint,
        woven: list[WovenCounts],
        tactics: Sequence[str] | None,
        clobber: Clobber | None,
    ) -> Counts:
        """Splice what is not woven, and put both together."""
        parts: list[Counts] = [*woven]
        rest = joint.resolved.only(joint.spliced)
        try:
            if len(rest.rows):
                parts.append(self._splice(lambda: self._decide_on(rest, tactics), False, clobber))
        except BaseException:
            for part in woven:
                part.detach()
            raise
        both = BothCounts(parts, joint)
        self._attachments.append(both)
        return both

    def clonable(self, *points: str) -> Clonable:
        """What `weave` would do with each point; changes nothing.

        Args:
            points: as in the point grammar.

        Raises:
            UsageError: not a point.
        """
        self._view.refresh()
        return self.weaver.find(self._resolve(self._parse(points)))

    @cached_property
    def weaver(self) -> Weaver:
        """Makes clones, for tools that need more than counts."""
        seen = self._view, self._analysis, self._hooks
        return Weaver(
            self._driver, self._link, seen, lambda: driver_file(self.target, self._progress)
        )

    def _parse(self, points: Sequence[str]) -> list[PointSpec]:
        if not points:
            raise UsageError("no point given", help="name a function, for instance vfs_read")
        return [parse_point(point) for point in points]

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

    def _tactics(self, names: Sequence[str] | None) -> list[Tactic]:
        known = {tactic.value: tactic for tactic in Tactic}
        wanted = list(known) if names is None else list(names)
        for name in wanted:
            if name not in known:
                raise UsageError(
                    f"no tactic {name!r}", help=f"use {', '.join(known)}, separated by commas"
                )
        can_yield = self._hooks.can_yield_to_ftrace()
        return [known[name] for name in wanted if can_yield or known[name] is not Tactic.NOP5]

    # ---- commands ------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = False,
        capture: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        limit_s: float | None = None,
    ) -> Completed:
        """Run a command on the target to its end; its output passes through.

        Args:
            argv: the command; 127 is its status if it is not found.
            check: raise if the status is not 0.
            capture: keep the output instead of passing it on.
            env: its whole environment; None: this process's.
            cwd: its working directory; None: this process's, if the target has it.
            limit_s: after so many seconds it gets SIGTERM, five seconds later SIGKILL.

        Raises:
            CommandError: `check`, and the status is not 0.
        """
        return self._commands.run(
            argv, check=check, capture=capture, env=env, cwd=cwd, limit_s=limit_s
        )

    def sleep(self, seconds: float | None) -> None:
        """Leave the counters in for so long, or until an interrupt; the latter is no error."""
        sleep(seconds)


def _open_driver(link: AnyLink, writer: bool) -> Driver:
    """Greet the driver; an owner that was killed in the middle of a request gets time to go."""
    deadline = time.monotonic() + _LEAVING_S
    while True:
        try:
            return Driver(link.call, writer=writer)
        except BusyError as error:
            if _is_alive(error.pid) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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


_open: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for session in list(_open):
        session.close()
