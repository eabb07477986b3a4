# SPDX-License-Identifier: GPL-2.0-or-later
"""stress-ng, unpacked beside the kernels: every kind of load, with its own checks of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernweave.lab.apt import CODENAME, library_folders, series_apt, unpack
from kernweave.lab.cache import Values, fetch_once, packages_dir, settle, tree_dir, unpack_aside

# what runs inside the guest: no devices, no privileges that could take the machine down
STRESSORS = {
    "futex": 1, "pipe": 1, "sock": 1, "switch": 1, "fork": 1, "vm": 1, "mmap": 1, "sigsegv": 1,
    "timer": 1, "poll": 1, "dentry": 1, "hdd": 1, "shm": 1, "sem": 1, "msg": 1, "clone": 1,
}  # fmt: skip


def stress_ng(
    seconds: int, names: Sequence[str] = tuple(STRESSORS)
) -> tuple[list[str], dict[str, str]]:
    """The command for so many seconds of some stressors, results verified, and its environment."""
    stamp = packages_dir() / "stress-ng.json"
    found = fetch_once(stamp, ("binary", "libs"), print, _download)
    libs = found["libs"]
    assert isinstance(libs, list)
    argv = [str(found["binary"]), "--verify", "--metrics-brief", "--temp-path", "/tmp"]
    argv += [word for name in names for word in (f"--{name}", str(STRESSORS[name]))]
    argv += ["--vm-bytes", "32M", "--hdd-bytes", "8M", "--timeout", f"{seconds}s"]
    return argv, {"LD_LIBRARY_PATH": ":".join(libs), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def _download() -> Values:
    apt = series_apt("6.1", print)
    with unpack_aside() as (debs, root):
        apt.download_missing(("stress-ng",), CODENAME, debs)
        packages = unpack(debs.iterdir(), root)
        final = tree_dir("stress-ng", packages["stress-ng"])
        settle(root, final)
    libs = [str(folder) for folder in library_folders(final)]
    libs += [str(path.parent) for path in Path(final).rglob("libjudy*.so*")][:1]
    return {"binary": str(final / "usr/bin/stress-ng"), "libs": libs}
