# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host itself must have installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kernweave.lab.apt import run_tool


@dataclass(frozen=True, slots=True)
class HostTool:
    """A program or file that must be installed on the host.

    Attributes:
        name: the command, or what it is.
        found: whether it is there.
        package: the Debian package that has it.
    """

    name: str
    found: bool
    package: str


def check_host_tools() -> list[HostTool]:
    """Return what the host itself must have, and whether it has it."""
    commands = {
        "apt-get": "apt",
        "dpkg-deb": "dpkg",
        "gcc": "gcc",
        "ld": "binutils",
        "make": "make",
    }
    tools = [
        HostTool(name, shutil.which(name) is not None, package)
        for name, package in commands.items()
    ]
    return [*tools, HostTool("static libc", _has_static_libc(), "libc6-dev")]


def install_line(packages: Iterable[str]) -> str:
    """Return the command that installs Debian packages."""
    return f"sudo apt-get install {' '.join(dict.fromkeys(packages))}"


def _has_static_libc() -> bool:
    if shutil.which("gcc") is None:
        return False
    shown = run_tool(
        ["gcc", "-static", "-print-file-name=libc.a"], "ask gcc for its libraries"
    ).strip()
    return Path(shown).is_absolute() and Path(shown).is_file()
