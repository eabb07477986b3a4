# SPDX-License-Identifier: GPL-2.0-or-later
"""Generations in the driver: entered, left, freed, on live kernels."""

from __future__ import annotations

import json

import pytest
from guest import booted, shell, target
from weaving import make_kernel, pick

import kernweave
from kernweave.lab.machine import Lab
from kernweave.session.generations import Live
from kernweave.weave.counters import make_counters, select_blocks
from kernweave.weave.scope import find_scope

SEED = 20261123


@pytest.mark.parametrize("series", ["6.1", "6.12"])
@pytest.mark.parametrize("functions", [300, 40_000])
def test_enter_and_leave(series: str, functions: int) -> None:
    with booted(f"weavedrv-{series}", kernel=series) as lab, lab.connect() as other:
        enter_and_leave(lab, other, series, functions)


def enter_and_leave(lab: Lab, other, series: str, functions: int) -> None:
    with kernweave.connect(target(lab), progress=print) as k:
        k.view.refresh()
        k._hooks.mirror()
        k.view.refresh()
        source = k.analysis.source()
        kernel = make_kernel(k, series, source)
        scope = find_scope(source, asked=pick(source, functions, SEED))
        insn, place = select_blocks(source, scope)
        counters, _ = make_counters(source, scope, insn, place)
        for _ in range(3):
            live = Live(kernel, source, scope, counters)
            moved = live.enter()
            print("entered", moved, len(live.handover.entries))
            shell(other, "ls -lR /usr/lib/python3 | md5sum; cat /proc/*/stack | wc -l")
            print(live.hits().sum(), (live.hits() > 0).sum())
            left = live.leave()
            print(json.dumps([str(one) for one in left.stops]))
            assert left.stuck == () and left.visitors == 0
            assert live.free() == 0
            assert "kernweave_" not in shell(other, "cat /proc/modules")
