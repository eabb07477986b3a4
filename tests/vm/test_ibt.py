# SPDX-License-Identifier: GPL-2.0-or-later
"""Indirect branches of a kernel built for IBT arrive at endbr64, displaced ones as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kernweave
from kernweave.driver.client import Driver
from oracle.ibt import Tracked, is_tracked, tracked
from oracle.lab import no_trouble, oracle_lab, storm

SEED = 20261122
#: without thunks the branches are in the code itself; and its CPU has no IBT in force
ARGS = ("spectre_v2=off",)
POINTS = ("vfs_*@insns", "security_file_*@insns", "sock_*@insns", "*hrtimer*@insns",
          "kmem_cache_*@insns", "do_sys_*@insns")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ffd0", True),  # call *%rax
        ("2effd0", True),  # with the prefix that pads a patched thunk call
        ("41ffe3", True),  # jmp *%r11
        ("ff1425f0000000", True),  # call through memory
        ("3effe0", False),  # notrack
        ("ff30", False),  # push
        ("c3", False),
        ("e800000000", False),
    ],
)
def test_tracked_branches_are_told_by_their_bytes(code: str, expected: bool) -> None:
    assert is_tracked(bytes.fromhex(code)) is expected


def test_displaced_indirect_branches_arrive_at_endbr64(tmp_path: Path) -> None:
    with (
        oracle_lab("ibt", tmp_path, kernel_args=ARGS, series="6.12") as machine,
        no_trouble(machine),
        kernweave.connect(machine.target) as k,
    ):
        ours = driver_text(k.driver)
        with k.splice(*POINTS, partial=True) as hits:
            before = machine.snapshot()
            machine.oracle.transfers_on()
            done = k.run(storm(SEED, 60, spawns=2), capture=True)
            with k.splice("__x64_sys_sched_rr_get_interval@insns"):
                pass  # the driver at work
            machine.oracle.transfers_off()
            assert (done.exit, done.stderr) == (0, b"")
            with machine.stopped():
                meanwhile = machine.oracle.snapshot().since(before)
                found = tracked(machine.oracle.transfers(), meanwhile)
            plan = hits.plan
        assert hits.text_restored and hits.exact().all()
    by_driver = (found.from_ >= ours[0]) & (found.from_ < ours[1])
    assert not bad(found, ~by_driver)
    displaced = (found.from_ >= plan.base) & (found.from_ < plan.base + len(plan.code))
    assert displaced.sum() >= 10  # 20 to 40 as a rule
    assert (~displaced & ~by_driver).sum() > 200
    # the check can fail: the driver calls sealed functions, so it refuses to load with IBT
    assert bad(found, by_driver)


def driver_text(driver: Driver) -> tuple[int, int]:
    """Where the driver's own code is."""
    row = next(row for row in driver.kmods() if bytes(row["name"]) == b"kernweave")
    return int(row["text_start"]), int(row["text_end"])


def bad(found: Tracked, chosen: np.ndarray) -> list[str]:
    rows = np.flatnonzero(chosen & ~found.lawful)
    return [f"{found.from_[row]:#x} -> {found.to[row]:#x}" for row in rows.tolist()]
