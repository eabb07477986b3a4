# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded transfers against a kernel whose every jump is known, and against executions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kernweave
from kernweave.errors import UnsupportedError
from kernweave.lab.packages import fetch_qemu
from oracle.flow import build_flow, flow_machine
from oracle.lab import OracleLab, oracle_lab, storm
from oracle.oracle import TRANSFERS_ON, Counts, Oracle, build_plugin, qemu_args
from oracle.transfers import TransferClass, Transfers

SYNC, ENTER, DELIVER, RESUME, LEAVE = TransferClass
SEED = 20240611
CPUS = 2
USER = "user mode"

#: flow.S: everything it does between its first return to user mode and its end
FLOWS = {
    (LEAVE, "first_iret", USER): 1,
    (ENTER, USER, "enter"): 2,
    (SYNC, "enter_jnz", "enter_done"): 1,
    (SYNC, "enter_jnz", "finish"): 1,
    (SYNC, "loop_jnz", "loop"): 99,
    (SYNC, "loop_jnz", "loop_done"): 1,
    (SYNC, "call", "callee"): 7,
    (SYNC, "callee_ret", "call_back"): 7,
    (SYNC, "calls_jnz", "calls"): 6,
    (SYNC, "calls_jnz", "calls_done"): 1,
    (SYNC, "way_jmp", "odd"): 3,
    (SYNC, "way_jmp", "even"): 2,
    (SYNC, "odd_jmp", "way_end"): 3,
    (SYNC, "ways_jnz", "ways"): 4,
    (SYNC, "ways_jnz", "ways_done"): 1,
    (SYNC, "rep", "rep"): 1,
    (SYNC, "rep", "rep_done"): 1,
    (DELIVER, "fixed_load", "fault_entry"): 1,
    (SYNC, "fault_jne", "fault_fix"): 1,
    (RESUME, "fixed_iret", "fixed_up"): 1,
    (DELIVER, "again_load", "fault_entry"): 1,
    (SYNC, "fault_jne", "fault_again"): 1,
    (RESUME, "again_iret", "again_load"): 1,
    (DELIVER, "invalid", "invalid_entry"): 1,
    (RESUME, "invalid_iret", "invalid_done"): 1,
    (SYNC, "device", "device_done"): 1,
    (SYNC, "sti", "sti_done"): 1,
    (SYNC, "sti_done", "ipi"): 1,
    (DELIVER, "ipi", "ipi_entry"): 1,
    (SYNC, "ipi_device", "ipi_device_done"): 1,
    (RESUME, "ipi_iret", "ipi_done"): 1,
    (SYNC, "cross_jmp", "cross"): 1,
    (SYNC, "cross_last", "cross_page"): 1,
    (SYNC, "cross_back", "leave"): 1,
    (LEAVE, "sysret", USER): 1,
    (ENTER, USER, "soft_entry"): 3,
    (LEAVE, "soft_iret", USER): 3,
}
#: what lies behind the instruction before; at `odd` by an indirect jump
FALLS = {
    "odd",
    *("enter_done", "loop_done", "calls_done", "ways_done", "rep_done", "fault_fix"),
    *("device_done", "sti_done", "ipi", "ipi_device_done", "cross_page"),
}
FEW_SLOTS = 16

Run = Callable[..., Transfers]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return {**build_flow(tmp_path_factory.mktemp("labels"))[1], USER: 0}


@pytest.fixture
def run_flow(tmp_path: Path) -> Run:
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    try:
        qemu = fetch_qemu()
    except UnsupportedError as error:
        if wanted == "1":
            raise
        pytest.skip(str(error))

    def run(*cflags: str) -> Transfers:
        plugin = qemu_args(build_plugin(tmp_path, cflags), tmp_path / "ctl", TRANSFERS_ON)
        argv = [str(qemu.binary), "-L", str(qemu.data)]
        env = {"LD_LIBRARY_PATH": ":".join(map(str, qemu.libs))}
        kernel, _ = build_flow(tmp_path)
        with flow_machine(argv, env, kernel, plugin), Oracle(tmp_path / "ctl") as oracle:
            return oracle.transfers()

    return run


def pairs(found: Transfers, labels: dict[str, int]) -> dict[tuple[int, int, int], int]:
    """What happened before the end: class, from, to -> count."""
    keys = zip(found.cls.tolist(), found.from_.tolist(), found.to.tolist(), strict=True)
    counted = dict(zip(keys, found.count.tolist(), strict=True))
    return {key: n for key, n in counted.items() if key[1] < labels["unexpected"]}


def test_flows_every_transfer_is_recorded_with_its_count(
    run_flow: Run, labels: dict[str, int]
) -> None:
    found = run_flow()
    expected = {(cls, labels[one], labels[other]): n for (cls, one, other), n in FLOWS.items()}
    assert found.dropped == 0
    assert pairs(found, labels) == expected
    falls = set(found.to[found.falls()].tolist())
    assert {to for to in falls if to < labels["unexpected"]} == {labels[name] for name in FALLS}


def test_flows_without_memory_for_all_pairs_tells_how_many_were_dropped(
    run_flow: Run, labels: dict[str, int]
) -> None:
    full, short = run_flow(), run_flow(f"-DTRANSFER_MAX_SLOTS={FEW_SLOTS}")
    assert len(short.count) == FEW_SLOTS - 1
    assert short.dropped > 0
    assert abs(full.total - short.total - short.dropped) <= 2  # the end may still be running
    assert pairs(short, labels).items() <= pairs(full, labels).items()


# ---- a stock kernel ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OracleLab]:
    folder = tmp_path_factory.mktemp("transfers")
    with oracle_lab("transfers", folder, options=[TRANSFERS_ON]) as booted:
        yield booted


def both(machine: OracleLab) -> tuple[Counts, Transfers]:
    with machine.stopped():
        return machine.oracle.snapshot(), machine.oracle.transfers()


def work(machine: OracleLab) -> None:
    print(f"seed {SEED}")
    with kernweave.connect(machine.target, progress=print) as k:
        k.run(["sh", "-c", "ls -lR /usr/share/doc | head -2000 >/dev/null"], check=True)
        k.run(storm(SEED, 20, spawns=4), check=True)


def jumps(counts: Counts) -> npt.NDArray[np.bool_]:
    """Rows of near jumps, calls and returns (QEMU ends a block there), never rewritten."""
    first = counts.code[:, 0].astype(int)
    near = (first & 0xF0) == 0x70
    for opcode in (0xC3, 0xE8, 0xE9, 0xEB):
        near |= first == opcode
    near |= (first == 0x0F) & (counts.code[:, 1] & 0xF0 == 0x80)
    addrs, times = np.unique(counts.vaddr, return_counts=True)
    result: npt.NDArray[np.bool_] = near & np.isin(counts.vaddr, addrs[times == 1])
    return result


def left(transfers: Transfers, vaddr: Any) -> npt.NDArray[np.uint64]:
    """Return how often control left each instruction: uint64[len(vaddr)]."""
    start, end = (np.searchsorted(transfers.from_, vaddr, side) for side in ("left", "right"))
    sums = np.append(np.uint64(0), np.cumsum(transfers.count, dtype=np.uint64))
    result: npt.NDArray[np.uint64] = sums[end] - sums[start]
    return result


def differences(counts: Counts, transfers: Transfers) -> npt.NDArray[np.int64]:
    """Return executions of each jump less its transfers: int64[n]."""
    rows = jumps(counts)
    missing = counts.count[rows] - left(transfers, counts.vaddr[rows])
    return missing.astype(np.int64)


def hottest(counts: Counts, transfers: Transfers) -> int:
    """Return the transfer with the highest count that starts at one of the jumps."""
    from_jumps = np.isin(transfers.from_, counts.vaddr[jumps(counts)])
    return int(np.argmax(np.where(from_jumps, transfers.count, 0)))


def describe(transfers: Transfers) -> str:
    sizes = [
        f"{cls.name} {transfers.of(cls).sum()} pairs, {transfers.count[transfers.of(cls)].sum()}"
        for cls in TransferClass
    ]
    total = f"{len(transfers.count)} pairs, {transfers.total} transfers"
    falls = f"fall-throughs {transfers.falls().sum()} pairs"
    return "; ".join([total, *sizes, falls, f"dropped {transfers.dropped}"])


def test_storm_each_executed_jump_is_left_by_a_recorded_transfer(machine: OracleLab) -> None:
    counts_before, before = both(machine)
    work(machine)
    counts_after, after = both(machine)
    counts, transfers = counts_after.since(counts_before), after.since(before)
    print("since the first user process:", describe(after))
    print("during the workload:", describe(transfers))
    assert after.dropped == 0
    assert all(transfers.of(cls).any() for cls in TransferClass)
    assert transfers.total > 10_000_000
    missing = differences(counts, transfers)
    assert (counts.count[jumps(counts)] > 0).sum() > 10_000
    # a CPU may be stopped between a jump and its target, at both ends of the time looked at
    assert abs(missing).sum() <= 2 * CPUS
    # a check that cannot fail is a defect
    row = hottest(counts, transfers)
    transfers.count[row] -= np.uint64(1000)
    assert abs(differences(counts, transfers)).sum() >= 1000 - 2 * CPUS


def test_switched_off_and_on_again_counts_go_on(machine: OracleLab) -> None:
    machine.oracle.transfers_off()
    _, before = both(machine)
    work(machine)
    _, same = both(machine)
    assert same.since(before).total == 0
    machine.oracle.transfers_on()
    with pytest.raises(RuntimeError, match="on already"):
        machine.oracle.transfers_on()
    work(machine)
    _, after = both(machine)
    assert after.since(before).total > 10_000_000
