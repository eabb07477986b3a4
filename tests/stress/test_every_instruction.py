# SPDX-License-Identifier: GPL-2.0-or-later
"""Every instruction of 200 functions against the oracle; of all the kernel in clones."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from guest import booted, target

import kernweave
from kernweave.session.session import Session
from oracle.counts import arrivals, differences, measure
from oracle.lab import OracleLab, no_trouble, oracle_lab, storm

SEED = 20261122
FUNCTIONS = 200
ROUNDS = 40
MODES = {"default": (), "preempt=full": ("preempt=full",)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("series", ["6.1", "6.12"])
@pytest.mark.parametrize("mode", MODES)
def test_every_instruction_of_200_functions_equals_the_oracle(
    series: str, mode: str, tmp_path: Path
) -> None:
    name = f"every-{series}-{mode.replace('=', '-')}"
    with (
        oracle_lab(name, tmp_path, MODES[mode], series=series) as machine,
        no_trouble(machine),
        kernweave.connect(machine.target, progress=print) as k,
    ):
        names = _functions(k)
        print(f"seed {SEED}: {' '.join(names)}")
        _check(machine, k, names)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("series", ["6.1", "6.12"])
def test_every_instruction_of_the_kernel_is_counted_at_once(series: str) -> None:
    with (
        booted(f"every-clone-{series}", kernel=series) as machine,
        kernweave.connect(target(machine)) as k,
    ):
        with k.weave("vmlinux:*@insns", partial=True) as hits:
            _work(k)
        print(len(hits.placed), len(hits.refused), int(hits.hits().sum()))
        assert hits.text_restored
        assert len(hits.placed) > 2_000_000
        assert (hits.hits() > 0).sum() > 50_000


def _check(machine: OracleLab, k: Session, names: list[str]) -> None:
    measured = measure(machine, k, [f"{name}@insns" for name in names], lambda: _work(k))
    assert differences(measured) == []
    hits = arrivals(measured)
    tactics = Counter(site.tactic.value for site in measured.sites.values())
    row = {
        "instructions": len(hits),
        "hit": sum(map(bool, hits.values())),
        "sum": sum(hits.values()),
    }
    print(json.dumps({**row, "functions": len(measured.functions), "tactics": tactics}))
    assert len(measured.functions) >= FUNCTIONS  # and their cold parts
    assert len(tactics) == 4
    assert row["hit"] > 2000


def _functions(k: Session) -> list[str]:
    """Functions of the kernel itself that the workload enters, drawn by chance."""
    with k.count("vmlinux:*", partial=True, tactics=["nop5"]) as hits:
        _work(k)
    ran = sorted({row.point for row in hits.rows() if row.hits and "#" not in row.point})
    return random.Random(SEED).sample(ran, FUNCTIONS)


def _work(k: Session) -> None:
    done = k.run(storm(SEED, ROUNDS, spawns=4), capture=True)
    assert (done.exit, done.stderr) == (0, b"")
