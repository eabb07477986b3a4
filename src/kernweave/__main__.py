# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m kernweave` is the command line."""

from kernweave.cli import main

main()
