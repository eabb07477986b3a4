# SPDX-License-Identifier: GPL-2.0-or-later
"""What one hit costs: instructions (one CPU, `-icount`) and wall time (two parallel CPUs).

Counter out and counter in alternate, so that both see the same machine. Writes
results/hit_cost.json, a table (.md) and a chart (.png). Counts of instructions are exact on a busy
machine, too: `--instructions` prints these, and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _hit_cost_report import by_tactic, draw_chart, write_table
from _methods import (
    FUNCTION,
    Candidate,
    Method,
    bpf_methods,
    candidates,
    is_boosted,
    kernweave_methods,
    kprobe_methods,
    optimisable,
    tactics_for,
)
from _one_point import one_point
from _record import record
from _springboards import Springboard, by_place, measure_springboards
from _stats import estimate
from _workload import Workload, lab_session

from kernweave.model.plan import Tactic
from kernweave.session.session import Session

_PAIRS = {"instructions": 3, "wall": 15}
_ROUNDS = {"instructions": 16, "wall": 40}
_LATENCY_RUNS = 300
_POINTS = 50
_PATH = (
    "__x64_sys_read", "ksys_read", "vfs_read", "read_zero", "__x64_sys_write", "ksys_write",
    "vfs_write", "write_null", "__x64_sys_lseek", "ksys_lseek", "vfs_llseek", "null_lseek",
    "__x64_sys_getppid", "__do_sys_getppid",
)  # fmt: skip
#: where springboards are looked for: what each of these loops runs through once per call
_SPRINGBOARDS = (
    ("mix", 1000, _PATH),
    ("read", 1000, ("rw_verify_area", "apparmor_file_permission", "aa_file_perm", "__fget_light")),
    ("getppid", 8000, ("exit_to_user_mode_prepare", "syscall_exit_to_user_mode_prepare")),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One point that every round hits once, and what its counter adds."""

    point: str
    tactic: str
    spills: tuple[str, ...]
    instructions: float


# ---- every method at one function --------------------------------------------------------------


def all_methods(workload: Workload) -> list[Method]:
    """Every way to count at FUNCTION, those inside it at one and the same instruction."""
    found = candidates(workload, FUNCTION, f"{FUNCTION}@insns")
    inside = optimisable(workload, found)
    return [
        *kernweave_methods(found, inside),
        *kprobe_methods(inside, is_boosted(workload, inside)),
        *bpf_methods(),
    ]


def measure(workload: Workload, methods: Sequence[Method], pairs: int) -> dict[str, Any]:
    """Nanoseconds (or instructions) per call, and what each method adds to it.

    All methods take turns, so that a slow minute of the machine touches each of them.
    """
    native: list[float] = []
    added: dict[str, list[float]] = defaultdict(list)
    for number in range(pairs):
        print(f"round {number + 1} of {pairs}", flush=True)
        for method in methods:
            out = workload.cost()
            with method.attach(workload) as prefix:
                added[method.name].append(workload.cost(prefix) - out)
            native.append(out)
    return {
        "native_per_call": asdict(estimate(native)),
        "added": {name: asdict(estimate(values)) for name, values in added.items()},
    }


# ---- many points, kernweave only ---------------------------------------------------------------


def _spread(session: Session) -> list[Sample]:
    """What a counter adds at points all along the path of four system calls."""
    workload = Workload(session, "mix")
    known = [name for name in _PATH if session.view.images[0].find(name)]
    found = candidates(workload, FUNCTION, *(f"{name}@insns" for name in known))
    return [
        Sample(one.point, one.tactic, one.spills, _added(workload, one)) for one in _choose(found)
    ]


def _choose(found: Sequence[Candidate]) -> list[Candidate]:
    """One entry, points without spills spread over the path, five of each kind with.

    No springboards: what they add is not theirs alone.
    """
    inside = [one for one in found if one.tactic not in (Tactic.NOP5, Tactic.SPRINGBOARD)]
    free = [one for one in inside if not one.spills]
    kinds = sorted({one.spills for one in inside if one.spills})
    spilled = [one for kind in kinds for one in [c for c in inside if c.spills == kind][:5]]
    entry = next(one for one in found if one.tactic == "nop5")
    return [entry, *free[:: max(1, len(free) // _POINTS)][:_POINTS], *spilled]


def _added(workload: Workload, one: Candidate) -> float:
    added = []
    for _ in range(3):
        native = workload.cost()
        with workload.session.count(one.point, tactics=tactics_for(one.tactic)):
            added.append(workload.cost() - native)
    return statistics.median(added)


def _springboards(session: Session) -> list[Springboard]:
    """What short points along the same calls add."""
    return [
        one
        for call, calls, functions in _SPRINGBOARDS
        for one in measure_springboards(Workload(session, call, calls), functions)
    ]


def _by_kind(samples: Sequence[Sample], springboards: Sequence[Springboard]) -> dict[str, Any]:
    def group(chosen: list[Sample]) -> dict[str, Any]:
        values = [round(one.instructions, 2) for one in chosen]
        return {
            "points": len(chosen),
            "median": statistics.median(values),
            "max": max(values),
            "rounded_max": max(round(value) for value in values),
        }

    free = [one for one in samples if not one.spills]
    kinds = Counter("+".join(one.spills) for one in samples if one.spills)
    return {
        tactic: group([one for one in free if one.tactic == tactic])
        for tactic in dict.fromkeys(one.tactic for one in free)
    } | {
        "springboards": by_place(springboards),
        "spills": {
            kind: group([one for one in samples if "+".join(one.spills) == kind]) for kind in kinds
        },
    }


# ---- the run -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """What one lab tells that counts instructions.

    Attributes:
        per_call: what a call takes, and what each method adds.
        samples: points along the path.
        springboards: those of them that are too short.
    """

    per_call: dict[str, Any]
    samples: list[Sample]
    springboards: list[Springboard]

    def per_hit(self) -> dict[str, Any]:
        """Figures of the points."""
        return {
            "added_instructions_per_hit": _by_kind(self.samples, self.springboards),
            "points": [
                [one.point, one.tactic, "+".join(one.spills), round(one.instructions, 2)]
                for one in self.samples
            ],
            "springboards": [
                [one.point, one.kind, one.host, round(one.whole, 2), round(one.host_alone, 2)]
                for one in self.springboards
            ],
        }


def count_instructions(lab: str) -> Counted:
    """Everything that is counted in instructions, in a lab of that name."""
    with lab_session(lab, icount=True) as session:
        workload = Workload(session, rounds=_ROUNDS["instructions"])
        methods = all_methods(workload)
        per_call = measure(workload, methods, _PAIRS["instructions"])
        return Counted(per_call, _spread(session), _springboards(session))


def main() -> None:
    """Measure in two labs, one after the other, and write the results, unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--instructions", action="store_true", help="print them, write nothing")
    parser.add_argument("--lab", default="bench", help="what the labs' names begin with")
    args = parser.parse_args()
    counted = count_instructions(f"{args.lab}-icount")
    if args.instructions:
        _print_instructions(counted)
        return
    _write_all(counted, f"{args.lab}-wall")


def _print_instructions(counted: Counted) -> None:
    for name, one in counted.per_call["added"].items():
        print(f"{name:45} {one['median']:8.1f}")
    figures = counted.per_hit()
    for row in (*figures["points"], *figures["springboards"]):
        print(*row, sep="  ")
    print("", *by_tactic(figures["added_instructions_per_hit"]), sep="\n")


def _write_all(counted: Counted, lab: str) -> None:
    with lab_session(lab) as session:
        kernel = session.kernel
        workload = Workload(session, rounds=_ROUNDS["wall"])
        methods = all_methods(workload)
        wall = measure(workload, methods, _PAIRS["wall"])
        latency = one_point(session, methods[1].point, _LATENCY_RUNS)
    instructions = counted.per_call
    figures = {
        "function": FUNCTION,
        "native_per_call": {
            "instructions": instructions["native_per_call"],
            "wall_ns": wall["native_per_call"],
        },
        "methods": {
            one.name: {
                "point": one.point,
                "instructions": instructions["added"][one.name],
                "wall_ns": wall["added"][one.name],
            }
            for one in methods
        },
        "one_point_ms": latency,
        **counted.per_hit(),
    }
    result = record("hit_cost", kernel, figures)
    write_table(result)
    draw_chart(result)


if __name__ == "__main__":
    main()
