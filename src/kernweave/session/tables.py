# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's tables as users see them: columns, and functions by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.analysis.kernel import KernelTables
from kernweave.errors import Reason, RefusedError, UsageError
from kernweave.image.btf import Btf
from kernweave.image.symbols import Symbols
from kernweave.model.point import Selector, parse_point
from kernweave.model.table import Column, columns
from kernweave.model.tables import EdgeKind
from kernweave.session.callgraph import AddressIndex, Rows, count_fitting, find_calls, link
from kernweave.session.html import table_html
from kernweave.session.names import NotOne, find_one, printed_name
from kernweave.session.rows import Block, Function
from kernweave.x86.counter import saves_nothing

__all__ = ["Block", "Function", "FunctionTable", "Kernel", "Table"]

_HELP = {
    Reason.NO_SUCH_NAME: "check the spelling: kernweave list GLOB",
    Reason.AMBIGUOUS: "choose one by its number",
}


class Kernel:
    """All tables of one kernel, its kmods included."""

    def __init__(
        self, tables: KernelTables, symbols: Sequence[Symbols], btf: Callable[[], Btf | None]
    ) -> None:
        """Wrap tables; `symbols` are those of the kernel and then of each kmod."""
        self.tables = link(tables)
        self.images = [image.kmod or "vmlinux" for image in symbols]
        self._symbols = symbols
        self._btf = btf
        self.functions = FunctionTable(self)
        self.blocks = Table(self.tables.blocks)
        self.instructions = Table(self.tables.instructions)
        self.edges = Table(self.tables.edges)

    @cached_property
    def btf(self) -> Btf | None:
        """The kernel's types, None if it has none."""
        return self._btf()

    @cached_property
    def calls(self) -> Table:
        """Direct calls and jumps between functions, one row per site."""
        return Table(find_calls(self.tables))

    # ---- names ---------------------------------------------------------------------------------

    def name(self, row: int) -> str:
        """The name of a function as it is printed in points."""
        functions = self.tables.functions
        image = self._symbols[int(functions.kmod[row])]
        addr = int(functions.addr[row])
        return printed_name(self._symbols, image, self.tables.names[row], addr)

    @cached_property
    def names(self) -> list[str]:
        """The name of each function."""
        return [self.name(row) for row in range(len(self.tables.names))]

    @cached_property
    def _by_addr(self) -> AddressIndex:
        return AddressIndex(self.tables.functions.addr)

    def row_at(self, addr: int) -> int:
        """Row of the function that holds a run-time address, -1 if there is none."""
        functions = self.tables.functions
        row = int(self._by_addr.last_before(np.array([addr], np.uint64))[0])
        return row if row >= 0 and addr - int(functions.addr[row]) < functions.size[row] else -1

    def point_at(self, addr: int) -> str:
        """A run-time address as a point: `vfs_read+0x31`; as a number outside of all functions."""
        row = self.row_at(addr)
        if row < 0:
            return f"{addr:#x}"
        off = addr - int(self.tables.functions.addr[row])
        return self.name(row) + (f"+{off:#x}" if off else "")

    def find(self, name: str) -> int:
        """Row of the function that a name means, as in a point without offset and selector.

        Raises:
            UsageError: not a name of that kind.
            RefusedError: there is no such function, or there are several.
        """
        spec = parse_point(name)
        rest = spec.offset is not None or spec.addr is not None or spec.is_glob
        if rest or spec.selector is not Selector.ENTRY:
            raise UsageError(f"not the name of one function: {name!r}", help="write its name alone")
        found = find_one(self._symbols, spec)
        if isinstance(found, NotOne):
            raise RefusedError(
                f"cannot find {name}: {found.detail}",
                [(name, found.reason, found.detail)],
                help=_HELP[found.reason],
            )
        row = self.row_at(found[1])
        assert row >= 0, "every symbol has a row"
        return row

    # ---- indirect calls ------------------------------------------------------------------------

    @cached_property
    def fitting(self) -> Rows:
        """int64[7]: how many functions an indirect site may call that passes 0..6 arguments."""
        return count_fitting(self.tables)

    def candidates(self, edge: int) -> list[Function]:
        """Functions that an indirect call or jump may lead to.

        Those whose address is known to be taken and whose prototype needs no argument that the
        site cannot have passed.
        """
        functions = self.tables.functions
        passed = self.tables.edges.arguments[edge]
        fits = functions.address_taken & (functions.arguments <= passed)
        return [self.function(row) for row in np.flatnonzero(fits).tolist()]

    def indirect_sites(self) -> Rows:
        """int64[k]: rows of the edges that are indirect calls and jumps."""
        return np.flatnonzero(self.tables.edges.kind == EdgeKind.INDIRECT)

    def no_save(self) -> dict[str, float]:
        """Share of the points, by selector, at which a counter saves no register and no flags."""
        blocks, functions = self.tables.blocks, self.tables.functions
        first = functions.first_block[(functions.parent == np.arange(len(self.tables.names)))]
        return {
            "entry": _share(blocks.live[first[first >= 0]]),
            "blocks": _share(blocks.live),
        }

    def function(self, row: int) -> Function:
        """The view of one row."""
        return Function(self, int(row))


def _share(live: npt.NDArray[np.uint32]) -> float:
    return round(float(saves_nothing(live).mean()), 5) if len(live) else 1.0


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

    def _repr_html_(self) -> str:
        return table_html(self.columns(), len(self))


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
            UsageError: not a name.
            RefusedError: there is no such function, or there are several.
        """
        return Function(self._kernel, self._kernel.find(name))

    def __contains__(self, name: object) -> bool:
        try:
            self._kernel.find(str(name))
        except (UsageError, RefusedError):
            return False
        return True

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
