# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave symbolize`: where natively is what a trace says of clones?"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import TextIO

import click

from kernweave.cli.output import print_warning
from kernweave.lab.cache import cache_dir
from kernweave.weave.mapfile import Names, load_names
from kernweave.weave.mapfile import symbolize as translate


@click.command()
@click.argument("files", nargs=-1, type=click.File(errors="replace"), metavar="[FILE]...")
def symbolize(files: tuple[TextIO, ...]) -> None:
    """Print traces with native places instead of those in clones; of FILEs or standard input.

    \b
    Examples:
      kernweave lab log | kernweave symbolize
      kernweave symbolize oops.txt
    """  # noqa: D301
    folder = cache_dir() / "generations"
    unknown: set[str] = set()

    @cache
    def find(kmod: str) -> Names | None:
        names = load_names(folder, kmod)
        if names is None:
            unknown.add(kmod)
        return names

    for file in files or (sys.stdin,):
        for line in file:
            sys.stdout.write(translate(line, find))
    if unknown:
        listed = ", ".join(sorted(unknown, key=lambda name: int(re.sub(r"\D", "", name))))
        print_warning(f"nothing is known of {listed} any more", help=None)
