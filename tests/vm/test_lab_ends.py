# SPDX-License-Identifier: GPL-2.0-or-later
"""Labs that end or hang: one clear error each, and the next command gets a fresh machine."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from command import Kernweave
from guest import LONGEST_S

from kernweave.errors import LabError, UnsupportedError
from kernweave.lab import machine
from kernweave.lab.cache import cache_dir
from kernweave.lab.machine import Lab
from kernweave.lab.packages import QemuTree
from kernweave.lab.qemu import TRACE_FILE, launch
from kernweave.lab.state import start_ticks
from kernweave.session.session import Session

NewLab = Callable[[str], Lab]


@pytest.fixture(scope="module")
def victim(lab: Lab) -> Iterator[Lab]:
    """A lab that each test may end; the next one boots it anew if it has to."""
    ended = Lab(f"{lab.name}-victim", kernel="6.1")
    yield ended
    ended.down()


def pid_of(victim: Lab) -> int:
    state = victim.status().state
    assert state is not None
    return state.pid


def test_panic_ends_a_command_and_the_next_gets_a_fresh_machine(victim: Lab) -> None:
    kernweave = Kernweave(victim.name)
    victim.up()
    first = pid_of(victim)
    done = kernweave("lab", "exec", "--", "sh", "-c", "echo c > /proc/sysrq-trigger", status=125)
    assert done.stderr.count("error: ") == 1
    assert f"error: lab {victim.name}: the lab's kernel panicked\n" in done.stderr
    assert "  note: " in done.stderr and "sysrq: Trigger a crash" in done.stderr
    assert kernweave("lab", "exec", "--", "echo", "fresh").stdout == "fresh\n"
    assert pid_of(victim) != first


def test_killed_qemu_is_told_with_the_last_console_lines(victim: Lab) -> None:
    victim.up()
    with victim.connect() as link:
        link.exec_start(["sleep", "60"])
        os.kill(pid_of(victim), signal.SIGKILL)
        with pytest.raises(LabError, match="QEMU is gone") as caught:
            list(link.exec_events(LONGEST_S))
    assert any("GUEST-UP" in note for note in caught.value.notes)
    assert not victim.running()
    victim.up()
    victim.connect().close()


MSIX = "qemu-system-x86_64: hw/pci/msix.c:228: msix_table_mmio_write: Assertion `x' failed."


@pytest.mark.parametrize("faults", [1, 2])
def test_qemu_that_fails_an_assertion_at_boot_is_started_once_more(
    new_lab: NewLab, monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    lab = new_lab("assertion")
    launches: list[int] = []
    said: list[str] = []

    def fails_first(qemu: QemuTree, argv: Sequence[str], folder: Path, smp: int) -> int:
        pid = launch(qemu, argv, folder, smp)
        launches.append(pid)
        if len(launches) <= faults:
            with (folder / TRACE_FILE).open("a") as trace:
                trace.write(MSIX + "\n")
            os.kill(pid, signal.SIGKILL)
        return pid

    monkeypatch.setattr(machine, "launch", fails_first)
    if faults == 1:
        lab.up(progress=said.append)
        assert lab.running()
    else:
        with pytest.raises(LabError, match="QEMU ended by a fault of its own") as caught:
            lab.up(progress=said.append)
        assert caught.value.notes == (MSIX,)
        assert not lab.running()
    assert len(launches) == 2
    assert f"booting again: lab {lab.name}: QEMU ended by a fault of its own: {MSIX}" in said


def test_guest_that_stands_still_at_boot_is_started_once_more(
    new_lab: NewLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab("still")
    launches: list[int] = []
    said: list[str] = []

    def stops_first(qemu: QemuTree, argv: Sequence[str], folder: Path, smp: int) -> int:
        launches.append(launch(qemu, argv, folder, smp))
        if len(launches) == 1:
            os.kill(launches[0], signal.SIGSTOP)
            monkeypatch.setattr(machine, "_BOOT_LIMIT_S", 2.0)
        else:
            monkeypatch.setattr(machine, "_BOOT_LIMIT_S", LONGEST_S)
        return launches[-1]

    monkeypatch.setattr(machine, "launch", stops_first)
    lab.up(progress=said.append)
    assert lab.running()
    assert len(launches) == 2
    assert start_ticks(launches[0]) is None
    assert any(line.startswith("booting again: ") for line in said)


def test_stopped_qemu_is_a_hung_guest_and_can_be_taken_down(victim: Lab) -> None:
    victim.up()
    pid = pid_of(victim)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(LabError, match=rf"guest hangs: .* within 1 s; QEMU \(pid {pid}\) is stop"):
        victim.connect(timeout=1)
    try:
        victim.connect(timeout=1)
    except LabError as error:
        assert error.help == f"kernweave lab down {victim.name}"
    assert Kernweave(victim.name)("lab", "down").stdout == f"lab {victim.name}: down\n"
    assert start_ticks(pid) is None


HOG = "for i in 1 2 3 4; do chrt -f 99 sh -c 'while :; do :; done' & done; wait"


def test_guest_that_hangs_as_a_whole_is_ended_by_its_watchdog(new_lab: NewLab) -> None:
    hung = new_lab("hung")
    hung.up(kernel_args=["kernweave.watchdog=15"])  # a loaded host takes some
    with hung.connect() as link:
        unleash = "echo -1 > /proc/sys/kernel/sched_rt_runtime_us"
        with pytest.raises(LabError, match="the guest hung, and its watchdog ended it"):
            link.run(["sh", "-c", f"{unleash}; {HOG}"], timeout=LONGEST_S)
    assert not hung.running()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_full_cache_disk_is_one_error(lab: Lab, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "kw", tmp_path], check=True)
    try:
        (tmp_path / "packages").symlink_to(cache_dir() / "packages")
        env = {**os.environ, "KERNWEAVE_CACHE": str(tmp_path)}
        done = Kernweave(f"{lab.name}-full")("lab", "up", status=1, env=env)
        left = sorted(path.name for path in (tmp_path / "builds").iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert done.stderr.count("error: ") == 1
    assert "No space left on device" in done.stderr
    assert "help: make room there, or set KERNWEAVE_CACHE" in done.stderr
    assert [name for name in left if not name.startswith(".lock")] == []
    assert not Lab(f"{lab.name}-full").running()


def test_labs_of_three_kernels_run_at_once(lab: Lab, new_lab: NewLab) -> None:
    names = {series: f"{lab.name}-{series}" for series in ("6.12", "7.2")}
    try:
        for series, name in names.items():
            done = Kernweave(name)("lab", "up", name, "--kernel", series)
            assert f"lab {name}: Linux {series}." in done.stdout
        table = Kernweave(lab.name)("lab", "status").stdout
        assert all(name in table for name in (lab.name, *names.values()))
        for series, name in names.items():
            done = Kernweave(name)("lab", "exec", "--", "uname", "-r")
            assert done.stdout.startswith(f"{series}.")
    finally:
        for name in names.values():
            Lab(name).down()


def test_session_without_a_driver_fails_with_the_reason(lab: Lab) -> None:
    with pytest.raises(UnsupportedError, match="was booted without the driver") as caught:
        Session(f"lab:{lab.name}", writer=False)
    assert caught.value.exit_code == 3
    done = Kernweave(lab.name)("count", "vfs_read", "--for", "1", status=3)
    assert done.stderr.startswith("error: the lab was booted without the driver\n")


# ---- lab shell ---------------------------------------------------------------------------------


def test_shell_without_terminal_runs_what_it_reads(lab: Lab) -> None:
    words = "read x\ngiven\necho got $x; echo err >&2; exit 7\n"
    done = Kernweave(lab.name)("lab", "shell", status=7, input=words)
    assert (done.stdout, done.stderr) == ("got given\n", "err\n")


class Terminal:
    """`kernweave lab shell` at a terminal of ours."""

    def __init__(self, lab: Lab) -> None:
        self.fd, theirs = pty.openpty()
        self.before = termios.tcgetattr(self.fd)
        argv = [*Kernweave(lab.name).argv, "lab", "shell"]
        self.client = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

    def until(self, text: str) -> None:
        seen, deadline = b"", time.monotonic() + LONGEST_S
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([self.fd], [], [], 1)[0]:
                seen += os.read(self.fd, 4096)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Status of the client; the terminal is as it was."""
        status = self.client.wait(LONGEST_S)
        assert termios.tcgetattr(self.fd) == self.before
        os.close(self.fd)
        return status


def test_shell_at_a_terminal_has_keys_jobs_and_leaves_it_as_it_was(lab: Lab) -> None:
    terminal = Terminal(lab)
    terminal.type("PS1='kw''> '\n")
    terminal.until("kw> ")
    terminal.type("sh -c \"echo g''o; exec cat\"\n")
    terminal.until("go\r\n")  # now it owns the terminal
    terminal.type("\x03")
    terminal.until("kw> ")  # what is typed before, bash drops
    terminal.type("echo sta''tus $?\n")
    terminal.until("status 130")
    terminal.type("sh -c \"echo g''o; exec sleep 300\"\n")
    terminal.until("go\r\n")
    terminal.type("\x1a")
    terminal.until("kw> ")
    terminal.type("jobs\n")
    terminal.until("Stopped")
    terminal.type("kill -9 %1\nexit 5\nexit 5\n")  # the first may only warn of the job
    assert terminal.end() == 5


def test_shell_whose_client_is_terminated_leaves_the_terminal_as_it_was(lab: Lab) -> None:
    terminal = Terminal(lab)
    terminal.type("echo rea''dy\n")
    terminal.until("ready\r\n")
    terminal.client.terminate()
    assert terminal.end() == 128 + signal.SIGTERM


def test_shell_whose_lab_dies_leaves_the_terminal_as_it_was(victim: Lab) -> None:
    victim.up()
    terminal = Terminal(victim)
    terminal.type("echo rea''dy\n")
    terminal.until("ready\r\n")
    os.kill(pid_of(victim), signal.SIGKILL)
    terminal.until("QEMU is gone")
    assert terminal.end() == 1
