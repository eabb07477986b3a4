# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of machine code written to many places at once, each byte exactly.

A piece of any size is two overlapping words, or several: so there is one vector write per word, not
one per byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64] | npt.NDArray[np.int32]

#: (least size, bytes of a word): pieces of that size and up to twice as much are two words
_WORDS = ((8, 8), (4, 4), (2, 2), (1, 1))
_MOST_BYTES = 16


def view_words(data: U8, width: int) -> npt.NDArray[np.unsignedinteger]:
    """Words of `width` bytes at every byte position; writes go to `data`."""
    count = max(len(data) - width + 1, 0)
    return np.ndarray((count,), np.dtype(f"<u{width}"), data.data, strides=(1,))


def copy_bytes(out: U8, to: Rows, text: U8, at: Rows, size: U8) -> None:
    """Copy pieces of `text` to places in `out` that do not overlap.

    Args:
        out: written.
        to: int[n], byte positions in `out`.
        text: read.
        at: int[n], byte positions in `text`.
        size: uint8[n], bytes of each piece, 1 to 16.
    """
    above = _MOST_BYTES + 1
    for least, width in _WORDS:
        rows = np.flatnonzero((size >= least) & (size < above))
        above = least
        if not len(rows):
            continue
        source, target = view_words(text, width), view_words(out, width)
        here, there, rest = at[rows], to[rows], size[rows] - np.uint8(width)
        target[there] = source[here]
        target[there + rest] = source[here + rest]


def write_pieces(out: U8, to: Rows, pieces: U8) -> None:
    """Write pieces of one size.

    Args:
        out: written.
        to: int[n], byte positions.
        pieces: uint8[n, size], size at least 1.
    """
    size = pieces.shape[1]
    width = next(width for least, width in _WORDS if size >= least)
    target = view_words(out, width)
    for at in {*range(0, size - width + 1, width), size - width}:
        part = np.ascontiguousarray(pieces[:, at : at + width])
        target[to + at] = part.view(f"<u{width}")[:, 0]


def write_numbers(out: U8, to: Rows, values: npt.NDArray[np.integer]) -> None:
    """Write little-endian numbers of the size of their type."""
    width = values.dtype.itemsize
    view_words(out, width)[to] = values.view(f"u{width}")
