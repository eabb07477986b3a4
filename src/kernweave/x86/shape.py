# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions without what their effect does not depend on: displacements and immediates.

References:
    SDM volume 2, 2.1 (instruction format) and appendix A (opcode maps)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

FILL = 0x11  # stands for every byte left out: no special value of any instruction
_MAX_BYTES = 15
_MASKS = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)
_SLOT_BITS = 22
_FACTORS = tuple(np.uint64(f) for f in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))


def words(text: bytes, at: Rows, length: U8) -> tuple[U64, U64]:
    """Bytes 0..7 and 8..15 of each instruction as numbers, zeros behind its end."""
    padded = text + bytes(16)
    views = [
        np.ndarray((len(text) + 1,), np.dtype("<u8"), padded, offset=off, strides=(1,))
        for off in (0, 8)
    ]
    low = views[0][at]
    low &= _MASKS[np.minimum(length, 8)]
    high = np.zeros(len(low), np.uint64)
    long = np.flatnonzero(length > 8)
    high[long] = views[1][at[long]] & _MASKS[length[long] - 8]
    return low, high


def distinct(low: U64, high: U64, length: U8) -> tuple[Rows, npt.NDArray[np.int32]]:
    """Rows of one representative of each distinct instruction, and which one each row equals.

    Exact: the hash only proposes a representative, the bytes are compared.
    """
    kind = np.empty(len(low), np.int32)
    chosen: list[Rows] = []
    count = 0
    left = np.arange(len(low))
    slots = np.empty(1 << _SLOT_BITS, np.int64)
    for turn in range(64):
        a, b, size = (low, high, length) if turn == 0 else (low[left], high[left], length[left])
        factor = _FACTORS[turn % 3] + np.uint64(2 * turn)
        key = (a ^ (b * _FACTORS[(turn + 1) % 3]) ^ size) * factor
        slot = (key >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        slots[slot] = np.arange(len(left))  # of several the last one stays
        first = slots[slot]
        same = (a[first] == a) & (b[first] == b) & (size[first] == size)
        own = np.flatnonzero(first == np.arange(len(left)))
        number = np.empty(len(left), np.int32)
        number[own] = np.arange(count, count + len(own))
        kind[left[same]] = number[first[same]]
        chosen.append(left[own])
        count += len(own)
        left = left[~same]
        if not len(left):
            break
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64), kind


def shapes(low: U64, high: U64, length: U8) -> tuple[list[bytes], npt.NDArray[np.int32]]:
    """The distinct shapes of some instructions as bytes, and which one each of them has."""
    count = len(low)
    code = np.empty((count, 16), np.uint8)
    code[:, :8] = low.view(np.uint8).reshape(-1, 8)
    code[:, 8:] = high.view(np.uint8).reshape(-1, 8)
    start, end = _left_out(code, length)
    columns = np.arange(16)
    fill = (columns >= start[:, None]) & (columns < end[:, None])
    code[fill] = FILL
    masked = code.view(np.uint64)
    rows, kind = distinct(
        np.ascontiguousarray(masked[:, 0]), np.ascontiguousarray(masked[:, 1]), length
    )
    sizes = length[rows].tolist()
    lines = code[rows].tobytes()
    return [lines[16 * i : 16 * i + size] for i, size in enumerate(sizes)], kind


def _left_out(code: U8, length: U8) -> tuple[Rows, Rows]:
    """Which bytes of each row do not matter: [start, end).

    They are adjacent: a displacement, and the immediate behind it, unless that is a shift count
    (a shift by zero leaves the flags alone) or an opcode (3DNow!).
    """
    rows = np.arange(len(code))
    at = np.zeros(len(code), np.int64)
    for _ in range(_MAX_BYTES - 1):
        prefix = _PREFIX[code[rows, at]] & (at < length - 1)
        if not prefix.any():
            break
        at += prefix
    first = code[rows, at]
    second = np.where(first == 0x0F, code[rows, np.minimum(at + 1, 15)], 0)
    escaped, three = first == 0x0F, np.isin(second, (0x38, 0x3A))
    modrm_follows = np.where(escaped, _MODRM_0F[second], _MODRM[first])
    unknown = _VECTOR[first]
    at = np.minimum(at + 1 + escaped + (escaped & three), 15)
    disp_at, disp_size = _displacement(code, rows, at)
    start = np.where(modrm_follows, disp_at, at)
    end = np.where(modrm_follows, disp_at + disp_size, at)
    matters = np.where(escaped, _IMM_MATTERS_0F[second], _IMM_MATTERS[first])
    end = np.where(matters, end, length)
    nothing = unknown | (end > length)
    return np.where(nothing, 0, start), np.where(nothing, 0, end)


def _displacement(code: U8, rows: Rows, at: Rows) -> tuple[Rows, Rows]:
    """Where the displacement behind a ModRM byte at `at` starts, and its size."""
    modrm = code[rows, at]
    mod, rm = modrm >> 6, modrm & 7
    sib = (mod != 3) & (rm == 4)
    base = code[rows, np.minimum(at + 1, 15)] & 7
    none = (mod == 0) & ((rm == 5) | (sib & (base == 5)))
    size = np.where(mod == 1, 1, np.where((mod == 2) | none, 4, 0))
    return at + 1 + sib, size


def _table(*values: int | range) -> npt.NDArray[np.bool_]:
    table = np.zeros(256, bool)
    for value in values:
        table[list(value) if isinstance(value, range) else value] = True
    return table


_PREFIX = _table(0x26, 0x2E, 0x36, 0x3E, range(0x40, 0x50), range(0x64, 0x68), 0xF0, 0xF2, 0xF3)
_VECTOR = _table(0x62, 0xC4, 0xC5, 0x8F)  # EVEX, VEX, and pop r/m, which XOP shares
#: one-byte opcodes with a ModRM byte
_MODRM = _table(
    *(range(row, row + 4) for row in range(0, 0x40, 8)),
    0x63, 0x69, 0x6B, range(0x80, 0x90), 0xC0, 0xC1, 0xC6, 0xC7, range(0xD0, 0xD4),
    range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF,
)  # fmt: skip
#: opcodes behind 0f without one
_MODRM_0F = ~_table(
    range(0x05, 0x0A), 0x0B, 0x0E, range(0x30, 0x38), 0x77, range(0x80, 0x90), 0xA0, 0xA1, 0xA2,
    0xA8, 0xA9, 0xAA, range(0xC8, 0xD0),
)  # fmt: skip
_IMM_MATTERS = _table(0xC0, 0xC1)
_IMM_MATTERS_0F = _table(0x0F, 0xA4, 0xAC)


def read_signed(text: bytes, at: Rows, size: U8) -> npt.NDArray[np.int64]:
    """Signed little-endian numbers of 1, 2, 4 or 8 bytes at byte positions of `text`."""
    padded = text + bytes(8)
    view = np.ndarray((len(text) + 1,), np.dtype("<i8"), padded, strides=(1,))
    unused = (64 - 8 * size.astype(np.int64)).clip(0, 63)
    return np.asarray((view[at] << unused) >> unused, np.int64)
