# SPDX-License-Identifier: GPL-2.0-or-later
"""A session: one connection to one kernel, undone as a whole when it ends."""

from __future__ import annotations

import atexit
import functools
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from kernweave.driver.client import BusyError, Driver
from kernweave.lab.cache import cache_dir
from kernweave.model.point import parse_point
from kernweave.session.analysis import Analysis
from kernweave.session.attach import Amend, Clobber
from kernweave.session.attachment import Attachment
from kernweave.session.commands import Commands, Completed, sleep
from kernweave.session.counting import Counting, Request
from kernweave.session.counts import Counts
from kernweave.session.hooks import Hooks
from kernweave.session.listing import InsnInfo, Listing
from kernweave.session.query import open_database
from kernweave.session.survey import (
    FunctionInfo,
    SiteVerdict,
    Survey,
    list_functions,
    prototype_of,
)
from kernweave.session.tables import FunctionTable, Kernel, Table
from kernweave.session.target import AnyLink, kmod_file, open_link
from kernweave.session.view import KernelView
from kernweave.session.woven import Clonable, Weaver, WovenCounts

_LEAVING_S = 60.0


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
        self._commands = Commands(self._link)
        self._tables: Kernel | None = None
        try:
            self._driver = _open_driver(self._link, writer)
            self._view = KernelView(self._driver, cache_dir())
            self._analysis = Analysis(self._view, cache_dir(), progress)
            seen = self._view, self._analysis, Hooks(self._driver, self._view, self._analysis)
            find_file = functools.partial(kmod_file, self.target, self.kernel, progress)
            self._weaver = Weaver(self._driver, self._link, seen, find_file)
            self._counting = Counting(self._driver, self._weaver, seen)
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
            self._counting.detach()
        finally:
            self._link.close()

    @property
    def kernel(self) -> str:
        """Release of the kernel, as `uname -r` prints it."""
        return self._driver.facts.release

    @property
    def attachments(self) -> tuple[Counts, ...]:
        """What this session has put in, in that order; an interrupted `count` may be among it.

        What was taken out is forgotten with the next one.
        """
        return tuple(self._counting.attachments)

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
        return self._counting.survey(points, tactics)

    def list_functions(self, glob: str = "*") -> list[FunctionInfo]:
        """Functions whose names match, in address order; kmods included."""
        self._view.refresh()
        return list_functions(self._view, parse_point(glob))

    def prototype(self, function: FunctionInfo) -> str | None:
        """C declaration of a listed function; None where BTF has none or several of its name."""
        return prototype_of(self._analysis.btf, function.kmod, function.symbol)

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
        return self._counting.count(Request(points, partial, tactics, clobber), engine)

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
        return self._counting.splice(Request(points, partial, tactics, clobber, amend))

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
        return self._counting.weave(Request(points, partial, clobber=clobber))

    def clonable(self, *points: str) -> Clonable:
        """What `weave` would do with each point; changes nothing.

        Args:
            points: as in the point grammar.

        Raises:
            UsageError: not a point.
        """
        return self._counting.clonable(points)

    @property
    def weaver(self) -> Weaver:
        """Makes clones, for tools that need more than counts."""
        return self._weaver

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
        decision = self._counting.decide([f"{function}@insns"], None)
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


_open: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for session in list(_open):
        session.close()
