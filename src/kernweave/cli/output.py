# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands print: errors, progress, tables, JSON lines."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from kernweave.model.plan import Refused


def print_refused(refused: Sequence[Refused]) -> None:
    """Print what was refused, by reason, with examples."""
    reasons = Counter(one.reason.value for one in refused)
    for reason, number in reasons.most_common():
        examples = [one for one in refused if one.reason == reason]
        names = ", ".join(one.point for one in examples[:2])
        more = ", ..." if number > 2 else ""
        print(f"refused {number:,} ({reason}): {examples[0].detail}")
        print(f"    {names}{more}")


def print_warning(message: str, help: str | None = None) -> None:
    """Print one warning on standard error."""
    print(
        "\n".join([f"warning: {message}", *([f"  help: {help}"] if help else [])]), file=sys.stderr
    )


def print_error(message: str, notes: Iterable[str] = (), help: str | None = None) -> None:
    """Print one error in the form `error:`, `note:`, `help:` on standard error."""
    lines = [f"error: {message}", *(f"  note: {note}" for note in notes)]
    if help:
        lines.append(f"  help: {help}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Print one step of slow work on standard error."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any, stream: IO[str] | None = None) -> None:
    """Print one object as one line."""
    (stream or sys.stdout).write(msgspec.json.encode(value).decode() + "\n")


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]
) -> None:
    """Print columns two blanks apart; `right` says which are flush right."""
    widths = [
        max(len(header), *(len(row[i]) for row in rows)) if rows else len(header)
        for i, header in enumerate(headers)
    ]
    for row in (headers, *rows):
        cells = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())
