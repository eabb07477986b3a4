# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions against a scripted agent on the other end of a socket pair."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kernweave
from kernweave.driver import records
from kernweave.driver.link import Link
from kernweave.driver.records import ACK, END, HEADER, RESET, RESTARTED, ExitStatus, Type
from kernweave.errors import DriverError, KernweaveError, LabError, UsageError

AGENT = Path(kernweave.__file__).parent / "driver/csrc/agent"


class Agent:
    """The far end, as far as a test wants it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def acknowledge(self) -> None:
        assert self.read(16) == RESET
        self.sock.sendall(ACK + self.read(16))

    def request(self) -> tuple[int, int, bytes]:
        length, kind, tag = HEADER.unpack(self.read(HEADER.size))
        payload = self.read(length + 1)
        assert payload[-1] == END
        return kind, tag, payload[:-1]

    def answer(self, kind: int, tag: int, payload: bytes = b"") -> None:
        self.sock.sendall(pack(kind, tag, payload))


def pack(kind: int, tag: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), kind, tag) + payload + bytes([END])


def reply(payload: bytes = b"", errno: int = 0) -> bytes:
    return struct.pack("<iI", -errno, 0) + payload


@contextmanager
def session(script: Callable[[Agent], None], timeout: float = 60.0) -> Iterator[Link]:
    """Open a link to an agent that acknowledges, then follows the script, then goes."""
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def play() -> None:
        agent = Agent(theirs)
        try:
            agent.acknowledge()
            script(agent)
        except (EOFError, OSError):
            pass
        except BaseException as failure:
            failures.append(failure)
        finally:
            theirs.close()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        with Link(ours, timeout=timeout) as link:
            yield link
    finally:
        ours.close()
        thread.join()
    assert not failures


def test_numbers_match_the_agents_header() -> None:
    text = (AGENT / "agent.h").read_text()
    types = {name: int(value) for name, value in re.findall(r"\bKW_(\w+)\s*= (\d+),", text)}
    assert types == {kind.name: kind.value for kind in Type}
    defines = dict(re.findall(r"#define KW_(\w+)\s+(\(?0x\w+|\(?[^\s*/]+)", text))
    assert records.magic(int(defines["RESET"], 16)) == RESET
    assert records.magic(int(defines["ACK"], 16)) == ACK
    assert records.magic(int(defines["RESTARTED"], 16)) == RESTARTED
    assert int(defines["END"], 16) == END
    assert "#define KW_PAYLOAD_MAX\t(128u << 20)" in text
    assert "#define KW_CHUNK_MAX\t(64u << 10)" in text


@pytest.mark.parametrize("magic", [RESET, ACK, RESTARTED])
def test_magic_cannot_be_part_of_a_whole_record(magic: bytes) -> None:
    assert END not in magic
    assert HEADER.unpack(magic[: HEADER.size])[0] > records.PAYLOAD_MAX


def test_magics_stand_in_no_source_file() -> None:
    for path in [*AGENT.iterdir(), *Path(records.__file__).parent.glob("*.py")]:
        assert not any(magic in path.read_bytes() for magic in (RESET, ACK, RESTARTED))


def test_handshake_skips_what_an_earlier_session_left() -> None:
    def script(agent: Agent) -> None:
        kind, tag, payload = agent.request()
        assert (kind, payload) == (Type.CALL, b"request")
        agent.answer(Type.REPLY, tag, reply(b"pong"))

    ours, theirs = socket.socketpair()
    theirs.sendall(b"old output" * 1000 + ACK + b"another's nonce!" + RESTARTED)

    def play() -> None:
        agent = Agent(theirs)
        agent.acknowledge()
        script(agent)

    thread = threading.Thread(target=play)
    thread.start()
    with theirs, Link(ours) as link:
        assert bytes(link.call(b"request")) == b"pong"
        thread.join()


def test_handshake_without_an_agent_times_out_and_releases_the_port() -> None:
    ours, theirs = socket.socketpair()
    released: list[bool] = []
    with theirs, pytest.raises(LabError, match=r"no agent answered within 0\.1 s"):
        Link(ours, timeout=0.1, on_close=lambda: released.append(True))
    assert released == [True]
    assert ours.fileno() == -1


def test_call_refused_by_the_driver_carries_errno() -> None:
    def script(agent: Agent) -> None:
        _, tag, _ = agent.request()
        agent.answer(Type.REPLY, tag, reply(errno=16))

    with session(script) as link, pytest.raises(DriverError, match="busy") as caught:
        link.call(b"x")
    assert caught.value.errno == 16


def test_call_while_a_command_runs_keeps_its_output() -> None:
    def script(agent: Agent) -> None:
        kind, command, payload = agent.request()
        assert kind == Type.EXEC
        assert payload[16:] == b"/work\0ls\0-l\0A=b\0"
        agent.answer(Type.STDOUT, command, b"one")
        _, tag, _ = agent.request()
        agent.answer(Type.STDERR, command, b"two")
        agent.answer(Type.REPLY, tag, reply(b"answer"))
        agent.answer(Type.EXITED, command, struct.pack("<iiQ", 137, 9, 5))

    with session(script) as link:
        link.exec_start(["ls", "-l"], env={"A": "b"}, cwd="/work")
        assert bytes(link.call(b"x")) == b"answer"
        assert list(link.exec_events()) == [
            ("stdout", b"one"),
            ("stderr", b"two"),
            ("exit", ExitStatus(137, 9, 5)),
        ]


def test_call_of_many_bytes_both_ways_does_not_block() -> None:
    size = 8 << 20

    def script(agent: Agent) -> None:
        _, command, _ = agent.request()
        header = agent.read(HEADER.size)
        for _ in range(64):  # far more than the socket holds, before the request is read
            agent.answer(Type.STDOUT, command, bytes(64 << 10))
        length, _, tag = HEADER.unpack(header)
        assert len(agent.read(length + 1)) == size + 1
        agent.answer(Type.REPLY, tag, reply(bytes(size)))

    with session(script) as link:
        link.exec_start(["yes"])
        assert len(link.call(bytes(size))) == size


def test_call_without_an_answer_times_out_and_its_late_answer_is_dropped() -> None:
    proceed = threading.Event()

    def script(agent: Agent) -> None:
        _, late, _ = agent.request()
        proceed.wait(60)
        agent.answer(Type.REPLY, late, reply(b"late"))
        _, tag, _ = agent.request()
        agent.answer(Type.REPLY, tag, reply(b"second"))

    with session(script) as link:
        with pytest.raises(KernweaveError, match=r"no answer to CALL within 0.05 s"):
            link.call(b"first", timeout=0.05)
        proceed.set()
        assert bytes(link.call(b"second")) == b"second"


def test_end_of_file_breaks_the_link_for_good() -> None:
    with session(lambda agent: None) as link:
        for _ in range(2):
            with pytest.raises(LabError, match=r"closed the connection|connection .* is lost"):
                link.call(b"x")


@pytest.mark.parametrize("kept", [0, 3, 8, 20])
def test_restarted_agent_is_noticed_inside_any_record(kept: int) -> None:
    def script(agent: Agent) -> None:
        _, tag, _ = agent.request()
        agent.sock.sendall(pack(Type.REPLY, tag, reply(b"whatever"))[:kept] + RESTARTED)
        agent.read(1)

    with session(script) as link, pytest.raises(LabError, match="died and was restarted"):
        link.call(b"x", timeout=60)


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(records.PAYLOAD_MAX + 1, Type.REPLY, 1),
        HEADER.pack(4, Type.REPLY, 1) + b"12345",
        b"\xff" * 64,
        pack(Type.ERROR, 0, b"malformed record"),
        pack(Type.FILE, 1, reply(b"x")),
    ],
    ids=["too long", "no end", "noise", "given up", "wrong type"],
)
def test_garbage_breaks_the_link(garbage: bytes) -> None:
    def script(agent: Agent) -> None:
        agent.request()
        agent.sock.sendall(garbage)
        agent.read(1)

    with session(script) as link:
        with pytest.raises(LabError):
            link.call(b"x")
        with pytest.raises(LabError):
            link.call(b"x")


def test_run_feeds_standard_input_one_chunk_at_a_time() -> None:
    food = bytes(range(256)) * 600

    def script(agent: Agent) -> None:
        _, command, _ = agent.request()
        got = b""
        while True:
            kind, _, payload = agent.request()
            assert kind == Type.STDIN
            agent.answer(Type.STDIN, command)
            got += payload
            if not payload:
                break
        agent.answer(Type.STDOUT, command, got)
        agent.answer(Type.EXITED, command, struct.pack("<iiQ", 0, 0, 1))

    out = bytearray()
    with session(script) as link:
        status = link.run(["cat"], stdin=food, stdout=out.extend)
    assert status == ExitStatus(0, None, 1)
    assert out == food


def test_run_beyond_its_time_is_killed() -> None:
    def script(agent: Agent) -> None:
        _, command, _ = agent.request()
        kind, _, payload = agent.request()
        assert (kind, payload) == (Type.SIGNAL, struct.pack("<i", 15))
        agent.answer(Type.EXITED, command, struct.pack("<iiQ", 143, 15, 1))

    with session(script) as link, pytest.raises(LabError, match=r"sleep did not end within 0\.1 s"):
        link.run(["sleep", "9"], timeout=0.1)


def test_requests_that_cannot_be_sent_are_refused_before_anything_is() -> None:
    with session(lambda agent: None) as link:
        with pytest.raises(UsageError, match="NUL"):
            link.run(["echo", "a\0b"])
        with pytest.raises(UsageError, match="no command"):
            link.run([])
        with pytest.raises(UsageError, match="are allowed"):
            link.call(bytes(records.PAYLOAD_MAX + 1))


def test_close_twice_releases_the_port_once() -> None:
    released: list[bool] = []
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: Agent(theirs).acknowledge())
    thread.start()
    link = Link(ours, on_close=lambda: released.append(True))
    thread.join()
    link.close()
    link.close()
    theirs.close()
    assert released == [True]
    with pytest.raises(LabError, match="closed"):
        link.call(b"x")
