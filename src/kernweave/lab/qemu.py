# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's QEMU: its command line, and its start as a daemon."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernweave.errors import LabError, UnsupportedError
from kernweave.lab.packages import KernelTree, QemuTree

PORTS = 8
IDLE_S = 15 * 60
CAP_S = 8 * 3600
OLDEST = (8, 1)
TRACE_FILE = "qemu.trace"  # what QEMU says after its start
WATCHDOG_EVENT = "watchdog_perform_action"  # in it once the watchdog has barked

_START_LIMIT_S = 20.0

# Nothing here changes the stock kernel's code: KASLR and mitigations stay as they are.
_KERNEL_ARGS = (
    "console=ttyS0",
    "ignore_loglevel",
    "printk.devkmsg=on",
    "oops=panic",
    "panic=-1",
    "tsc=reliable",
    "random.trust_cpu=on",
    "cryptomgr.notests",  # self-tests of ciphers: a second of every boot
)

# What a lab has no use for and a boot would probe.
_MACHINE = "pc,i8042=off,hpet=off,vmport=off"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the lab machine is made of, and what is added to both command lines."""

    smp: int = 2
    memory_mib: int = 1024
    qemu_args: tuple[str, ...] = ()
    kernel_args: tuple[str, ...] = ()
    accel: str = "tcg"


def check_version(qemu: QemuTree) -> None:
    """Refuse a QEMU that hangs when parallel CPUs run code that is being patched.

    Raises:
        UnsupportedError: it is older than 8.1.
    """
    found = re.match(r"(\d+)\.(\d+)", qemu.version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise UnsupportedError(
            f"QEMU {qemu.version} is too old, 8.1 is needed",
            notes=["older ones hang when one CPU patches code that another one runs"],
        )


def command_line(
    qemu: QemuTree, kernel: KernelTree, initramfs: Path, folder: Path, hardware: Hardware
) -> list[str]:
    """Return the argument vector; `folder` receives console.log, sockets and qemu.pid."""
    ports = [
        arg
        for port in range(PORTS)
        for arg in (
            *(
                "-chardev",
                f"socket,id=p{port},path={_quoted(folder)}/port{port},server=on,wait=off",
            ),
            *("-device", f"virtserialport,chardev=p{port},nr={port + 1},name=kernweave.{port}"),
        )
    ]
    return [
        *(str(qemu.binary), "-L", str(qemu.data), "-name", f"kernweave-{folder.name}"),
        *("-daemonize", "-pidfile", str(folder / "qemu.pid")),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *_accel(hardware),
        *("-machine", _MACHINE),
        *("-smp", str(hardware.smp), "-m", f"{hardware.memory_mib}M"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(initramfs)),
        *("-append", kernel_command_line(hardware)),
        *("-chardev", f"file,id=console,path={_quoted(folder)}/console.log"),
        *("-serial", "chardev:console"),
        *("-qmp", f"unix:{_quoted(folder)}/qmp,server=on,wait=off"),
        # the guest's init strokes it: a guest that hangs as a whole is ended too
        *("-device", "i6300esb", "-action", "watchdog=poweroff"),
        *("-trace", WATCHDOG_EVENT, "-D", str(folder / TRACE_FILE)),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-device", f"virtio-serial-pci,max_ports={PORTS + 1}"),
        *ports,
        *hardware.qemu_args,
        *shlex.split(os.environ.get("KERNWEAVE_QEMU_ARGS", "")),
    ]


def _accel(hardware: Hardware) -> tuple[str, ...]:
    if hardware.accel == "kvm":
        return ("-accel", "kvm", "-cpu", "host")
    threads = "multi" if hardware.smp > 1 else "single"
    return ("-accel", f"tcg,thread={threads}", "-cpu", "max")


def kernel_command_line(hardware: Hardware) -> str:
    """Return what the kernel is booted with; later words win."""
    limits = (f"kernweave.ports={PORTS}", f"kernweave.idle={IDLE_S}", f"kernweave.cap={CAP_S}")
    added = shlex.split(os.environ.get("KERNWEAVE_KERNEL_ARGS", ""))
    return " ".join([*_KERNEL_ARGS, *limits, *hardware.kernel_args, *added])


def launch(qemu: QemuTree, argv: Sequence[str], folder: Path, smp: int) -> int:
    """Start QEMU as a daemon and return its pid.

    The guest powers itself off when idle and after CAP_S; should it hang instead, its watchdog
    ends it; should QEMU run wild, the limit on CPU time set here.

    Raises:
        LabError: QEMU refuses its command line or cannot start; the notes are its own words.
    """
    libs = [*map(str, qemu.libs), os.environ.get("LD_LIBRARY_PATH", "")]
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, libs))}
    words = folder / "qemu.log"
    try:
        with words.open("wb") as log:
            done = subprocess.run(
                argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                timeout=_START_LIMIT_S, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LabError(f"QEMU did not start within {_START_LIMIT_S:g} s") from None
    if done.returncode:
        raise LabError(
            f"QEMU did not start (status {done.returncode})",
            notes=words.read_text(errors="replace").splitlines()[-10:],
        )
    pid = int((folder / "qemu.pid").read_text())
    limit_s = CAP_S * smp
    resource.prlimit(pid, resource.RLIMIT_CPU, (limit_s, limit_s))
    return pid


def own_words(folder: Path) -> list[str]:
    """Return what QEMU said of itself since it started: why it gave up, if it did."""
    try:
        said = (folder / TRACE_FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in said if re.match(r"(ERROR:|qemu-system-\S+: .*Assertion)", line)]


def _quoted(path: Path) -> str:
    """Return a path as a value inside a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")
