# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that run with the C library unpacked beside them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError
from kernweave.lab.foreign import wrap_programs

LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
KBUILD = "usr/lib/linux-kbuild-1"


def tree(root: Path) -> Path:
    """Give a C library (this host's) and a kbuild folder with one program."""
    loaded = set(re.findall(r"/\S+/(?:libc|ld-linux-x86-64)\.so\.\d", maps()))
    libs = (root / LOADER).parent
    libs.mkdir(parents=True)
    for path in loaded:
        shutil.copy(path, libs)
    programs = root / KBUILD / "scripts"
    programs.mkdir(parents=True)
    shutil.copy("/bin/echo", programs / "shout")
    (programs / "text.sh").write_text("#!/bin/sh\n")
    (programs / "text.sh").chmod(0o755)
    (programs / "link").symlink_to("shout")
    return programs


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def test_wrapped_program_runs_from_the_final_place_with_its_arguments(tmp_path: Path) -> None:
    root, final = tmp_path / "aside", tmp_path / "final"
    before = tree(root)
    assert wrap_programs(root, final, "usr/lib/linux-kbuild-*") == 1
    assert (before / "text.sh").read_text() == "#!/bin/sh\n"
    root.rename(final)
    for name in ("shout", "link"):
        argv = [str(final / KBUILD / "scripts" / name), "a  b", "$c"]
        assert subprocess.run(argv, capture_output=True, check=True).stdout == b"a  b $c\n"
    loader = final / LOADER
    loader.rename(f"{loader}.gone")  # it was that one, not the host's
    assert subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode != 0


def test_tree_without_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="ld-linux"):
        wrap_programs(tmp_path, tmp_path, "usr/lib/linux-kbuild-*")
