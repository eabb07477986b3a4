# SPDX-License-Identifier: GPL-2.0-or-later
"""Long use of labs: sessions side by side, and guests killed under a running `count`."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernweave.driver.records import ExitStatus
from kernweave.errors import DriverError
from kernweave.lab.build import build_static
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

SEED = int(os.environ.get("KERNWEAVE_SEED", "0")) or random.randrange(1, 1 << 31)
_CALLS = Path(__file__).parent / "vm/csrc/calls.c"
_POINT = "__x64_sys_sched_rr_get_interval"
_GIVE_UP_S = 240.0


def calls_program() -> str:
    """Path of a program that makes as many calls of `_POINT` as its argument says."""
    return str(build_static(_CALLS, cflags=["-pthread", "-Wno-unused-result"]))


@contextmanager
def labs(*names: str) -> Iterator[list[Lab]]:
    """Labs with the driver, booted side by side, gone afterwards."""
    found = [Lab(f"{name}-{os.getpid()}", kernel="6.1") for name in names]
    kmod = driver_kmod("6.1", print)
    try:
        with ThreadPoolExecutor(len(found)) as pool:
            list(pool.map(lambda lab: lab.up(kmod=kmod), found))
        yield found
    finally:
        for lab in found:
            lab.down()


# ---- sessions side by side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What must be the same before and after."""

    sessions: int
    processes: tuple[str, ...]
    placed: int
    pinned: int
    files: int

    @staticmethod
    def of(lab: Lab) -> Left:
        """Look at a lab and at this process, which keeps no file that nobody uses."""
        gc.collect()
        with Session(f"lab:{lab.name}", writer=False) as session:
            shown = session.run(["ps", "-eo", "ppid,comm"], capture=True, check=True).stdout
            placed, pinned = len(session.driver.placed()), session.driver.facts.pinned
        lines = (line.split(None, 1) for line in shown.decode().splitlines()[1:])
        names = sorted(name for parent, name in lines if parent != "2")  # 2: kernel threads
        return Left(
            lab.status().sessions,
            tuple(names),
            placed,
            pinned,
            len([*Path("/proc/self/fd").iterdir()]),
        )


def soak(machines: Sequence[Lab], rounds: int) -> None:
    """Use all labs at the same time for so many rounds; nothing crosses, nothing stays."""
    print(f"KERNWEAVE_SEED={SEED}")
    before = _at_rest(machines)
    with ThreadPoolExecutor(len(machines)) as pool:
        futures = [
            pool.submit(_use, lab, rounds, random.Random(SEED + number))
            for number, lab in enumerate(machines)
        ]
        for future in futures:
            future.result()
    deadline = time.monotonic() + _GIVE_UP_S
    while (after := [Left.of(lab) for lab in machines]) != before:  # processes take a moment to end
        assert time.monotonic() < deadline, (before, after)
    for lab in machines:
        assert not lab.trouble()


def _at_rest(machines: Sequence[Lab]) -> list[Left]:
    """What two looks in a row agree on: booting leaves processes that are about to end."""
    last = [Left.of(lab) for lab in machines]
    while (found := [Left.of(lab) for lab in machines]) != last:
        last = found
    return found


def _use(lab: Lab, rounds: int, chance: random.Random) -> None:
    target = f"lab:{lab.name}"
    one: Session | None = Session(target, writer=True)
    two: Session | None = Session(target, writer=False)
    for number in range(rounds):
        assert one is not None and two is not None
        with pytest.raises(DriverError) as caught:
            Session(target, writer=True)
        assert caught.value.errno == errno.EBUSY
        _round(lab, one, two, number, chance)
        one.close()
        two.close()
        # the roles swap: who read now writes
        two, one = Session(target, writer=False), Session(target, writer=True)
    for session in (one, two):
        assert session is not None
        session.close()


def _round(lab: Lab, writer: Session, reader: Session, number: int, chance: random.Random) -> None:
    calls = chance.randrange(1, 5000)
    word = f"{lab.name}:{number}:{chance.random()}"
    script = chance.choice(
        [f"echo {word}", f"sleep 0.0{number % 10}; echo {word}", f"printf '%s\\n' {word}"]
    )
    reader._link.exec_start(["sh", "-c", script])
    with writer.count(_POINT) as hits:
        addr = int(hits.rows()[0].addr, 16)
        assert addr in reader.driver.placed()["addr"]
        ran = writer.run([calls_program(), str(calls)], capture=True)
        assert ran.exit == 0
    assert [row.hits for row in hits.rows()] == [calls]
    assert hits.text_restored
    assert addr not in reader.driver.placed()["addr"]
    out, status = b"", None
    for kind, data in reader._link.exec_events(_GIVE_UP_S):
        if isinstance(data, ExitStatus):
            status = data.exit
        elif kind == "stdout":
            out += data
    assert (out.decode(), status) == (f"{word}\n", 0)


# ---- guests killed under a client --------------------------------------------------------------


def kill_guests(lab: Lab, times: int) -> list[float]:
    """Kill the lab's QEMU at random moments of a `count`; return how long each client lived on."""
    print(f"KERNWEAVE_SEED={SEED}")
    chance = random.Random(SEED)
    took: list[float] = []
    kmod = driver_kmod("6.1", print)
    while len(took) < times:
        state = lab.up(kmod=kmod)
        delay_s = chance.uniform(0, 4)
        with _client(lab) as client:
            _wait(lambda: lab.status().sessions or client.poll() is not None)
            time.sleep(delay_s)  # the moment to kill at, not a wait for anything
            if client.poll() is not None:
                continue  # it was faster
            os.kill(state.pid, signal.SIGKILL)
            began = time.monotonic()
            out, err = client.communicate(timeout=_GIVE_UP_S)
            took.append(time.monotonic() - began)
        print(f"killed after {delay_s:.2f} s, ended {took[-1]:.2f} s later: {err.splitlines()[:1]}")
        if client.returncode == 0:
            assert '"text_restored":true' in out  # all was done when the guest died
            continue
        assert client.returncode == 125, err
        assert err.count("error: ") == 1 and "Traceback" not in err, err
        assert f"lab {lab.name}: " in err
        assert not re.search("no agent answered|no answer|takes nothing", err), err  # it was told
    return took


@contextmanager
def _client(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "kernweave", "--target", f"lab:{lab.name}"]
    argv += ["count", "vfs_*@blocks", "--partial", "--json", "--", "sleep", "1"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as client:
        try:
            yield client
        finally:
            client.kill()


def _wait(condition: Callable[[], object]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + _GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)
