# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that kills itself with SIGKILL at one stage of attach or detach.

usage: kill_client.py LAB STAGE POINT...

Stages: a method of Driver and `before` or `after` it, for instance before:commit, after:undo;
`work` while a workload runs; `never` says `attached` and waits for its standard input to end,
and so does `groups`, which places nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from guest import program

import kernweave
from kernweave.driver.client import Driver


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str) -> None:
    """Make a method of Driver deadly; of an attach with a hook the last commit counts."""
    when, _, name = stage.partition(":")
    method: Callable[..., Any] = getattr(Driver, name)

    def deadly(self: Driver, *args: Any) -> Any:
        wanted = name != "commit" or len(args[1]) > 1
        if wanted and when == "before":
            die()
        result = method(self, *args)
        if wanted and when == "after":
            die()
        return result

    setattr(Driver, name, deadly)


def main(lab: str, stage: str, *points: str) -> None:
    tactics: tuple[str, ...] | None
    if ":" in stage:
        arm(stage)
    with kernweave.connect(f"lab:{lab}") as session:
        # so many traps, or grace periods, would take a minute
        tactics = ("nop5", "jmp32") if len(points) > 100 else None
        if stage == "groups":
            tactics = ("group",)
        hits = session.count(*points, partial=True, tactics=tactics, engine="splice")
        print("attached", flush=True)
        if stage in ("never", "groups"):
            sys.stdin.read()
        if stage == "work":
            session._link.exec_start([program("mixed"), "50"])
            die()
        hits.detach()
        print("detached", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
