# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables in SQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kernweave.errors import UnsupportedError
from kernweave.model.table import columns
from kernweave.model.tables import EdgeKind
from kernweave.session.query import open_database
from kernweave.session.tables import Kernel
from kernweave.x86.effect import ALL_MASK
from kernweave.x86.text import mask_names
from pure.kernels import make_kernel

VIEWS = ("functions", "blocks", "instructions", "edges", "calls", "images")


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return make_kernel()


@pytest.fixture(scope="module")
def database(kernel: Kernel) -> Iterator[Any]:
    with open_database(kernel) as database:
        yield database


def ask(database: Any, sql: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = database.execute(sql).fetchall()
    return found


def test_views_hold_the_columns_as_they_are(kernel: Kernel, database: Any) -> None:
    for name, table in columns_by_view(kernel).items():
        got = database.execute(f"FROM {name} ORDER BY row").fetchnumpy()
        assert got["row"].tolist() == list(range(len(got["row"])))
        assert set(got) == {"row", *table}
        assert all(got[key].tolist() == table[key].tolist() for key in table)


def columns_by_view(kernel: Kernel) -> dict[str, Any]:
    return {name: getattr(kernel, name).columns() for name in VIEWS[:-1]}


def test_images_name_what_kmod_counts(database: Any) -> None:
    sql = "select images.name, count(*) from functions f join images on f.kmod = images.row"
    assert ask(database, f"{sql} group by all order by all") == [("km", 2), ("vmlinux", 5)]


def test_calls_join_with_functions_on_both_sides(database: Any) -> None:
    sql = """select a.name, b.name, edge_kind(kind), count(*) from calls
             join functions a on caller = a.row join functions b on callee = b.row
             group by all order by all"""
    assert ask(database, sql) == [
        ("a", "b#1", "call", 2),
        ("a", "twice#1", "sibling", 1),
        ("a", "twice#2", "call", 1),
        ("km:m", "a", "sibling", 1),
        ("km:m", "b#1", "call", 1),
        ("km:m", "km:b", "call", 1),
    ]


def test_point_is_the_name_and_the_offset(kernel: Kernel, database: Any) -> None:
    points = ask(database, "select point(function, addr) from instructions order by row")
    addrs = kernel.instructions.columns()["addr"].tolist()
    assert [point for (point,) in points] == [kernel.point_at(addr) for addr in addrs]


def test_words_are_those_of_python(kernel: Kernel, database: Any) -> None:
    for kind in EdgeKind:
        assert ask(database, f"select edge_kind({kind.value})") == [(kind.name.lower(),)]
    flows = ask(database, "select distinct flow_name(flow) from instructions order by all")
    assert [word for (word,) in flows] == [
        "branch", "call", "indirect_call", "jump", "next", "return",
    ]  # fmt: skip
    for mask in (0, 1, 0x8000, 0x10001, 0x3F0000, 0x1F0004, ALL_MASK):
        sql = f"select registers({mask}), dead({mask}), dead({mask | 1 << 31}::uinteger)"
        dead = mask_names(ALL_MASK & ~mask)
        assert ask(database, sql) == [(mask_names(mask), dead, dead)]


def test_query_without_duckdb_names_the_extra(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UnsupportedError) as error:
        open_database(kernel)
    assert "pip install 'kernweave[query]'" in str(error.value)


def test_model_tables_have_no_column_called_row(kernel: Kernel) -> None:
    tables = (kernel.tables.functions, kernel.tables.blocks, kernel.tables.edges)
    assert not any("row" in columns(table) for table in tables)
