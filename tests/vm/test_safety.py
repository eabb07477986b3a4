# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever dies, whenever it dies: the text is what it was, and the next session works."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import (
    LONGEST_S,
    Text,
    assert_exact,
    kmodctl,
    names_of,
    program,
    read_text,
    shell,
    target,
    until,
)

import kernweave
from kernweave.driver.link import Link
from kernweave.driver.records import HEADER, Type
from kernweave.lab.machine import Lab
from kernweave.model.plan import Tactic
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

CLIENT = Path(__file__).parent / "kill_client.py"
COLD = ("ne*@insns", "nf*@insns")
FEW = ("vfs_read@insns", "vfs_write", "__schedule@blocks", "try_to_wake_up@insns")
STAGES = ("before:area", "after:area", "after:percpu", "after:write", "before:seal", "after:seal",
          "before:commit", "after:commit", "work", "before:undo", "after:undo", "before:quiesce",
          "after:quiesce", "before:counters", "before:free", "after:free",
          "before:forget", "after:forget")  # fmt: skip
SEED = int(os.environ.get("KERNWEAVE_SEED", "0")) or random.randrange(1, 1 << 31)


@pytest.fixture(scope="module")
def native(machine: Lab) -> Text:
    return read_text(machine)


@pytest.fixture
def lab(machine: Lab, native: Text) -> Iterator[Lab]:
    """The lab; after the test its text is what it was, and a new session counts right."""
    yield machine
    while _started:
        kill(_started.pop())
    assert_exact(machine)
    assert not native.changed(read_text(machine))
    assert not machine.trouble()


_started: list[subprocess.Popen[str]] = []


def start(lab: Lab, stage: str, *points: str) -> subprocess.Popen[str]:
    client = subprocess.Popen(
        [sys.executable, str(CLIENT), lab.name, stage, *points],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _started.append(client)
    return client


def kill(client: subprocess.Popen[str]) -> None:
    client.kill()
    client.wait(LONGEST_S)
    for pipe in (client.stdin, client.stdout):
        if pipe is not None:
            pipe.close()


def wait_attached(client: subprocess.Popen[str]) -> None:
    assert client.stdout is not None
    assert client.stdout.readline() == "attached\n"


def many(session: Session) -> list[str]:
    """Functions whose instructions make more than 20,000 sites."""
    print("seed", SEED)
    return [f"{name}@insns" for name in random.Random(SEED).sample(names_of(session)[1], 1550)]


# ---- the client --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_client_killed_at_a_stage_leaves_nothing(lab: Lab, stage: str) -> None:
    client = start(lab, stage, *FEW)
    client.communicate(timeout=LONGEST_S)
    assert client.returncode == -signal.SIGKILL


@pytest.mark.parametrize("turn", range(2))
def test_client_killed_at_a_random_moment_of_a_large_attach_leaves_nothing(
    lab: Lab, turn: int
) -> None:
    with kernweave.connect(target(lab), writer=False) as reader:
        points = many(reader)
    choose = random.Random(SEED + turn)
    client = start(lab, "never", *points)
    with kernweave.connect(target(lab), writer=False) as reader:
        at_least = choose.randrange(1, 20_000)
        print(f"seed {SEED}, turn {turn}: kill at {at_least} sites")
        until("sites placed", lambda: len(reader.driver.placed()) >= at_least)
        kill(client)


def test_client_killed_in_a_commit_of_many_groups_makes_way_for_the_next(lab: Lab) -> None:
    """The driver begins few more rounds, each at most twice as large as the one before."""
    seen = [0]
    with kernweave.connect(target(lab), writer=False) as reader:

        def look() -> int:
            seen.append(len(reader.driver.placed()))
            return seen[-1]

        found = reader.survey(*COLD, tactics=("group",)).of(Tactic.GROUP)
        groups = len({one.site_addr for one in found})
        assert groups > 16_000
        client = start(lab, "groups", *COLD)
        until("groups are armed", lambda: look() > 100)
        kill(client)
        look()  # a loaded guest learns late of it
        at = max(seen)
        until("everything is taken out", lambda: not look())
    print(f"killed at {at} sites, {max(seen)} at most, of {groups}")
    assert max(seen) < min(groups, 8 * at + 8192)  # three rounds more; what is no group, once


def test_client_killed_while_it_takes_out_20000_points_leaves_nothing(lab: Lab) -> None:
    with kernweave.connect(target(lab), writer=False) as reader:
        client = start(lab, "never", *many(reader))
        wait_attached(client)
        all_sites = len(reader.driver.placed())
        assert all_sites > 20_000
        assert client.stdin is not None
        client.stdin.close()
        until("undo has begun", lambda: len(reader.driver.placed()) < all_sites)
        client.kill()
        client.wait(LONGEST_S)


# ---- the agent and the link --------------------------------------------------------------------


def driver_owners(link: Link) -> list[int]:
    """Pids of processes in the guest that have the driver open."""
    found = shell(link, "ls -l /proc/[0-9]*/fd 2>/dev/null | grep -e ^/proc -e kernweave$ || true")
    owners, pid = [], 0
    for line in found.splitlines():
        if line.startswith("/proc/"):
            pid = int(line.split("/")[2])
        elif line.endswith("/dev/kernweave"):
            owners.append(pid)
    return owners


def kill_agent(lab: Lab) -> None:
    with lab.connect() as link:
        (pid,) = driver_owners(link)
        shell(link, f"kill -9 {pid}")
        until("the agent has gone", lambda: pid not in driver_owners(link))


def test_agent_killed_while_attached_leaves_nothing(lab: Lab) -> None:
    client = start(lab, "never", *FEW)
    wait_attached(client)
    kill_agent(lab)
    kill(client)


@pytest.mark.parametrize("stage", ["commit", "undo"])
def test_agent_killed_in_a_large_request_leaves_nothing(lab: Lab, stage: str) -> None:
    with kernweave.connect(target(lab), writer=False) as reader:
        points = many(reader)
    with lab.connect() as link:  # before the client: finding the agent must not wait for it
        client = start(lab, "never", *points)
        until("the session is open", lambda: driver_owners(link))
        (pid,) = driver_owners(link)
        with kernweave.connect(target(lab), writer=False) as reader:
            until("sites are placed", lambda: len(reader.driver.placed()) > 1000)
            if stage == "undo":
                wait_attached(client)
                placed = len(reader.driver.placed())
                assert client.stdin is not None
                client.stdin.close()
                until("undo has begun", lambda: len(reader.driver.placed()) < placed)
            shell(link, f"kill -9 {pid}")
            until("everything is taken out", lambda: not len(reader.driver.placed()))
        client.kill()
        client.wait(LONGEST_S)


def test_link_closed_in_the_middle_of_a_large_request_leaves_nothing(lab: Lab) -> None:
    session = kernweave.connect(target(lab))
    session.count(*FEW, partial=True)
    link = session._link
    assert isinstance(link, Link)
    sock = link._channel._sock
    sock.setblocking(True)
    sock.sendall(HEADER.pack(48 << 20, Type.CALL, 99) + bytes(5 << 20))
    sock.close()
    link.close()


# ---- rmmod -------------------------------------------------------------------------------------


def test_rmmod_while_a_session_is_open_is_refused(lab: Lab) -> None:
    with kernweave.connect(target(lab)) as session, session.count(*FEW, partial=True) as hits:
        with lab.connect() as link:
            assert kmodctl(link, "unload", "kernweave") == "EAGAIN"
        session.run([program("mixed"), "1"], check=True)
    assert hits.text_restored


def test_rmmod_right_after_a_kill_waits_and_the_driver_loads_again(lab: Lab) -> None:
    client = start(lab, "never", *FEW)
    wait_attached(client)
    with lab.connect() as link:
        kill(client)
        until("rmmod", lambda: kmodctl(link, "unload", "kernweave") == "ok")
        assert not re.search("^kernweave ", shell(link, "cat /proc/modules"), re.MULTILINE)
        assert kmodctl(link, "load", str(driver_kmod("6.1", print))) == "ok"


# ---- requests nobody should send ---------------------------------------------------------------


def test_random_requests_do_no_harm(lab: Lab) -> None:
    """Well-formed headers with random payloads: every one is answered, none changes text."""
    print("seed", SEED)
    rng = random.Random(SEED)
    with kernweave.connect(target(lab)) as session:
        link = session._link
        for _ in range(400):
            op, size = rng.randrange(0, 24), rng.choice((0, 1, 7, 8, 16, 24, 40, 64, 4096))
            words = [rng.choice((0, 1, 5, 2**31, 2**63, 2**64 - 4)) for _ in range(size // 8)]
            body = struct.pack(f"<{len(words)}Q", *words) + bytes(size % 8)
            head = struct.pack("<IHHQ", 0x5245574B, 1, op, len(body))
            if op == 3 and words:  # reading is the one that may take long
                continue
            assert len(link.call(head + body)) >= 24
