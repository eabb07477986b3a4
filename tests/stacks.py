# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel prints of stacks, and whether it is what it would have printed natively."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SUFFIX = ".kw"
#: one line of /proc/PID/stack
_LINE = re.compile(r"\[<0>\] ([\w.]+)\+0x([0-9a-f]+)/0x[0-9a-f]+(?: \[(\w+)\])?")
_GENERATION = re.compile(r"kernweave_\d+")


@dataclass(frozen=True)
class Frame:
    """A return address: function, bytes behind its start, kmod or None."""

    function: str
    off: int
    kmod: str | None

    @property
    def woven(self) -> bool:
        """Whether it is one of a clone."""
        return self.kmod is not None and bool(_GENERATION.fullmatch(self.kmod))


#: kmod of clones -> native frame -> its frame in the clone
Clones = Mapping[str, Mapping[Frame, Frame]]


def parse_stack(text: str) -> list[Frame]:
    """Frames of a stack, innermost first.

    Raises:
        ValueError: a line that is none.
    """
    frames = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if not found:
            raise ValueError(f"not a line of a stack: {line!r}")
        frames.append(Frame(found[1], int(found[2], 16), found[3]))
    return frames


def is_right(text: str, native: Sequence[Frame], clones: Clones) -> bool:
    """Whether a stack has the frames it has natively, each of them there or in a clone.

    Args:
        text: what was read.
        native: what was read before anything was woven.
        clones: of all generations there were.
    """
    try:
        frames = parse_stack(text)
    except ValueError:
        return False
    return len(frames) == len(native) and all(
        frame == home or (frame.woven and clones.get(str(frame.kmod), {}).get(home) == frame)
        for frame, home in zip(frames, native, strict=True)
    )
