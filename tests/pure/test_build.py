# SPDX-License-Identifier: GPL-2.0-or-later
"""Build keys, and compilers that fail."""

import shutil
from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.build import build_kmod, build_static, cache_key, compiler_args
from kernweave.lab.packages import KernelTree


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNWEAVE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "packages").mkdir(parents=True)
    return tmp_path / "cache"


def test_cache_key_changes_with_name_content_and_every_part() -> None:
    keys = [
        cache_key({"a.c": b"1"}, ["6.1", "-O2"]),
        cache_key({"a.c": b"2"}, ["6.1", "-O2"]),
        cache_key({"b.c": b"1"}, ["6.1", "-O2"]),
        cache_key({"a.c": b"1", "b.c": b""}, ["6.1", "-O2"]),
        cache_key({"a.c": b"1"}, ["6.12", "-O2"]),
        cache_key({"a.c": b"1"}, ["6.1", "-O", "2"]),
        cache_key({"a.c": b"1"}, ["6.1-O2"]),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key({"a": b"", "b": b""}, []) == cache_key({"b": b"", "a": b""}, [])


def test_kmod_without_a_kbuild_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no Kbuild file"):
        build_kmod(KernelTree("6.1", "1-amd64", "1-1", tmp_path / "vmlinuz", tmp_path), tmp_path)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_compilers_words_are_in_the_error_and_nothing_stays_behind(
    tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "bad.c").write_text("int main(void) { return nobody; }\n")
    with pytest.raises(UnsupportedError) as caught:
        build_static(tmp_path / "bad.c")
    assert caught.value.message == "cannot compile bad.c: gcc ended with status 1"
    assert any("nobody" in note for note in caught.value.notes)
    assert list((cache / "builds").iterdir()) == []


def test_make_is_told_what_the_compiler_lacks(tmp_path: Path) -> None:
    for name, status in (("new", 0), ("old", 1)):
        compiler = tmp_path / name
        compiler.write_text(f"#!/bin/sh\nexit {status}\n")
        compiler.chmod(0o755)
    new, old = (compiler_args(str(tmp_path / name)) for name in ("new", "old"))
    assert new == [f"CC={tmp_path}/new"]
    assert old == [f"CC={tmp_path}/old", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="]
