# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave lab`: boot, use and end the throw-away machines."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

import click

from kernweave.cli.output import print_json, print_table, print_warning, progress
from kernweave.cli.terminal import run_piped, run_terminal
from kernweave.errors import UsageError
from kernweave.lab.machine import Lab, Status
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.lab.state import lab_names
from kernweave.session.target import boot_lab, lab_name

_FOLLOW_S = 0.1
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
_named = click.argument("name", required=False)


@click.group()
def lab() -> None:
    """Boot, use and end the throw-away machines.

    \b
    Examples:
      kernweave lab up
      kernweave lab up --kernel 6.12
      kernweave lab shell
      kernweave lab exec -- uname -a
      kernweave lab down
    """  # noqa: D301


def _name(obj: dict[str, Any], name: str | None) -> str:
    return name or lab_name(obj["target"])


@lab.command()
@_named
@click.option("--kernel", type=click.Choice(KERNEL_SERIES), help="Series of the stock kernel.")
@_json
@click.pass_obj
def up(obj: dict[str, Any], name: str | None, kernel: str | None, as_json: bool) -> None:
    """Boot the lab unless it runs; NAME defaults to the kernel."""
    began = time.monotonic()
    machine = boot_lab(name or kernel or lab_name(obj["target"]), progress, kernel)
    found = machine.status()
    state = found.state
    assert state is not None
    if state.no_driver is not None:
        print_warning(state.no_driver)
    if as_json:
        _print_status(found)
    else:
        print(f"lab {machine.name}: Linux {state.kernel}, up in {time.monotonic() - began:.1f} s")


@lab.command()
@_named
@_json
@click.pass_obj
def down(obj: dict[str, Any], name: str | None, as_json: bool) -> None:
    """Power the lab off at once."""
    machine = Lab(_name(obj, name))
    ran = machine.down()
    if as_json:
        print_json({"schema": "kernweave.lab_down/1", "name": machine.name, "ran": ran})
    else:
        print(f"lab {machine.name}: {'down' if ran else 'was not running'}")


@lab.command()
@_named
@_json
def status(name: str | None, as_json: bool) -> None:
    """Tell whether the lab runs; without NAME, tell of all labs."""
    found = [Lab(one).status() for one in ([name] if name else lab_names())]
    if as_json:
        for one in found:
            _print_status(one)
    elif name:
        print(_sentence(found[0]))
    elif found:
        print_table(
            ("lab", "kernel", "pid", "sessions", "up (s)", "driver"),
            [_status_row(one) for one in found],
            (False, False, True, True, True, False),
        )
    else:
        print("no lab is running")


def _sentence(found: Status) -> str:
    state = found.state
    if not found.running or state is None:
        return f"lab {found.name}: not running"
    return (
        f"lab {found.name}: Linux {state.kernel} in QEMU {state.qemu} ({state.accel}), "
        f"pid {state.pid}\n{found.sessions} sessions, up {_age_s(found):.0f} s, "
        f"{f'no driver: {state.no_driver}' if state.no_driver else 'driver loaded'}"
    )


def _status_row(found: Status) -> tuple[str, ...]:
    state = found.state
    if not found.running or state is None:
        return (found.name, "not running", "", "", "", "")
    driver = "no" if state.no_driver else "yes"
    age = f"{_age_s(found):.0f}"
    return (found.name, state.kernel, str(state.pid), str(found.sessions), age, driver)


def _age_s(found: Status) -> float:
    return time.time() - ((found.state.booted_at if found.state else None) or time.time())


def _print_status(found: Status) -> None:
    state = found.state if found.running else None
    print_json(
        {
            "schema": "kernweave.lab/1",
            "name": found.name,
            "running": found.running,
            "kernel": state.kernel if state else None,
            "qemu": state.qemu if state else None,
            "pid": state.pid if state else None,
            "sessions": found.sessions,
            "series": state.series if state else None,
            "accel": state.accel if state else None,
            "driver": state.no_driver is None if state else None,
            "no_driver": state.no_driver if state else None,
            "boot_seconds": state.boot_seconds if state else None,
        }
    )


@lab.command()
@_json
def kernels(as_json: bool) -> None:
    """List the stock kernels, and which are fetched already."""
    found = [(series, fetched_kernel(series)) for series in KERNEL_SERIES]
    if as_json:
        for series, kernel in found:
            print_json(
                {
                    "schema": "kernweave.kernel/1",
                    "series": series,
                    "fetched": kernel is not None,
                    "release": kernel.release if kernel else None,
                    "package_version": kernel.version if kernel else None,
                }
            )
        return
    rows = [
        (series, kernel.release, kernel.version, "yes") if kernel else (series, "", "", "no")
        for series, kernel in found
    ]
    print_table(("series", "release", "package version", "fetched"), rows, (False,) * 4)


@lab.command(name="exec")
@_named
@click.pass_obj
def exec_(obj: dict[str, Any], name: str | None) -> int:
    """Run a command in the lab: kernweave lab exec -- CMD..."""
    if not obj["command"]:
        raise UsageError("no command given", help="kernweave lab exec -- uname -a")
    with boot_lab(_name(obj, name), progress).connect() as link:
        return run_piped(link, obj["command"], stdin=False)


@lab.command()
@_named
@click.pass_obj
def shell(obj: dict[str, Any], name: str | None) -> int:
    """Work in the lab: a shell at this terminal, or one that reads commands from stdin."""
    program = shutil.which("bash") or "sh"
    with boot_lab(_name(obj, name), progress).connect() as link:
        if os.isatty(0):
            return run_terminal(link, [program, "-i"])
        return run_piped(link, [program, "-s"], stdin=True)


@lab.command()
@_named
@click.option("-f", "--follow", is_flag=True, help="Go on until the lab ends.")
@_json
@click.pass_obj
def log(obj: dict[str, Any], name: str | None, follow: bool, as_json: bool) -> None:
    """Print the lab's console, the kernel log included."""
    machine = Lab(_name(obj, name))
    shown, alive = 0, True
    while alive:
        alive = follow and machine.running()
        text = machine.log()
        end = len(text) if not alive else text.rfind("\n") + 1  # whole lines, but for the last
        if as_json:
            for line in text[shown:end].splitlines():
                print_json({"schema": "kernweave.log/1", "line": line})
        else:
            sys.stdout.write(text[shown:end])
        sys.stdout.flush()
        shown = max(shown, end)
        if alive:
            time.sleep(_FOLLOW_S)
