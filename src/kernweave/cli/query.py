# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave query`: SQL over the kernel's tables."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from kernweave import connect
from kernweave.cli.files import check_path, copy_rows
from kernweave.cli.output import print_json, print_table, progress
from kernweave.errors import UsageError
from kernweave.session.query import find_duckdb

ROW_SCHEMA = "kernweave.row/1"
_SHOWN_ROWS = 30
_AT_ONCE = 10_000
_ADDRESS = "UBIGINT"
_NUMBERS = {
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT",
    "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "FLOAT", "DOUBLE",
}  # fmt: skip
_INT64_MAX = 2**63


@click.command()
@click.argument("sql", metavar="SQL")
@click.option("--all", "every", is_flag=True, help="Print every row, not the first 30.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row.")
@click.option(
    "-o",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write every row to FILE: .jsonl, .csv or .parquet.",
)
@click.pass_obj
def query(obj: dict[str, Any], sql: str, every: bool, as_json: bool, file: Path | None) -> None:
    """Ask the kernel's tables in SQL; needs DuckDB: pip install 'kernweave[query]'.

    \b
    Examples:
      kernweave query "select name, count(*) n from blocks join functions
        on blocks.function = functions.row group by all order by n desc limit 10"
      kernweave query "select edge_kind(kind), count(*) from edges group by all"
      kernweave query "describe functions"
    \b
    Views:   functions blocks instructions edges calls images; each has a column row
    Macros:  edge_kind(kind) flow_name(flow) registers(mask) dead(live)
             point(function, addr)
    \b
    Unsigned 64-bit numbers are addresses and are printed as such.
    """  # noqa: D301
    duckdb = find_duckdb("a query")
    if file is not None:
        check_path(file)
    with connect(obj["target"], writer=False, progress=progress) as session:
        try:
            with session.database() as database:
                if file is not None:
                    sql = copy_rows(file, database, sql)
                result = database.execute(sql)
                if result is None:
                    raise UsageError("there is no query", help="write a SELECT")
                report = _print_json if as_json else _print_human
                report(result, every)
        except duckdb.Error as error:
            raise _usage(str(error)) from error
    sys.stdout.flush()


def _usage(text: str) -> UsageError:
    """DuckDB's words: the first line says what, the others where."""
    first, *rest = [line for line in text.splitlines() if line.strip()]
    what = re.sub(r"^(\w+ )*Error: ", "", first)
    return UsageError(
        f"cannot run the query: {what[:1].lower()}{what[1:].rstrip('.!')}", notes=rest
    )


def _print_json(result: Any, every: bool) -> None:
    names, types = _columns(result)
    for row in _fetch(result):
        cells = (_plain(value, kind) for value, kind in zip(row, types, strict=True))
        print_json({"schema": ROW_SCHEMA, **dict(zip(names, cells, strict=True))})


def _columns(result: Any) -> tuple[list[str], list[str]]:
    """Names, each once, and types of the columns."""
    names: list[str] = []
    for name, *_ in result.description:
        same = names.count(name)
        names.append(f"{name}_{same}" if same else name)
    return names, [str(kind) for _, kind, *_ in result.description]


def _fetch(result: Any) -> Iterator[Sequence[Any]]:
    while rows := result.fetchmany(_AT_ONCE):
        yield from rows


def _plain(value: Any, kind: str) -> Any:
    """A value as JSON has it: addresses as everywhere else, and no number it cannot hold."""
    if isinstance(value, int) and kind == _ADDRESS:
        return f"{value:#x}"
    if isinstance(value, int) and not -_INT64_MAX <= value < _INT64_MAX:
        return float(value)
    return value


def _print_human(result: Any, every: bool) -> None:
    names, types = _columns(result)
    rows = _fetch(result)
    shown = [
        [_cell(value, kind) for value, kind in zip(row, types, strict=True)]
        for row in itertools.islice(rows, None if every else _SHOWN_ROWS)
    ]
    print_table(names, shown, [kind in _NUMBERS for kind in types])
    more = sum(1 for _ in rows)
    if more:
        print(f"... {more:,} more rows: add --all")


def _cell(value: Any, kind: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if kind == _ADDRESS:
        return f"{value:#x}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
