# SPDX-License-Identifier: GPL-2.0-or-later
"""Thin views over rows of the tables: functions, blocks, calls."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from kernweave.model.tables import EdgeKind
from kernweave.session.html import table_html
from kernweave.session.survey import prototype_of
from kernweave.x86.effect import ALL_MASK
from kernweave.x86.text import mask_names

if TYPE_CHECKING:
    from kernweave.session.tables import Kernel


@dataclass(frozen=True, slots=True)
class Call:
    """All places where one function calls another, or jumps to it, directly.

    Attributes:
        caller: the calling function.
        callee: the called one.
        kind: `call`, or `sibling`: a jump that leaves the caller for good.
        sites: points, in the order of their addresses.
    """

    caller: Function
    callee: Function
    kind: str
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IndirectSite:
    """A place from which a function calls, or jumps, to where a register or memory says.

    Attributes:
        point: the place.
        arguments: how many argument registers may hold a value there.
        candidates: how many functions fit, see `Kernel.candidates`.
    """

    point: str
    arguments: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Function:
    """One function: a view over its row."""

    kernel: Kernel
    row: int

    @property
    def name(self) -> str:
        """As printed in points."""
        return self.kernel.name(self.row)

    @property
    def symbol(self) -> str:
        """The plain symbol."""
        return self.kernel.tables.names[self.row]

    @property
    def kmod(self) -> str | None:
        """The kmod's name, None for the kernel itself."""
        image = int(self.kernel.tables.functions.kmod[self.row])
        return self.kernel.images[image] if image else None

    @property
    def addr(self) -> int:
        """Run-time address."""
        return int(self.kernel.tables.functions.addr[self.row])

    @property
    def size(self) -> int:
        """Bytes up to the next symbol."""
        return int(self.kernel.tables.functions.size[self.row])

    @property
    def prototype(self) -> str | None:
        """Its C declaration, None where BTF has none or several of that name."""
        return prototype_of(self.kernel.btf, self.kmod, self.symbol)

    @property
    def blocks(self) -> list[Block]:
        """Its blocks in address order."""
        functions = self.kernel.tables.functions
        first, count = int(functions.first_block[self.row]), int(functions.blocks[self.row])
        return [Block(self.kernel, first + i) for i in range(count)]

    # ---- calls ---------------------------------------------------------------------------------

    @property
    def parent(self) -> Function:
        """The function that a `.cold` part belongs to; for any other itself."""
        return Function(self.kernel, int(self.kernel.tables.functions.parent[self.row]))

    @property
    def callers(self) -> list[Function]:
        """Functions that call it or jump to it directly, each once."""
        return self._others("callee", "caller")

    @property
    def callees(self) -> list[Function]:
        """Functions that it calls or jumps to directly, from its `.cold` parts too, each once."""
        return self._others("caller", "callee")

    def _others(self, own: str, other: str) -> list[Function]:
        calls = self.kernel.calls.columns()
        rows = np.unique(calls[other][calls[own] == self.parent.row])
        return [Function(self.kernel, row) for row in rows.tolist()]

    @property
    def calls_in(self) -> list[Call]:
        """How each of `callers` gets here."""
        return self._grouped("callee")

    @property
    def calls_out(self) -> list[Call]:
        """How it gets to each of `callees`."""
        return self._grouped("caller")

    def _grouped(self, own: str) -> list[Call]:
        kernel, calls = self.kernel, self.kernel.calls.columns()
        found: dict[tuple[int, int, int], list[str]] = {}
        rows = np.flatnonzero(calls[own] == self.parent.row)
        keys = zip(
            *(calls[name][rows].tolist() for name in ("caller", "callee", "kind")), strict=True
        )
        addrs = kernel.tables.instructions.addr[calls["insn"][rows]].tolist()
        for key, addr in zip(keys, addrs, strict=True):
            found.setdefault(key, []).append(kernel.point_at(addr))
        return [
            Call(
                Function(kernel, caller),
                Function(kernel, callee),
                EdgeKind(kind).name.lower(),
                tuple(sites),
            )
            for (caller, callee, kind), sites in found.items()
        ]

    @property
    def indirect_sites(self) -> list[IndirectSite]:
        """Its indirect calls and jumps, those of its `.cold` parts too."""
        kernel = self.kernel
        tables, edges = kernel.tables, kernel.indirect_sites()
        function = tables.functions.parent[tables.blocks.function[tables.edges.source[edges]]]
        edges = edges[function == self.parent.row]
        addrs = tables.instructions.addr[tables.edges.insn[edges]].tolist()
        passed = tables.edges.arguments[edges].tolist()
        return [
            IndirectSite(kernel.point_at(addr), number, int(kernel.fitting[number]))
            for addr, number in zip(addrs, passed, strict=True)
        ]

    @property
    def address_taken(self) -> bool:
        """Whether its address is an operand or a word of data: it may be called indirectly."""
        return bool(self.kernel.tables.functions.address_taken[self.row])

    @property
    def fitting_sites(self) -> int:
        """How many indirect calls and jumps of the whole kernel may lead to it."""
        if not self.address_taken:
            return 0
        needed = self.kernel.tables.functions.arguments[self.row]
        passed = self.kernel.tables.edges.arguments[self.kernel.indirect_sites()]
        return int(np.count_nonzero(needed <= passed))

    def __repr__(self) -> str:
        return f"<function {self.name} at {self.addr:#x}, {self.size} bytes>"

    def _repr_html_(self) -> str:
        blocks = self.blocks
        cells = {
            "block": np.array([block.point for block in blocks], object),
            "bytes": np.array([block.size for block in blocks], object),
            "edges": np.array([_edges_text(block) for block in blocks], object),
            "dead": np.array([block.dead for block in blocks], object),
        }
        title = self.prototype or self.name
        return f"<p><code>{escape(title)}</code></p>{table_html(cells, len(blocks))}"


@dataclass(frozen=True, slots=True)
class Block:
    """One basic block: a view over its row."""

    kernel: Kernel
    row: int

    @property
    def addr(self) -> int:
        """Run-time address."""
        return int(self.kernel.tables.blocks.addr[self.row])

    @property
    def size(self) -> int:
        """Bytes up to the end of its last instruction."""
        return int(self.kernel.tables.blocks.size[self.row])

    @property
    def function(self) -> Function:
        """The function it is in."""
        return Function(self.kernel, int(self.kernel.tables.blocks.function[self.row]))

    @property
    def point(self) -> str:
        """How it is named as a point."""
        function = self.function
        return f"{function.name}+{self.addr - function.addr:#x}"

    @property
    def successors(self) -> list[tuple[str, Block | None]]:
        """(kind, target) of its edges; the target is None where nothing is known of it."""
        edges = self.kernel.tables.edges
        first, end = np.searchsorted(edges.source, [self.row, self.row + 1])
        return [
            (
                EdgeKind(int(edges.kind[row])).name.lower(),
                Block(self.kernel, int(edges.target[row])) if edges.target[row] >= 0 else None,
            )
            for row in range(int(first), int(end))
        ]

    @property
    def dead(self) -> str:
        """Registers and flags that nothing reads any more before it, for instance `r11 flags`."""
        return mask_names(ALL_MASK & ~int(self.kernel.tables.blocks.live[self.row]))

    def __repr__(self) -> str:
        return f"<block {self.point}, {self.size} bytes>"


def _edges_text(block: Block) -> str:
    return ", ".join(
        f"{kind} {target.kernel.point_at(target.addr)}" if target else kind
        for kind, target in block.successors
    )
