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
    GROUP = "group"
    SPRINGBOARD = "springboard"
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
        to_addr: of an edge, run-time address of the instruction it leads to.
    """

    text: str
    function: str
    kmod: str | None
    offset: int
    addr: int
    kind: Kind
    to_addr: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A point that is not placed, and why."""

    point: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Pokes:
    """What is going to be written into text, ascending by address.

    Attributes:
        addr: uint64[k], where.
        old: k times the bytes expected there.
        new: k times the bytes to be written: a jump, and int3 or springboards behind it.
        group: bool[k], replaces several instructions: somebody may be between them.
        host: bool[k], is a springboard, or has some behind its jump.
        keep: bool[k], stays as long as any area has copies.
        stay: bool[k], stays as long as any area has clones.
    """

    addr: npt.NDArray[np.uint64]
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    group: npt.NDArray[np.bool_]
    host: npt.NDArray[np.bool_]
    keep: npt.NDArray[np.bool_]
    stay: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Copies:
    """Copies of instructions that the kernel looks up by their address; ascending by `addr`.

    Attributes:
        addr: uint64[c], run-time address of the copy.
        native: uint64[c], that of the instruction.
    """

    addr: npt.NDArray[np.uint64]
    native: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Plan:
    """Everything a commit needs, for code that starts at `base`.

    Instructions counted by a trap come last and need no code: the kernel's kprobes count there.

    Attributes:
        base: run-time address of `code`.
        code: trampolines, one after the other.
        addr: uint64[n], instructions that are counted; those displaced ascend, and so do those
            with a trap.
        tactic: n tactics.
        spills: n tuples of what the counter has to save.
        copy: uint64[n], run-time address of the displaced instruction's copy; 0 if there is none.
        counter: int32[n], number of each one's counter.
        poke: int32[n], row of `pokes` through which control gets to the counter, -1 for traps.
        pokes: what is written.
        copies: which of the copies may fault or trap.
        trapped: first native byte of each instruction with a trap.
    """

    base: int
    code: bytes
    addr: npt.NDArray[np.uint64]
    tactic: tuple[Tactic, ...]
    spills: tuple[tuple[str, ...], ...]
    copy: npt.NDArray[np.uint64]
    counter: npt.NDArray[np.int32]
    poke: npt.NDArray[np.int32]
    pokes: Pokes
    copies: Copies
    trapped: bytes = b""

    @property
    def jumps(self) -> int:
        """Number of instructions that are displaced; the others trap."""
        return len(self.tactic) - len(self.trapped)
