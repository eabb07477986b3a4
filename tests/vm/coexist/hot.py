# SPDX-License-Identifier: GPL-2.0-or-later
"""An entry that two CPUs call all the time, with a kprobe that is registered only."""

from __future__ import annotations

import signal

from guest import ENV, program, target, until

import kernweave
from coexist.counting import CALLS
from coexist.others import Kprobes
from kernweave.lab.machine import Lab

HOT = "__x64_sys_getppid"


def write_where_all_call(machine: Lab, engine: str, rounds: int) -> None:
    """Count the entry again and again; whoever runs into a write must come through."""
    user = Kprobes(HOT)
    with (
        machine.connect() as link,
        machine.connect() as callers,
        kernweave.connect(target(machine)) as session,
    ):
        user.register(link)
        callers.exec_start([program("getppids")], env=ENV, cwd="/", fresh=True)
        for _ in range(rounds):
            with getattr(session, engine)(HOT) as hits:
                until("it is hot", lambda: hits.rows()[0].hits > CALLS)
            assert hits.text_restored and hits.exact().all() and not hits.evicted
        callers.signal(signal.SIGKILL)
        user.detach(link)
