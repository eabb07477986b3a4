# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach to the entry of every function and detach: kernweave, and what the kernel brings.

On 6.1 the function tracer, on 6.12 BPF's kprobe.multi, on the very functions that kernweave
placed a counter at, in the same guest and in turns. kernweave's times are the caller's, from
names to counters; the other side's are measured in the guest, around the system calls.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from _one_point import stopwatch
from _record import record
from _stats import estimate, ratio
from _workload import CSRC

import kernweave
from kernweave.driver.link import Link
from kernweave.errors import KernweaveError
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

_LAB = "bench-attach-all"
_ROUNDS = 9
_TRACER_REFS = np.uint64((1 << 23) - 1)  # FTRACE_REF_MAX: how many tracers use a record

Addrs = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Guest:
    """A reading session, and one for commands."""

    session: Session
    link: Link

    def numbers(self, tool: str, *args: str, stdin: bytes = b"") -> list[int]:
        """What a program of csrc prints."""
        out, err = bytearray(), bytearray()
        argv = [str(build_static(CSRC / f"{tool}.c")), *args]
        done = self.link.run(argv, cwd="/", stdin=stdin, stdout=out.extend, stderr=err.extend)
        if done.exit:
            raise KernweaveError(f"{tool} ended with status {done.exit}: {err.decode().strip()}")
        return [int(word) for word in out.split()]


#: attaches to these ftrace sites and detaches; nanoseconds by part, those of attach with `attach`
Other = Callable[[Guest, Addrs], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Ours:
    """One attach and detach of kernweave: milliseconds, and where they went."""

    sites: Addrs
    spent: dict[str, float]


def measure_ours(target: str) -> Ours:
    """Count every function's entry in a session of its own."""
    spent: dict[str, float] = defaultdict(float)
    requests: dict[str, float] = defaultdict(float)
    with kernweave.connect(target) as session, stopwatch(session.driver, requests):
        began = time.perf_counter()
        hits = session.splice("*", tactics=["nop5"], partial=True)
        spent["attach"] = time.perf_counter() - began
        spent["attach_python"] = spent["attach"] - sum(requests.values())
        spent["attach_commit"] = requests["commit"]
        requests.clear()
        began = time.perf_counter()
        hits.detach()
        spent["detach"] = time.perf_counter() - began
        spent["detach_python"] = spent["detach"] - sum(requests.values())
        spent["detach_undo"] = requests["undo"]
        assert hits.text_restored and not hits.evicted
    return Ours(hits.plan.addr, {name: 1e3 * value for name, value in spent.items()})


# ---- the others --------------------------------------------------------------------------------


def ftrace(guest: Guest, sites: Addrs) -> dict[str, float]:
    """The function tracer, which records nothing, on the same ftrace records."""
    driver = guest.session.driver
    records = driver.ftrace_records()["ip"].astype(np.uint64)
    numbers = np.flatnonzero(np.isin(records, sites)) + 1
    listed = "".join(f"{number}\n" for number in numbers.tolist()).encode()
    select, enable = guest.numbers("ftrace_all", "on", stdin=listed)
    traced = driver.ftrace_records()
    used = traced["ip"][(traced["flags"].astype(np.uint64) & _TRACER_REFS) > 0]
    disable, clear = guest.numbers("ftrace_all", "off")
    assert np.array_equal(np.sort(used.astype(np.uint64)), np.sort(sites)), len(used)
    return {
        "attach": select + enable,
        "attach_filter": select,
        "attach_enable": enable,
        "detach": disable + clear,
        "detach_disable": disable,
    }


def kprobe_multi(guest: Guest, sites: Addrs) -> dict[str, float]:
    """A BPF program that does nothing, at the same places by one link."""
    listed = sites.astype("<u8").tobytes()
    attach, detach, enabled = guest.numbers("kprobe_multi", stdin=listed)
    assert enabled == len(sites), (enabled, len(sites))
    return {"attach": attach, "detach": detach}


OTHERS: dict[str, tuple[str, Other]] = {
    "6.1": ("ftrace", ftrace),
    "6.12": ("kprobe.multi", kprobe_multi),
}


# ---- both --------------------------------------------------------------------------------------


def measure(series: str, rounds: int) -> tuple[str, dict[str, Any]]:
    """Release of a kernel, and the figures of both sides in it."""
    name, other = OTHERS[series]
    lab = Lab(f"{_LAB}-{series}", kernel=series)
    lab.down()
    target = f"lab:{lab.name}"
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    try:
        lab.up(kmod=driver_kmod(series, print), progress=print)
        with (
            kernweave.connect(target, writer=False) as reader,
            lab.connect() as link,
        ):
            for number in range(rounds + 1):  # the first one only fills caches
                print(f"{series}: round {number} of {rounds}", flush=True)
                one = measure_ours(target)
                two = other(Guest(reader, link), one.sites)
                for kept, spent in ((ours, one.spent), (theirs, two)):
                    for part, value in spent.items() if number else ():
                        kept[part].append(value)
            assert not lab.trouble(), lab.trouble()
            return reader.kernel, _figures(len(one.sites), ours, name, theirs)
    finally:
        lab.down()


def _figures(
    sites: int, ours: dict[str, list[float]], name: str, theirs: dict[str, list[float]]
) -> dict[str, Any]:
    theirs = {part: [value / 1e6 for value in values] for part, values in theirs.items()}
    return {
        "functions": sites,
        "kernweave_ms": {part: asdict(estimate(values)) for part, values in ours.items()},
        f"{name}_ms": {part: asdict(estimate(values)) for part, values in theirs.items()},
        "ratio": {part: asdict(ratio(ours[part], theirs[part])) for part in ("attach", "detach")},
    }


def main() -> None:
    """Measure in labs of its own and write results/attach_all.json, unless told what to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernel", choices=OTHERS)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    series = [args.kernel] if args.kernel else list(OTHERS)
    found = {one: measure(one, args.rounds or _ROUNDS) for one in series}
    figures = {one: kernel_figures for one, (_, kernel_figures) in found.items()}
    if args.kernel or args.rounds:
        print(figures)
        return
    record("attach_all", ", ".join(release for release, _ in found.values()), figures)


if __name__ == "__main__":
    main()
