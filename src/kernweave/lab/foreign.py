# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of another Debian release, made to run with that release's own C library."""

from __future__ import annotations

from pathlib import Path

from kernweave.errors import UnsupportedError

_LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
# $0 is what a program goes by that starts another one beside it (objtool: objtool.real-x86)
_WRAPPER = """\
#!/bin/sh
exec {loader} --library-path {libs} --argv0 "$0" {program} "$@"
"""


def wrap_programs(root: Path, final: Path, folders: str) -> int:
    """Put a script in the place of each program in `folders`; return how many there were.

    The script starts the program through the dynamic loader of `root`, so what it needs is looked
    for there alone. The host's programs, which make runs as well, keep the host's libraries; no
    environment variable could tell the two apart.

    Args:
        root: unpacked packages, the C library of the release among them.
        final: where `root` will be.
        folders: a pattern below `root`; they are searched with all folders in them.

    Raises:
        UnsupportedError: `root` holds no dynamic loader.
    """
    if not (root / _LOADER).is_file():
        raise UnsupportedError(f"the packages in {root} hold no {Path(_LOADER).name}")
    loader = final / _LOADER
    programs = [path for path in root.glob(f"{folders}/**/*") if _is_program(path)]
    for path in programs:
        moved = path.with_name(f"{path.name}.elf")
        path.rename(moved)
        program = final / moved.relative_to(root)
        path.write_text(_WRAPPER.format(loader=loader, libs=loader.parent, program=program))
        path.chmod(0o755)
    return len(programs)


def _is_program(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or not path.stat().st_mode & 0o100:
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
