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
from kernweave.weave.mapfile import Names, load_all, load_names, names_clones
from kernweave.weave.mapfile import symbolize as translate


@click.command()
@click.argument("files", nargs=-1, type=click.File(errors="replace"), metavar="[FILE]...")
def symbolize(files: tuple[TextIO, ...]) -> None:
    """Print traces with native places instead of those in clones; of FILEs or standard input.

    Traces are what the kernel prints, or `perf script`; the last eight generations are known.

    \b
    Examples:
      perf script | kernweave symbolize
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

    @cache
    def known() -> list[Names]:
        return load_all(folder)

    left = 0
    for file in files or (sys.stdin,):
        for line in file:
            native = translate(line, find, known)
            sys.stdout.write(native)
            left += names_clones(native)
    if unknown:
        listed = ", ".join(sorted(unknown, key=lambda name: int(re.sub(r"\D", "", name))))
        print_warning(f"nothing is known of {listed} any more", help=None)
    elif left:
        print_warning(f"{left:,} lines name places in clones that are not known", help=None)
