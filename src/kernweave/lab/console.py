# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab's console tells: signs of trouble, a panic, why the guest went away."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_LINES = 15

_TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|ftrace bug|general protection|rcu:.*stall|soft lockup|Call Trace"
    r"|Kernel panic|workqueue: .*\[kernweave\]"
)
_FIRST_SIGN = re.compile(
    r"BUG: |Oops: |general protection|sysrq: Trigger|invalid opcode|double fault"
)
_PANIC = "Kernel panic - not syncing"
_NO_DRIVER = "kernweave: cannot load kernweave.ko: "


def read_console(file: Path) -> str:
    """Return the console so far, or nothing."""
    try:
        return file.read_text(errors="replace").replace("\r", "")
    except FileNotFoundError:
        return ""


def trouble_lines(log: str) -> list[str]:
    """Return the lines that tell of a warning, bug, oops or stall."""
    return [line for line in log.splitlines() if _TROUBLE.search(line)]


def panic_lines(log: str) -> list[str]:
    """Return the console from the first sign of trouble before a panic; nothing without one."""
    lines = log.splitlines()
    panic = next((i for i, line in enumerate(lines) if _PANIC in line), None)
    if panic is None:
        return []
    early = range(max(0, panic - 100), panic)
    first = next((i for i in early if _FIRST_SIGN.search(lines[i])), panic)
    return lines[first : first + 2 * TAIL_LINES]


def power_off_reason(log: str) -> str | None:
    """Return why the guest powered itself off, if it did."""
    found = re.search(r"kernweave: power off: (.*)", log)
    return found[1] if found else None


def driver_refusal(log: str) -> str | None:
    """Return why the driver was not loaded, in its own and the kernel's words; None if it was."""
    if _NO_DRIVER not in log:
        return None
    before, _, reason = log.partition(_NO_DRIVER)
    # the lines the kernel or the driver wrote about it come just before
    said = re.findall(r"^\[ *[\d.]+\] (kernweave: .*|module kernweave: .*)$", before, re.M)
    own = [line for line in said if "taint" not in line and "verification" not in line]
    return "; ".join([reason.splitlines()[0], *own[-1:]])
