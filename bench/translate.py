# SPDX-License-Identifier: GPL-2.0-or-later
"""What weaving a whole kernel takes on the host: from tables in the cache to the clones' bytes.

Kernel files as they are shipped.  Each time is of a fresh process that has the text in memory and
the tables in the page cache; blocks have the median of seven, the others one run.  Beside it stand
the seconds of CPU, as others may use the machine, and the time in which the same process decodes
the text once, as machines differ.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _analysis_run import Input, cold
from _record import RESULTS, record, summary

from kernweave.analysis.imagefile import load_file
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import fetch_kernel

_SERIES = ("6.1", "6.12")
_RUNS = {"blocks": 7, "entry": 1, "return": 1, "calls": 1, "edges": 1, "loads": 1,
         "stores": 1, "insns": 1}  # fmt: skip
_RUN = Path(__file__).with_name("_translate_run.py")
_ONCE = ("functions", "functions_left", "instructions", "blocks", "bail_outs", "bail_out_share",
         "bail_out_reasons", "native_mib")  # fmt: skip


def main() -> None:
    """Measure and write results/translate.json and .md."""
    figures = {}
    with tempfile.TemporaryDirectory(prefix="kernweave-bench-") as name:
        for series in _SERIES:
            figures[f"{series} file"] = _measure(series, Path(name))
    kernel = ", ".join(one["kernel"] for one in figures.values())
    write_table(record("translate", kernel, {"texts": figures}))


def _measure(series: str, folder: Path) -> dict[str, Any]:
    kernel = open_image(fetch_kernel(series).vmlinuz)
    file = load_file(kernel)
    given = Input(kernel.release, file.base, file.text, file.symbols, file.sites, file.hints)
    source, cache = folder / f"{series}.pickle", folder / series
    source.write_bytes(pickle.dumps(given))
    cold(given, cache)
    load = os.getloadavg()[0]
    runs = {name: [_run(source, cache, name) for _ in range(n)] for name, n in _RUNS.items()}
    first = runs["blocks"][0]
    return {
        "kernel": kernel.release,
        **{name: first[name] for name in _ONCE},
        "selectors": {name: _summed(each) for name, each in runs.items()},
        "load": round(load, 2),
    }


def _run(source: Path, cache: Path, selector: str) -> dict[str, Any]:
    command = [sys.executable, str(_RUN), str(source), str(cache), selector]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [run["translate_s"] / run["decode_s"] for run in runs]
    parts = {
        name: round(statistics.median(run["parts_s"][name] for run in runs), 3)
        for name in runs[0]["parts_s"]
    }
    same = ("counters", "not_possible", "saves_nothing", "code_mib")
    return {
        "translate_s": summary([run["translate_s"] for run in runs]),
        "cpu_s": summary([run["cpu_s"] for run in runs]),
        "of_decode": summary(ratios),
        "parts_s": parts,
        **{name: runs[0][name] for name in same},
    }


# ---- report --------------------------------------------------------------------------------------


def write_table(result: Mapping[str, Any]) -> None:
    """Write results/translate.md."""
    texts: Mapping[str, Any] = result["texts"]
    lines = [
        "# Weaving a whole kernel, host side", "",
        "Wall times of fresh processes, text in memory, tables in the cache. Written by",
        f"bench/translate.py at {result['commit']}, on {result['machine']['cpus']} CPUs.",
    ]  # fmt: skip
    for name, one in texts.items():
        lines += ["", *_text_lines(name, one)]
    (RESULTS / "translate.md").write_text("\n".join(lines) + "\n")


def _text_lines(name: str, one: Mapping[str, Any]) -> list[str]:
    reasons = ", ".join(f"{count} {why}" for why, count in one["bail_out_reasons"].items())
    left = ", ".join(f"{count:,} {why}" for why, count in sorted(one["functions_left"].items()))
    rows = [
        f"| {selector} | {each['counters']:,} | {each['code_mib']:.1f} | "
        f"{each['translate_s']['median']:.2f} | {each['cpu_s']['median']:.2f} | "
        f"{each['of_decode']['median']:.2f} | "
        f"{100 * each['saves_nothing']:.1f} | {each['not_possible']} |"
        for selector, each in one["selectors"].items()
    ]
    parts = one["selectors"]["blocks"]["parts_s"]
    spent = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
    return [
        f"## {name} ({one['kernel']}), load {one['load']}", "",
        f"{one['functions']:,} functions, {one['instructions']:,} instructions, "
        f"{one['native_mib']:.1f} MiB of native code.",
        f"Left out: {left}.",
        f"Of {one['blocks']:,} blocks {one['bail_outs']} bail out "
        f"({100 * one['bail_out_share']:.4f} %): {reasons or 'none'}.", "",
        "| counters on | number | clones, MiB | s | s of CPU | of one decoding | save nothing, % "
        "| not possible |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows, "",
        f"Blocks, by parts, s: {spent}.",
    ]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        write_table(json.loads((RESULTS / "translate.json").read_text()))
    else:
        main()
