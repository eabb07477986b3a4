# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables as a notebook shows them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from kernweave.model.table import Column

_SHOWN_ROWS = 10


def table_html(columns: Mapping[str, Column], count: int) -> str:
    """The first rows of columns, and how many there are."""
    shown = [_cells(column[:_SHOWN_ROWS]) for column in columns.values()]
    head = _row("th", list(columns))
    body = "".join(_row("td", cells) for cells in zip(*shown, strict=True))
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{count:,} rows</p>"


def _cells(column: Column) -> list[str]:
    is_address = column.dtype == np.uint64
    return [f"{value:#x}" if is_address else str(value) for value in column.tolist()]


def _row(tag: str, cells: list[str] | tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
