# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel at hand as tables: from the cache, or analysed now and kept there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.hints import (
    exported_addresses,
    find_btf,
    prototype_arguments,
    taken_addresses,
)
from kernweave.analysis.kernel import (
    Hints,
    KernelTables,
    Stretches,
    analyse,
    analyse_text,
    join,
    landings_of,
    live_before,
)
from kernweave.analysis.liveness import live_before as live_alone
from kernweave.analysis.normal import Print, differing
from kernweave.analysis.parts import make_parts
from kernweave.analysis.store import find, functions_at, save
from kernweave.image.btf import Btf
from kernweave.image.sites import contains
from kernweave.image.symbols import Symbols
from kernweave.model.table import select
from kernweave.session.view import KernelView
from kernweave.weave.source import Source, make_source
from kernweave.x86.decode import Flow

U32 = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

_MOST_DIFFERING = 4096  # bytes; beyond it is another kernel


@dataclass(frozen=True)
class KernelImage:
    """What is known of the kernel's own text.

    Attributes:
        tables: of the text as it was analysed.
        changed: bool[f], functions whose text is another one now: their rows do not hold.
        from_cache: whether nothing had to be analysed.
        print: the text that was analysed.
        base: its run-time address then.
    """

    tables: KernelTables
    changed: Mask
    from_cache: bool
    print: Print
    base: int

    def changed_in(self, text: bytes, base: int) -> Mask:
        """bool[f]: functions that are other ones in the kernel's text as it is now."""
        return functions_at(self.tables, differing(self.print, text, base - self.base), base)


class Analysis:
    """The tables of one session's kernel, made when they are first asked for."""

    def __init__(self, view: KernelView, cache: Path, progress: Callable[[str], None]) -> None:
        """Remember where to look; nothing is read yet."""
        self._view = view
        self._folder = cache / "analysis" / view.build_id if view.build_id else None
        self._progress = progress
        self._image: KernelImage | None = None

    def live(self, code: Code) -> U32:
        """uint32[n]: what is live before each instruction of some functions.

        What the whole kernel does is used where it is known to be what runs now; elsewhere - in
        kmods, in functions that somebody changed - what those functions tell alone.
        """
        sites = self._view.sites
        live, found = live_before(code, sites, self._stretches)
        if not found.all():
            live[~found] = live_alone(code, sites)[~found]
        return live

    def landing(self, code: Code) -> Mask:
        """bool[n]: where control may arrive otherwise than from the instruction before.

        So may tasks that sleep in the trampolines of an earlier attachment.
        Of a kmod's data nothing is known: where it jumps through a register, anywhere.
        """
        found = contains(self.kernel.tables.landings.addr, code.addr)
        found |= contains(np.sort(self._view.returns), code.addr)
        for image in self._view.images[1:]:
            if any(part.kmod == image.kmod for part in code.parts):
                found |= contains(self._kmod_landings(image), code.addr)
        return found

    def comes_back(self, code: Code) -> Mask:
        """bool[n]: False for calls of functions of the kernel that do not return."""
        functions = self.kernel.tables.functions
        lost = functions.addr[~functions.returns & ~self.kernel.changed]
        calls = (code.flow == Flow.CALL) & contains(lost, code.target)
        return np.asarray(~calls | contains(self._view.sites.static_calls, code.addr))

    def _kmod_landings(self, image: Symbols) -> npt.NDArray[np.uint64]:
        code = build_code(self._kmod_parts(image), self._view.sites)
        start, end = code.thunks
        indirect = (code.flow == Flow.JUMP) & (code.target >= start) & (code.target < end)
        indirect |= code.flow == Flow.INDIRECT_JUMP
        anywhere = np.zeros(len(code.parts), bool)
        anywhere[code.part[indirect]] = True
        none = np.zeros(0, np.uint64)
        return np.asarray(code.addr[landings_of(code, none) | anywhere[code.part]])

    @cached_property
    def _stretches(self) -> Stretches:
        """Of the kernel's functions that are as they were analysed."""
        image = self.kernel
        table = image.tables.stretches
        if not image.changed.any():
            return table
        functions = image.tables.functions
        row = np.searchsorted(functions.addr, table.addr, side="right") - 1
        return select(table, ~image.changed[row])

    @property
    def kernel(self) -> KernelImage:
        """The kernel's own text."""
        if self._image is None:
            self._image = self._find(*self._text())
        return self._image

    def _find(self, text: bytes, base: int) -> KernelImage:
        known = find(self._folder, text, base, _MOST_DIFFERING) if self._folder else None
        if known is not None:
            changed = functions_at(known.tables, known.differs, base)
            if not _matters(known.tables, changed):
                return KernelImage(known.tables, changed, True, known.print, known.base)
        return self._analyse(text, base)

    def _text(self, *, watched: bool = True) -> tuple[bytes, int]:
        """The kernel's native text as it is now, and its run-time address."""
        image = self._view.images[0]
        start, end = (np.array([edge], np.uint64) for edge in (image.starts[0], image.end))
        self._view.note_placed()
        return self._view.read_text(start, end, watched=watched)[0], image.starts[0]

    def _analyse(self, text: bytes, base: int) -> KernelImage:
        self._progress("analysing the kernel (once)")
        image, sites = self._view.images[0], self._view.sites
        parts = make_parts(image, base, text, sites)
        found = analyse_text(parts, sites, self._hints(), text, base)
        if self._folder:
            save(self._folder, found)
        unchanged = np.zeros(len(parts), bool)
        return KernelImage(found.tables, unchanged, False, found.print, found.base)

    def source(self) -> Source:
        """The kernel's own text as it is now, to weave from.

        `KernelView.is_current` does not tell whether it still is: `Weaver.enter` does.
        """
        text, base = self._text(watched=False)
        changed = self.kernel.changed_in(text, base)
        if _matters(self.kernel.tables, changed):
            changed = self.renew().changed_in(text, base)
        return make_source(self.kernel.tables, text, base, self._view.sites, changed)

    def renew(self) -> KernelImage:
        """The tables of the text as it is now, from here on."""
        self._image = self._analyse(*self._text(watched=False))
        self.__dict__.pop("_stretches", None)
        return self._image

    @cached_property
    def btf(self) -> Btf | None:
        """The kernel's types; None if it was built without."""
        return find_btf(self._view.driver.read, self._view.driver.lookup)

    def _hints(self) -> Hints:
        driver, image = self._view.driver, self._view.images[0]
        taken = taken_addresses(driver.read, driver.lookup, (image.starts[0], image.end))
        exported = exported_addresses(driver.read, driver.lookup)
        return Hints(taken, prototype_arguments(self.btf), exported, image.local)

    def tables(self) -> KernelTables:
        """The kernel and every kmod loaded now.

        Where somebody changed a function everything is analysed anew: rows of other text would
        be wrong.
        """
        image = self.kernel
        if image.changed.any():
            image = self.renew()
        return join([image.tables, *(self._kmod(one) for one in self._view.images[1:])])

    def _kmod(self, image: Symbols) -> KernelTables:
        hints = Hints(np.array(image.starts, np.uint64), {})
        return analyse(self._kmod_parts(image), self._view.sites, hints)

    def _kmod_parts(self, image: Symbols) -> list[Part]:
        start = image.starts[0] if len(image.addr) else image.end
        bounds = (np.array([edge], np.uint64) for edge in (start, image.end))
        text = self._view.read_text(*bounds)[0]
        return make_parts(image, start, text, self._view.sites)


def _matters(tables: KernelTables, changed: Mask) -> bool:
    """Whether what others rely on may have changed: more than the calling convention.

    That is so for functions without it, and for those that did not return, if anybody calls them
    or jumps there.
    """
    functions, edges = tables.functions, tables.edges
    special = changed & ~(functions.is_c & functions.returns)
    if not special.any():
        return False
    target = edges.target[edges.target >= 0]
    source = edges.source[edges.target >= 0]
    function = tables.blocks.function
    outside = function[target] != function[source]
    return bool(special[function[target[outside]]].any())
