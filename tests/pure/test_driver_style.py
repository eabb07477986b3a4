# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout gate finds what it is there to find."""

import pytest

from driver_style import faults

GOOD = (
    "// SPDX-License-Identifier: GPL-2.0-or-later\n"
    "/* Words,\n"
    " * and more.\n"
    " */\n"
    "int f(int a,\n"
    "      int b)\n"
    "{\n"
    "\treturn a +\n"
    "\t       b;\n"
    "}\n"
)


def test_faults_in_good_text_are_none() -> None:
    assert list(faults(GOOD)) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("GPL-2.0-or-later", "MIT", (1, "no SPDX line")),
        ("and more.", "and more. ", (3, "trailing blank")),
        ("{\n", "{\r\n", (7, "trailing blank")),
        ("\treturn", "        return", (8, "indented with blanks, not tabs")),
        ("\t       b", "\t \tb", (9, "blank before a tab")),
        ("{\n", "{\n\t// why\n", (8, "// comment, use /* */")),
        ("b;", "b" * 85 + ";", (9, "101 columns, at most 100")),
        ("}\n", "}\n\n", (12, "does not end with exactly one newline")),
        ("}\n", "}", (10, "does not end with exactly one newline")),
    ],
)
def test_faults_name_the_line_and_what_is_wrong(old: str, new: str, found: tuple[int, str]) -> None:
    assert list(faults(GOOD.replace(old, new))) == [found]
