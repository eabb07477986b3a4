# SPDX-License-Identifier: GPL-2.0-or-later
"""`make demo`: exact counts from inside a stock kernel, checked by QEMU, and kill -9 survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import iced_x86 as iced
import numpy as np

import kernweave
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_headers, fetch_kernel, fetch_qemu
from kernweave.model.plan import Tactic
from kernweave.session.attachment import Attachment, Count
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle.oracle import Counts, Oracle, build_plugin, qemu_args

NAME = "demo"
TARGET = f"lab:{NAME}"
POINT = "vfs_read@blocks"
DD = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=100000", "status=none"]
STEPS = 4
SHOWN = 5

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
    with session.count(POINT) as hits:
        session.run(DD, check=True)
    counted = oracle.snapshot().since(before)
    step(3, "count", "every block of vfs_read while dd reads 100,000 bytes", began)
    rows = sorted(hits.rows(), key=lambda row: -row.hits)
    chosen = [*rows[: SHOWN - 1], rows[-1]]
    width = max(len(row.point) for row in chosen)
    print(f"      {'hits':>9}  {'point':{width}}  tactic  begins with")
    for row in chosen:
        text = begins_with(session, row)
        print(f"      {row.hits:>9,}  {row.point:{width}}  {row.tactic:6}  {text}")
    print(f"      {'...':>9}  {len(rows) - len(chosen)} more, {len(hits.refused)} refused: "
          f"kernweave count --all '{POINT}'")  # fmt: skip
    equal = count_equal(hits, counted)
    check(equal == len(rows), f"QEMU counted the same itself: {equal} of {len(rows)} equal")


def count_equal(hits: Attachment, counted: Counts) -> int:
    """Points whose hits are QEMU's executions of the displaced instruction.

    Nothing is left of a nop to be displaced: there the way back is counted.
    """
    copies = [copy or _way_back(hits, row) for row, copy in enumerate(hits.plan.copy.tolist())]
    executed = counted.at(np.array(copies, np.uint64))
    return int((executed[hits.site] == hits.hits()).sum())


def _way_back(hits: Attachment, row: int) -> int:
    """Address of the jump at the end of a nop's trampoline."""
    plan = hits.plan
    start = (
        int(plan.addr[row]) + 5 + int.from_bytes(bytes(plan.new[row][1:]), "little", signed=True)
    )
    code = plan.code[start - plan.base :]
    ins = next(one for one in iced.Decoder(64, code, ip=start) if one.is_jmp_near)
    return int(ins.ip)


def kill(lab: Lab) -> None:
    """Step 4: kill -9 the client while its counters are in and dd runs."""
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
    step(4, "safety", "kill -9 while the counters are in and dd is running", began)
    check(changed, "the counters were in the kernel's text")
    check(status == 0, "dd went on and ended with status 0")
    check(restored, f"text byte-identical: {size:,} bytes")
    check(not trouble, f"{len(trouble)} kernel warnings")


def main() -> NoReturn:
    """Run the four steps; exit 0 only if every check holds."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            control = Path(folder) / "oracle"
            get_tools()
            lab = boot(control)
            with kernweave.connect(TARGET) as session, Oracle(control) as oracle:
                count(session, oracle)
            kill(lab)
    except KernweaveError as error:
        sys.exit(f"error: {error}")
    print(f"Done in {time.monotonic() - began:.0f} s. The lab stays up 15 min: "
          f"kernweave lab down {NAME} ends it now.")  # fmt: skip
    print("Next:  kernweave count 'vfs_read@blocks' -- ls -lR /usr/share      make test")
    sys.exit(0)


if __name__ == "__main__":
    main()
