# SPDX-License-Identifier: GPL-2.0-or-later
"""A request's points as rows of decoded code, and in words again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code, Mask, Part
from kernweave.model.plan import Point, Refused
from kernweave.model.point import Kind, format_edge, format_point

Rows = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

KINDS = tuple(Kind)


@dataclass(frozen=True)
class Resolved:
    """What was asked for, as rows of `code`.

    Attributes:
        code: the functions concerned.
        rows: int64[m], row of each point, in the order asked for, each point and kind once; of an
            edge that of the instruction it leaves.
        to: int64[m], of an edge the row it leads to, -1 for all others.
        place: uint8[m], `Place` where an edge is counted, seen from its row; `BEFORE` for others.
        counted: int64[m], row that counts each: its own, or the one behind its endbr64.
        kinds: uint8[m], what each is: its place in `Kind`.
        explicit: bool[m], named one by one, so that a refusal is an error.
        refused: points that are not in the code at all.
        refused_explicit: how many of `refused` were named one by one.
    """

    code: Code
    rows: Rows
    to: Rows
    place: U8
    counted: Rows
    kinds: U8
    explicit: Mask
    refused: tuple[Refused, ...]
    refused_explicit: int

    @property
    def edges(self) -> Mask:
        """bool[m]: which points are edges."""
        return self.to >= 0

    def only(self, chosen: Mask) -> Resolved:
        """Some of the points; those that are not in the code are left out."""
        return replace(
            self,
            rows=self.rows[chosen],
            to=self.to[chosen],
            place=self.place[chosen],
            counted=self.counted[chosen],
            kinds=self.kinds[chosen],
            explicit=self.explicit[chosen],
            refused=(),
            refused_explicit=0,
        )

    def point(self, i: int) -> Point:
        """The point of that number."""
        code, row = self.code, int(self.rows[i])
        part_row = int(code.part[row])
        part = code.parts[part_row]
        offset = int(code.addr[row]) - part.start
        if self.to[i] >= 0:
            return self._edge(part, offset, int(self.to[i]))
        at_entry = part.group == part.start and int(code.entries[part_row]) == row
        kind = KINDS[self.kinds[i]]
        text = format_point(part.name, offset, kind, at_entry=at_entry)
        return Point(text, part.symbol, part.kmod, offset, int(code.addr[row]), kind)

    def _edge(self, part: Part, offset: int, to: int) -> Point:
        code, to_addr = self.code, int(self.code.addr[to])
        there = code.parts[int(code.part[to])]
        name = "" if there is part else name_in_image(there)
        text = format_edge(part.name, offset, name, to_addr - there.start)
        addr = part.start + offset
        return Point(text, part.symbol, part.kmod, offset, addr, Kind.EDGE, to_addr)


def name_in_image(part: Part) -> str:
    """A part's printed name without its kmod."""
    return part.name.removeprefix(f"{part.kmod}:")
