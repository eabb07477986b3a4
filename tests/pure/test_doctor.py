# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says about machines in good and bad order; no network, nothing changed."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from kernweave.lab import apt, doctor, host
from kernweave.lab.cache import write_stamp
from kernweave.lab.doctor import Check, checks
from kernweave.lab.packages import QemuTree
from kernweave.lab.state import State, start_ticks

DEBIAN = apt.Source("file:///srv/debian", "bookworm", ("main",))


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a machine with a mirror, an empty cache and no lab."""
    monkeypatch.setenv("KERNWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "machine_sources", lambda: [DEBIAN])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def by_name() -> dict[str, Check]:
    found = checks()
    assert len({check.check for check in found}) == len(found)
    return {check.check: check for check in found}


def test_checks_come_in_the_order_of_need() -> None:
    assert list(by_name()) == [
        *("python", "apt-get", "dpkg-deb", "gcc", "ld", "make", "static libc", "cache", "mirror"),
        *("kernel 6.1", "kernel 6.12", "kernel 7.2", "qemu", "driver build", "kvm", "lab"),
        *("local driver", "local lockdown", "local kmod signing", "local tracers"),
    ]


def test_empty_path_names_every_tool_and_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name()
    missing = {name: check.command for name, check in found.items() if check.status == "missing"}
    assert missing == {
        "apt-get": "sudo apt-get install apt",
        "dpkg-deb": "sudo apt-get install dpkg",
        "gcc": "sudo apt-get install gcc",
        "ld": "sudo apt-get install binutils",
        "make": "sudo apt-get install make",
        "static libc": "sudo apt-get install libc6-dev",
        "driver build": "sudo apt-get install apt dpkg gcc binutils make libc6-dev",
    }
    assert found["python"].status == "ok"


def test_empty_path_needs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a program was run: {args}")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert len(by_name()) == 20


def test_nothing_fetched_is_ok_with_a_mirror_and_nothing_is_made(machine: Path) -> None:
    found = by_name()
    for name in ("kernel 6.1", "kernel 6.12", "kernel 7.2", "qemu"):
        assert (found[name].status, found[name].command) == ("ok", None)
        assert "at first use" in found[name].detail
    assert list(machine.iterdir()) == []


def test_nothing_fetched_and_no_mirror_is_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine_sources", lambda: [])
    found = by_name()
    for name in ("mirror", "kernel 6.1", "qemu"):
        assert found[name].status == "fix"
    assert "add a Debian mirror" in found["mirror"].detail


def test_fetched_kernel_is_named_even_without_a_mirror(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "machine_sources", lambda: [])
    (machine / "cache/packages").mkdir(parents=True)
    here = str(machine)
    values = {"release": "6.1.0-9-amd64", "version": "6.1.99-1", "vmlinuz": here, "modules": here}
    write_stamp(machine / "cache/packages/kernel-6.1.json", values)
    found = by_name()
    kernel = Check("kernel 6.1", "ok", "6.1.0-9-amd64 (package 6.1.99-1)")
    assert found["kernel 6.1"] == kernel
    assert found["kernel 6.12"].status == "fix"


@pytest.mark.parametrize(
    ("version", "status"), [("8.0.4", "fix"), ("7.2.17", "fix"), ("8.1.0", "ok"), ("10.0.2", "ok")]
)
def test_qemu_before_8_1_is_to_be_fixed(version: str, status: str) -> None:
    found = doctor.qemu_check(QemuTree(Path("/q"), version, (), Path("/d")))
    assert found.status == status
    assert version in found.detail


def test_cache_that_cannot_be_made_is_to_be_fixed(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "file").touch()
    monkeypatch.setenv("KERNWEAVE_CACHE", str(machine / "file"))
    found = by_name()["cache"]
    assert found.status == "fix"
    assert found.command is not None
    assert found.command.startswith("export KERNWEAVE_CACHE=")


def test_cache_with_a_blank_is_one_row_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNWEAVE_CACHE", "/a b")
    found = by_name()
    assert found["cache"].status == "fix"
    assert "blank or colon" in found["cache"].detail
    assert found["lab"].status == "ok"


def test_too_little_space_is_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1 << 62)
    assert by_name()["cache"].status == "fix"


def test_old_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 0))
    assert by_name()["python"].status == "missing"


def test_lab_is_running_only_while_its_process_lives(machine: Path) -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    for name, when in (("alive", ticks), ("dead", ticks + 1)):
        folder = machine / f"kernweave-{os.getuid()}" / name
        folder.mkdir(parents=True)
        state = State(os.getpid(), when, "6.1.0-9-amd64", "10.0.2", 8, "i")
        fields = {name: getattr(state, name) for name in State.__slots__}
        (folder / "state.json").write_text(json.dumps(fields))
    detail = by_name()["lab"].detail
    assert detail == f"running: alive (kernel 6.1.0-9-amd64, pid {os.getpid()})"


def test_install_line_names_each_package_once() -> None:
    assert host.install_line(["gcc", "make", "gcc"]) == "sudo apt-get install gcc make"
