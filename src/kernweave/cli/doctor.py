# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave doctor`: is everything there, and what to do if not."""

from __future__ import annotations

import click

from kernweave.cli.output import print_json
from kernweave.lab.doctor import checks

DOCTOR_SCHEMA = "kernweave.doctor/1"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def doctor(as_json: bool) -> int:
    """Check every precondition; one line each, with the command that mends it."""
    found = checks()
    for check in found:
        if as_json:
            print_json(
                {
                    "schema": DOCTOR_SCHEMA,
                    "check": check.check,
                    "status": check.status,
                    "detail": check.detail,
                    "command": check.command,
                }
            )
        else:
            print(f"{check.status:7}  {check.check}: {check.detail}")
            if check.command:
                print(f"         fix: {check.command}")
    return 0 if all(check.status == "ok" for check in found) else 3
