# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave lab`: boot, use and end the throw-away machine."""

from __future__ import annotations

import time
from typing import Any

import click

from kernweave.cli.output import print_json, progress
from kernweave.errors import UsageError
from kernweave.lab.machine import Lab
from kernweave.lab.packages import KERNEL_SERIES
from kernweave.session.session import Session
from kernweave.session.target import boot_lab, lab_name


@click.group()
def lab() -> None:
    """Boot, use and end the throw-away machine.

    \b
    Examples:
      kernweave lab up
      kernweave lab exec -- uname -a
      kernweave lab down
    """  # noqa: D301


def _name(obj: dict[str, Any], name: str | None) -> str:
    return name or lab_name(obj["target"])


@lab.command()
@click.argument("name", required=False)
@click.option("--kernel", type=click.Choice(KERNEL_SERIES), help="Series of the stock kernel.")
@click.pass_obj
def up(obj: dict[str, Any], name: str | None, kernel: str | None) -> None:
    """Boot the lab unless it runs."""
    if kernel not in (None, KERNEL_SERIES[0]):
        raise UsageError(f"kernel {kernel} is not there yet", help="use --kernel 6.1")
    began = time.monotonic()
    machine = boot_lab(_name(obj, name), progress)
    state = machine.status().state
    assert state is not None
    print(f"lab {machine.name}: Linux {state.kernel}, up in {time.monotonic() - began:.1f} s")


@lab.command()
@click.argument("name", required=False)
@click.pass_obj
def down(obj: dict[str, Any], name: str | None) -> None:
    """Power the lab off at once."""
    machine = Lab(_name(obj, name))
    ran = machine.down()
    print(f"lab {machine.name}: {'down' if ran else 'was not running'}")


@lab.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def status(obj: dict[str, Any], name: str | None, as_json: bool) -> None:
    """Tell whether the lab runs."""
    found = Lab(_name(obj, name)).status()
    state = found.state if found.running else None
    if as_json:
        print_json(
            {
                "schema": "kernweave.lab/1",
                "name": found.name,
                "running": found.running,
                "kernel": state.kernel if state else None,
                "qemu": state.qemu if state else None,
                "pid": state.pid if state else None,
                "sessions": found.sessions,
            }
        )
    elif state is None:
        print(f"lab {found.name}: not running")
    else:
        print(f"lab {found.name}: Linux {state.kernel} in QEMU {state.qemu}, pid {state.pid}")
        print(f"{found.sessions} sessions, up {time.time() - (state.booted_at or 0):.0f} s")


@lab.command(name="exec")
@click.argument("name", required=False)
@click.pass_obj
def exec_(obj: dict[str, Any], name: str | None) -> int:
    """Run a command in the lab: kernweave lab exec -- CMD..."""
    if not obj["command"]:
        raise UsageError("no command given", help="kernweave lab exec -- uname -a")
    with Session(f"lab:{_name(obj, name)}", writer=False, progress=progress) as session:
        return session.run(obj["command"]).exit


@lab.command()
@click.argument("name", required=False)
@click.pass_obj
def log(obj: dict[str, Any], name: str | None) -> None:
    """Print the lab's console, the kernel log included."""
    print(Lab(_name(obj, name)).log(), end="")
