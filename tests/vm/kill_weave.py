# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that kills itself with SIGKILL at one stage of weaving.

usage: kill_weave.py LAB STAGE POINT...

Stages: `before` or `after`, a method of Driver or Link, and its which call, for instance
after:move:2; when it is armed, what weaving needs of the kernel once is there. `never` says
`woven` and waits for its standard input to end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from kill_client import die

import kernweave
from kernweave.driver.client import Driver
from kernweave.driver.link import Link


def arm(stage: str) -> None:
    """Make one call of a method deadly."""
    when, name, number = stage.split(":")
    owner = Driver if hasattr(Driver, name) else Link
    method: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if when == "before" and calls == int(number):
            die()
        result = method(self, *args)
        if when == "after" and calls == int(number):
            die()
        return result

    setattr(owner, name, deadly)


def main(lab: str, stage: str, *points: str) -> None:
    with kernweave.connect(f"lab:{lab}") as session:
        session.view.refresh()
        session.weaver.prepare()
        if stage != "never":
            arm(stage)
        woven = session.weave(*points, partial=True)
        print("woven", flush=True)
        if stage == "never":
            sys.stdin.read()
        woven.detach()
        print("detached", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
