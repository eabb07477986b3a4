# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the kernel runs: a target's name to a link with its driver."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol

from kernweave.driver.link import Event
from kernweave.driver.local import LocalLink
from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.build import build_kmod
from kernweave.lab.machine import Lab
from kernweave.lab.packages import KERNEL_SERIES, fetch_kernel

Progress = Callable[[str], None]

LOCAL_KMODS = Path("/lib/modules")
_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
}


def lab_name(target: str) -> str:
    """The lab a target means; `lab` alone is `lab:6.1`.

    Raises:
        UsageError: not a target.
        UnsupportedError: a target that is not a lab.
    """
    kind, _, name = target.partition(":")
    if kind == "lab" and (name or target == "lab"):
        return name or KERNEL_SERIES[0]
    if target.startswith("ssh://"):
        raise UnsupportedError(
            f"target {target} is not there yet",
            help="use a lab: kernweave --target lab ...",
        )
    raise UsageError(f"not a target: {target!r}", help="use lab, lab:NAME or local")


def driver_kmod(series: str, progress: Progress, cflags: tuple[str, ...] = ()) -> Path:
    """The driver built for a lab's kernel, from the sources in this package."""
    kernel = fetch_kernel(series, progress)
    with as_file(files("kernweave.driver") / "csrc" / "kmod") as sources:
        return build_kmod(kernel, sources, cflags=cflags, progress=progress)


def boot_lab(name: str, progress: Progress, kernel: str | None = None) -> Lab:
    """The lab of that name, booted with this kernweave's driver if it does not run yet.

    A kernel for which the driver cannot be built boots without; its sessions are told why.

    Raises:
        UsageError: it runs another kernel than `kernel`.
    """
    lab = Lab(name, kernel)
    if lab.running():
        lab.up(progress=progress)
        return lab
    try:
        kmod = driver_kmod(lab.series, progress)
    except UnsupportedError as error:
        why = f"the driver cannot be built for {lab.series}: {error.message}"
        lab.up(no_driver=why, progress=progress)
    else:
        lab.up(kmod=kmod, progress=progress)
    return lab


def kmod_file(target: str, release: str, progress: Progress) -> bytes:
    """The file of some kmod of the kernel that runs on a target.

    Raises:
        UnsupportedError: there is none.
    """
    if target == "local":
        return read_kmod(LOCAL_KMODS / release)
    return driver_kmod(Lab(lab_name(target)).series, progress).read_bytes()


def read_kmod(folder: Path) -> bytes:
    """The smallest of the kernel's own kmods, unpacked; a foreign one's license could taint.

    Args:
        folder: of all kmods of a kernel; its own are in `kernel` below it, if there is that.

    Raises:
        UnsupportedError: there is none that can be unpacked.
    """
    own = folder / "kernel"
    within = own if own.is_dir() else folder
    found = [path for path in within.rglob("*.ko*") if path.suffix in _UNPACK]
    if not found:
        raise UnsupportedError(
            f"no kmod in {within} to model clones on", help="install the kernel's own package"
        )
    smallest = min(found, key=lambda path: (path.stat().st_size, path))
    return _UNPACK[smallest.suffix](smallest.read_bytes())


class AnyLink(Protocol):
    """What a session needs of a target: one driver, one command at a time."""

    def call(self, request: bytes) -> memoryview:
        """Exchange one request with the driver."""

    def load_kmod(self, file: bytes) -> None:
        """Load a kmod."""

    def unload_kmod(self, name: str) -> None:
        """Unload a kmod."""

    def exec_start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        fresh: bool = False,
    ) -> None:
        """Start a command."""

    def exec_events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield the command's output and its end."""

    def signal(self, signo: int) -> None:
        """Send a signal to the command's process group."""

    def close(self) -> None:
        """End the session, which undoes it."""


def open_link(target: str, progress: Progress) -> AnyLink:
    """Connect to a target; a lab comes up by itself, this machine only when named."""
    if target == "local":
        return LocalLink()
    return boot_lab(lab_name(target), progress).connect()
