# SPDX-License-Identifier: GPL-2.0-or-later
"""The grammar of points: text to a value and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from kernweave.errors import UsageError


class Selector(StrEnum):
    """Which points of a function are meant."""

    ENTRY = "entry"
    RETURN = "return"
    INSNS = "insns"
    BLOCKS = "blocks"
    EDGES = "edges"
    CALLS = "calls"
    LOADS = "loads"
    STORES = "stores"


class Kind(StrEnum):
    """What a counted point is; values of the JSON field `kind`."""

    ENTRY = "entry"
    RETURN = "return"
    INSN = "insn"
    BLOCK = "block"
    EDGE = "edge"
    CALL = "call"
    LOAD = "load"
    STORE = "store"


KIND_OF = {
    Selector.ENTRY: Kind.ENTRY,
    Selector.RETURN: Kind.RETURN,
    Selector.INSNS: Kind.INSN,
    Selector.BLOCKS: Kind.BLOCK,
    Selector.EDGES: Kind.EDGE,
    Selector.CALLS: Kind.CALL,
    Selector.LOADS: Kind.LOAD,
    Selector.STORES: Kind.STORE,
}

_LATER = {"paths"}

_NUMBER = r"\#(?P<{}>[1-9][0-9]*)"
_OFFSET = r"\+(?P<{}>0[xX][0-9a-fA-F]+|[0-9]+)"
_TO = rf"->(?:(?P<to>[\w.$-]+?)(?:{_NUMBER.format('to_number')})?)?{_OFFSET.format('to_offset')}"
_POINT = re.compile(
    rf"""(?:(?P<kmod>[\w.-]+):)?
        (?P<function>[\w.*?\[\]!$-]+?)
        (?:{_NUMBER.format("number")})?
        (?:{_OFFSET.format("offset")}(?:{_TO})?|@(?P<selector>\w+))?""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class EdgeEnd:
    """Where an edge leads: a place in the same function.

    Attributes:
        function: the function part's name; empty: the part in which the edge begins.
        number: 1-based choice among equal names, or None.
        offset: bytes from the part's symbol.
    """

    function: str
    number: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class PointSpec:
    """One point as the user wrote it.

    Attributes:
        text: the user's own words.
        kmod: kmod's name, None: any (`vmlinux` is a kmod name).
        function: name or glob; `.cold` belongs to it; empty for an address.
        number: 1-based choice among equal names, or None.
        offset: bytes from the symbol, or None.
        selector: which points of the function, when there is no offset.
        addr: run-time address for `0xADDR`, or None.
        to: of an edge, where it leads.
    """

    text: str
    kmod: str | None
    function: str
    number: int | None
    offset: int | None
    selector: Selector
    addr: int | None
    to: EdgeEnd | None = None

    @property
    def is_glob(self) -> bool:
        """Whether the name is a pattern: then a part of its points may be placed."""
        return any(char in self.function for char in "*?[")

    @property
    def is_explicit(self) -> bool:
        """Whether one single point is named: then it is placed or the request fails."""
        single = self.offset is not None or self.addr is not None
        return not self.is_glob and (single or self.selector is Selector.ENTRY)


def parse_point(text: str) -> PointSpec:
    """Parse one point.

    Raises:
        UsageError: not a point, or a selector that does not exist (yet).

    Example:
        >>> parse_point("vfs_read@blocks").selector
        <Selector.BLOCKS: 'blocks'>
        >>> hex(parse_point("vfs_read+0x3f").offset)
        '0x3f'
        >>> parse_point("vfs_read+0x36->vfs_read.cold+0x0").to
        EdgeEnd(function='vfs_read.cold', number=None, offset=0)
    """
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        return PointSpec(text, None, "", None, None, Selector.INSNS, int(text, 16))
    match = _POINT.fullmatch(text)
    if match is None:
        edge = "function+0xOFF->+0xOFF, " if "->" in text else ""
        raise UsageError(
            f"not a point: {text!r}",
            notes=["a shell takes > for itself: quote edges"] if text.endswith("-") else [],
            help=f"write {edge}function, function+0xOFF, function@blocks or 0xADDR",
        )
    offset = match["offset"]
    return PointSpec(
        text,
        match["kmod"],
        match["function"],
        int(match["number"]) if match["number"] else None,
        int(offset, 0) if offset else None,
        _parse_selector(text, match["selector"]),
        None,
        _parse_end(match) if match["to_offset"] else None,
    )


def _parse_end(match: re.Match[str]) -> EdgeEnd:
    number = int(match["to_number"]) if match["to_number"] else None
    return EdgeEnd(match["to"] or "", number, int(match["to_offset"], 0))


def _parse_selector(text: str, name: str | None) -> Selector:
    if name is None:
        return Selector.ENTRY
    try:
        return Selector(name)
    except ValueError:
        state = "is not there yet" if name in _LATER else "does not exist"
        known = ", ".join(selector.value for selector in Selector)
        raise UsageError(
            f"selector @{name} {state}: {text!r}", help=f"use one of {known}"
        ) from None


def format_point(name: str, offset: int, kind: Kind, *, at_entry: bool) -> str:
    """The printed form of a point, which `parse_point` accepts.

    Args:
        name: the function part's name, with kmod and number where they are needed.
        offset: bytes from the part's symbol.
        kind: what is counted.
        at_entry: whether this is where calls of the function arrive.

    Example:
        >>> format_point("vfs_read", 0x3f, Kind.BLOCK, at_entry=False)
        'vfs_read+0x3f'
        >>> format_point("vfs_read", 0, Kind.BLOCK, at_entry=True)
        'vfs_read'
    """
    if at_entry and kind in (Kind.ENTRY, Kind.BLOCK):
        return name
    return f"{name}+{offset:#x}"


def format_edge(name: str, offset: int, to_name: str, to_offset: int) -> str:
    """The printed form of an edge, which `parse_point` accepts.

    Args:
        name: the function part's name, with kmod and number where they are needed.
        offset: bytes from the part's symbol to the instruction that leads on.
        to_name: the part it leads to, without kmod; empty: the same.
        to_offset: bytes from that part's symbol.

    Example:
        >>> format_edge("vfs_read", 0x36, "", 0x3c)
        'vfs_read+0x36->+0x3c'
    """
    return f"{name}+{offset:#x}->{to_name}+{to_offset:#x}"
