# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in counter snippet: one read-modify-write on a per-CPU 64-bit counter.

[pushfq]                      if a status flag is live
[push   %scratch]             if no register is dead
movabs $offset,%scratch       per-CPU offset, not an address: migration cannot hurt
incq   %gs:0x0(%scratch)
[pop    %scratch]
[popfq]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from kernweave.x86.decode import FLAGS_MASK, REG_NAMES

#: registers the snippet may use, best first; rsp and r12 would need a longer encoding
SCRATCH_ORDER = tuple(
    REG_NAMES.index(name)
    for name in (
        "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "r13", "r14", "r15", "rbx", "rbp",
    )
)  # fmt: skip

_CARRY = 1 << (16 + 4)
#: `inc` leaves the carry flag alone
CLOBBERED_FLAGS = FLAGS_MASK & ~_CARRY


_PUSH_BYTES, WORD_BYTES = 2, 8
_SCRATCH = sum(1 << register for register in SCRATCH_ORDER)


def saves_nothing(live: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """bool[n]: where a counter saves nothing, from uint32[n] masks of what is live."""
    return np.asarray(((live & CLOBBERED_FLAGS) == 0) & ((live & _SCRATCH) != _SCRATCH))


@dataclass(frozen=True, slots=True)
class Snippet:
    """Machine code with one hole for the counter's per-CPU offset.

    Attributes:
        code: bytes, the hole zero.
        hole: byte position of the 8-byte offset.
        spills: registers and flags saved around it.
        depths: (byte position, bytes it has pushed from there on), ascending.
    """

    code: bytes
    hole: int
    spills: tuple[str, ...]
    depths: tuple[tuple[int, int], ...] = ()


def _rex_wb(register: int) -> int:
    return 0x48 | register >> 3


def _push(register: int) -> bytes:
    return bytes((0x40 | register >> 3, 0x50 | register & 7))


def _pop(register: int) -> bytes:
    return bytes((0x40 | register >> 3, 0x58 | register & 7))


@cache
def counter_snippet(dead: int) -> Snippet:
    """The shortest counter for a place where the registers and flags in `dead` are dead.

    Args:
        dead: mask as in `x86.decode`.
    """
    free = [register for register in SCRATCH_ORDER if dead >> register & 1]
    register = free[0] if free else SCRATCH_ORDER[0]
    movabs = bytes((_rex_wb(register), 0xB8 | register & 7)) + bytes(8)
    inc = bytes((0x65, _rex_wb(register), 0xFF, 0x40 | register & 7, 0x00))
    before, after, spills = b"", b"", []
    if CLOBBERED_FLAGS & ~dead:
        before, after = b"\x9c", b"\x9d"
        spills.append("flags")
    if not free:
        before, after = before + _push(register), _pop(register) + after
        spills.append(REG_NAMES[register])
    code = before + movabs + inc + after
    return Snippet(code, len(before) + 2, tuple(spills), _depths(spills, len(code)))


def _depths(spills: list[str], end: int) -> tuple[tuple[int, int], ...]:
    sizes = [1 if name == "flags" else _PUSH_BYTES for name in spills]
    pushed = [(sum(sizes[: i + 1]), WORD_BYTES * (i + 1)) for i in range(len(sizes))]
    popped = [(end - sum(sizes[:i]), WORD_BYTES * i) for i in reversed(range(len(sizes)))]
    return (*pushed, *popped)


# ---- many at once --------------------------------------------------------------------------------


def _first_free() -> npt.NDArray[np.uint8]:
    """uint8[65536]: by the mask of live registers, the place in SCRATCH_ORDER of the best one."""
    live = np.arange(1 << 16)
    best = np.full(len(live), len(SCRATCH_ORDER), np.uint8)
    for place in reversed(range(len(SCRATCH_ORDER))):
        best[(live >> SCRATCH_ORDER[place] & 1) == 0] = place
    return best


@cache
def _kinds() -> tuple[npt.NDArray[np.uint8], tuple[Snippet, ...]]:
    """What `counter_kinds` looks up: a number by live registers, and all snippets there are."""
    registers = [*(1 << register for register in SCRATCH_ORDER), 0]
    flags = (FLAGS_MASK, 0)
    return _first_free(), tuple(counter_snippet(one | two) for one in registers for two in flags)


def counter_kinds(
    live: npt.NDArray[np.uint32],
) -> tuple[npt.NDArray[np.uint8], tuple[Snippet, ...]]:
    """The shortest counter for each of many places.

    Args:
        live: uint32[n], masks of what is live there.

    Returns:
        uint8[n]: which of the snippets.
    """
    first, snippets = _kinds()
    kind = first[live & np.uint32(0xFFFF)] << 1
    kind |= (live & np.uint32(CLOBBERED_FLAGS)) != 0
    return kind, snippets


def bind_counters(snippet: Snippet, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """uint8[n, size]: one snippet with n per-CPU offsets filled in."""
    code = np.tile(np.frombuffer(snippet.code, np.uint8), (len(offsets), 1))
    number = offsets.astype("<u8").view(np.uint8).reshape(-1, 8)
    code[:, snippet.hole : snippet.hole + 8] = number
    return code
