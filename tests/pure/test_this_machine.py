# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts about a machine's own kernel, from made-up sysfs and tracefs trees."""

from __future__ import annotations

from pathlib import Path

from kernweave.lab.this_machine import read_state


def tree(root: Path, **files: str) -> Path:
    names = {
        "lockdown": "sys/kernel/security/lockdown",
        "signing": "sys/module/module/parameters/sig_enforce",
        "tracer": "sys/kernel/tracing/current_tracer",
        "functions": "sys/kernel/tracing/enabled_functions",
        "kprobes": "sys/kernel/debug/kprobes/list",
        "driver": "dev/kernweave",
    }
    for key, text in files.items():
        file = root / names[key]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_state_of_a_quiet_kernel_names_nobody(tmp_path: Path) -> None:
    root = tree(
        tmp_path, lockdown="[none] integrity\n", signing="N\n", tracer="nop\n", functions=""
    )
    state = read_state(root)
    assert (state.driver, state.lockdown) == ("not loaded", "none")
    assert (state.signing, state.tracers) == ("not enforced", "none")


def test_state_of_a_busy_kernel_names_everybody(tmp_path: Path) -> None:
    root = tree(
        tmp_path, lockdown="none [integrity] confidentiality\n", signing="Y\n", driver="",
        tracer="function\n", functions="a (1)\nb (1)\n", kprobes="c0 k vfs_read+0x0\n",
    )  # fmt: skip
    state = read_state(root)
    assert (state.driver, state.lockdown, state.signing) == ("loaded", "integrity", "enforced")
    assert state.tracers == "tracer function, 2 functions under ftrace, 1 kprobes"


def test_state_without_the_files_says_so(tmp_path: Path) -> None:
    state = read_state(tmp_path)
    assert "no lockdown support" in state.lockdown and state.tracers == "not readable"
