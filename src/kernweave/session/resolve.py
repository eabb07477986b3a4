# SPDX-License-Identifier: GPL-2.0-or-later
"""Points as the user wrote them to rows of decoded code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kernweave.analysis.code import Code, Mask, Part, build_code
from kernweave.analysis.expand import select_rows
from kernweave.analysis.inner import InnerEdges, find_inner_edges
from kernweave.analysis.parts import COLD, home_of, trim
from kernweave.errors import Reason
from kernweave.image.sites import contains
from kernweave.image.symbols import Symbols
from kernweave.model.plan import Refused
from kernweave.model.point import (
    KIND_OF,
    EdgeEnd,
    Kind,
    PointSpec,
    Selector,
)
from kernweave.session.names import NotOne, find_one, images_of, printed_name
from kernweave.session.resolved import KINDS, U8, Resolved, Rows, name_in_image
from kernweave.session.view import KernelView
from kernweave.weave.counters import Place, places_of

_ENDBR_BYTES = 4
_NOP_BYTES = 5


@dataclass(frozen=True, slots=True)
class Named:
    """A function part that a point names: image, symbol, printed name, [start, end)."""

    image: Symbols
    symbol: str
    printed: str
    start: int
    end: int


@dataclass(frozen=True)
class _Found:
    """Points of one request, or some of them; columns as in `Resolved`."""

    kind: Kind
    rows: Rows
    to: Rows
    place: U8


def _instructions(kind: Kind, rows: Rows) -> _Found:
    return _Found(kind, rows, np.full(len(rows), -1), np.full(len(rows), Place.BEFORE, np.uint8))


class Resolver:
    """Looks names up and decodes what they mean, for one request."""

    def __init__(self, view: KernelView, comes_back: Callable[[Code], Mask]) -> None:
        """Start a request on the view as it is now.

        Args:
            view: of the kernel.
            comes_back: tells which calls do, bool[n]; asked only for edges.
        """
        self._view = view
        self._comes_back = comes_back
        self._full: dict[int, Named] = {}  # parts to decode whole, by start
        self._entry: dict[int, Named] = {}  # parts of which only the entry is wanted
        self._cold: dict[int, list[Named]] = {}
        self._refused: list[Refused] = []
        self._refused_explicit = 0

    def resolve(self, specs: Sequence[PointSpec]) -> Resolved:
        """Expand `specs`; what cannot be found is refused, not raised."""
        wanted = [(spec, self._find(spec)) for spec in specs]
        for spec, named in wanted:
            for one in named:
                self._want(spec, one)
        code = self._code = self._decode()
        found = [self._points_of(spec, named, code) for spec, named in wanted]
        rows = np.concatenate([np.zeros(0, np.int64), *(one.rows for one in found)])
        to = np.concatenate([np.zeros(0, np.int64), *(one.to for one in found)])
        place = np.concatenate([np.zeros(0, np.uint8), *(one.place for one in found)])
        sizes = [len(one.rows) for one in found]
        kinds = np.repeat(np.array([KINDS.index(one.kind) for one in found], np.uint8), sizes)
        explicit = np.repeat(np.array([spec.is_explicit for spec, _ in wanted], bool), sizes)
        key = (rows * len(KINDS) + kinds) * (len(code.addr) + 1) + to
        _, first = np.unique(key, return_index=True)
        kept = np.sort(first)
        rows, to = rows[kept], to[kept]
        return Resolved(
            code,
            rows,
            to,
            place[kept],
            np.where(to >= 0, rows, code.past_endbr(rows)),
            kinds[kept],
            explicit[kept],
            tuple(self._refused),
            self._refused_explicit,
        )

    # ---- names ---------------------------------------------------------------------------------

    def _find(self, spec: PointSpec) -> list[Named]:
        if spec.addr is not None:
            return self._find_addr(spec)
        if spec.is_glob:
            return self._find_glob(spec)
        return self._find_name(spec)

    def _find_addr(self, spec: PointSpec) -> list[Named]:
        assert spec.addr is not None
        for image in self._view.images:
            bounds = image.bounds(spec.addr) if len(image.addr) else None
            if bounds:
                return [self._name(image, image.name_at[bounds[0]], bounds[0])]
        self._refuse(spec, Reason.NO_SUCH_NAME, f"{spec.text} is not in kernel text")
        return []

    def _find_glob(self, spec: PointSpec) -> list[Named]:
        repeated = self._repeated
        found = [
            self._name(image, name, addr, plain=image.kmod is None and name not in repeated)
            for image in images_of(self._view.images, spec.kmod)
            for name, addr in image.match(spec.function)
        ]
        if not found:
            self._refuse(spec, Reason.NO_SUCH_NAME, f"no function matches {spec.function}")
        return found

    def _find_name(self, spec: PointSpec) -> list[Named]:
        found = find_one(self._view.images, spec)
        if isinstance(found, NotOne):
            self._refuse(spec, found.reason, found.detail)
            return []
        image, addr = found
        return [self._name(image, spec.function, addr)]

    @cached_property
    def _repeated(self) -> frozenset[str]:
        """Names of several functions: in points they need a number."""
        seen: set[str] = set()
        found: set[str] = set()
        for image in self._view.images:
            for name, addrs in image.by_name.items():
                if len(addrs) > 1 or name in seen:
                    found.add(name)
                seen.add(name)
        return frozenset(found)

    def _name(self, image: Symbols, symbol: str, addr: int, plain: bool = False) -> Named:
        """A function part; `plain`: its symbol is known to be its printed name."""
        bounds = image.bounds(addr)
        assert bounds is not None
        printed = symbol if plain else printed_name(self._view.images, image, symbol, addr)
        return Named(image, symbol, printed, addr, bounds[1])

    def _refuse(self, spec: PointSpec, reason: Reason, detail: str) -> None:
        self._refused.append(Refused(spec.text, reason, detail))
        single = spec.is_glob or reason in (Reason.NO_SUCH_NAME, Reason.AMBIGUOUS)
        self._refused_explicit += single or spec.is_explicit

    # ---- code ----------------------------------------------------------------------------------

    def _want(self, spec: PointSpec, named: Named) -> None:
        only_entry = spec.selector is Selector.ENTRY and spec.offset is None and spec.addr is None
        if only_entry:
            self._entry[named.start] = named
            return
        for one in (named, *self._home(named)):
            self._full[one.start] = one
            if one.start not in self._cold:  # its jumps back are branch targets here
                self._cold[one.start] = self._cold_parts(one)
                for cold in self._cold[one.start]:
                    self._full[cold.start] = cold

    def _home(self, named: Named) -> list[Named]:
        """The function of a cold part: they are one, with jumps to and fro."""
        start = home_of(named.image, named.symbol, named.start)
        if start == named.start or start in self._full:
            return []
        return [self._name(named.image, named.symbol.removesuffix(COLD), start)]

    def _cold_parts(self, named: Named) -> list[Named]:
        """The `.cold` parts of a function; of several of one name those it jumps to."""
        symbol = f"{named.symbol}{COLD}"
        addrs = named.image.find(symbol)
        if not addrs:
            return []
        if len(addrs) > 1 or len(named.image.find(named.symbol)) > 1:
            code = build_code(self._parts([named], {}), self._view.sites)
            addrs = [
                addr
                for addr in addrs
                if ((code.target >= addr) & (code.target < _end(named.image, addr))).any()
            ]
        return [self._name(named.image, symbol, addr) for addr in addrs]

    def _text(self, parts: Sequence[Named]) -> list[bytes]:
        starts = np.array([one.start for one in parts], np.uint64)
        ends = np.array([self._read_end(one) for one in parts], np.uint64)
        return [trim(text) for text in self._view.read_text(starts, ends)]

    def _read_end(self, named: Named) -> int:
        """For an entry that is an ftrace nop its bytes are all that is needed."""
        if named.start in self._full or named.start not in self._entry:
            return named.end
        entry = self._ftrace_entry(named.start)
        return named.end if entry is None else entry + _NOP_BYTES

    def _ftrace_entry(self, start: int) -> int | None:
        for addr in (start, start + _ENDBR_BYTES):
            if addr in self._ftrace:
                return addr
        return None

    def _decode(self) -> Code:
        self._ftrace = set(self._view.sites.ftrace.tolist())
        parts = list({**self._entry, **self._full}.values())
        homes = {cold.start: start for start, colds in self._cold.items() for cold in colds}
        code = build_code(self._parts(parts, homes), self._view.sites)
        self._part_rows = {part.start: row for row, part in enumerate(code.parts)}
        return code

    def _parts(self, parts: Sequence[Named], homes: Mapping[int, int]) -> list[Part]:
        """Parts with their text; `homes` has the function of each cold part."""
        groups = np.array([homes.get(one.start, one.start) for one in parts], np.uint64)
        sites = self._view.sites.ftrace
        is_c = contains(sites, groups) | contains(sites, groups + np.uint64(_ENDBR_BYTES))
        rows = zip(parts, self._text(parts), groups.tolist(), is_c.tolist(), strict=True)
        return [
            Part(one.printed, one.symbol, one.image.kmod, one.start, text, group, c)
            for one, text, group, c in rows
        ]

    # ---- points --------------------------------------------------------------------------------

    def _points_of(self, spec: PointSpec, named: Sequence[Named], code: Code) -> _Found:
        if spec.to is not None:
            return self._edges(
                [row for one in named for row in self._edge_rows(spec, spec.to, one, code)]
            )
        if spec.offset is not None or spec.addr is not None:
            rows = [self._row_at(spec, one, spec.offset, code) for one in named]
            return _instructions(Kind.INSN, np.array([row for row in rows if row >= 0], np.int64))
        starts = [
            start
            for one in named
            for start in (one.start, *(cold.start for cold in self._cold.get(one.start, [])))
        ]
        parts = [self._part_rows[start] for start in starts]
        if spec.selector is Selector.EDGES:
            return self._edges(self._inner.of_parts(parts))
        return _instructions(KIND_OF[spec.selector], select_rows(code, parts, spec.selector))

    @cached_property
    def _inner(self) -> InnerEdges:
        return find_inner_edges(self._code, self._view.sites, self._comes_back(self._code))

    def _edges(self, chosen: Rows | Sequence[int]) -> _Found:
        """Edges as points; who branches to what lies behind gets there either way."""
        inner, rows = self._inner, np.asarray(chosen, np.int64)
        place = places_of(inner.kind[rows], self._code.flow[inner.source[rows]])
        place[inner.twice[rows]] = Place.BEFORE
        return _Found(Kind.EDGE, inner.source[rows], inner.target[rows], place)

    def _edge_rows(self, spec: PointSpec, to: EdgeEnd, named: Named, code: Code) -> list[int]:
        """The edge that a point names, as rows of `_inner`; refused if there is none."""
        source = self._row_at(spec, named, spec.offset, code)
        there = self._end_part(spec, to, named, code)
        if source < 0 or there is None:
            return []
        target = self._row_at(spec, there, to.offset, code)
        if target < 0:
            return []
        found = self._inner.between(source, target).tolist()
        if not found:
            self._refuse(spec, Reason.NO_EDGE, self._way_on(code, named, source))
        return list(found)

    def _end_part(self, spec: PointSpec, to: EdgeEnd, named: Named, code: Code) -> Named | None:
        """The part of the same function in which an edge ends."""
        if not to.function:
            return named
        group = code.parts[self._part_rows[named.start]].group
        wanted = to.function if to.number is None else f"{to.function}#{to.number}"
        found = [
            self._full[part.start]
            for part in code.parts
            if part.group == group and wanted in (part.symbol, name_in_image(part))
        ]
        if len(found) == 1:
            return found[0]
        detail = f"{wanted} is no part of the function of {named.printed}"
        self._refuse(spec, Reason.NO_EDGE, detail)
        return None

    def _way_on(self, code: Code, named: Named, source: int) -> str:
        """Name where the edges of an instruction lead."""
        rows = self._inner.leaving(source)
        at = f"+{int(code.addr[source]) - named.start:#x}"
        if not len(rows):
            return f"no edge inside the function leaves {at}"
        places = []
        for row in self._inner.target[rows].tolist():
            part = code.parts[int(code.part[row])]
            name = "" if part.start == named.start else name_in_image(part)
            places.append(f"{at}->{name}+{int(code.addr[row]) - part.start:#x}")
        return f"edges from there: {', '.join(dict.fromkeys(places))}"

    def _row_at(self, spec: PointSpec, named: Named, offset: int | None, code: Code) -> int:
        addr = named.start + offset if offset is not None else spec.addr
        assert addr is not None
        row = int(code.rows_at(np.array([addr], np.uint64))[0])
        if row < 0:
            self._refuse(spec, Reason.NOT_BOUNDARY, _boundaries(code, named, addr))
        return row


def _end(image: Symbols, addr: int) -> int:
    bounds = image.bounds(addr)
    return bounds[1] if bounds else addr


def _boundaries(code: Code, named: Named, addr: int) -> str:
    """Name the instructions around an address that starts none."""
    if addr >= named.end:
        return f"{named.printed} ends at +{named.end - named.start:#x}"
    rows = np.flatnonzero((code.addr < addr) & (code.addr >= named.start))
    if not len(rows):
        return "not an instruction"
    row = rows[np.argmax(code.addr[rows])]
    low = int(code.addr[row]) - named.start
    high = low + int(code.length[row])
    if addr >= named.start + high:
        return f"padding; the last instruction is {named.printed}+{low:#x}"
    return f"inside an instruction; it starts at +{low:#x}, the next at +{high:#x}"
