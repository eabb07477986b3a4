# SPDX-License-Identifier: GPL-2.0-or-later
"""Clones of a running kernel: entered and left; what they count the oracle saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from guest import booted, shell, target
from weaving import draw, functions_that_run, load, prepared
from woven_edges import edge_differences

import kernweave
from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.weave.clonemap import CloneMap, make_map
from kernweave.weave.counters import (
    Place,
    select_blocks,
    select_calls,
    select_edges,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from kernweave.weave.scope import find_nops, native_blocks
from oracle.lab import OracleLab, no_trouble, oracle_lab, storm
from oracle.oracle import Counts

SEED = 20261122
FUNCTIONS = 2000
ALL = 100_000
SELECTS = (
    select_blocks,
    select_edges,
    select_insns,
    select_calls,
    select_loads,
    select_stores,
    select_returns,
)
FAULT_ENTRIES = ("asm_exc_page_fault", "asm_exc_general_protection")
REPEATS, STRINGS = (0xF2, 0xF3), (0xA4, 0xA5, 0xAA, 0xAB, 0x48)


@pytest.mark.parametrize("series", ["6.1", "6.12", "7.2"])
def test_entered_and_left_again_and_again(series: str) -> None:
    with (
        booted(f"weave-again-{series}", kernel=series) as machine,
        machine.connect() as link,
        kernweave.connect(target(machine)) as k,
    ):
        source = prepared(k)
        native = k.driver.read(source.base, len(source.text))
        for functions in (ALL, 300):
            live = load(k, source, draw(source, functions, SEED), (select_blocks,))
            names = shell(link, f"grep '[.]kw.*{live.kmod}' /proc/kallsyms").splitlines()
            assert min(int(line.split()[0], 16) for line in names) == live.base
            assert len(names) == len(live.handover.parts)
            entered = live.enter()
            shell(link, "ls -lR /usr/lib/python3 | md5sum; cat /proc/[0-9]*/stack | wc -l")
            left = live.leave()
            assert live.hits().sum() > 1000
            print(functions, len(names), entered, left.stops)
            assert (left.stuck, left.visitors) == ((), 0)
            live.free()
            assert not left.closed.any()
            assert live.kmod not in shell(link, "cat /proc/modules")
            assert k.driver.read(source.base, len(source.text)) == native


@pytest.mark.parametrize(
    ("series", "args"), [("6.1", ()), ("6.12", ("preempt=full",))], ids=["6.1", "6.12-full"]
)
def test_counters_of_clones_equal_the_oracle(
    series: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    with (
        oracle_lab(f"weave-{series}", tmp_path, args, series=series) as machine,
        no_trouble(machine),
        kernweave.connect(machine.target, progress=print) as k,
    ):
        found = _count(machine, k)
    assert found == []


def _count(machine: OracleLab, k: Session) -> list[str]:
    """Weave what the workload runs, run it again, and compare."""
    command = storm(SEED, 60, spawns=2)
    ran = functions_that_run(k, command, 1)
    chosen = np.random.default_rng(SEED).permutation(ran)[:FUNCTIONS]
    source = prepared(k)
    live = load(k, source, np.isin(source.tables.functions.addr, chosen), SELECTS)
    _watch(machine, k, live)
    before = machine.snapshot()
    moved = live.enter()
    print(moved)
    assert moved.visitors == 0
    inside = machine.snapshot()
    done = k.run(command, capture=True)
    assert (done.exit, done.stderr) == (0, b"")
    meanwhile = machine.snapshot().since(inside)
    left = live.leave()
    executed = machine.snapshot().since(before)
    hits = live.hits().astype(np.int64)
    print(left.stops)
    assert (left.stuck, left.visitors) == ((), 0)
    live.free()
    rows = machine.oracle.unwatch()
    restarts = dict(zip(rows["vaddr"].tolist(), rows["restarts"].tolist(), strict=True))
    interrupted = moved.places + sum(stop.places for stop in left.stops)
    return [
        *_outside(live, meanwhile),
        *_differences(live, executed, hits, restarts),
        *edge_differences(live, _executions(live, executed, restarts), hits, interrupted),
    ]


def _map(live: Live) -> CloneMap:
    return make_map(live.woven.source, live.woven.layout, live.base)


def _watch(machine: OracleLab, k: Session, live: Live) -> None:
    """Measure how often copies are run again: after a fault, or inside a repetition."""
    source, clones = live.woven.source, _map(live)
    at = source.at[clones.insn]
    again = np.isin(clones.native, source.sites.exceptions)
    again |= np.isin(source.text[at], REPEATS) & np.isin(source.text[at + 1], STRINGS)
    find = k.view.images[0].find
    entries = [find(name)[0] for name in FAULT_ENTRIES]
    machine.oracle.watch(clones.clone[again].tolist(), clones.size[again].tolist(), entries)


def _differences(
    live: Live, executed: Counts, hits: npt.NDArray[np.int64], restarts: dict[int, int]
) -> list[str]:
    """Counters that are not what was executed of their copies."""
    counters, clones = live.counters, _map(live)
    source, slots = live.woven.source, live.woven.layout.slots
    # behind the slot: native callers arrive there, and whoever finds it closed goes on natively
    entry = np.isin(counters.insn, slots.body)
    insn = counters.insn + entry
    native = source.tables.instructions.addr[insn]
    clone = clones.clones_of(native)
    again = np.array([restarts.get(addr, 0) for addr in clone.tolist()], np.int64)
    seen = executed.at(clone).astype(np.int64) - again
    block = source.tables.instructions.block
    copied = (clone != 0) & (block[insn] == block[counters.insn])
    copied &= counters.place == Place.BEFORE
    wrong = copied & (hits != seen)
    row = {
        "functions": int(live.woven.scope.woven.sum()),
        "counters": len(hits),
        "hit": int((hits > 0).sum()),
        "sum": int(hits.sum()),
        "not compared": int((~copied).sum()),
    }
    print(json.dumps(row))
    assert row["functions"] > 1500 and row["hit"] > 40_000
    return [
        f"{_name(live, int(native[at]))}: {hits[at]} hits, {seen[at]} executions"
        for at in np.flatnonzero(wrong).tolist()
    ]


def _executions(
    live: Live, executed: Counts, restarts: dict[int, int]
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """How often the copies of some instructions were executed, -1 without a copy."""
    addrs, clones = live.woven.source.tables.instructions.addr, _map(live)

    def count(insns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        clone = clones.clones_of(addrs[insns])
        again = np.array([restarts.get(addr, 0) for addr in clone.tolist()], np.int64)
        return np.where(clone != 0, executed.at(clone).astype(np.int64) - again, -1)

    return count


def _outside(live: Live, executed: Counts) -> list[str]:
    """Native instructions that were executed although their counts are said to be complete."""
    source, scope = live.woven.source, live.woven.scope
    instructions = source.tables.instructions
    blocks = scope.woven[source.tables.blocks.function] & ~native_blocks(source, scope)
    inner = blocks[instructions.block]
    first = source.tables.functions.first_insn
    inner[find_nops(source, first[first >= 0].astype(np.int64))] = False  # our jumps are there
    inner[first[first >= 0]] = False
    addrs = instructions.addr[inner]
    seen = executed.at(addrs)
    return [
        f"{_name(live, addr)}: executed {count} times natively"
        for addr, count in zip(addrs[seen > 0].tolist(), seen[seen > 0].tolist(), strict=True)
    ]


def _name(live: Live, addr: int) -> str:
    """Function, offset and bytes of a native instruction."""
    source = live.woven.source
    functions, instructions = source.tables.functions, source.tables.instructions
    insn = int(np.searchsorted(instructions.addr, np.uint64(addr)))
    row = int(instructions.function[insn])
    at = addr - source.base
    code = source.text[at : at + int(instructions.length[insn])].tobytes().hex(" ")
    return f"{live.woven.names[row]}+{addr - int(functions.addr[row]):#x} ({code})"
