# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave bench`: run one of a checkout's benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

import kernweave
from kernweave.cli.output import print_json
from kernweave.errors import KernweaveError, UsageError


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Its result as one JSON object.")
def bench(name: str, as_json: bool) -> int:
    """Run one benchmark of a checkout; its result stays in bench/results.

    \b
    Examples:
      kernweave bench hit_cost
      kernweave bench latency --json
    """  # noqa: D301
    folder = bench_dir(Path(kernweave.__file__))
    known = sorted(file.stem for file in folder.glob("[!_]*.py"))
    if name not in known:
        raise UsageError(f"no benchmark {name!r}", help=f"use one of: {', '.join(known)}")
    result = folder / "results" / f"{name}.json"
    before = result.stat().st_mtime_ns if result.exists() else 0
    # with --json the benchmark's own words are talk
    talk = sys.stderr if as_json else None
    status = subprocess.run(
        [sys.executable, str(folder / f"{name}.py")], stdout=talk, check=False
    ).returncode
    if status or not as_json:
        return 0 if status == 0 else 1
    if not result.exists() or result.stat().st_mtime_ns == before:
        raise KernweaveError(f"benchmark {name} wrote no result", help=f"kernweave bench {name}")
    print_json(json.loads(result.read_text()))
    return 0


def bench_dir(package: Path) -> Path:
    """The folder bench/ of the checkout that holds a package's file.

    Raises:
        UsageError: the package is installed without one.
    """
    for root in package.resolve().parents[1:4]:
        folder = root / "bench"
        if (folder / "_record.py").is_file():
            return folder
    raise UsageError(
        "benchmarks need a checkout, this kernweave is installed without one",
        help="clone the repository and run: make bench",
    )
