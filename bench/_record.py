# SPDX-License-Identifier: GPL-2.0-or-later
"""Where benchmark results go: one JSON file per benchmark, with what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, kernel: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Write `results/NAME.json` and print each figure beside the last committed one.

    Args:
        name: of the benchmark.
        kernel: release of the kernel measured.
        figures: what was measured, units in the names.

    Returns:
        What was written.
    """
    result = {
        "schema": "kernweave.bench/1",
        "name": name,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "date": datetime.now(UTC).date().isoformat(),
        "kernel": kernel,
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "accel": "tcg"},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(_compact(result) + "\n")
    print("\n".join(_compared(name, figures)))
    return result


def _compact(result: dict[str, Any]) -> str:
    """JSON with one line per item of a list or table, so that a change shows as a small diff."""
    lines = []
    for key, value in result.items():
        items = list(value.values()) if isinstance(value, dict) else []
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n ]")
        elif len(items) > 1 and all(isinstance(item, dict) for item in items):
            rows = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n  {rows}\n }}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}"


# ---- comparison --------------------------------------------------------------------------------


def _compared(name: str, figures: dict[str, Any]) -> list[str]:
    """One line per number: now, in the last committed result, the ratio of both."""
    now, before = dict(_numbers(figures)), dict(_numbers(_committed(name)))
    if not now:
        return []
    width = max(map(len, now))
    lines = [f"{'figure':{width}}  {'now':>9}  {'committed':>9}  ratio"]
    for path, value in now.items():
        old = before.get(path)
        known = f"{old:9,.2f}" if old is not None else f"{'-':>9}"
        ratio = f"{value / old:5.2f}" if old else "    -"
        lines.append(f"{path:{width}}  {value:9,.2f}  {known}  {ratio}")
    gone = [path for path in before if path not in now]
    return [*lines, *(f"{path:{width}}  {'-':>9}  {before[path]:9,.2f}" for path in gone)]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number outside a list, with the keys that lead to it; the bounds of a median aside."""
    if isinstance(value, dict):
        aside = {"low", "high", "values", "runs"} if "median" in value else set()
        for key, item in value.items():
            if key not in aside:
                yield from _numbers(item, path if key == "median" else f"{path}/{key}".strip("/"))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _committed(name: str) -> dict[str, Any]:
    """The result in the last commit, without what says where it was measured."""
    text = _git("show", f"HEAD:./{RESULTS.name}/{name}.json")
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key != "machine"}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some measurements, rounded to milliseconds."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "runs": len(values),
    }


def _git(*args: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
