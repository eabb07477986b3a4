# SPDX-License-Identifier: GPL-2.0-or-later
"""Clones of a running kernel: a generation loads and unloads; what clones count the oracle saw."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from guest import kmodctl, shell, target
from weaving import NAME, Live, Mask, live_source, weave_live

import kernweave
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.weave.counters import (
    select_blocks,
    select_calls,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from oracle.lab import OracleLab, no_trouble, oracle_lab, storm
from oracle.oracle import Counts

SEED = 20261122
FUNCTIONS = 2000
SELECTS = (select_blocks, select_insns, select_calls, select_loads, select_stores, select_returns)
FAULT_ENTRIES = ("asm_exc_page_fault", "asm_exc_general_protection")
REPEATS, STRINGS = (0xF2, 0xF3), (0xA4, 0xA5, 0xAA, 0xAB, 0x48)


def test_generation_loads_with_names_and_unloads(machine: Lab) -> None:
    with kernweave.connect(target(machine)) as session, machine.connect() as link:
        source = live_source(session)
        functions = source.tables.functions
        asked = np.zeros(len(functions.addr), bool)
        asked[np.random.default_rng(SEED).choice(len(asked), FUNCTIONS, replace=False)] = True
        live = weave_live(session, link, "6.1", source, asked, (select_blocks,))
        text = live.text()
        assert session.read(live.base, len(text)) == text
        names = shell(link, f"grep '[.]kw.*{NAME}' /proc/kallsyms").splitlines()
        parts = int((live.woven.scope.woven & (functions.first_insn >= 0)).sum())
        assert len(names) == parts > FUNCTIONS // 2
        assert min(int(line.split()[0], 16) for line in names) == live.base
        assert kmodctl(link, "unload", NAME) == "ok"
        assert NAME not in shell(link, "cat /proc/modules")


@pytest.mark.parametrize(
    ("series", "args"), [("6.1", ()), ("6.12", ("preempt=full",))], ids=["6.1", "6.12-full"]
)
def test_counters_of_clones_equal_the_oracle(
    series: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    with (
        oracle_lab(f"weave-{series}", tmp_path, args, series=series) as machine,
        no_trouble(machine),
        suppress(KernweaveError),  # the lab goes before the session, as clones are never left
        kernweave.connect(machine.target, progress=print) as k,
    ):
        found = _count(machine, k, series)
        machine.lab.down()
    assert found == []


def _count(machine: OracleLab, k: Session, series: str) -> list[str]:
    """Weave what the workload runs, run it again, and compare."""
    command = storm(SEED, 60, spawns=2)
    asked = _functions_that_run(k, command)
    with machine.lab.connect() as link:
        live = weave_live(k, link, series, live_source(k), asked, SELECTS)
    _watch(machine, k, live)
    before = machine.snapshot()
    transaction = live.enter()
    done = k.run(command, capture=True)
    assert (done.exit, done.stderr) == (0, b"")
    k.driver.undo(transaction)
    k.driver.quiesce()
    first = machine.snapshot().since(before)
    hits = live.hits().astype(np.int64)  # whoever sleeps in a clone may wake meanwhile
    last = machine.snapshot().since(before)
    rows = machine.oracle.unwatch()
    restarts = dict(zip(rows["vaddr"].tolist(), rows["restarts"].tolist(), strict=True))
    return _differences(live, first, last, hits, restarts)


def _functions_that_run(k: Session, command: list[str]) -> Mask:
    """bool[f]: functions of the kernel that the workload enters, drawn by chance."""
    with k.count("vmlinux:*", partial=True, tactics=["nop5"]) as hits:
        k.run(command, check=True, capture=True)
    ran = sorted({point.function for point, n in zip(hits.placed, hits.hits(), strict=True) if n})
    find = k.view.images[0].find
    addrs = np.array([addr for name in ran for addr in find(name)], np.uint64)
    chosen = np.random.default_rng(SEED).permutation(addrs)[:FUNCTIONS]
    return np.isin(k.analysis.kernel.tables.functions.addr, chosen)


def _watch(machine: OracleLab, k: Session, live: Live) -> None:
    """Measure how often copies are run again: after a fault, or inside a repetition."""
    source, clones = live.woven.source, live.map
    at = source.at[clones.insn]
    again = np.isin(clones.native, source.sites.exceptions)
    again |= np.isin(source.text[at], REPEATS) & np.isin(source.text[at + 1], STRINGS)
    find = k.view.images[0].find
    entries = [find(name)[0] for name in FAULT_ENTRIES]
    machine.oracle.watch(clones.clone[again].tolist(), clones.size[again].tolist(), entries)


def _differences(
    live: Live, first: Counts, last: Counts, hits: npt.NDArray[np.int64], restarts: dict[int, int]
) -> list[str]:
    """Counters that are not what was executed of their copies when they were read."""
    counters, clones = live.counters, live.map
    native = live.woven.source.tables.instructions.addr[counters.insn]
    clone = clones.clones_of(native)
    again = np.array([restarts.get(addr, 0) for addr in clone.tolist()], np.int64)
    low, high = (counts.at(clone).astype(np.int64) - again for counts in (first, last))
    copied = clone != 0
    wrong = copied & ((hits < low) | (hits > high))
    row = {
        "functions": int(live.woven.scope.woven.sum()),
        "counters": len(hits),
        "hit": int((hits > 0).sum()),
        "sum": int(hits.sum()),
        "moved": int((low != high).sum()),
        "bail-outs": int((~copied).sum()),
    }
    print(json.dumps(row))
    assert row["functions"] > 1500 and row["hit"] > 40_000
    assert row["moved"] * 10 < row["hit"]  # the others are compared exactly
    return [
        f"{native[at]:#x}: {hits[at]} hits, {low[at]} to {high[at]} executions of {clone[at]:#x}"
        for at in np.flatnonzero(wrong).tolist()
    ]
