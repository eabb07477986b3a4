# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs for development: the host's own first, then one that is there; no network."""

from pathlib import Path

import pytest

from kernweave.errors import UsageError
from kernweave.lab.cache import write_stamp
from kernweave.lab.tool import ToolTree, fetch_tool


def test_unknown_tool_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no tool emacs"):
        fetch_tool("emacs")


def test_the_hosts_own_tool_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sparse"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_tool("sparse") == ToolTree(program, ())


def test_a_fetched_tool_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNWEAVE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    (tmp_path / "packages").mkdir()
    program, libs = tmp_path / "program", tmp_path / "libs"
    program.touch()
    libs.mkdir()
    values = {"binary": str(program), "libs": [str(libs)]}
    write_stamp(tmp_path / "packages/tool-sparse.json", values)
    assert fetch_tool("sparse") == ToolTree(program, (libs,))
