# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: one file per command; the only place that prints."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its status."""
    from kernweave.cli.main import run

    run()
