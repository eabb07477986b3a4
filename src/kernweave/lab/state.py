# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab leaves on disk: its folder, locks, the record of its QEMU process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from kernweave.errors import LabError, UsageError

_SOCKET_PATH_MAX = 100  # sun_path holds 108 bytes
_TERM_GRACE_S = 2.0  # a stopped QEMU never takes the first one
_KILL_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class State:
    """A QEMU process that is or was this lab.

    Attributes:
        pid: of QEMU.
        start_ticks: its start time, field 22 of /proc/PID/stat: tells it from a later pid twin.
        kernel: release, such as `6.1.0-56-amd64`.
        qemu: version, such as `10.0.2`.
        ports: how many sessions it takes at once.
        initramfs: file name, which holds a hash of the contents.
        booted_at: seconds since the epoch, or None while it boots.
        boot_seconds: from the start of QEMU to a guest ready for sessions, or None.
        series: of the kernel, such as `6.1`.
        accel: tcg or kvm.
        no_driver: why the guest has no driver; None if it has.
    """

    pid: int
    start_ticks: int
    kernel: str
    qemu: str
    ports: int
    initramfs: str
    booted_at: float | None = None
    boot_seconds: float | None = None
    series: str = "6.1"
    accel: str = "tcg"
    no_driver: str | None = None

    def alive(self) -> bool:
        """Return whether this very process still runs."""
        return start_ticks(self.pid) == self.start_ticks

    def kill(self) -> None:
        """End the process, and only this one: SIGTERM, then SIGKILL after 2 s."""
        for signo, grace_s in ((signal.SIGTERM, _TERM_GRACE_S), (signal.SIGKILL, _KILL_GRACE_S)):
            if not self.alive():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signo)
            deadline = time.monotonic() + grace_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.01)
        if self.alive():
            raise LabError(f"QEMU process {self.pid} does not end")


def start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it is gone."""
    fields = _stat_fields(pid)
    return None if fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Return whether a process is held by SIGSTOP or a debugger."""
    return _stat_fields(pid)[0] in "Tt"


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; a lone X if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ["X"]
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def labs_folder() -> Path:
    """Return the folder of this user's lab folders; it need not exist."""
    return Path(tempfile.gettempdir()) / f"kernweave-{os.getuid()}"


def lab_names() -> list[str]:
    """Return the labs that run or ended without being taken down, by name."""
    return sorted(path.parent.name for path in labs_folder().glob("*/state.json"))


def lab_folder(name: str) -> Path:
    """Return the private folder of the lab of that name, made if needed.

    Raises:
        UsageError: the name is no plain file name.
        LabError: the folder belongs to someone else, or socket paths in it would be too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} is no name for a lab", help="use letters, digits, . _ -")
    top = labs_folder()
    folder = top / name
    if len(os.fsencode(folder / "port00")) > _SOCKET_PATH_MAX:
        raise LabError(
            f"the lab's socket paths would exceed {_SOCKET_PATH_MAX} bytes",
            notes=[str(folder)],
            help="use a shorter lab name, or set TMPDIR to a shorter path",
        )
    for path in (top, folder):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise LabError(
                f"{path} is not a private folder of this user",
                help="remove it, or set TMPDIR to a folder of your own",
            )
    return folder


def read_state(folder: Path) -> State | None:
    """Return what the folder's state file says; None without one, or with one not understood."""
    try:
        return State(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_state(folder: Path, state: State) -> None:
    """Replace the state file in one step."""
    aside = folder / f".state.{os.getpid()}"
    aside.write_text(json.dumps(asdict(state), indent=1) + "\n")
    aside.rename(folder / "state.json")


def try_lock(path: Path) -> IO[bytes] | None:
    """Return an open file that holds the lock until it is closed; None if another has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for whoever has it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
