# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs the guest's instructions: KVM where it was seen to boot a stock kernel, else TCG."""

# A /dev/kvm can be there and hang with the first guest, for ever and beyond SIGKILL. So:
#   1. it is never opened by this process, only by a QEMU in a session of its own
#   2. that QEMU boots the kernel without any root; its panic on the console is the proof
#   3. the wait for the panic is bounded, and so is the wait for QEMU's end
#   4. the verdict is kept for this boot of the host and this QEMU

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.cache import Progress, cache_dir, locked, read_stamp, write_stamp
from kernweave.lab.packages import KernelTree, QemuTree

CHOICES = ("auto", "tcg", "kvm")
PROBE_S = 10.0
_END_S = 2.0
_PROOF = b"Unable to mount root fs"
_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TCG_ONLY = ("-plugin", "-icount")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether KVM can be used, and what was seen (`boots a stock kernel`)."""

    usable: bool
    why: str


def wanted_accel() -> str:
    """Return what KERNWEAVE_ACCEL says: auto, tcg or kvm.

    Raises:
        UsageError: it says something else.
    """
    wanted = os.environ.get("KERNWEAVE_ACCEL") or "auto"
    if wanted not in CHOICES:
        raise UsageError(f"KERNWEAVE_ACCEL is {wanted!r}", help=f"use {', '.join(CHOICES)}")
    return wanted


def choose_accel(
    qemu: QemuTree, kernel: KernelTree, qemu_args: Sequence[str], progress: Progress
) -> str:
    """Return tcg or kvm; the first call after the host has booted may take PROBE_S seconds.

    Args:
        qemu: to run.
        kernel: to boot.
        qemu_args: what only TCG can do is looked for in them.
        progress: is called if KVM has to be probed.

    Raises:
        UnsupportedError: KERNWEAVE_ACCEL=kvm, and KVM cannot be used.
    """
    wanted = wanted_accel()
    words = " ".join(qemu_args) + os.environ.get("KERNWEAVE_QEMU_ARGS", "")
    tcg_only = any(word in words for word in _TCG_ONLY)
    if wanted == "tcg" or (wanted == "auto" and (tcg_only or not kvm_accessible())):
        return "tcg"
    verdict = kvm_verdict(qemu, kernel, progress)
    if wanted == "kvm" and not verdict.usable:
        raise UnsupportedError(
            f"KERNWEAVE_ACCEL=kvm, but /dev/kvm {verdict.why}",
            help="unset KERNWEAVE_ACCEL: TCG is then used instead",
        )
    return "kvm" if verdict.usable else "tcg"


def kvm_accessible() -> bool:
    """Return whether this user may open /dev/kvm, without opening it."""
    return os.access(_DEVICE, os.R_OK | os.W_OK)


def cached_verdict(qemu_version: str) -> Verdict | None:
    """Return the verdict of an earlier probe since the host has booted, or None."""
    values = read_stamp(_stamp(), ())
    if values is None or (values.get("boot"), values.get("qemu")) != (_boot_id(), qemu_version):
        return None
    return Verdict(values.get("usable") == "yes", str(values.get("why")))


def kvm_verdict(qemu: QemuTree, kernel: KernelTree, progress: Progress) -> Verdict:
    """Return whether KVM can be used, probed once per boot of the host and QEMU version."""
    if not kvm_accessible():
        return Verdict(False, "is absent or not accessible")
    verdict = cached_verdict(qemu.version)
    if verdict is not None:
        return verdict
    with locked(_stamp().parent):
        verdict = cached_verdict(qemu.version)
        if verdict is None:
            progress(f"probing /dev/kvm (at most {PROBE_S + _END_S:g} s, once per boot)")
            verdict = _probe(qemu, kernel)
            usable = "yes" if verdict.usable else "no"
            stamp = {"boot": _boot_id(), "qemu": qemu.version, "usable": usable, "why": verdict.why}
            write_stamp(_stamp(), stamp)
    return verdict


def _stamp() -> Path:
    return cache_dir() / "kvm" / "verdict.json"


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _probe(qemu: QemuTree, kernel: KernelTree) -> Verdict:
    """Boot the kernel without a root under KVM and look for its panic."""
    console = tempfile.NamedTemporaryFile(prefix="kernweave-kvm-")  # noqa: SIM115
    with console:
        argv = [
            *(str(qemu.binary), "-L", str(qemu.data), "-accel", "kvm", "-cpu", "host"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256M"),
            *("-kernel", str(kernel.vmlinuz), "-append", "console=ttyS0 panic=-1"),
            *("-chardev", f"file,id=console,path={console.name.replace(',', ',,')}"),
            *("-serial", "chardev:console"),
        ]
        env = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, qemu.libs))}
        return probe_command(argv, env, Path(console.name))


def probe_command(
    argv: Sequence[str], env: Mapping[str, str], console: Path, limit_s: float = PROBE_S
) -> Verdict:
    """Run a QEMU until its console shows the proof, it ends, or time is up; leave no process."""
    began = time.monotonic()
    words = tempfile.TemporaryFile()  # noqa: SIM115
    with words:
        process = subprocess.Popen(
            argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=words, stderr=words,
            start_new_session=True,
        )  # fmt: skip
        verdict = _watch(process, console, began, limit_s)
        words.seek(0)
        said = words.read().decode(errors="replace").strip().splitlines()
    if not verdict.usable and process.returncode not in (None, -signal.SIGKILL) and said:
        return Verdict(False, f"{verdict.why}: {said[-1].rpartition('qemu-system-x86_64: ')[2]}")
    return verdict


def _watch(
    process: subprocess.Popen[bytes], console: Path, began: float, limit_s: float
) -> Verdict:
    ended = proved = False
    try:
        while not (ended or proved) and time.monotonic() - began < limit_s:
            ended = process.poll() is not None
            proved = _PROOF in console.read_bytes()
            time.sleep(0.02)
    finally:
        gone = _end(process)
    took = time.monotonic() - began
    if not gone:
        return Verdict(False, f"holds QEMU process {process.pid}, which cannot be killed")
    if proved:
        return Verdict(True, f"boots a stock kernel in {took:.1f} s")
    if ended:
        return Verdict(False, f"is refused by QEMU (status {process.returncode})")
    return Verdict(False, f"cannot run a stock kernel: it hangs (probed for {limit_s:g} s)")


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Kill the process group; return whether the process has ended within `_END_S` seconds."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.returncode = -signal.SIGKILL  # given up: nobody will ever wait for it
        return False
    return True
