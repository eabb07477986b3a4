# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM is taken only after it was seen to boot a kernel; a probe is bounded and leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab import accel
from kernweave.lab.accel import Verdict, cached_verdict, choose_accel, probe_command, wanted_accel
from kernweave.lab.packages import KernelTree, QemuTree
from kernweave.lab.state import start_ticks

QEMU = QemuTree(Path("/q/qemu"), "10.0.2", (), Path("/q/data"))
KERNEL = KernelTree("6.1", "6.1.0", "6.1.1-1", Path("/k/vmlinuz"), Path("/k/modules"))


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose /dev/kvm is a plain file, with an empty cache and no wish."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "_DEVICE", device)
    monkeypatch.setenv("KERNWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNWEAVE_ACCEL", raising=False)
    monkeypatch.delenv("KERNWEAVE_QEMU_ARGS", raising=False)
    return device


def seen(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[int]:
    """Let every probe end in this verdict; return a list with one entry per probe."""
    probes: list[int] = []

    def probe(qemu: QemuTree, kernel: KernelTree) -> Verdict:
        probes.append(1)
        return verdict

    monkeypatch.setattr(accel, "_probe", probe)
    return probes


def choose(*qemu_args: str) -> str:
    return choose_accel(QEMU, KERNEL, qemu_args, lambda line: None)


@pytest.mark.parametrize(("usable", "chosen"), [(True, "kvm"), (False, "tcg")])
def test_auto_probes_once_and_follows_the_verdict(
    monkeypatch: pytest.MonkeyPatch, usable: bool, chosen: str
) -> None:
    probes = seen(monkeypatch, Verdict(usable, "why"))
    assert [choose() for _ in range(3)] == [chosen] * 3
    assert len(probes) == 1
    assert cached_verdict("10.0.2") == Verdict(usable, "why")
    assert cached_verdict("10.0.3") is None


def test_auto_probes_again_after_the_host_was_booted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probes = seen(monkeypatch, Verdict(True, "why"))
    choose()
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(accel, "_BOOT_ID", boot_id)
    choose()
    assert len(probes) == 2


def test_auto_without_device_or_with_what_only_tcg_can_does_not_probe(
    monkeypatch: pytest.MonkeyPatch, machine: Path
) -> None:
    probes = seen(monkeypatch, Verdict(True, "why"))
    assert choose("-plugin", "file.so") == "tcg"
    monkeypatch.setenv("KERNWEAVE_QEMU_ARGS", "-icount shift=0")
    assert choose() == "tcg"
    monkeypatch.delenv("KERNWEAVE_QEMU_ARGS")
    machine.unlink()
    assert choose() == "tcg"
    assert not probes


def test_kvm_that_cannot_be_used_is_an_error_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(monkeypatch, Verdict(False, "hangs"))
    monkeypatch.setenv("KERNWEAVE_ACCEL", "kvm")
    with pytest.raises(UnsupportedError, match="KERNWEAVE_ACCEL=kvm, but /dev/kvm hangs"):
        choose()
    monkeypatch.setenv("KERNWEAVE_ACCEL", "tcg")
    assert choose() == "tcg"
    monkeypatch.setenv("KERNWEAVE_ACCEL", "fast")
    with pytest.raises(UsageError, match="'fast'"):
        wanted_accel()


def probe(script: str, console: Path, limit_s: float = 60.0) -> Verdict:
    console.touch()
    return probe_command(["sh", "-c", script, "sh", str(console)], os.environ, console, limit_s)


def test_probe_sees_the_panic_and_ends_the_machine(tmp_path: Path) -> None:
    script = 'echo $$ > "$1.pid"; echo "VFS: Unable to mount root fs" > "$1"; sleep 600'
    verdict = probe(script, tmp_path / "console")
    assert verdict.usable and verdict.why.startswith("boots a stock kernel in ")
    assert start_ticks(int((tmp_path / "console.pid").read_text())) is None


def test_probe_that_hangs_is_bounded_and_leaves_no_process(tmp_path: Path) -> None:
    script = 'trap "" TERM; sleep 600 & echo $! > "$1.child"; echo $$ > "$1.pid"; wait'
    verdict = probe(script, tmp_path / "console", 3)  # or else it waits for the child to end
    assert verdict == Verdict(False, "cannot run a stock kernel: it hangs (probed for 3 s)")
    deadline = time.monotonic() + 120
    for name in ("child", "pid"):  # killed; whoever inherited it may take a moment to notice
        pid = int((tmp_path / f"console.{name}").read_text())
        while start_ticks(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert start_ticks(pid) is None


def test_probe_that_qemu_refuses_gives_its_words(tmp_path: Path) -> None:
    verdict = probe("echo first; echo no such accelerator >&2; exit 3", tmp_path / "console")
    assert verdict == Verdict(False, "is refused by QEMU (status 3): no such accelerator")


def test_probe_whose_process_cannot_be_killed_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(accel, "_END_S", 0.1)
    monkeypatch.setattr("os.killpg", lambda pid, signo: killed.append(pid))
    verdict = probe("exec sleep 600", tmp_path / "console", 0.1)
    assert verdict == Verdict(False, f"holds QEMU process {killed[0]}, which cannot be killed")
    os.kill(killed[0], signal.SIGKILL)
    os.waitpid(killed[0], 0)
