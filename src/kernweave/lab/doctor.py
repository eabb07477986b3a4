# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this machine has what kernweave needs: quick, without network, changing nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kernweave.errors import KernweaveError
from kernweave.lab import this_machine
from kernweave.lab.accel import cached_verdict, kvm_accessible, wanted_accel
from kernweave.lab.apt import CODENAME, debian_sources, machine_sources
from kernweave.lab.cache import cache_dir
from kernweave.lab.host import check_host_tools, install_line
from kernweave.lab.packages import KERNEL_SERIES, QemuTree, fetched_kernel, fetched_qemu
from kernweave.lab.qemu import check_version
from kernweave.lab.state import lab_names, labs_folder, read_state

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 1 << 30  # package lists, one kernel with headers, QEMU, builds


@dataclass(frozen=True, slots=True)
class Check:
    """One precondition.

    Attributes:
        check: its name.
        status: ok; missing: something must be installed; fix: something must be changed.
        detail: what was found.
        command: one line that mends it, or None.
    """

    check: str
    status: Literal["ok", "missing", "fix"]
    detail: str
    command: str | None = None


def checks() -> list[Check]:
    """Return all preconditions in the order in which they are needed."""
    return [check for name, group in _GROUPS for check in _guarded(name, group)]


def _guarded(name: str, group: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Turn an error inside a check into a row: the doctor itself must not fail."""
    try:
        yield from group()
    except KernweaveError as error:
        yield Check(name, "fix", "; ".join(filter(None, (error.message, error.help))))
    except OSError as error:
        yield Check(name, "fix", str(error))


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        yield Check("python", "missing", f"{version}, {needed} is needed", "make PYTHON=python3.11")
    else:
        yield Check("python", "ok", f"{version} at {sys.executable}")


def _tools() -> Iterator[Check]:
    for tool in check_host_tools():
        if tool.found:
            yield Check(tool.name, "ok", shutil.which(tool.name) or "installed")
        else:
            line = install_line([tool.package])
            yield Check(tool.name, "missing", f"not installed (package {tool.package})", line)


def _cache() -> Iterator[Check]:
    folder = cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    other = f"export KERNWEAVE_CACHE=/var/tmp/kernweave-cache-{os.getuid()}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Check("cache", "fix", f"{there} is not writable", other)
    elif free < LEAST_FREE_BYTES and not _fetched_all():
        detail = f"{folder}: {free >> 20} MiB free, {LEAST_FREE_BYTES >> 20} are needed"
        yield Check("cache", "fix", detail, other)
    else:
        yield Check("cache", "ok", f"{folder}, {free / (1 << 30):.1f} GiB free")


def _fetched_all() -> bool:
    return fetched_qemu() is not None and fetched_kernel(KERNEL_SERIES[0]) is not None


def _mirror() -> Iterator[Check]:
    fault = _mirror_fault()
    detail = "a Debian archive is among apt's sources"
    yield Check("mirror", "fix", fault) if fault else Check("mirror", "ok", detail)


def _mirror_fault() -> str | None:
    """Say why nothing can be fetched, or None: the mirror is configured; it is not asked."""
    try:
        debian_sources(machine_sources(), [CODENAME])
    except KernweaveError as error:
        return f"{error.message}; {error.help}"
    return None


def _fetchable(name: str, detail: str | None) -> Check:
    if detail is not None:
        return Check(name, "ok", detail)
    if _mirror_fault():
        return Check(name, "fix", "not fetched yet, and there is no mirror to fetch it from")
    return Check(name, "ok", "not fetched yet; that is done at first use")


def _kernels() -> Iterator[Check]:
    for series in KERNEL_SERIES:
        kernel = fetched_kernel(series)
        detail = f"{kernel.release} (package {kernel.version})" if kernel else None
        yield _fetchable(f"kernel {series}", detail)


def _qemu() -> Iterator[Check]:
    qemu = fetched_qemu()
    if qemu is None:
        yield _fetchable("qemu", None)
    else:
        yield qemu_check(qemu)


def qemu_check(qemu: QemuTree) -> Check:
    """Return whether a QEMU can run the lab's CPUs in parallel."""
    try:
        check_version(qemu)
    except KernweaveError as error:
        line = f"rm -r {cache_dir() / 'packages'}"
        return Check("qemu", "fix", "; ".join((error.message, *error.notes)), line)
    return Check("qemu", "ok", f"{qemu.version}, runs CPUs in parallel")


def _driver() -> Iterator[Check]:
    absent = [tool.package for tool in check_host_tools() if not tool.found]
    if absent:
        detail = f"cannot be compiled without {', '.join(absent)}"
        yield Check("driver build", "missing", detail, install_line(absent))
        return
    compiler = "gcc-12" if shutil.which("gcc-12") else "gcc"
    kernels = [fetched_kernel(series) for series in KERNEL_SERIES]
    headers = [kernel.release for kernel in kernels if kernel and kernel.headers]
    found = f"{compiler}, headers of {', '.join(headers)}" if headers else None
    yield _fetchable("driver build", found)


def _kvm() -> Iterator[Check]:
    # never opened here: on some hosts it is there, and running a guest with it hangs
    qemu = fetched_qemu()
    wanted, verdict = wanted_accel(), cached_verdict(qemu.version) if qemu else None
    if not kvm_accessible():
        detail = "/dev/kvm is absent or not accessible; not needed"
    elif verdict is None:
        detail = "/dev/kvm is there, probed at the next boot of a lab"
    else:
        why = verdict.why.partition(":")[0]
        detail = f"/dev/kvm {why}{'' if verdict.usable else '; TCG is used instead'}"
    yield Check("kvm", "ok", f"{detail} (KERNWEAVE_ACCEL={wanted})")


def _lab() -> Iterator[Check]:
    states = {name: read_state(labs_folder() / name) for name in lab_names()}
    running = [
        f"{name} (kernel {state.kernel}, pid {state.pid})"
        for name, state in states.items()
        if state is not None and state.alive()
    ]
    yield Check("lab", "ok", f"running: {', '.join(running)}" if running else "none is running")


def _local() -> Iterator[Check]:
    """This machine's own kernel: what `--target local` would meet; nothing of it is needed."""
    state = this_machine.read_state()
    yield Check("local driver", "ok", f"{state.driver} (only --target local needs it)")
    yield Check("local lockdown", "ok", _judged(state.lockdown, "none", "local is refused"))
    yield Check("local kmod signing", "ok", state.signing)
    yield Check("local tracers", "ok", state.tracers)


def _judged(value: str, good: str, otherwise: str) -> str:
    return value if value.startswith(good) else f"{value}: {otherwise}"


_GROUPS: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
    ("python", _python),
    ("host tools", _tools),
    ("cache", _cache),
    ("mirror", _mirror),
    ("kernel", _kernels),
    ("qemu", _qemu),
    ("driver build", _driver),
    ("kvm", _kvm),
    ("lab", _lab),
    ("local", _local),
)
