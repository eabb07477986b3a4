# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs for development that the host may lack: fetched as QEMU is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.apt import CODENAME, library_folders, series_apt, unpack
from kernweave.lab.cache import (
    Progress,
    Values,
    fetch_once,
    packages_dir,
    settle,
    silent,
    tree_dir,
    unpack_aside,
)

TOOLS = ("sparse",)


@dataclass(frozen=True, slots=True)
class ToolTree:
    """A program for development, the host's own or unpacked.

    Attributes:
        binary: the program.
        libs: folders for LD_LIBRARY_PATH; empty if the host has all.
    """

    binary: Path
    libs: tuple[Path, ...]


def fetch_tool(name: str, progress: Progress = silent) -> ToolTree:
    """Return a program for development: the host's, else one downloaded at the first call.

    Args:
        name: of the program and of its Debian package, one of TOOLS.
        progress: is called with one line per step.

    Raises:
        UsageError: the name is none of TOOLS.
        UnsupportedError: the mirror cannot be reached, or its package holds no such program.
    """
    if name not in TOOLS:
        raise UsageError(f"no tool {name}", help=f"use one of {', '.join(TOOLS)}")
    there = shutil.which(name)
    if there is not None:
        return ToolTree(Path(there), ())
    stamp = packages_dir() / f"tool-{name}.json"
    values = fetch_once(stamp, ("binary", "libs"), progress, lambda: _download_tool(name, progress))
    libs = values["libs"]
    assert isinstance(libs, list)
    return ToolTree(Path(str(values["binary"])), tuple(map(Path, libs)))


def _download_tool(name: str, progress: Progress) -> Values:
    apt = series_apt("6.1", progress)
    with unpack_aside() as (debs, root):
        progress(f"downloading {name}")
        apt.download_missing([name], CODENAME, debs)
        progress(f"unpacking {name}")
        packages = unpack(debs.iterdir(), root)
        if not (root / "usr/bin" / name).is_file():
            raise UnsupportedError(f"the package {name} holds no program of that name")
        final = tree_dir(name, packages[name])
        settle(root, final)
    return {
        "binary": str(final / "usr/bin" / name),
        "libs": [str(folder) for folder in library_folders(final)],
        "packages": [f"{package}={version}" for package, version in packages.items()],
    }
