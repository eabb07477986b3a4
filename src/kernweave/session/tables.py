# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's tables as users see them: columns, and thin views over their rows."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.analysis.kernel import KernelTables
from kernweave.errors import Reason, RefusedError
from kernweave.image.btf import Btf
from kernweave.image.btf_text import prototype
from kernweave.model.table import Column, columns
from kernweave.model.tables import EdgeKind
from kernweave.x86.decode import ALL_MASK, FLAG_NAMES, FLAGS_MASK, FLAGS_SHIFT, REG_NAMES

Rows = npt.NDArray[np.int64]


class Kernel:
    """All tables of one kernel, its kmods included."""

    def __init__(
        self, tables: KernelTables, images: list[str], btf: Callable[[], Btf | None]
    ) -> None:
        """Wrap tables; `images` are the names of the kernel (`vmlinux`) and its kmods."""
        self.tables = tables
        self.images = images
        self._btf = btf
        self.functions = FunctionTable(self)
        self.blocks = Table(tables.blocks)
        self.instructions = Table(tables.instructions)
        self.edges = Table(tables.edges)

    @cached_property
    def btf(self) -> Btf | None:
        """The kernel's types, None if it has none."""
        return self._btf()

    @cached_property
    def names(self) -> list[str]:
        """The name of each function as it is printed in points."""
        kmods = self.tables.functions.kmod.tolist()
        where: dict[tuple[int, str], list[int]] = {}
        everywhere: dict[str, list[int]] = {}
        for row, name in enumerate(self.tables.names):
            where.setdefault((kmods[row], name), []).append(row)
            everywhere.setdefault(name, []).append(row)
        addr = self.tables.functions.addr
        found = []
        for row, name in enumerate(self.tables.names):
            kmod = kmods[row]
            same = everywhere[name] if kmod == 0 else where[kmod, name]
            rank = sorted(same, key=lambda other: int(addr[other])).index(row) + 1
            number = f"#{rank}" if len(same) > 1 else ""
            prefix = f"{self.images[kmod]}:" if kmod else ""
            found.append(f"{prefix}{name}{number}")
        return found

    @cached_property
    def rows_of(self) -> dict[str, list[int]]:
        """Rows of the functions by printed name, and by symbol."""
        found: dict[str, list[int]] = {}
        for row, (name, symbol) in enumerate(zip(self.names, self.tables.names, strict=True)):
            for key in {name, symbol}:
                found.setdefault(key, []).append(row)
        return found

    @cached_property
    def calls(self) -> tuple[Rows, Rows]:
        """(caller, callee) rows of every direct call and sibling jump between functions.

        `.cold` parts count as the function they belong to; each pair is there once.
        """
        edges, blocks, functions = self.tables.edges, self.tables.blocks, self.tables.functions
        kinds = (EdgeKind.CALL, EdgeKind.SIBLING)
        chosen = np.isin(edges.kind, kinds) & (edges.target >= 0)
        ends = (blocks.function[edge[chosen]] for edge in (edges.source, edges.target))
        caller, callee = (functions.parent[end].astype(np.int64) for end in ends)
        pairs = np.unique(caller << 32 | callee)
        return pairs >> 32, pairs & 0xFFFF_FFFF

    def function(self, row: int) -> Function:
        """The view of one row."""
        return Function(self, int(row))

    def candidates(self, edge: int) -> list[Function]:
        """Functions that an indirect call or jump may lead to.

        Those whose address is known to be taken and whose prototype needs no argument that the
        site cannot have passed.
        """
        functions = self.tables.functions
        passed = self.tables.edges.arguments[edge]
        fits = functions.address_taken & (functions.arguments <= passed)
        return [self.function(row) for row in np.flatnonzero(fits).tolist()]


class Table:
    """One table as columns."""

    def __init__(self, table: Any) -> None:
        """Wrap a frozen dataclass of equally long arrays."""
        self._table = table

    def __len__(self) -> int:
        return len(next(iter(columns(self._table).values())))

    def columns(self) -> dict[str, Column]:
        """The columns by name; pandas, polars and duckdb take them as they are."""
        return columns(self._table)

    def __repr__(self) -> str:
        names = ", ".join(self.columns())
        return f"<{type(self._table).__name__.lower()}: {len(self):,} rows of {names}>"


class FunctionTable(Table):
    """The functions; by name, by glob, one after the other."""

    def __init__(self, kernel: Kernel) -> None:
        """Wrap the functions of a kernel."""
        super().__init__(kernel.tables.functions)
        self._kernel = kernel

    def columns(self) -> dict[str, Column]:
        """The columns by name, the names as printed in points among them."""
        names = np.array(self._kernel.names, object)
        return {"name": names, **super().columns()}

    def __getitem__(self, name: str) -> Function:
        """The function of that name, as in a point without offset and selector.

        Raises:
            RefusedError: there is none, or there are several.
        """
        rows = self._kernel.rows_of.get(name.removeprefix("vmlinux:"), [])
        if len(rows) == 1:
            return Function(self._kernel, rows[0])
        if rows:
            names = ", ".join(self._kernel.names[row] for row in rows)
            why, reason = f"{len(rows)} functions: {names}", Reason.AMBIGUOUS
        else:
            why, reason = f"no function {name}", Reason.NO_SUCH_NAME
        raise RefusedError(f"cannot find {name}: {why}", [(name, reason, why)])

    def __contains__(self, name: object) -> bool:
        return len(self._kernel.rows_of.get(str(name), [])) == 1

    def __iter__(self) -> Iterator[Function]:
        return (Function(self._kernel, row) for row in range(len(self)))

    def match(self, glob: str) -> list[Function]:
        """Functions whose printed name, or symbol, matches; `.cold` parts are left out."""
        parent = self._kernel.tables.functions.parent
        return [
            Function(self._kernel, row)
            for row, (name, symbol) in enumerate(
                zip(self._kernel.names, self._kernel.tables.names, strict=True)
            )
            if parent[row] == row and (fnmatch.fnmatchcase(name, glob) or symbol == glob)
        ]


@dataclass(frozen=True, slots=True)
class Function:
    """One function: a view over its row."""

    kernel: Kernel
    row: int

    @property
    def name(self) -> str:
        """As printed in points."""
        return self.kernel.names[self.row]

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
        btf = self.kernel.btf
        found = btf.find_function(self.symbol) if btf and self.kmod is None else None
        return prototype(btf, found) if btf and found is not None else None

    @property
    def blocks(self) -> list[Block]:
        """Its blocks in address order."""
        functions = self.kernel.tables.functions
        first, count = int(functions.first_block[self.row]), int(functions.blocks[self.row])
        return [Block(self.kernel, first + i) for i in range(count)]

    @property
    def callers(self) -> list[Function]:
        """Functions that call it or jump to it directly."""
        caller, callee = self.kernel.calls
        return [Function(self.kernel, int(row)) for row in caller[callee == self.row]]

    @property
    def callees(self) -> list[Function]:
        """Functions that it calls or jumps to directly, its `.cold` parts included."""
        caller, callee = self.kernel.calls
        return [Function(self.kernel, int(row)) for row in callee[caller == self.row]]

    def __repr__(self) -> str:
        return f"<function {self.name} at {self.addr:#x}, {self.size} bytes>"


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


def mask_names(mask: int) -> str:
    """Registers and flags of a mask; all six status flags are called `flags`."""
    names = [name for bit, name in enumerate(REG_NAMES) if mask >> bit & 1]
    flags = [name for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1]
    return " ".join(names + (["flags"] if mask & FLAGS_MASK == FLAGS_MASK else flags))
