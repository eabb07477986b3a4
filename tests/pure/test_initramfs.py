# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's archive, command lines and state, without a machine."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import pytest

from kernweave.errors import LabError, UnsupportedError, UsageError
from kernweave.lab import qemu
from kernweave.lab.initramfs import Member, encode_cpio
from kernweave.lab.packages import KernelTree, QemuTree
from kernweave.lab.state import (
    State,
    lab_folder,
    read_state,
    start_ticks,
    try_lock,
    write_state,
)

MEMBERS = [
    Member("sys", stat.S_IFDIR | 0o755),
    Member("init", stat.S_IFREG | 0o755, b"#!"),
    Member("empty", stat.S_IFREG | 0o644),
    Member("odd", stat.S_IFREG | 0o644, b"12345"),
]


def decode_cpio(archive: bytes) -> list[tuple[str, int, bytes]]:
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name[-1:] == b"\0"
        data = (at + 110 + name_size + 3) & ~3
        at = (data + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found.append((name[:-1].decode(), mode, archive[data : data + size]))


def test_cpio_decodes_to_what_went_in() -> None:
    found = decode_cpio(encode_cpio(MEMBERS))
    assert found == [(member.name, member.mode, member.data) for member in MEMBERS]


def test_cpio_of_the_same_members_is_the_same() -> None:
    assert encode_cpio(MEMBERS) == encode_cpio(list(MEMBERS))
    assert encode_cpio(MEMBERS) != encode_cpio(MEMBERS[::-1])


def tree(version: str = "10.0.2") -> QemuTree:
    return QemuTree(Path("/q/qemu"), version, (Path("/q/lib"),), Path("/q/data"))


KERNEL = KernelTree("6.1", "6.1.0", "6.1.1-1", Path("/k/vmlinuz"), Path("/k/modules"))


def test_command_line_appends_the_environments_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNWEAVE_QEMU_ARGS", "-d 'in asm'")
    monkeypatch.setenv("KERNWEAVE_KERNEL_ARGS", "nosmp kernweave.idle=5")
    hardware = qemu.Hardware(4, 512, ("-icount", "0"), ("mine",))
    argv = qemu.command_line(tree(), KERNEL, Path("/i"), Path("/lab"), hardware)
    assert argv[-4:] == ["-icount", "0", "-d", "in asm"]
    assert argv[argv.index("-smp") + 1] == "4"
    append = argv[argv.index("-append") + 1].split()
    assert append[-3:] == ["mine", "nosmp", "kernweave.idle=5"]
    assert not {"nokaslr", "mitigations=off"} & set(append)


def test_command_line_doubles_commas_in_paths() -> None:
    argv = qemu.command_line(tree(), KERNEL, Path("/i"), Path("/a,b"), qemu.Hardware())
    assert "file,id=console,path=/a,,b/console.log" in argv


@pytest.mark.parametrize("version", ["7.2.1", "8.0.5", "what"])
def test_old_qemu_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"8\.1 is needed"):
        qemu.check_version(tree(version))


@pytest.mark.parametrize("version", ["8.1.0", "10.0.2"])
def test_new_qemu_is_taken(version: str) -> None:
    qemu.check_version(tree(version))


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_lab_folder_is_private_and_the_same_twice(tmp: Path) -> None:
    folder = lab_folder("6.1")
    assert folder == lab_folder("6.1")
    assert folder.parent.parent == tmp
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_lab_folder_open_to_others_is_refused(tmp: Path) -> None:
    lab_folder("x").parent.chmod(0o755)
    with pytest.raises(LabError, match="not a private folder"):
        lab_folder("x")


def test_lab_folder_that_is_a_link_is_refused(tmp: Path) -> None:
    (tmp / f"kernweave-{os.getuid()}").symlink_to(tmp)
    with pytest.raises(LabError, match="not a private folder"):
        lab_folder("x")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b"])
def test_lab_name_that_is_no_file_name_is_refused(tmp: Path, name: str) -> None:
    with pytest.raises(UsageError):
        lab_folder(name)


def test_lab_folder_too_long_for_sockets_is_refused(tmp: Path) -> None:
    with pytest.raises(LabError, match="100 bytes"):
        lab_folder("n" * 100)


def test_state_is_read_back(tmp_path: Path) -> None:
    state = State(1, 2, "6.1", "10", 8, "i", 3.5, 4.5)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text('{"pid": 1}')
    assert read_state(tmp_path) is None


def test_kill_spares_a_process_with_another_start_time() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        own = State(process.pid, ticks, "", "", 8, "")
        dataclasses.replace(own, start_ticks=ticks - 1).kill()
        assert process.poll() is None
        own.kill()
        assert process.wait(60) == -15
    assert start_ticks(process.pid) is None


def test_lock_is_held_once_until_closed(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    first.close()
    second = try_lock(tmp_path / "lock")
    assert second is not None
    second.close()
