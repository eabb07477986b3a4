# SPDX-License-Identifier: GPL-2.0-or-later
"""A function's instructions as a user reads them: text, edges, what is dead, which tactic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.analysis.kernel import Hints, KernelTables, analyse
from kernweave.image.sites import Sites
from kernweave.model.tables import EdgeKind
from kernweave.session.survey import SiteVerdict
from kernweave.session.tables import Kernel
from kernweave.x86.effect import ALL_MASK
from kernweave.x86.text import disassemble, mask_names

INSN_SCHEMA = "kernweave.insn/1"
_INSIDE = (EdgeKind.TAKEN, EdgeKind.LABEL, EdgeKind.FALL)


@dataclass(frozen=True, slots=True)
class EdgeInfo:
    """Where control may go from an instruction.

    Attributes:
        kind: name of an `EdgeKind` in lower case.
        to: the point it leads to, None for returns and indirect ones.
        to_addr: its address, None likewise.
        candidates: of an indirect one: how many functions fit, else None.
    """

    kind: str
    to: str | None
    to_addr: str | None
    candidates: int | None


@dataclass(frozen=True, slots=True)
class InsnInfo:
    """One instruction: the fields of kernweave.insn/1."""

    schema: str
    point: str
    addr: str
    function: str
    offset: int
    bytes: str
    text: str
    leader: bool
    successors: tuple[str, ...]
    tactic: str | None
    reason: str | None
    dead: str
    edges: tuple[EdgeInfo, ...]


class Listing:
    """Describes the instructions of some functions."""

    def __init__(self, kernel: Kernel, code: Code, sites: Sites) -> None:
        """Find the edges of `code`, which was decoded from the text as it is now."""
        self._kernel = kernel
        self._code = code
        self._edges = _edges_by_addr(kernel, code, sites)

    def rows(self, live: npt.NDArray[np.uint32], verdicts: Sequence[SiteVerdict]) -> list[InsnInfo]:
        """One row per instruction with a verdict: a cold part's function may not be asked for.

        Args:
            live: uint32[n], mask of what is live before each.
            verdicts: what could be placed at each.
        """
        known = {one.addr: one for one in verdicts}
        found = (
            (row, known.get(f"{addr:#x}")) for row, addr in enumerate(self._code.addr.tolist())
        )
        return [self._describe(row, int(live[row]), one) for row, one in found if one]

    def _describe(self, row: int, live: int, verdict: SiteVerdict) -> InsnInfo:
        code, addr = self._code, int(self._code.addr[row])
        part = code.parts[int(code.part[row])]
        target = int(code.target[row])
        edges = self._edges.get(addr, [])
        return InsnInfo(
            INSN_SCHEMA,
            verdict.point,
            f"{addr:#x}",
            part.symbol,
            addr - part.start,
            code.raw(row).hex(),
            disassemble(code.raw(row), addr, self._near(row, target) if target else None),
            bool(code.leader[row]),
            self._successors(row, edges),
            verdict.tactic,
            verdict.reason,
            mask_names(ALL_MASK & ~live),
            tuple(self._edge(*edge) for edge in edges),
        )

    def _near(self, row: int, target: int) -> str:
        """A place in the words of a point: `+0x31` inside the part, `f+0x31` elsewhere."""
        part = self._code.parts[int(self._code.part[row])]
        if part.start <= target < part.end:
            return f"+{target - part.start:#x}"
        return self._kernel.point_at(target)

    def _successors(self, row: int, edges: Sequence[tuple[EdgeKind, int, int]]) -> tuple[str, ...]:
        """Where control goes behind the last instruction of a block, inside the function."""
        leader = self._code.leader
        if row + 1 < len(leader) and not leader[row + 1]:
            return ()
        return tuple(
            self._near(row, target)
            for wanted in _INSIDE
            for kind, target, _ in edges
            if kind is wanted and target
        )

    def _edge(self, kind: EdgeKind, target: int, arguments: int) -> EdgeInfo:
        if kind is EdgeKind.INDIRECT:
            fits = int(self._kernel.fitting[arguments])
            return EdgeInfo(kind.name.lower(), None, None, fits)
        if kind is EdgeKind.RETURN or not target:
            return EdgeInfo(kind.name.lower(), None, None, None)
        return EdgeInfo(kind.name.lower(), self._kernel.point_at(target), f"{target:#x}", None)


def _edges_by_addr(
    kernel: Kernel, code: Code, sites: Sites
) -> dict[int, list[tuple[EdgeKind, int, int]]]:
    """(kind, target's address or 0, arguments) of the edges from each instruction's address."""
    found: dict[int, list[tuple[EdgeKind, int, int]]] = {}
    for number, part in enumerate(code.parts):
        addr = code.addr[code.part == number]
        if not len(addr):
            continue
        row = kernel.row_at(part.start)
        tables, insns = kernel.tables, _insns(kernel.tables, row) if row >= 0 else range(0)
        if not np.array_equal(tables.instructions.addr[insns.start : insns.stop], addr):
            # loaded or changed since the tables were made
            tables = analyse([part], sites, Hints(np.zeros(0, np.uint64), {}))
            insns = range(len(tables.instructions.addr))
        _collect(tables, insns, found)
    return found


def _insns(tables: KernelTables, row: int) -> range:
    first, count = int(tables.functions.first_insn[row]), int(tables.functions.insns[row])
    return range(first, first + count)


def _collect(
    tables: KernelTables, insns: range, found: dict[int, list[tuple[EdgeKind, int, int]]]
) -> None:
    edges, instructions = tables.edges, tables.instructions
    first, end = np.searchsorted(edges.insn, [insns.start, insns.stop])
    for row in range(int(first), int(end)):
        insn, block = int(edges.insn[row]), int(edges.target[row])
        target = tables.blocks.addr[block] if block >= 0 else instructions.target[insn]
        edge = EdgeKind(int(edges.kind[row])), int(target), int(edges.arguments[row])
        found.setdefault(int(instructions.addr[insn]), []).append(edge)
