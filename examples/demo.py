# SPDX-License-Identifier: GPL-2.0-or-later
"""`make demo`: exact counts from inside a stock kernel, checked by QEMU; their cost; kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import iced_x86 as iced
import numpy as np

import kernweave
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_headers, fetch_kernel, fetch_qemu
from kernweave.lab.state import State
from kernweave.model.plan import Tactic
from kernweave.session.attachment import Attachment
from kernweave.session.counts import Count
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

sys.path.extend(str(Path(__file__).parent.parent / name) for name in ("tests", "bench"))
from _methods import (
    FUNCTION,
    Method,
    candidates,
    kernweave_methods,
    kprobe_methods,
    optimisable,
    probe_kmod,
)
from _workload import ICOUNT, ICOUNT_KERNEL, Workload

from oracle.oracle import Counts, Oracle, build_plugin, qemu_args

NAME = "demo"
TARGET = f"lab:{NAME}"
POINT = "vfs_read@blocks"
DD = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=100000", "status=none"]
STEPS = 5
SHOWN = 5
BAR = 42
INT3 = b"\xcc"
COSTS = {
    "kernweave nop5": "kernweave nop5",
    "kernweave jmp32": "kernweave jmp32",
    "kprobe, optimised": "optimised kprobe",
    "kprobe on ftrace": "ftrace kprobe",
    "kprobe int3, not boosted": "int3 kprobe",
}
FEWER = 12  # 25 were measured

KILLED_CLIENT = """
import sys, time
import kernweave
k = kernweave.connect(sys.argv[1])
k.count(sys.argv[2])
print("attached", flush=True)
time.sleep(600)
"""


def step(number: int, name: str, what: str, began: float) -> None:
    """Print the heading of a step with the seconds it took."""
    line = f"[{number}/{STEPS}] {name:9} {what}"
    print(f"{line:72}{time.monotonic() - began:5.1f} s", flush=True)


def check(holds: bool, text: str) -> None:
    """Print an `ok`, or end the demo."""
    print(f"      {'ok' if holds else 'FAILED'}  {text}", flush=True)
    if not holds:
        sys.exit(1)


def talk(line: str) -> None:
    """Print one line of progress."""
    print(f"      .. {line}", flush=True)


def get_tools() -> None:
    """Step 1: packages, unpacked in the cache."""
    began = time.monotonic()
    kernel, qemu = fetch_kernel("6.1", talk), fetch_qemu(talk)
    fetch_headers(kernel, talk)
    driver_kmod("6.1", talk)
    probe_kmod()
    step(1, "tools", f"gcc, QEMU {qemu.version}, linux-image {kernel.version}", began)


def boot(control: Path) -> Lab:
    """Step 2: a lab of its own, with QEMU counting."""
    began = time.monotonic()
    plugin = build_plugin(control.parent)
    lab = Lab(NAME)
    lab.down()
    state = lab.up(kmod=driver_kmod("6.1", talk), qemu_args=qemu_args(plugin, control))
    step(2, "lab", f"Linux {state.kernel}, 2 CPUs, KASLR, QEMU's TCG", began)
    return lab


def begins_with(session: Session, row: Count) -> str:
    """The native instruction of a point, for the reader."""
    if row.tactic == Tactic.NOP5:
        return "(function entry)"
    code = session.read(int(row.addr, 16), 15)
    ins = iced.Decoder(64, code, ip=int(row.addr, 16)).decode()
    return iced.Formatter(iced.FormatterSyntax.INTEL).format(ins)


def count(session: Session, oracle: Oracle) -> None:
    """Step 3: every block of vfs_read, counted twice."""
    began = time.monotonic()
    before = oracle.snapshot()
    with session.splice(POINT) as hits:
        session.run(DD, check=True)
    counted = oracle.snapshot().since(before)
    step(3, "count", "every block of vfs_read while dd reads 100,000 bytes", began)
    rows = hits.rows()
    chosen = telling(rows)
    width = max(len(row.point) for row in chosen)
    wide = max(len("tactic"), *(len(row.tactic) for row in chosen))
    print(f"      {'hits':>9}  {'point':{width}}  {'tactic':{wide}}  begins with")
    for row in chosen:
        text = begins_with(session, row)
        print(f"      {row.hits:>9,}  {row.point:{width}}  {row.tactic:{wide}}  {text}")
    print(f"      {'...':>9}  {len(rows) - len(chosen)} more, {len(hits.refused)} refused: "
          f"kernweave count --all '{POINT}'")  # fmt: skip
    equal = equal_to(counted, hits)
    check(equal == len(rows), f"QEMU counted the same itself: {equal} of {len(rows)} equal")


def telling(rows: list[Count]) -> list[Count]:
    """A few rows: the most hit of each tactic and overall, one that was not hit; by address."""
    most = sorted(rows, key=lambda row: (-row.hits, row.offset))
    firsts = {row.tactic: row for row in reversed(most)}.values()
    order = [*firsts, most[-1], *(row for row in most if row.tactic != Tactic.INT3)]
    return sorted(list(dict.fromkeys(order))[:SHOWN], key=lambda row: row.offset)


def equal_to(counted: Counts, hits: Attachment) -> int:
    """Points whose arrivals are QEMU's executions of what only an arrival executes.

    That is the displaced instruction's copy; for a nop, which has none, the way back; for a trap
    its int3.
    """
    plan = hits.plan
    copies = [
        copy or _way_back(hits, row) for row, copy in enumerate(plan.copy[: plan.jumps].tolist())
    ]
    traps = plan.addr[plan.jumps :].tolist()
    executed = np.concatenate(
        [counted.at(np.array(copies, np.uint64)), counted.at_code(traps, [INT3] * len(traps))]
    )
    return int((executed[hits.site] == hits.hits() + hits.missed()).sum())


def _way_back(hits: Attachment, row: int) -> int:
    """Address of the jump at the end of a nop's trampoline."""
    plan = hits.plan
    jump = plan.pokes.new[int(plan.poke[row])]
    start = int(plan.addr[row]) + 5 + int.from_bytes(jump[1:5], "little", signed=True)
    code = plan.code[start - plan.base :]
    ins = next(one for one in iced.Decoder(64, code, ip=start) if one.is_jmp_near)
    return int(ins.ip)


@contextmanager
def cost_lab() -> Iterator[Future[State]]:
    """A second lab, which boots while the first one is used."""
    lab = Lab(f"{NAME}-icount")
    lab.down()
    with ThreadPoolExecutor(1) as aside:
        booting = aside.submit(
            lab.up,
            kmod=driver_kmod("6.1", talk),
            qemu_args=ICOUNT,
            kernel_args=ICOUNT_KERNEL,
            smp=1,
        )
        try:
            yield booting
        finally:
            booting.exception()
            lab.down()


def cost(booting: Future[State]) -> None:
    """Step 4: instructions that a hit adds, where a guest nanosecond is an instruction."""
    began = time.monotonic()
    booting.result()
    with kernweave.connect(f"lab:{NAME}-icount") as session:
        added = costs(Workload(session))
    step(4, "cost", "instructions added per hit (icount, second lab)", began)
    most = max(added.values())
    for name, label in COSTS.items():
        bar = "#" * max(1, round(added[name] / most * BAR))
        print(f"      {label:16} {added[name]:4.0f}  {bar}")
    ours = max(value for name, value in added.items() if name.startswith("kernweave"))
    best = min(value for name, value in added.items() if name.startswith("kprobe"))
    times = int(best / ours)
    check(times >= FEWER, f"{times} times fewer than the best kprobe, measured in this run")


def cost_methods(workload: Workload) -> list[Method]:
    """The methods shown, at the entry of a function and at one instruction inside it."""
    found = candidates(workload, FUNCTION, f"{FUNCTION}@insns")
    inside = optimisable(workload, found)
    methods = [*kernweave_methods(found, inside), *kprobe_methods(inside, boosted=False)]
    return [method for method in methods if method.name in COSTS]


def costs(workload: Workload) -> dict[str, float]:
    """Instructions per call with each method's counter in, less those without.

    Nothing is random there; but background work of the kernel can only add, so the least of
    several native runs is the native cost.
    """
    native, costs = [], {}
    for method in cost_methods(workload):
        native.append(workload.cost())
        with method.attach(workload) as prefix:
            costs[method.name] = workload.cost(prefix)
    return {name: value - min(native) for name, value in costs.items()}


def kill(lab: Lab) -> None:
    """Step 5: kill -9 the client while its counters are in and dd runs."""
    began = time.monotonic()
    with kernweave.connect(TARGET, writer=False) as watcher:
        facts = watcher.driver.facts
        size = facts.text_end - facts.text_start
        native = watcher.read(facts.text_start, size)
        command = [sys.executable, "-c", KILLED_CLIENT, TARGET, POINT]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            client.stdout.readline()
            changed = watcher.read(facts.text_start, size) != native
            reader = subprocess.Popen(
                [sys.executable, "-m", "kernweave", "--target", TARGET, "lab", "exec", "--", *DD]
            )
            os.kill(client.pid, signal.SIGKILL)
        status = reader.wait()
        restored = watcher.read(facts.text_start, size) == native
    trouble = lab.trouble()
    step(5, "safety", "kill -9 while the counters are in and dd is running", began)
    check(changed, "the counters were in the kernel's text")
    check(status == 0, "dd went on and ended with status 0")
    check(restored, f"text byte-identical: {size:,} bytes")
    check(not trouble, f"{len(trouble)} kernel warnings")


def main() -> NoReturn:
    """Run the five steps; exit 0 only if every check holds."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            control = Path(folder) / "oracle"
            get_tools()
            with cost_lab() as booting:
                lab = boot(control)
                with kernweave.connect(TARGET) as session, Oracle(control) as oracle:
                    count(session, oracle)
                cost(booting)
            kill(lab)
    except KernweaveError as error:
        sys.exit(f"error: {error}")
    print(f"Done in {time.monotonic() - began:.0f} s. The lab stays up 15 min: "
          f"kernweave lab down {NAME} ends it now.")  # fmt: skip
    print("Next:  kernweave count 'vfs_read@blocks' -- ls -lR /usr/share      make test")
    sys.exit(0)


if __name__ == "__main__":
    main()
