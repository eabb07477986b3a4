# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel text compared across boots: what KASLR moves and the kernel itself patches left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.image.sites import Sites
from kernweave.x86.decode import Decoded, Trait
from kernweave.x86.shape import read_signed

Rows = npt.NDArray[np.int64]

_PATCH_BYTES = 5  # of a call or jump; a jump label may be 2, then its neighbour is compared less
_WIDE = 8  # bytes of the longest immediates
_IMAGE_SPAN = 64 << 20
_MAP_START = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: physical addresses are relative to it
_LINK_BASE = 0xFFFF_FFFF_8100_0000  # where the kernel is when KASLR is off
_LOW_END = 1 << 32


@dataclass(frozen=True)
class Print:
    """A kernel's text as it was analysed, with what may differ at another boot.

    Attributes:
        text: uint8[bytes], zero where the kernel may patch it.
        patched: int32[p], byte positions of what is zero.
        absolute: int32[a], byte positions of operands that may hold an address.
        size: uint8[a], bytes of each: 4 or 8.
        sign: int8[a], 1 if the kernel's base is added to it, -1 if it is subtracted.
    """

    text: npt.NDArray[np.uint8]
    patched: npt.NDArray[np.int32]
    absolute: npt.NDArray[np.int32]
    size: npt.NDArray[np.uint8]
    sign: npt.NDArray[np.int8]


def make_print(text: bytes, base: int, decoded: Decoded, sites: Sites) -> Print:
    """Find what may differ in `text`, which starts at run-time address `base`."""
    positions = [_operands(text, base, decoded, kind) for kind in ("disp", "imm")]
    absolute, size, sign = (np.concatenate(column) for column in zip(*positions, strict=True))
    order = np.argsort(absolute, kind="stable")
    patched = _patched(len(text), base, decoded, sites, absolute)
    plain = np.frombuffer(text, np.uint8).copy()
    plain[patched] = 0
    return Print(
        text=plain,
        patched=patched.astype(np.int32),
        absolute=absolute[order].astype(np.int32),
        size=size[order].astype(np.uint8),
        sign=sign[order].astype(np.int8),
    )


def _operands(text: bytes, base: int, decoded: Decoded, kind: str) -> tuple[Rows, Rows, Rows]:
    """Position, size and sign of the operands of one kind that may hold an address."""
    at, size = getattr(decoded, kind), getattr(decoded, f"{kind}_size")
    rows = np.flatnonzero((at > 0) & (size >= 4) & (decoded.target == 0))
    position = (decoded.addr[rows] - np.uint64(base)).astype(np.int64) + at[rows]
    value = read_signed(text, position, size[rows]).view(np.uint64)
    relative = (kind == "disp") & ((decoded.trait[rows] & Trait.RIP) != 0)
    place = decoded.addr[rows] + decoded.length[rows].astype(np.uint64) + value
    # an offset into the per-CPU area, seen from code that moves
    moves_away = relative & (place < np.uint64(_LOW_END))
    physical = base - _MAP_START
    slide = value == np.uint64(base - _LINK_BASE) if base != _LINK_BASE else False
    moves_along = ~relative & (_between(value, base) | _between(value, physical) | slide)
    chosen = moves_away | moves_along
    sign = np.where(moves_away, -1, 1)[chosen]
    return position[chosen], size[rows][chosen].astype(np.int64), sign


def _between(value: npt.NDArray[np.uint64], start: int) -> npt.NDArray[np.bool_]:
    return np.asarray(value - np.uint64(start % (1 << 64)) < np.uint64(_IMAGE_SPAN))


def _patched(count: int, base: int, decoded: Decoded, sites: Sites, absolute: Rows) -> Rows:
    """Byte positions that the kernel may rewrite while it runs, or at boot.

    Wide immediates are among them, but for addresses in the image: what they hold is data, and at
    each boot another one where the kernel writes where its tables are (runtime constants).
    """
    calls = sites.static_calls, sites.tracer_calls
    tables = np.concatenate((sites.ftrace, sites.jump_labels, *calls))
    spread = (tables[:, None] + np.arange(_PATCH_BYTES, dtype=np.uint64)).ravel()
    locks = decoded.addr[(decoded.trait & Trait.LOCK) != 0]
    wide = np.flatnonzero(decoded.imm_size == _WIDE)
    wide_at = decoded.addr[wide] + decoded.imm[wide].astype(np.uint64)
    wide_at = wide_at[~np.isin(wide_at, np.uint64(base) + absolute.astype(np.uint64))]
    words = (wide_at[:, None] + np.arange(_WIDE, dtype=np.uint64)).ravel()
    others = [
        np.arange(start, end, dtype=np.uint64)
        for start, end in (*sites.static_text, *sites.other_modes)
    ]
    addrs = np.concatenate((spread, locks, words, *others))
    inside = (addrs >= np.uint64(base)) & (addrs < np.uint64(base + count))
    found = np.zeros(count, bool)
    found[(addrs[inside] - np.uint64(base)).astype(np.int64)] = True
    return np.flatnonzero(found)


def differing(known: Print, text: bytes, slide: int) -> Rows:
    """Byte positions where `text` is another code than what was analysed, ascending.

    Args:
        known: the text analysed.
        text: native text of the same length, as it is now.
        slide: how much higher its base is than that of the text analysed.
    """
    now = np.frombuffer(text, np.uint8).copy()
    now[known.patched] = 0
    for size in (4, 8):
        _take_back_slide(known, now, size, slide)
    return np.flatnonzero(now != known.text)


def _take_back_slide(known: Print, now: npt.NDArray[np.uint8], size: int, slide: int) -> None:
    """Replace operands that moved, or stayed, as they should by those that were analysed."""
    chosen = known.size == size
    position = known.absolute[chosen].astype(np.int64)
    if not len(position):
        return
    dtype = np.dtype(f"<u{size}")
    then, current = (_fields(array, position, dtype) for array in (known.text, now))
    delta = np.array([-slide % (1 << 8 * size), slide % (1 << 8 * size)], dtype)
    moved = then + delta[(known.sign[chosen] > 0).astype(np.intp)]
    right = position[(current == moved) | (current == then)]
    for byte in range(size):
        now[right + byte] = known.text[right + byte]


def _fields(
    array: npt.NDArray[np.uint8], position: Rows, dtype: np.dtype[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    count = len(array) - dtype.itemsize + 1
    return np.ndarray((count,), dtype, np.ascontiguousarray(array).data, strides=(1,))[position]
