# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code to columns: lengths, flow, targets, registers and flags read and written.

Lengths come from the decoder, one instruction after the other; all else is looked up.  What an
instruction does depends on its *shape*: its bytes without displacement and immediate.  A kernel
has millions of instructions and some ten thousand shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import iced_x86 as iced
import numpy as np
import numpy.typing as npt

from kernweave.x86.effect import (
    ALL_MASK,
    FLAG_NAMES,
    FLAGS_MASK,
    FLAGS_SHIFT,
    REG_NAMES,
    REGS_MASK,
    Effect,
    Flow,
    Trait,
    effect_of,
)
from kernweave.x86.shape import distinct, read_signed, shapes, words

__all__ = [
    "ALL_MASK", "FLAGS_MASK", "FLAGS_SHIFT", "FLAG_NAMES", "REGS_MASK", "REG_NAMES",
    "Decoded", "Flow", "Trait", "decode",
]  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """Instructions of some stretches of text, each in address order.

    Attributes:
        stretch: int32[n], which of the stretches.
        addr: uint64[n], run-time address.
        length: uint8[n].
        flow: uint8[n], `Flow`.
        trait: uint16[n], `Trait`.
        reads: uint32[n], mask of registers and flags read.
        writes: uint32[n], mask of registers and flags overwritten whatever happens.
        target: uint64[n], run-time address of a direct branch or call, else 0.
        disp: uint8[n], where in the instruction a memory operand's displacement is, 0: none.
        disp_size: uint8[n], its bytes.
        imm: uint8[n], where the last immediate or the branch displacement is, 0: none.
        imm_size: uint8[n], its bytes.
        operands: uint64[k], addresses in the kernel's half that displacements and immediates
            name, branch targets apart.
    """

    stretch: npt.NDArray[np.int32]
    addr: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint8]
    flow: npt.NDArray[np.uint8]
    trait: npt.NDArray[np.uint16]
    reads: npt.NDArray[np.uint32]
    writes: npt.NDArray[np.uint32]
    target: npt.NDArray[np.uint64]
    disp: npt.NDArray[np.uint8]
    disp_size: npt.NDArray[np.uint8]
    imm: npt.NDArray[np.uint8]
    imm_size: npt.NDArray[np.uint8]
    operands: npt.NDArray[np.uint64]


_KERNEL_HALF = 0xFFFF_8000_0000_0000
_TARGETED = (Flow.JUMP, Flow.BRANCH, Flow.CALL)
_length = attrgetter("len")

#: shapes seen before: their bytes to what they do
_known: dict[bytes, Effect] = {}


def _effect(code: bytes) -> Effect:
    found = _known.get(code)
    if found is None:
        found = _known[code] = effect_of(code)
    return found


def decode(stretches: Iterable[tuple[int, bytes]]) -> Decoded:
    """Decode stretches of text linearly.

    Args:
        stretches: (run-time address, bytes) of each; undecodable bytes become an `INVALID`
            instruction.
    """
    starts: list[int] = []
    texts: list[bytes] = []
    lengths = bytearray()
    firsts: list[int] = []
    for start, code in stretches:
        starts.append(start)
        texts.append(code)
        firsts.append(len(lengths))
        lengths.extend(map(_length, iced.Decoder(64, code)))
    first = np.array([*firsts, len(lengths)], np.int64)
    length = np.frombuffer(lengths, np.uint8)
    return _columns(b"".join(texts), np.array(starts, np.uint64), first, length)


def _columns(
    text: bytes,
    starts: npt.NDArray[np.uint64],
    first: npt.NDArray[np.int64],
    length: npt.NDArray[np.uint8],
) -> Decoded:
    """Look every instruction up; they fill the text from end to end."""
    stretch = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(first))
    at = np.cumsum(length, dtype=np.int64) - length
    shift = starts - np.append(at, 0)[first[:-1]].astype(np.uint64)
    addr = at.astype(np.uint64) + shift[stretch]
    low, high = words(text, at, length)
    rows, kind = distinct(low, high, length)
    known, known_kind = shapes(low[rows], high[rows], length[rows])
    table = np.array([_effect(code) for code in known], np.uint32).reshape(-1, 8)
    kind = known_kind[kind]
    flow, *place = (table[:, i].astype(np.uint8)[kind] for i in (0, 4, 5, 6, 7))
    direct = np.flatnonzero(np.isin(flow, _TARGETED) & (place[3] > 0))
    target = np.zeros(len(addr), np.uint64)
    distance = read_signed(text, at[direct] + place[2][direct], place[3][direct])
    following = addr + length.astype(np.uint64)
    target[direct] = following[direct] + distance.view(np.uint64)
    trait = table[:, 1].astype(np.uint16)[kind]
    base = np.where(trait & Trait.RIP, following, np.uint64(0))
    operands = [
        _addresses(text, at + place[0], place[1], base),
        _addresses(text, at + place[2], np.where(target, 0, place[3]).astype(np.uint8), 0 * base),
    ]
    return Decoded(
        stretch=stretch,
        addr=addr,
        length=length,
        flow=flow,
        trait=trait,
        reads=np.ascontiguousarray(table[:, 2])[kind],
        writes=np.ascontiguousarray(table[:, 3])[kind],
        target=target,
        disp=place[0],
        disp_size=place[1],
        imm=place[2],
        imm_size=place[3],
        operands=np.concatenate(operands),
    )


def _addresses(
    text: bytes,
    at: npt.NDArray[np.int64],
    size: npt.NDArray[np.uint8],
    base: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """What fields of at least four bytes hold, if it is an address of the kernel."""
    rows = np.flatnonzero(size >= 4)
    value = base[rows] + read_signed(text, at[rows], size[rows]).view(np.uint64)
    return value[value >= np.uint64(_KERNEL_HALF)]
