# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel at hand as tables: from the cache, or analysed now and kept there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.kernel import (
    Hints,
    KernelTables,
    Stretches,
    analyse,
    analyse_text,
    join,
    live_before,
)
from kernweave.analysis.liveness import live_before as live_alone
from kernweave.analysis.parts import make_parts
from kernweave.analysis.store import find, save
from kernweave.image.btf import Btf, read_btf
from kernweave.image.symbols import Symbols
from kernweave.model.table import select
from kernweave.session.view import KernelView

Addrs = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

_MOST_DIFFERING = 4096  # bytes; beyond it is another kernel
_SYMBOL_BYTES = 12  # of struct kernel_symbol, its value first and relative to itself
_DATA = (("__start_rodata", "__end_rodata"), ("_sdata", "_edata"))
_EXPORTS = (
    ("__start___ksymtab", "__stop___ksymtab"),
    ("__start___ksymtab_gpl", "__stop___ksymtab_gpl"),
)


@dataclass(frozen=True)
class KernelImage:
    """What is known of the kernel's own text.

    Attributes:
        tables: of the text as it was analysed.
        changed: bool[f], functions whose text is another one now: their rows do not hold.
        from_cache: whether nothing had to be analysed.
    """

    tables: KernelTables
    changed: Mask
    from_cache: bool


class Analysis:
    """The tables of one session's kernel, made when they are first asked for."""

    def __init__(self, view: KernelView, cache: Path, progress: Callable[[str], None]) -> None:
        """Remember where to look; nothing is read yet."""
        self._view = view
        self._folder = cache / "analysis" / view.build_id if view.build_id else None
        self._progress = progress

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

    @cached_property
    def kernel(self) -> KernelImage:
        """The kernel's own text."""
        image = self._view.images[0]
        base = image.starts[0]
        bounds = (np.array([edge], np.uint64) for edge in (base, image.end))
        text = self._view.read_text(*bounds)[0]
        known = find(self._folder, text, base, _MOST_DIFFERING) if self._folder else None
        if known is not None:
            changed = _functions_at(known.tables, known.differs, base)
            if not _matters(known.tables, changed):
                return KernelImage(known.tables, changed, True)
        return self._analyse(image, text, base)

    def _analyse(self, image: Symbols, text: bytes, base: int) -> KernelImage:
        self._progress("analysing the kernel (once)")
        sites = self._view.sites
        parts = make_parts(image, base, text, sites)
        hints = Hints(self._taken_addresses(), self._arguments())
        found = analyse_text(parts, sites, hints, text, base)
        if self._folder:
            save(self._folder, found)
        return KernelImage(found.tables, np.zeros(len(parts), bool), False)

    def _arguments(self) -> dict[str, int]:
        """Argument registers of every function that BTF knows by one prototype."""
        btf = self.btf
        if btf is None:
            return {}
        rows = zip(btf.functions.name_off.tolist(), btf.argument_registers.tolist(), strict=True)
        found: dict[str, int] = {}
        for off, count in rows:
            name = btf.name(off)
            found[name] = count if found.get(name, count) == count else -1
        return found

    @cached_property
    def btf(self) -> Btf | None:
        """The kernel's types; None if it was built without."""
        spans = self._spans((("__start_BTF", "__stop_BTF"),))
        if not spans:
            return None
        return read_btf(self._view.driver.read(spans[0][0], spans[0][1] - spans[0][0]))

    def _taken_addresses(self) -> Addrs:
        """What the kernel's data may hold as addresses of functions, and what it exports."""
        driver = self._view.driver
        words = [np.zeros(0, np.uint64)]
        for start, end in self._spans(_DATA):
            data = driver.read(start, end - start)
            words.append(np.frombuffer(data[: len(data) // 8 * 8], "<u8"))
        for start, end in self._spans(_EXPORTS):
            rows = np.frombuffer(driver.read(start, end - start), "<i4").reshape(-1, 3)
            place = np.uint64(start) + np.uint64(_SYMBOL_BYTES) * np.arange(len(rows), dtype="u8")
            words.append(place + rows[:, 0].astype(np.int64).view(np.uint64))
        found = np.concatenate(words)
        image = self._view.images[0]
        inside = (found >= np.uint64(image.starts[0])) & (found < np.uint64(image.end))
        return np.unique(found[inside])

    def _spans(self, symbols: tuple[tuple[str, str], ...]) -> list[tuple[int, int]]:
        addrs = self._view.driver.lookup([name for pair in symbols for name in pair])
        pairs = zip(addrs[::2], addrs[1::2], strict=True)
        return [(start, end) for start, end in pairs if start and end > start]

    def tables(self) -> KernelTables:
        """The kernel and every kmod loaded now; functions that somebody changed as they are."""
        image = self.kernel
        return join([image.tables, *(self._kmod(one) for one in self._view.images[1:])])

    def _kmod(self, image: Symbols) -> KernelTables:
        start = image.starts[0] if len(image.addr) else image.end
        bounds = (np.array([edge], np.uint64) for edge in (start, image.end))
        text = self._view.read_text(*bounds)[0]
        parts = make_parts(image, start, text, self._view.sites)
        return analyse(parts, self._view.sites, Hints(np.array(image.starts, np.uint64), {}))


def _functions_at(tables: KernelTables, positions: npt.NDArray[np.int64], base: int) -> Mask:
    """bool[f]: the functions that hold these byte positions."""
    found = np.zeros(len(tables.functions.addr), bool)
    addrs = np.uint64(base) + positions.astype(np.uint64)
    rows = np.searchsorted(tables.functions.addr, addrs, side="right") - 1
    found[rows[rows >= 0]] = True
    return found


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
