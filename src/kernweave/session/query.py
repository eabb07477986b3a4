# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables in DuckDB: one view each, over the columns where they are."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from kernweave.errors import UnsupportedError
from kernweave.model.table import Column
from kernweave.model.tables import EdgeKind
from kernweave.x86.effect import (
    ALL_MASK,
    FLAG_NAMES,
    FLAGS_MASK,
    FLAGS_SHIFT,
    REG_NAMES,
    Flow,
)

if TYPE_CHECKING:
    from kernweave.session.tables import Kernel


def find_duckdb(purpose: str) -> Any:
    """The module `duckdb`, which is an optional dependency.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise UnsupportedError(
            f"{purpose} needs DuckDB", help="pip install 'kernweave[query]'"
        ) from None
    return duckdb


def open_database(kernel: Kernel) -> Any:
    """A DuckDB connection with the tables as views and words for what they hold.

    Views: functions, blocks, instructions, edges, calls, images; each has a column `row`.
    Macros: edge_kind(kind), flow_name(flow), registers(mask), dead(live), point(function, addr).

    Raises:
        UnsupportedError: DuckDB is not installed.
    """
    database = find_duckdb("a query").connect()
    tables = {
        "functions": kernel.functions,
        "blocks": kernel.blocks,
        "instructions": kernel.instructions,
        "edges": kernel.edges,
        "calls": kernel.calls,
    }
    for name, table in tables.items():
        database.register(name, _with_rows(table.columns()))
    database.register("images", _with_rows({"name": np.array(kernel.images, object)}))
    for macro in _macros():
        database.execute(f"CREATE MACRO {macro}")
    return database


def _with_rows(columns: dict[str, Column]) -> dict[str, Column]:
    count = len(next(iter(columns.values())))
    return {"row": np.arange(count, dtype=np.int32), **columns}


def _macros() -> list[str]:
    bits = {1 << bit: name for bit, name in enumerate(REG_NAMES)}
    flags = {1 << bit: name for bit, name in enumerate(FLAG_NAMES, FLAGS_SHIFT)}
    words = [f"CASE WHEN m & {bit} <> 0 THEN '{name}' END" for bit, name in bits.items()]
    words += [f"CASE WHEN m & {FLAGS_MASK} = {FLAGS_MASK} THEN 'flags' END"]
    words += [
        f"CASE WHEN m & {bit} <> 0 AND m & {FLAGS_MASK} <> {FLAGS_MASK} THEN '{name}' END"
        for bit, name in flags.items()
    ]
    offset = "CASE WHEN a = addr THEN '' ELSE '+0x' || lower(to_hex(a - addr)) END"
    return [
        f"edge_kind(k) AS {_word('k', EdgeKind)}",
        f"flow_name(f) AS {_word('f', Flow)}",
        f"registers(m) AS concat_ws(' ', {', '.join(words)})",
        f"dead(l) AS registers({ALL_MASK} - (l & {ALL_MASK}))",
        f"point(f, a) AS (SELECT name || {offset} FROM functions WHERE row = f)",
    ]


def _word(value: str, names: type[IntEnum]) -> str:
    cases = " ".join(f"WHEN {one.value} THEN '{one.name.lower()}'" for one in names)
    return f"CASE {value} {cases} END"
