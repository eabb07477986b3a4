# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout of C sources: what can be seen without a compiler and without checkpatch."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

COLUMNS = 100
TAB = 8

RULES = (
    (re.compile(r"[ \t\r]+$"), "trailing blank"),
    (re.compile(r"^\t* {8}"), "indented with blanks, not tabs"),
    (re.compile(r" \t"), "blank before a tab"),
    (re.compile(r"^\s*//(?! SPDX)"), "// comment, use /* */"),
)


def faults(text: str) -> Iterator[tuple[int, str]]:
    """Give (line number, what is wrong) for one file's text."""
    lines = text.split("\n")
    if "SPDX-License-Identifier: GPL-2.0" not in lines[0]:
        yield 1, "no SPDX line"
    for number, line in enumerate(lines, start=1):
        for pattern, what in RULES:
            if pattern.search(line):
                yield number, what
        width = len(line.expandtabs(TAB))
        if width > COLUMNS:
            yield number, f"{width} columns, at most {COLUMNS}"
    if lines[-1] != "" or lines[-2:] == ["", ""]:
        yield len(lines), "does not end with exactly one newline"


def file_faults(folders: Iterable[Path]) -> list[str]:
    """Return one line per fault in all C files of the folders."""
    files = sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".c", ".h")
    )
    return [f"{path}:{line}: {what}" for path in files for line, what in faults(path.read_text())]


if __name__ == "__main__":
    found = file_faults(map(Path, sys.argv[1:]))
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    sys.exit(1 if found else 0)
