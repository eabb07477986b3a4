# SPDX-License-Identifier: GPL-2.0-or-later
"""A client to be killed: `python client.py TARGET POINT...` attaches, says so, waits."""

from __future__ import annotations

import sys

import kernweave


def main() -> None:
    """Hold an attachment until standard input ends, which a killed client does not see."""
    target, *points = sys.argv[1:]
    with kernweave.connect(target) as k, k.count(*points, tactics=["nop5", "jmp32"]):
        print("attached", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
