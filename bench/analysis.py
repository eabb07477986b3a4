# SPDX-License-Identifier: GPL-2.0-or-later
"""What the analysis of a whole kernel takes, cold and from the cache, and what it finds.

Live text of a lab, and kernel files as they are shipped.  Each time is of a fresh process that has
the text in memory; the medians are of five.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _analysis_run import Input
from _record import RESULTS, record, summary

import kernweave
from kernweave.analysis.hints import exported_addresses, prototype_arguments, taken_addresses
from kernweave.analysis.imagefile import load_file
from kernweave.analysis.kernel import Hints
from kernweave.image.vmlinuz import open_image
from kernweave.lab.machine import Lab
from kernweave.lab.packages import KERNEL_SERIES, fetch_kernel
from kernweave.session.session import Session

_LAB = "bench-analysis"
_RUNS = 5
_RUN = Path(__file__).with_name("_analysis_run.py")
_STATIC_KEY = "/proc/sys/kernel/sched_schedstats"


def main() -> None:
    """Measure and write results/analysis.json and .md."""
    with tempfile.TemporaryDirectory(prefix="kernweave-bench-") as name:
        folder = Path(name)
        first, second = _live_texts(folder)
        figures = {"6.1 live": {**_measure(first, folder / "live"), **_warm(second, folder)}}
        for series in KERNEL_SERIES:
            source = _file_text(series, folder)
            figures[f"{series} file"] = _measure(source, folder / series)
            source.unlink()
    result = record("analysis", figures["6.1 live"]["kernel"], {"texts": figures})
    write_table(result)


# ---- inputs --------------------------------------------------------------------------------------


def _live_texts(folder: Path) -> tuple[Path, Path]:
    """The text of two boots, a static key flipped in the second; their bases differ."""
    paths = (folder / "first.pickle", folder / "second.pickle")
    bases: set[int] = set()
    try:
        for path, flip in zip(paths, (False, True), strict=True):
            given = _live_text(flip)
            while given.base in bases:  # KASLR may choose the same again
                given = _live_text(flip)
            bases.add(given.base)
            path.write_bytes(pickle.dumps(given))
    finally:
        Lab(_LAB).down()
    return paths


def _live_text(flip: bool) -> Input:
    Lab(_LAB).down()
    with kernweave.connect(f"lab:{_LAB}", progress=print) as session:
        if flip:
            session.run(["sh", "-c", f"echo 1 > {_STATIC_KEY}"], check=True)
        return _read(session)


def _read(session: Session) -> Input:
    view, driver = session.view, session.driver
    view.refresh()
    image = view.images[0]
    base = image.starts[0]
    text = driver.read(base, image.end - base)
    taken = taken_addresses(driver.read, driver.lookup, (base, image.end))
    exported = exported_addresses(driver.read, driver.lookup)
    hints = Hints(taken, prototype_arguments(session.analysis.btf), exported, image.local)
    return Input(session.kernel, base, text, image, view.sites, hints)


def _file_text(series: str, folder: Path) -> Path:
    kernel = open_image(fetch_kernel(series).vmlinuz)
    file = load_file(kernel)
    given = Input(kernel.release, file.base, file.text, file.symbols, file.sites, file.hints)
    path = folder / f"{series}.pickle"
    path.write_bytes(pickle.dumps(given))
    return path


# ---- measurements --------------------------------------------------------------------------------


def _run(what: str, source: Path, folder: Path) -> dict[str, Any]:
    """One measurement, and the load of the machine when it began."""
    load = os.getloadavg()[0]
    command = [sys.executable, str(_RUN), what, str(source), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout), "load": load}


def _measure(source: Path, folder: Path) -> dict[str, Any]:
    """Everything that one text allows; its analysis stays in the folder."""
    with source.open("rb") as file:
        kernel = pickle.load(file).release
    runs = []
    for _ in range(_RUNS):
        shutil.rmtree(folder, ignore_errors=True)
        runs.append(_run("cold", source, folder))
    parts = runs[0]["parts_s"]
    flips, points = _run("flips", source, folder), _run("points", source, folder)
    for one in (flips, points):
        del one["load"]
    sizes = ("functions", "instructions", "blocks", "edges")
    return {
        "kernel": kernel,
        **{name: runs[0][name] for name in sizes},
        "cold_s": summary([run["cold_s"] for run in runs]),
        "cold_parts_s": {
            name: round(statistics.median(run["parts_s"][name] for run in runs), 3)
            for name in parts
        },
        "load": round(statistics.median(run["load"] for run in runs), 2),
        "input_mib": round(runs[0]["input_mib"]),
        "peak_mib": round(max(run["peak_mib"] for run in runs)),
        "stored_mib": round(runs[0]["stored_mib"]),
        "flips": flips,
        "no_save": points,
    }


def _warm(source: Path, folder: Path) -> dict[str, Any]:
    runs = [_run("warm", source, folder / "live") for _ in range(_RUNS)]
    return {
        "warm_s": summary([run["warm_s"] for run in runs]),
        "warm_read_all_s": summary([run["read_all_s"] for run in runs]),
        "warm_load": round(statistics.median(run["load"] for run in runs), 2),
        "warm_changed": runs[0]["changed"],
    }


# ---- report --------------------------------------------------------------------------------------


def write_table(result: Mapping[str, Any]) -> None:
    """Write results/analysis.md."""
    texts: Mapping[str, Any] = result["texts"]
    live = texts["6.1 live"]
    lines = [
        "# Analysis of a whole kernel", "",
        "Wall times of one process with the text in memory, medians of five fresh processes on",
        f"{result['machine']['cpus']} CPUs. Written by bench/analysis.py at {result['commit']}.",
        "",
        *_table("text", list(texts), _cold_rows(texts)),
        "", "Cold: until the liveness of every block is known; writing the cache comes on top.",
        "Warm, 6.1 at another KASLR base with a static key flipped: "
        f"{live['warm_s']['median']:.3f} s until the",
        f"tables are usable ({live['warm_changed']} functions differ), "
        f"{live['warm_read_all_s']['median']:.3f} s more to read every column once; "
        f"load {live['warm_load']:.1f}.",
        "",
        *_flip_lines(texts), "",
        "Points at which a counter saves nothing, per cent of those that can be placed: a general",
        "register and the flags it changes are dead (in brackets: a register dead).", "",
        *_table("points", list(texts), _point_rows(texts)),
    ]  # fmt: skip
    (RESULTS / "analysis.md").write_text("\n".join(lines) + "\n")


def _table(head: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    return [
        f"| {head} | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


def _cold_rows(texts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    every = list(texts.values())
    rows = [
        (name, [f"{one[name]:,}" for one in every])
        for name in ("functions", "instructions", "blocks", "edges")
    ]
    rows.append(("cold, s", [f"{one['cold_s']['median']:.2f}" for one in every]))
    rows += [
        (f"- {name}", [f"{one['cold_parts_s'][name]:.2f}" for one in every])
        for name in every[0]["cold_parts_s"]
    ]
    rows += [
        ("peak memory, MiB", [f"{one['peak_mib']:,}" for one in every]),
        ("- before the analysis", [f"{one['input_mib']:,}" for one in every]),
        ("in the cache, MiB", [f"{one['stored_mib']:,}" for one in every]),
        ("load of the machine", [f"{one['load']:.1f}" for one in every]),
    ]
    return rows


def _flip_lines(texts: Mapping[str, Any]) -> list[str]:
    seen = {int(count) for one in texts.values() for count in one["flips"]["functions_invalidated"]}
    flipped = sum(one["flips"]["flipped"] for one in texts.values())
    return [f"One flipped byte, at {flipped} random places outside patchable sites, costs the",
            f"analysis of {' or '.join(map(str, sorted(seen)))} function each."]  # fmt: skip


def _point_rows(texts: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    every = [one["no_save"] for one in texts.values()]
    return [
        (
            name,
            [
                f"{100 * one[name]['nothing_saved']:.2f} "
                f"({100 * one[name]['register_dead']:.2f}) of {one[name]['placeable']:,}"
                for one in every
            ],
        )
        for name in every[0]
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        write_table(json.loads((RESULTS / "analysis.json").read_text()))
    else:
        main()
