# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans: what is going to be written, as values that can be printed and compared."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kernweave.errors import Reason
from kernweave.model.point import Kind


class Tactic(StrEnum):
    """How a site is spliced; in the order in which they are tried."""

    NOP5 = "nop5"
    JMP32 = "jmp32"
    INT3 = "int3"


@dataclass(frozen=True, slots=True)
class Point:
    """One point after expansion.

    Attributes:
        text: printed form, accepted as input.
        function: symbol of the function part.
        kmod: kmod's name, None for the kernel.
        offset: bytes from the part's symbol.
        addr: run-time address.
        kind: what it is.
    """

    text: str
    function: str
    kmod: str | None
    offset: int
    addr: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Refused:
    """A point that is not placed, and why."""

    point: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Plan:
    """Everything a commit needs, for code that starts at `base`.

    Sites of `int3` come last and need no code: the kernel's kprobes count there.

    Attributes:
        base: run-time address of `code`.
        code: trampolines, one after the other.
        addr: uint64[n], sites; those with a jump ascend, and so do those with a trap.
        old: uint8[n, 5], bytes expected there.
        new: uint8[n, 5], bytes to be written.
        rest: n times the native bytes behind the first five of a longer instruction; they are
            dead while the jump is in, and become int3.
        tactic: n tactics.
        spills: n tuples of what the counter has to save.
        copy: uint64[n], run-time address of the displaced instruction's copy; 0 if there is none.
        counter: int32[n], number of the site's counter.
    """

    base: int
    code: bytes
    addr: npt.NDArray[np.uint64]
    old: npt.NDArray[np.uint8]
    new: npt.NDArray[np.uint8]
    rest: tuple[bytes, ...]
    tactic: tuple[Tactic, ...]
    spills: tuple[tuple[str, ...], ...]
    copy: npt.NDArray[np.uint64]
    counter: npt.NDArray[np.int32]

    @property
    def jumps(self) -> int:
        """Number of sites with a jump; the others trap."""
        return len(self.tactic) - self.tactic.count(Tactic.INT3)
