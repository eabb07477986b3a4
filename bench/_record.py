# SPDX-License-Identifier: GPL-2.0-or-later
"""Where benchmark results go: one JSON file per benchmark, with what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, kernel: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json` and print it.

    Args:
        name: of the benchmark.
        kernel: release of the kernel measured.
        figures: what was measured, units in the names.
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
    text = _compact(result)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _compact(result: dict[str, Any]) -> str:
    """JSON with one line per item of a long list, so that a change shows as a small diff."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of some measurements, rounded to milliseconds."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "runs": len(values),
    }


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
