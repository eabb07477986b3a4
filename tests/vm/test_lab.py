# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions with a booted stock kernel: commands, files, loss of either end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import LONGEST_S, until

from kernweave.driver.link import Link
from kernweave.driver.records import ACK, HEADER, PAYLOAD_MAX, RESET, ExitStatus, Type
from kernweave.errors import (
    DriverError,
    KernweaveError,
    LabError,
    UnsupportedError,
    UsageError,
)
from kernweave.lab.machine import Lab

NewLab = Callable[[str], Lab]
DEFAULT_TEXT = 0xFFFFFFFF81000000
ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


def shell(link: Link, script: str, **options: object) -> tuple[str, str, ExitStatus]:
    out, err = bytearray(), bytearray()
    arguments = {"env": ENV, "cwd": "/", "timeout": LONGEST_S, **options}
    argv = ["sh", "-c", script]
    status = link.run(argv, stdout=out.extend, stderr=err.extend, **arguments)  # type: ignore[arg-type]
    return out.decode(), err.decode(), status


def test_run_passes_output_and_exit_status(link: Link) -> None:
    out, err, status = shell(link, "echo out; echo err >&2; exit 42")
    assert (out, err, status.exit, status.signal) == ("out\n", "err\n", 42, None)
    assert status.duration_ns > 0


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV])
def test_run_killed_by_signal_gives_128_and_its_number(link: Link, signo: signal.Signals) -> None:
    status = shell(link, f"kill -{signo.value} $$")[2]
    assert (status.exit, status.signal) == (128 + signo, signo)


def test_run_of_unknown_command_is_127_and_says_so(link: Link) -> None:
    err = bytearray()
    status = link.run(["no-such-thing"], env=ENV, cwd="/nowhere", stderr=err.extend)
    assert status.exit == 127
    assert b"no-such-thing: No such file" in err
    assert b"no directory /nowhere" in err


def test_run_of_a_plain_file_is_126(link: Link) -> None:
    assert link.run(["/etc/passwd"], env=ENV, cwd="/").exit == 126


def test_run_passes_directory_environment_and_arguments(link: Link) -> None:
    out = bytearray()
    argv = ["sh", "-c", 'pwd; echo "$A"; echo "$#:$1:$2"; env | wc -l', "sh", "", "b c"]
    link.run(argv, env={**ENV, "A": "x=\nü"}, cwd="/usr/lib", stdout=out.extend)
    assert out.decode().startswith("/usr/lib\nx=\nü\n2::b c\n")


def test_run_passes_large_standard_input_through(link: Link) -> None:
    food = os.urandom(3 << 20)
    out = bytearray()
    status = link.run(["cat"], env=ENV, cwd="/", stdin=food, stdout=out.extend, timeout=60)
    assert status.exit == 0
    assert out == food


def test_run_of_a_command_that_ignores_its_input_ends(link: Link) -> None:
    assert link.run(["true"], env=ENV, cwd="/", stdin=bytes(1 << 20), timeout=60).exit == 0


def test_run_that_leaves_a_daemon_behind_ends_with_all_output(link: Link) -> None:
    script = "sleep 300 & head -c 300000 /dev/zero | tr '\\0' x; exit 3"
    out, _, status = shell(link, script)
    assert (len(out), status.exit) == (300000, 3)


def test_run_beyond_its_time_is_killed_with_its_group(lab: Lab, link: Link) -> None:
    with pytest.raises(LabError, match=r"did not end within 0\.5 s"):
        shell(link, "trap '' TERM; sleep 301; sleep 302", timeout=0.5)
    count = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 30[12]'"
    with lab.connect() as other:
        until("both have gone", lambda: shell(other, count)[0] == "0\n")  # killed is not gone yet


def test_run_in_a_terminal_has_its_size_its_keys_and_one_output(link: Link) -> None:
    link.exec_start(["sh", "-c", "tty >&2; stty size; read x; stty size; cat"], pty=(33, 99))
    events, seen = link.exec_events(LONGEST_S), ""

    def read_until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            kind, data = next(events)
            assert kind in ("stdout", "fed") and isinstance(data, bytes)
            seen += data.decode()

    read_until("33 99\r\n")
    assert seen.startswith("/dev/pts/")
    link.resize(22, 77)
    link.feed(b"\n")
    read_until("22 77\r\n")
    link.feed(b"\x03")  # ^C
    *_, (kind, status) = events
    assert isinstance(status, ExitStatus)
    assert (kind, status.signal) == ("exit", signal.SIGINT)


def test_second_command_in_a_session_is_refused_by_the_agent(link: Link) -> None:
    link.exec_start(["sleep", "60"], env=ENV, cwd="/")
    link._command_tag, first = None, link._command_tag
    with pytest.raises(DriverError, match="already running"):
        link.run(["true"], env=ENV, cwd="/")
    link._command_tag = first
    link.signal(signal.SIGTERM)
    kind, status = list(link.exec_events(LONGEST_S))[-1]
    assert isinstance(status, ExitStatus)
    assert (kind, status.exit) == ("exit", 143)


def test_two_sessions_do_not_cross(lab: Lab) -> None:
    with lab.connect() as one, lab.connect() as two:
        assert one.identify()[0] != two.identify()[0]
        for link, letter in ((one, "a"), (two, "b")):
            argv = ["sh", "-c", f"head -c 2000000 /dev/zero | tr '\\0' {letter}"]
            link.exec_start(argv, env=ENV, cwd="/")
        for link, expected in ((two, b"b"), (one, b"a")):
            events = list(link.exec_events(60))
            out = b"".join(data for kind, data in events if kind == "stdout")  # type: ignore[misc]
            assert out == expected * 2000000


def test_requests_are_answered_while_a_command_floods_the_session(link: Link) -> None:
    link.exec_start(["yes"], env=ENV, cwd="/")
    version = link.read_file("/proc/version")
    assert version.startswith(b"Linux version")
    link.signal(signal.SIGKILL)
    *output, last = link.exec_events(60)
    assert last[1].signal == signal.SIGKILL  # type: ignore[union-attr]
    text = b"".join(data for _, data in output)  # type: ignore[misc]
    assert set(text) <= set(b"y\n")


def test_ports_are_all_given_out_once(lab: Lab) -> None:
    links = [lab.connect() for _ in range(8)]
    try:
        assert len({link.identify()[0] for link in links}) == 8
        assert lab.status().sessions == 8
        with pytest.raises(LabError, match="all 8 ports"):
            lab.connect()
    finally:
        for link in links:
            link.close()
    assert lab.status().sessions == 0


def test_killed_agent_is_noticed_and_its_port_works_again(lab: Lab) -> None:
    with lab.connect() as victim, lab.connect() as other:
        pid, _ = victim.identify()
        victim.exec_start(["yes"], env=ENV, cwd="/")
        assert next(victim.exec_events(LONGEST_S))[0] == "stdout"
        assert shell(other, f"kill -9 {pid}")[2].exit == 0
        with pytest.raises(LabError, match="died and was restarted"):
            for _ in victim.exec_events(LONGEST_S):
                pass
        with pytest.raises(LabError, match="died and was restarted"):
            victim.read_file("/proc/version")
    with lab.connect() as again:
        assert again.identify()[0] != pid
        assert shell(again, "echo back")[0] == "back\n"


def test_idle_agent_killed_is_noticed_at_the_next_request(lab: Lab) -> None:
    with lab.connect() as victim, lab.connect() as other:
        pid, _ = victim.identify()
        shell(other, f"kill -9 {pid}")
        with pytest.raises(LabError, match="died and was restarted"):
            victim.identify()


def raw_session(lab: Lab) -> socket.socket:
    """Start a session by hand on port 0, as a client that goes wrong would."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LONGEST_S)
    sock.connect(str(lab.folder / "port0"))
    sock.sendall(RESET + b"n" * 16)
    seen = b""
    while not seen.endswith(ACK + b"n" * 16):
        seen += sock.recv(4096)
    return sock


def test_host_gone_inside_a_huge_record_does_not_disturb_the_next_session(lab: Lab) -> None:
    sock = raw_session(lab)
    sock.sendall(HEADER.pack(60 << 20, Type.CALL, 1) + bytes(5 << 20))
    sock.close()
    with lab.connect() as link:
        assert shell(link, "echo fine")[0] == "fine\n"


def test_reset_inside_a_record_starts_afresh(lab: Lab) -> None:
    with raw_session(lab) as sock:
        for missing in (60 << 20, 40, 5):
            sock.sendall(HEADER.pack(100 + missing, Type.READFILE, 1) + bytes(100) + RESET)
            sock.sendall(bytes([missing & 255]) * 16)
            seen = b""
            while len(seen) < 32:
                seen += sock.recv(4096)
            assert seen == ACK + bytes([missing & 255]) * 16
        sock.sendall(HEADER.pack(0, Type.GETPID, 7) + b"\n")
        length, kind, tag = HEADER.unpack(sock.recv(HEADER.size))
        assert (kind, tag) == (Type.PID, 7)
        assert length > 8


@pytest.mark.parametrize(
    "record",
    [HEADER.pack(PAYLOAD_MAX + 1, Type.CALL, 3), HEADER.pack(2, Type.READFILE, 3) + b"/\0\0"],
    ids=["too long", "no end"],
)
def test_malformed_record_is_answered_by_an_error(lab: Lab, record: bytes) -> None:
    with raw_session(lab) as sock:
        sock.sendall(record)
        length, kind, _ = HEADER.unpack(sock.recv(HEADER.size))
        assert kind == Type.ERROR
        assert sock.recv(length) == b"malformed record"


def test_detached_command_lives_on_and_the_port_is_clean(lab: Lab) -> None:
    with lab.connect() as link:
        link.exec_start(["sh", "-c", "echo noise; exec sleep 303"], env=ENV, cwd="/")
        assert next(link.exec_events(LONGEST_S)) == ("stdout", b"noise\n")
    with lab.connect() as link:
        find = "pkill -x -f 'sleep 303' && echo was there"
        until("it is there", lambda: shell(link, find)[0] == "was there\n")  # sh may still exec it


def test_read_file_returns_kallsyms_whole(link: Link) -> None:
    text = link.read_file("/proc/kallsyms")
    assert len(text) > 4_000_000
    assert len(text) == int(shell(link, "wc -c < /proc/kallsyms")[0])
    assert b" T _text\n" in text


def test_read_file_that_does_not_exist_gives_errno(link: Link) -> None:
    with pytest.raises(DriverError, match="cannot read /nowhere") as caught:
        link.read_file("/nowhere")
    assert caught.value.errno == 2


def test_request_to_a_lab_without_driver_says_why(link: Link) -> None:
    with pytest.raises(UnsupportedError, match="booted without the driver"):
        link.call(b"hello")


def test_host_file_changed_is_seen_by_a_fresh_command(link: Link) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        file, program = Path(folder) / "file", Path(folder) / "program"
        for text in ("first", "and second", "3rd"):
            file.write_text(text)
            shutil.copy("/bin/true" if text == "first" else "/bin/echo", program)
            out, _, status = shell(link, f"cat {file}; {program} +", fresh=True)
            assert status.exit == 0
            assert out == (text if text == "first" else f"{text}+\n")


def test_guest_cannot_write_to_the_host(link: Link) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        file = Path(folder) / "file"
        file.write_text("host")
        out, _, _ = shell(link, f"echo guest > {file}; cat {file}", fresh=True)
        assert out == "guest\n"
        assert file.read_text() == "host"


def test_guest_has_what_programs_expect(link: Link) -> None:
    script = "hostname; cat /sys/class/net/lo/operstate; ls /sys/kernel/debug /sys/kernel/tracing"
    out, err, status = shell(link, f"{script}; echo x > /tmp/x; echo y > /dev/shm/y")
    assert (err, status.exit) == ("", 0)
    assert out.startswith("kernweave-lab\nunknown\n")
    assert "available_filter_functions" in out


def test_kernel_is_stock_with_kaslr_and_mitigations_on(link: Link, new_lab: NewLab) -> None:
    command_line = link.read_file("/proc/cmdline").decode()
    assert "nokaslr" not in command_line
    assert "mitigations" not in command_line
    addr = text_addr(link)
    print(f"_text is at {addr:#x}")
    if addr == DEFAULT_TEXT:  # one boot in about 500
        again = new_lab("again")
        again.up()
        with again.connect() as other:
            assert text_addr(other) != DEFAULT_TEXT


def text_addr(link: Link) -> int:
    lines = link.read_file("/proc/kallsyms").splitlines()
    return next(int(line.split()[0], 16) for line in lines if line.endswith(b" T _text"))


def test_up_twice_is_the_same_machine(lab: Lab) -> None:
    assert lab.up() == lab.up()
    assert lab.running()
    lab.connect().close()


def test_console_has_the_whole_kernel_log(lab: Lab, link: Link) -> None:
    shell(link, "echo '<7>needle 4711' > /dev/kmsg")
    lab.wait_console("needle 4711", LONGEST_S)
    assert "Linux version" in lab.log()
    assert "Run /init" in lab.log()


def test_up_with_another_kernel_than_it_runs_is_refused(lab: Lab) -> None:
    with pytest.raises(UsageError, match=r"runs kernel 6\.1, not 6\.12"):
        Lab(lab.name, kernel="6.12").up()
    assert Lab(lab.name).series == "6.1"


UP = "import sys; from kernweave.lab.machine import Lab; print(Lab(sys.argv[1], '6.1').up().pid)"


def test_up_in_two_processes_boots_one_machine_even_after_a_killed_third(
    lab: Lab, new_lab: NewLab
) -> None:
    many = new_lab("many")
    argv = [sys.executable, "-c", UP, many.name]
    with subprocess.Popen(argv) as killed:
        while not (many.folder / "console.log").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    pids = [process.communicate(timeout=LONGEST_S)[0] for process in processes]
    state = many.status().state
    assert state is not None
    assert pids == [f"{state.pid}\n"] * 2
    pidfile = os.fsencode(many.folder / "qemu.pid")
    assert sum(pidfile in arguments(path) for path in Path("/proc").glob("[0-9]*")) == 1
    assert many.down()
    assert not many.down()
    assert lab.running()


def arguments(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def test_panic_is_told_with_the_console(lab: Lab, new_lab: NewLab) -> None:
    victim = new_lab("panic")
    victim.up()
    with victim.connect() as link:
        with pytest.raises(KernweaveError, match="kernel panicked") as caught:
            shell(link, "echo c > /proc/sysrq-trigger")
        assert any("sysrq" in note for note in caught.value.notes)
    until("QEMU has ended", lambda: not victim.running())
    with pytest.raises(LabError, match="is down"):
        victim.connect()
    assert lab.running()


def test_boot_that_fails_leaves_nothing_running(lab: Lab, new_lab: NewLab) -> None:
    bad = new_lab("bad")
    with pytest.raises(LabError, match="panicked") as caught:
        bad.up(kernel_args=["rdinit=/nowhere", "root=/dev/nothing"])
    assert caught.value.notes
    assert bad.status().state is None
    with pytest.raises(LabError, match="did not start"):
        bad.up(qemu_args=["-nonsense"])
    assert bad.status().state is None
    assert lab.running()


def test_driver_that_does_not_load_leaves_a_lab_that_says_why(
    lab: Lab, new_lab: NewLab, tmp_path: Path
) -> None:
    kmod = tmp_path / "bad.ko"
    kmod.write_bytes(b"nonsense")
    bad = new_lab("bad-driver")
    state = bad.up(kmod=kmod)
    assert state.no_driver is not None
    assert re.fullmatch("the driver does not load in 6.1.*: Exec format error", state.no_driver)
    with bad.connect() as link:
        assert shell(link, "echo fine")[0] == "fine\n"
        with pytest.raises(UnsupportedError, match="Exec format error"):
            link.call(b"x")
    assert lab.running()


def test_idle_lab_powers_itself_off(lab: Lab, new_lab: NewLab) -> None:
    idle = new_lab("idle")
    state = idle.up(kernel_args=["kernweave.idle=8"])
    with idle.connect() as link:  # keeps it up
        shell(link, "sleep 11")
    idle.wait_console("kernweave: power off: idle", LONGEST_S)
    until("QEMU has ended", lambda: not state.alive())
    assert not idle.running()
    assert lab.running()


def test_round_trips_are_reported(lab: Lab, link: Link) -> None:
    shell(link, "true")
    took: dict[str, float] = {}
    for name, action in (
        ("exec true", lambda: link.run(["true"], env=ENV, cwd="/")),
        ("read a small file", lambda: link.read_file("/proc/sys/kernel/ostype")),
        ("identify", link.identify),
    ):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        took[name] = sorted(times)[10]
    began = time.perf_counter()
    size = len(link.read_file("/proc/kallsyms"))
    took[f"kallsyms ({size} bytes)"] = time.perf_counter() - began
    print({name: f"{seconds * 1000:.2f} ms" for name, seconds in took.items()})
