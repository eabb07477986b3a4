# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows into a file whose ending says how: .jsonl, .csv or .parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from kernweave.errors import KernweaveError, UsageError
from kernweave.session.counts import Counts
from kernweave.session.query import find_duckdb


def check_path(path: Path) -> Path:
    """Refuse a file that could not be written in the end, before anything is counted.

    Raises:
        UsageError: unknown ending, or no such folder.
        UnsupportedError: .parquet, and DuckDB is not installed.
    """
    if path.suffix not in _WRITERS:
        raise UsageError(f"cannot write {path}", help=f"end it in {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} to write {path.name} into")
    if path.suffix == ".parquet":
        find_duckdb("writing .parquet")
    return path


def write_rows(path: Path, hits: Counts, end: dict[str, Any]) -> None:
    """Write every row, aside and then renamed; only .jsonl has room for the end row."""
    aside = path.with_name(f".{path.name}.part")
    try:
        _WRITERS[path.suffix](aside, hits, end)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise KernweaveError(f"cannot write {path}: {error.strerror}") from error


def _write_jsonl(path: Path, hits: Counts, end: dict[str, Any]) -> None:
    rows: Sequence[Any] = [*hits.rows(), end]
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _write_csv(path: Path, hits: Counts, end: dict[str, Any]) -> None:
    rows = [asdict(row) for row in hits.rows()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, hits: Counts, end: dict[str, Any]) -> None:
    duckdb = find_duckdb("writing .parquet")
    columns = hits.columns()
    with duckdb.connect() as db:
        db.register("counts", columns)
        db.execute("COPY counts TO ? (FORMAT parquet)", [str(path)])


def copy_rows(path: Path, database: Any, sql: str) -> str:
    """Write every row of a query, aside and then renamed; return SQL that gives them again.

    Raises:
        UsageError: the query gives no rows.
    """
    relation = database.sql(sql)
    if relation is None:
        raise UsageError("the query gives no rows", help="write a SELECT")
    relation.create("kernweave_rows")
    aside = path.with_name(f".{path.name}.part")
    try:
        database.execute(f"COPY kernweave_rows TO ? ({_COPIES[path.suffix]})", [str(aside)])
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return "FROM kernweave_rows"


_COPIES = {".jsonl": "FORMAT json", ".csv": "FORMAT csv, HEADER", ".parquet": "FORMAT parquet"}
_WRITERS: dict[str, Callable[[Path, Counts, dict[str, Any]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
