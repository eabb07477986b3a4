# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions added per hit: one CPU, `-icount`, where a guest nanosecond is an instruction."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from _record import record

import kernweave
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

_LAB = "bench-icount"
_CALLS = 1000  # a round is shorter than a timer tick, so that the least round has none
_ROUNDS = 16
_POINTS = 50
_PATH = (
    "__x64_sys_read", "ksys_read", "vfs_read", "read_zero", "__x64_sys_write", "ksys_write",
    "vfs_write", "write_null", "__x64_sys_lseek", "ksys_lseek", "vfs_llseek", "null_lseek",
    "__x64_sys_getppid", "__do_sys_getppid",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One point that every round hits once, and what its counter adds."""

    point: str
    tactic: str
    spills: tuple[str, ...]
    instructions: float


def _loop(session: Session, program: Path) -> float:
    """Instructions per mix of four system calls, the least of some rounds."""
    command = [str(program), "mix", str(_CALLS), str(_ROUNDS)]
    done = session.run(command, check=True, capture=True)
    return float(done.stdout)


def _candidates(session: Session, program: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Points of the path that one mix hits exactly once."""
    known = [name for name in _PATH if session.view.images[0].find(name)]
    points = [*(f"{name}@insns" for name in known), "vfs_read"]
    with session.count(*points, partial=True) as hits:
        session.run([str(program), "mix", str(_CALLS), "1"], check=True, capture=True)
    spills = dict(zip(hits.plan.addr.tolist(), hits.plan.spills, strict=True))
    return [
        (row.point, row.tactic, spills[int(row.addr, 16)])
        for row in hits.rows()
        if _CALLS <= row.hits < _CALLS * 1.02
    ]


def _choose(
    candidates: list[tuple[str, str, tuple[str, ...]]],
) -> list[tuple[str, str, tuple[str, ...]]]:
    free = [one for one in candidates if one[1] == "jmp32" and not one[2]]
    kinds = {one[2] for one in candidates if one[2]}
    spilled = [one for kind in kinds for one in [c for c in candidates if c[2] == kind][:5]]
    step = max(1, len(free) // _POINTS)
    return [("vfs_read", "nop5", ()), *free[::step][:_POINTS], *spilled]


def _measure(session: Session, program: Path, point: str) -> float:
    """Counter in and out in turn: what it adds per call, the median of three."""
    added = []
    for _ in range(3):
        native = _loop(session, program)
        with session.count(point):
            added.append(_loop(session, program) - native)
    return statistics.median(added)


def _figures(samples: list[Sample]) -> dict[str, object]:
    def group(chosen: list[Sample]) -> dict[str, object]:
        values = [round(one.instructions, 2) for one in chosen]
        return {
            "points": len(chosen),
            "median": statistics.median(values) if values else None,
            "max": max(values, default=None),
            "rounded_max": max((round(value) for value in values), default=None),
        }

    free = [one for one in samples if not one.spills]
    spilled = [one for one in samples if one.spills]
    kinds = Counter("+".join(one.spills) for one in spilled)
    return {
        "added_instructions_per_hit": {
            "nop5": group([one for one in free if one.tactic == "nop5"]),
            "jmp32": group([one for one in free if one.tactic == "jmp32"]),
            "spills": {
                kind: group([one for one in spilled if "+".join(one.spills) == kind])
                for kind in kinds
            },
        },
        "points": [
            [one.point, one.tactic, "+".join(one.spills), round(one.instructions, 2)]
            for one in samples
        ],
    }


def main() -> None:
    """Measure in a lab of its own and write results/hit_cost.json."""
    lab = Lab(_LAB)
    lab.down()
    lab.up(
        kmod=driver_kmod(lab.series, print),
        qemu_args=("-icount", "shift=0,sleep=off"),
        smp=1,
        progress=print,
    )
    try:
        program = build_static(Path(__file__).parent / "csrc" / "calls.c")
        with kernweave.connect(f"lab:{_LAB}") as session:
            chosen = _choose(_candidates(session, program))
            samples = [
                Sample(point, tactic, spills, _measure(session, program, point))
                for point, tactic, spills in chosen
            ]
            record("hit_cost", session.kernel, _figures(samples))
    finally:
        lab.down()


if __name__ == "__main__":
    main()
