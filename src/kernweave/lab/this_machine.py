# SPDX-License-Identifier: GPL-2.0-or-later
"""What this machine's own kernel says about being changed: for `--target local` and its doctor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_NOTHING = "not readable"


@dataclass(frozen=True, slots=True)
class KernelState:
    """Facts read from this machine's sysfs and tracefs; each is a text for the reader.

    Attributes:
        driver: whether the kernweave driver is loaded.
        lockdown: the lockdown mode.
        signing: whether kmods must be signed.
        tracers: who else changes or traces the text.
    """

    driver: str
    lockdown: str
    signing: str
    tracers: str


def read_state(root: Path = Path("/")) -> KernelState:
    """Read the state; what is not readable is said to be so.

    Args:
        root: where sys, dev and proc are; another one in tests.
    """
    return KernelState(
        driver="loaded" if (root / "dev/kernweave").exists() else "not loaded",
        lockdown=_read(
            root / "sys/kernel/security/lockdown", _chosen, "none (no lockdown support)"
        ),
        signing=_read(
            root / "sys/module/module/parameters/sig_enforce",
            lambda text: "enforced" if text == "Y" else "not enforced",
            "not enforced (no signature support)",
        ),
        tracers=_tracers(root),
    )


def _tracers(root: Path) -> str:
    tracing = root / "sys/kernel/tracing"
    kprobes = root / "sys/kernel/debug/kprobes/list"
    users = [
        _read(
            tracing / "current_tracer", lambda text: "" if text == "nop" else f"tracer {text}", ""
        ),
        _read(tracing / "enabled_functions", _lines("functions under ftrace"), ""),
        _read(kprobes, _lines("kprobes"), ""),
    ]
    found = ", ".join(filter(None, users))
    if found:
        return found
    try:
        return "none" if (tracing / "current_tracer").exists() else _NOTHING
    except OSError:
        return _NOTHING


def _lines(what: str) -> Callable[[str], str]:
    return lambda text: f"{len(text.splitlines())} {what}" if text else ""


def _chosen(text: str) -> str:
    """The word in brackets of a file that lists the choices."""
    return text.partition("[")[2].partition("]")[0] or text


def _read(file: Path, tell: Callable[[str], str], absent: str) -> str:
    try:
        return tell(file.read_text().strip())
    except FileNotFoundError:
        return absent
    except OSError:
        return _NOTHING if absent else ""
