# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine for the oracle's own test: stock kernel, one static process, serial console."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_FLAGS = "-O1 -static -nostdlib -ffreestanding -fno-stack-protector -fno-pic -no-pie -Wall -Wextra"


def build_initrd(out_dir: Path) -> Path:
    """Compile selftest_init.c and return an initial RAM disk with nothing else in it."""
    init = out_dir / "init"
    source = Path(__file__).parent / "selftest_init.c"
    subprocess.run(["gcc", *_FLAGS.split(), "-o", str(init), str(source)], check=True)
    initrd = out_dir / "initrd"
    entries = [
        _cpio_entry("dev", stat.S_IFDIR | 0o755),
        _cpio_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _cpio_entry("init", stat.S_IFREG | 0o755, init.read_bytes()),
        _cpio_entry("TRAILER!!!", 0),
    ]
    initrd.write_bytes(b"".join(entries))
    return initrd


def _cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _pad4(head) + _pad4(data)


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


class BareMachine:
    """A running machine with two parallel CPUs; see selftest_init.c for `tell`."""

    def __init__(
        self,
        qemu: Sequence[str],
        env: Mapping[str, str],
        vmlinuz: Path,
        initrd: Path,
        extra: Sequence[str] = (),
        kernel_args: str = "nokaslr",
    ) -> None:
        argv = [*qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512"]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-serial", "stdio", "-kernel", str(vmlinuz), "-initrd", str(initrd)]
        argv += ["-append", f"console=ttyS0 quiet panic=-1 {kernel_args}", *extra]
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._until("ready")

    def __enter__(self) -> BareMachine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, line: str) -> list[str]:
        """Have the machine's process obey a line; return what it printed."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._until("done")

    def symbols(self, *names: str) -> dict[str, int]:
        """Return the addresses of kernel symbols; of several with one name, the first."""
        rows = [row.split() for row in self.tell("k " + " ".join(names))]
        found: dict[str, int] = {}
        for row in rows:
            if len(row) == 3 and row[2] in names:
                found.setdefault(row[2], int(row[0], 16))
        return found

    def _until(self, last: str) -> list[str]:
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            if line.strip() == last:
                return lines
            lines.append(line.strip())
        raise RuntimeError("the machine died: " + " | ".join(lines[-20:]))
