# SPDX-License-Identifier: GPL-2.0-or-later
"""An image's symbols and text to the parts that are analysed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Part
from kernweave.image.sites import Sites, contains
from kernweave.image.symbols import Symbols

COLD = ".cold"
_KEPT_FILLER = 16
_ENDBR_BYTES = 4


def trim(text: bytes) -> bytes:
    """Text without most of the int3 filler at its end."""
    return text[: len(text.rstrip(b"\xcc")) + _KEPT_FILLER]


def make_parts(image: Symbols, base: int, text: bytes, sites: Sites) -> list[Part]:
    """All functions of an image, ascending by address; parts are called by their symbols.

    What is not 64-bit code has no bytes.

    Args:
        image: its symbols.
        base: run-time address of the first byte of `text`.
        text: its native text.
        sites: for the ftrace sites.
    """
    starts = np.array(image.starts, np.uint64)
    ftraced = _has_ftrace(starts, sites)
    ends = [*image.starts[1:], image.end]
    other_modes = {start for start, _ in sites.other_modes}
    is_c = dict(zip(image.starts, ftraced.tolist(), strict=True))
    parts = []
    for start, end in zip(image.starts, ends, strict=True):
        name = image.name_at[start]
        home = home_of(image, name, start)
        code = b"" if start in other_modes else trim(text[start - base : end - base])
        parts.append(Part(name, name, image.kmod, start, code, home, is_c[home]))
    return parts


def _has_ftrace(starts: npt.NDArray[np.uint64], sites: Sites) -> npt.NDArray[np.bool_]:
    behind = starts + np.uint64(_ENDBR_BYTES)
    return np.asarray(contains(sites.ftrace, starts) | contains(sites.ftrace, behind))


def home_of(image: Symbols, name: str, start: int) -> int:
    """The function a part belongs to: of several of that name the nearest one.

    The linker puts the cold parts of one file in the order of the functions, so this is a guess
    only among functions of one name.
    """
    if not name.endswith(COLD):
        return start
    found, colds = image.find(name.removesuffix(COLD)), image.find(name)
    if not found:
        return start
    return found[colds.index(start)] if len(found) == len(colds) else found[0]
