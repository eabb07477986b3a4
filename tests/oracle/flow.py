# SPDX-License-Identifier: GPL-2.0-or-later
"""The small kernel (flow.S) whose every transfer of control is known."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments")
_MACHINE = (
    *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "64", "-nodefaults"),
    *("-no-user-config", "-display", "none", "-no-reboot", "-debugcon", "stdio"),
)


def build_flow(out_dir: Path) -> tuple[Path, dict[str, int]]:
    """Assemble the kernel; return its file and the addresses of its labels."""
    out = out_dir / "flow"
    sources = [f"-Wl,-T,{_HERE / 'flow.ld'}", str(_HERE / "flow.S")]
    subprocess.run(["gcc", *_FLAGS, "-o", str(out), *sources], check=True)
    table = subprocess.run(["nm", str(out)], check=True, capture_output=True, text=True).stdout
    rows = map(str.split, table.splitlines())
    return out, {name: int(addr, 16) for addr, _, name in rows}


@contextlib.contextmanager
def flow_machine(
    qemu: Sequence[str], env: Mapping[str, str], kernel: Path, extra: Sequence[str]
) -> Iterator[None]:
    """Run the kernel to its end; QEMU stays until the block is left."""
    process = subprocess.Popen(
        [*qemu, *_MACHINE, "-kernel", str(kernel), *extra],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"the machine printed {line!r}")
        yield
    finally:
        process.kill()
        process.communicate()
