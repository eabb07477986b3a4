# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters against the oracle: all equal in a migration storm, and each seeded fault is seen."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guest import FAULTING, names_of, program

import kernweave
from kernweave.model.plan import Plan, Tactic
from kernweave.session.session import Session
from oracle.counts import (
    Fault,
    Measured,
    arrivals,
    counter_at,
    differences,
    measure,
    overwrite,
    per_cpu,
)
from oracle.lab import OracleLab, no_trouble, oracle_lab, storm
from oracle.oracle import Counts, pack_codes

SEED = 20240607
HOT = 100_000
MODES = {"default": (), "preempt=full": ("preempt=full",)}
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "oracle.json"

POINTS = {
    "vfs": [
        "vfs_read@insns", "ksys_read@blocks", "vfs_write@blocks", "vfs_statx@blocks", "fput",
        "dput@blocks", "do_sys_openat2@blocks", "lookup_fast@return",
    ],
    "mm": [
        "read_zero@insns", "handle_mm_fault@insns", "__handle_mm_fault@blocks",
        "mmap_region@blocks", "kmem_cache_alloc@calls", "__alloc_pages@blocks",
    ],
    "sched": [
        "try_to_wake_up@blocks", "update_load_avg@blocks", "__sched_setaffinity@insns",
        "enqueue_task_fair@blocks", "finish_task_switch.isra.0@blocks",
    ],
    "net": [
        "unix_stream_sendmsg@blocks", "unix_stream_read_generic@blocks", "udp_sendmsg@blocks",
        "ip_rcv", "sock_def_readable@insns",
    ],
    "pipe": ["pipe_read@insns", "pipe_write@blocks"],
    "timers": [
        "hrtimer_interrupt@blocks", "__hrtimer_run_queues@blocks", "hrtimer_start_range_ns@blocks",
        "tick_sched_timer", "handle_edge_irq@blocks",
    ],
    "futex": ["futex_wait@blocks", "futex_wake@insns", "get_futex_key@calls"],
    "process": ["copy_process@calls", "do_exit@calls", "__do_sys_getppid"],
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODES))
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OracleLab]:
    mode = request.param
    folder = tmp_path_factory.mktemp("counts")
    with oracle_lab(mode.replace("=", "-"), folder, MODES[mode]) as booted:
        if mode == "preempt=full":
            assert "Dynamic Preempt: full" in booted.lab.log()
        yield booted


@pytest.fixture(autouse=True)
def quiet(machine: OracleLab) -> Iterator[None]:
    with no_trouble(machine):
        yield


def count(
    machine: OracleLab, points: Sequence[str], rounds: int, fault: Fault | None = None
) -> Measured:
    print(f"seed {SEED}")
    with kernweave.connect(machine.target, progress=print) as k:
        command = storm(SEED, rounds, spawns=4)
        return measure(machine, k, points, lambda: _run(k, command), fault)


def _run(k: Session, command: list[str]) -> None:
    done = k.run(command, capture=True)
    assert (done.exit, done.stderr) == (0, b"")


def test_counts_in_a_migration_storm_equal_the_oracle(
    machine: OracleLab, request: pytest.FixtureRequest
) -> None:
    measured = count(machine, [point for group in POINTS.values() for point in group], 320)
    assert differences(measured) == []
    row = _summary(machine, measured, request.node.callspec.params["machine"])
    print(json.dumps(row))
    assert row["points"] >= 200
    assert row["functions"] >= 20
    assert len(row["subsystems"]) >= 6
    assert row["hit"] >= 150
    assert row["over_100k"] >= 10
    assert row["entries_checked_by_native_code"] == row["tactics"]["nop5"]
    hits = np.array(list(arrivals(measured).values()))
    cpus = np.array(list(per_cpu(measured).values()))
    assert (cpus.sum(axis=1) == hits).all()
    # a point of one process may stay where that process does; most are hit on both CPUs
    assert (cpus[hits >= HOT].min(axis=1) > HOT // 100).mean() > 0.5
    if os.environ.get("KERNWEAVE_RECORD") == "1":
        _record(row)


def _summary(machine: OracleLab, measured: Measured, mode: str) -> dict[str, Any]:
    counts = np.array(list(arrivals(measured).values()))
    sites = measured.sites.values()
    entries = [site for site in sites if site.tactic is Tactic.NOP5]
    return {
        "mode": mode,
        "kernel": machine.release,
        "qemu": machine.qemu,
        "seed": SEED,
        "subsystems": sorted(POINTS),
        "functions": len(measured.functions),
        "points": len(sites),
        "tactics": dict(Counter(site.tactic.value for site in sites)),
        "entries_checked_by_native_code": sum(not site.entered_behind for site in entries),
        "hit": int((counts > 0).sum()),
        "over_100k": int((counts > HOT).sum()),
        "hits": int(counts.sum()),
        "equal": not differences(measured),
    }


def _record(row: dict[str, Any]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [other for other in rows if other["mode"] != row["mode"]]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")


FAULT_ROUNDS = {"bad": 200, "lazy": 100}


@pytest.mark.parametrize("kind", FAULT_ROUNDS)
def test_counts_of_what_faults_equal_the_oracle(machine: OracleLab, kind: str) -> None:
    """Instructions that are fixed up, or run again when their page is there: one hit each."""
    with kernweave.connect(machine.target, progress=print) as k:
        known = set(names_of(k)[1])
        points = [f"{name}@insns" for name in FAULTING if name in known]
        command = [program("faults"), kind, str(FAULT_ROUNDS[kind])]
        measured = measure(machine, k, points, lambda: _run(k, command))
        exceptions = k.view.sites.exceptions.tolist()
    assert differences(measured) == []
    faulting = {addr: hits for addr, hits in arrivals(measured).items() if addr in exceptions}
    assert sum(hits > 0 for hits in faulting.values()) >= 3
    assert sum(faulting.values()) >= FAULT_ROUNDS[kind]


# ---- traps -------------------------------------------------------------------------------------

TRAPS = [
    "vfs_read@insns", "fput@insns", "pipe_read@blocks", "try_to_wake_up@blocks",
    "handle_mm_fault@insns", "kmem_cache_alloc@blocks", "sock_def_readable@insns",
]  # fmt: skip
INT3 = b"\xcc"


def test_traps_and_missed_hits_equal_the_oracle(machine: OracleLab) -> None:
    command = storm(SEED, 5, spawns=2)
    with kernweave.connect(machine.target, progress=print) as k:
        before = machine.snapshot()
        with k.count(*TRAPS, tactics=["int3"]) as attachment:
            _run(k, command)
            at_least = machine.snapshot().since(before)
        executed = machine.snapshot().since(before)
    addrs = [point.addr for point in attachment.placed]
    assert len(addrs) > 200 and set(attachment.tactics()) == {"int3"}
    counted = attachment.hits() + attachment.missed()
    arrivals = executed.at_code(addrs, [INT3] * len(addrs))
    exact = attachment.exact()
    # a kprobe is marked disabled just before its int3 goes: what hits it then is not counted
    before_detach = at_least.at_code(addrs, [INT3] * len(addrs))
    assert (counted[exact] >= before_detach[exact]).all()
    # few are hit just then, more of them the slower the machine
    assert (counted[exact] != arrivals[exact]).sum() * 10 <= exact.sum()
    # two CPUs that miss at the same time may count one miss
    assert (counted <= arrivals).all() and (attachment.missed()[~exact] > 0).all()
    assert (counted[exact] > 0).sum() > 100 and attachment.text_restored
    # a check that cannot fail is a defect
    assert arrivals[exact].tolist() != (counted[exact] + 1).tolist()


# ---- seeded faults -----------------------------------------------------------------------------

FAULT_POINTS = ["vfs_read@blocks", "vfs_rename@insns"]
NOP_LIKE_INC = bytes.fromhex("0f1f440000")
in_default_mode = pytest.mark.parametrize("machine", ["default"], indirect=True)


@pytest.fixture(scope="module")
def healthy(machine: OracleLab) -> Measured:
    return count(machine, FAULT_POINTS, 5)


def _hottest(healthy: Measured, tactic: Tactic) -> int:
    seen = arrivals(healthy)
    return max(
        (addr for addr in seen if healthy.sites[addr].tactic is tactic), key=seen.__getitem__
    )


def _neighbours(healthy: Measured) -> tuple[int, int]:
    """Return two places next to each other, one of them hot, the other never reached."""
    seen = arrivals(healthy)
    pairs = itertools.pairwise(seen)
    return max(pairs, key=lambda pair: abs(seen[pair[0]] - seen[pair[1]]))


def counter_in_the_neighbouring_block(healthy: Measured, plan: Plan) -> Plan:
    holes = [counter_at(plan, addr)[0] for addr in _neighbours(healthy)]
    mine, other = (plan.code[hole : hole + 8] for hole in holes)
    return overwrite(plan, (holes[0], other), (holes[1], mine))


def counter_dropped(healthy: Measured, plan: Plan) -> Plan:
    _, inc, end = counter_at(plan, _hottest(healthy, Tactic.JMP32))
    assert end - inc == len(NOP_LIKE_INC)
    return overwrite(plan, (inc, NOP_LIKE_INC))


def counter_counts_twice(healthy: Measured, plan: Plan) -> Plan:
    _, inc, end = counter_at(plan, _hottest(healthy, Tactic.NOP5))
    back = int.from_bytes(plan.code[end + 1 : end + 5], "little", signed=True)
    assert plan.code[end : end + 1] == b"\xe9"
    moved = b"\xe9" + (back - (end - inc)).to_bytes(4, "little", signed=True)
    return overwrite(plan, (end, plan.code[inc:end] + moved))


def counter_one_slot_off(healthy: Measured, plan: Plan) -> Plan:
    _, _, end = counter_at(plan, _hottest(healthy, Tactic.JMP32))
    return overwrite(plan, (end - 1, b"\x08"))


def counters_read_one_slot_off(healthy: Measured, plan: Plan) -> Plan:
    return replace(plan, counter=np.roll(plan.counter, 1))


def branch_targets_swapped(healthy: Measured, plan: Plan) -> Plan:
    """Swap them where nobody comes by: a wrong branch in use would end the machine."""
    seen = arrivals(healthy)
    near_jcc = (
        site
        for site in healthy.sites.values()
        if site.native[0] == 0x0F and site.native[1] & 0xF0 == 0x80 and not seen[site.addr]
    )
    at = int(plan.copy[plan.addr.tolist().index(next(near_jcc).addr)]) - plan.base
    there, back = (int.from_bytes(plan.code[at + off :][:4], "little") for off in (2, 7))
    assert plan.code[at + 6] == 0xE9
    swapped = [(distance % (1 << 32)).to_bytes(4, "little") for distance in (back + 5, there - 5)]
    return overwrite(plan, (at + 2, swapped[0]), (at + 7, swapped[1]))


# and in how many ways each is wrong: what is not seeded must stay equal
FAULTS: list[tuple[Callable[[Measured, Plan], Plan], range]] = [
    (counter_in_the_neighbouring_block, range(2, 3)),
    (counter_dropped, range(2, 3)),
    (counter_counts_twice, range(3, 4)),
    (counter_one_slot_off, range(2, 3)),
    (counters_read_one_slot_off, range(3, 100)),
    (branch_targets_swapped, range(2, 3)),
]


@in_default_mode
@pytest.mark.parametrize(("fault", "wrong"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_seeded_fault_is_seen(
    machine: OracleLab, healthy: Measured, fault: Callable[[Measured, Plan], Plan], wrong: range
) -> None:
    measured = count(machine, FAULT_POINTS, 5, lambda plan: fault(healthy, plan))
    found = differences(measured)
    print("\n".join(found))
    assert len(found) in wrong


@in_default_mode
def test_small_differences_are_seen(machine: OracleLab, healthy: Measured) -> None:
    assert differences(healthy) == []
    chosen = {_hottest(healthy, Tactic.JMP32), _hottest(healthy, Tactic.NOP5)}
    for key in [key for key in healthy.hits if key[0] in chosen]:
        for off in (-1, 1):
            wrong = {**healthy.hits, key: healthy.hits[key] + off}
            assert differences(replace(healthy, hits=wrong))
    # as if the originals had been executed all the time
    assert differences(replace(healthy, inside=native_executed(healthy)))


def native_executed(healthy: Measured) -> Counts:
    site = healthy.sites[_hottest(healthy, Tactic.JMP32)]
    length, code = pack_codes([site.native])
    one, cpus = np.ones(1, np.uint64), np.array([[1, 0]], np.uint64)
    return Counts(np.array([site.addr], np.uint64), length, code, one, cpus)
