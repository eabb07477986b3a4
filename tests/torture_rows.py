# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tortures are done: one JSON row per run, and what the rows say about a commit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "bench/results/torture.jsonl"
#: what a torture tests, and the torture itself: when these change, it has to be run again
SUBJECT = ("src", "tests/torture.py", "tests/torture_weave.py", "tests/stress_ng.py")


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        commit: that was checked out.
        dirty: whether something of SUBJECT was changed and not committed.
        date: ISO 8601.
        kernel: series.
        release: of the kernel; empty if it did not boot.
        mode: how it was booted.
        seed: of the draw.
        minutes: asked for.
        rounds: requests made.
        placed: points by tactic.
        refused: points by reason.
        hits: counted.
        missed: arrivals that traps could not count.
        result: `ok`, or what went wrong.
        engine: `splice`, `weave`, or `poison`: weave with everything dead overwritten.
    """

    commit: str
    dirty: bool
    date: str
    kernel: str
    release: str
    mode: str
    seed: int
    minutes: float
    rounds: int
    placed: dict[str, int]
    refused: dict[str, int]
    hits: int
    missed: int
    result: str
    engine: str = "splice"


def append_row(row: Row, file: Path = FILE) -> None:
    """Add one line."""
    with file.open("a") as out:
        out.write(json.dumps(asdict(row)) + "\n")


def read_rows(file: Path = FILE) -> list[Row]:
    """All rows, oldest first."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def is_done(
    rows: Sequence[Row],
    cell: tuple[str, str, str],
    minutes: float,
    holds: Callable[[str], bool],
) -> bool:
    """Whether a cell of the matrix went well for so long, on a commit for which `holds`.

    Args:
        rows: all there are.
        cell: kernel, mode, engine.
        minutes: that are enough.
        holds: whether a commit has what is tested.
    """
    return any(
        row.result == "ok" and not row.dirty and row.minutes >= minutes and holds(row.commit)
        for row in rows
        if (row.kernel, row.mode, row.engine) == cell
    )


# ---- git ---------------------------------------------------------------------------------------


def head() -> str:
    """The commit that is checked out."""
    return _git("rev-parse", "HEAD")


def is_dirty() -> bool:
    """Whether something of SUBJECT differs from what is committed."""
    return bool(_git("status", "--porcelain", "--", *SUBJECT))


def has_subject(commit: str) -> bool:
    """Whether a commit has all changes of SUBJECT that are checked out."""
    newest = _git("log", "-1", "--format=%H", "--", *SUBJECT)
    command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", newest, commit]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
