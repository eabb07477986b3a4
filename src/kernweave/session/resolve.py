# SPDX-License-Identifier: GPL-2.0-or-later
"""Points as the user wrote them to rows of decoded code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.expand import select_rows
from kernweave.analysis.parts import trim
from kernweave.errors import Reason
from kernweave.image.sites import contains
from kernweave.image.symbols import Symbols
from kernweave.model.plan import Point, Refused
from kernweave.model.point import KIND_OF, Kind, PointSpec, Selector, format_point
from kernweave.session.names import NotOne, find_one, images_of, printed_name
from kernweave.session.view import KernelView

_KINDS = tuple(Kind)
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
class Resolved:
    """What was asked for, as rows of `code`.

    Attributes:
        code: the functions concerned.
        rows: int64[m], row of each point, in the order asked for, each row and kind once.
        counted: int64[m], row that counts each: its own, or the one behind its endbr64.
        kinds: uint8[m], what each is: its place in `Kind`.
        explicit: bool[m], named one by one, so that a refusal is an error.
        refused: points that are not in the code at all.
        refused_explicit: how many of `refused` were named one by one.
    """

    code: Code
    rows: npt.NDArray[np.int64]
    counted: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    explicit: npt.NDArray[np.bool_]
    refused: tuple[Refused, ...]
    refused_explicit: int

    def only(self, chosen: npt.NDArray[np.bool_]) -> Resolved:
        """Some of the points; those that are not in the code are left out."""
        columns = (self.rows[chosen], self.counted[chosen], self.kinds[chosen])
        return Resolved(self.code, *columns, self.explicit[chosen], (), 0)

    def point(self, i: int) -> Point:
        """The point of that number."""
        code, row = self.code, int(self.rows[i])
        part_row = int(code.part[row])
        part = code.parts[part_row]
        offset = int(code.addr[row]) - part.start
        at_entry = part.group == part.start and int(code.entries[part_row]) == row
        kind = _KINDS[self.kinds[i]]
        text = format_point(part.name, offset, kind, at_entry=at_entry)
        return Point(text, part.symbol, part.kmod, offset, int(code.addr[row]), kind)


class Resolver:
    """Looks names up and decodes what they mean, for one request."""

    def __init__(self, view: KernelView) -> None:
        """Start a request on the view as it is now."""
        self._view = view
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
        code = self._decode()
        found = [(spec, *self._rows_of(spec, named, code)) for spec, named in wanted]
        rows = np.concatenate([np.zeros(0, np.int64), *(rows for _, _, rows in found)])
        sizes = [len(rows) for _, _, rows in found]
        kinds = np.repeat(np.array([_KINDS.index(kind) for _, kind, _ in found], np.uint8), sizes)
        explicit = np.repeat(np.array([spec.is_explicit for spec, _, _ in found], bool), sizes)
        _, first = np.unique(rows * len(_KINDS) + kinds, return_index=True)
        kept = np.sort(first)
        return Resolved(
            code,
            rows[kept],
            code.past_endbr(rows[kept]),
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
        self._full[named.start] = named
        if named.start not in self._cold:  # its jumps back are branch targets here
            self._cold[named.start] = self._cold_parts(named)
            for cold in self._cold[named.start]:
                self._full[cold.start] = cold

    def _cold_parts(self, named: Named) -> list[Named]:
        """The `.cold` parts of a function; of several of one name those it jumps to."""
        symbol = f"{named.symbol}.cold"
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

    def _rows_of(
        self, spec: PointSpec, named: Sequence[Named], code: Code
    ) -> tuple[Kind, npt.NDArray[np.int64]]:
        if spec.offset is not None or spec.addr is not None:
            rows = [self._row_at(spec, one, code) for one in named]
            return Kind.INSN, np.array([row for row in rows if row >= 0], np.int64)
        starts = [
            start
            for one in named
            for start in (one.start, *(cold.start for cold in self._cold.get(one.start, [])))
        ]
        parts = [self._part_rows[start] for start in starts]
        return KIND_OF[spec.selector], select_rows(code, parts, spec.selector)

    def _row_at(self, spec: PointSpec, named: Named, code: Code) -> int:
        addr = named.start + spec.offset if spec.offset is not None else spec.addr
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
