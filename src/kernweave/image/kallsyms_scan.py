# SPDX-License-Identifier: GPL-2.0-or-later
"""The kallsyms tables of a kernel that does not run: found by their structure, then checked.

Nothing in the file names them. Their order in .rodata:

- before 6.4: offsets, relative_base, num_syms, names, markers, [seqs,] token_table, token_index
- from 6.4: num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs
- newer (seen in 7.2): the same without relative_base, each offset relative to its own place

Each is aligned to 8 bytes in the first two, to 4 in the last.

So (1) find the token tables, 256 strings and the offset of each; (2) find num_syms before names
that those tokens decode, with markers behind that agree; (3) try the places of the offsets.

References:
    404bad70fcf7 ("scripts/kallsyms: change the output order"), a081b5789255 ("kallsyms: Get rid
    of kallsyms relative base")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError
from kernweave.image.kallsyms import (
    Addrs,
    addresses,
    addresses_from_self,
    cut_tokens,
    decode_names,
)

_TOKENS = 256
_INDEX_BYTES = 2 * _TOKENS
_MOST_TOKEN = 512  # KSYM_NAME_LEN: no token is longer than the longest name
_MOST_SYMBOLS = 1 << 22
_MARKED = 256  # one marker per so many symbols
_TYPES = b"aAbBcCdDgGiInNpPrRsStTuUvVwW?"  # letters of nm


@dataclass(frozen=True, slots=True)
class _Names:
    """Where the names are, as offsets in .rodata, how many, and the alignment of all tables."""

    start: int
    end: int
    count: int
    align: int


def find_kallsyms(data: bytes, base: int, text_start: int) -> tuple[Addrs, list[bytes]]:
    """All symbols of a kernel file.

    Args:
        data: bytes of section .rodata.
        base: its link address, a multiple of 8.
        text_start: link address of `_stext`, to check the decoding.

    Returns:
        uint64[n] link addresses, ascending, and n names, each with its type letter in front.

    Raises:
        UnsupportedError: no tables there agree with each other and with `text_start`.
    """
    tried = 0
    for table, index in _token_tables(data):
        tokens = cut_tokens(data[table:index], data[index : index + _INDEX_BYTES])
        for found in _name_tables(data, table, tokens):
            tried += 1
            names = decode_names(data[found.start : found.end], found.count, tokens)
            for addrs in _offset_tables(data, base, found, index + _INDEX_BYTES):
                if _agree(addrs, names, text_start):
                    return addrs, names
    raise UnsupportedError(
        f"no kallsyms tables in {len(data)} bytes of .rodata: {tried} lists of names found, none "
        f"with addresses that put _stext at {text_start:#x}",
        help="use a kernel with CONFIG_KALLSYMS",
    )


def _pad(off: int, align: int) -> int:
    return -(-off // align) * align


# ---- (1) tokens ----------------------------------------------------------------------------------


def _token_tables(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset of token_table, offset of token_index) of everything that looks like them."""
    words = np.frombuffer(data, "<u2", len(data) // 2)
    last = len(words) - _TOKENS
    start = 2 * np.flatnonzero(words[: max(0, last + 1) : 2] == 0)
    for i in range(1, _TOKENS):
        step = words[start + i].astype(np.int32) - words[start + i - 1]
        start = start[(step > 0) & (step <= _MOST_TOKEN)]
    for index in (2 * start).tolist():
        table = _token_table(data, index)
        if table is not None:
            yield table, index


def _token_table(data: bytes, index: int) -> int | None:
    """Offset of the 256 strings that end just before the index, or None."""
    begins = np.frombuffer(data, "<u2", _TOKENS, index).astype(np.int64)
    last = int(begins[-1])
    for table in range(index - last - 1 & ~3, index - last - _MOST_TOKEN - 8, -4):
        if table < 0:
            return None
        tail = data[table + last : index]
        padding = len(tail) - len(tail.rstrip(b"\0"))
        ends = np.frombuffer(data, np.uint8, last, table)[begins[1:] - 1]
        if not ends.any() and 1 <= padding <= 8 and data.count(0, table, index - padding) == 255:
            return table
    return None


# ---- (2) names -----------------------------------------------------------------------------------


def _name_tables(data: bytes, end: int, tokens: list[bytes]) -> Iterator[_Names]:
    """Everything before `end` that is a count, so many names, and markers that agree."""
    typed = np.array([token[:1] in _TYPES and token != b"" for token in tokens])
    letters = np.frombuffer(data, np.uint8)
    for align in (8, 4):
        counts = np.frombuffer(data, f"<u{align}", end // align)
        rows = np.flatnonzero((counts > 0) & (counts < _MOST_SYMBOLS))
        start = align * (rows + 1)
        fits = start + 2 * counts[rows].astype(np.int64) < end
        rows, start = rows[fits], start[fits]
        token = letters[start + 1 + (letters[start] >> 7)]  # of the first name
        good = (letters[start] > 0) & typed[token]
        for at, count in zip(start[good].tolist(), counts[rows[good]].tolist(), strict=True):
            found = _walk(data, _Names(at, end, count, align), typed.tolist())
            if found:
                yield found


def _walk(data: bytes, names: _Names, typed: list[bool]) -> _Names | None:
    """The names with their true end; None if one is impossible or the markers say otherwise."""
    markers = []
    at = names.start
    for row in range(names.count):
        if row % _MARKED == 0:
            markers.append(at - names.start)
        size = data[at]
        at += 1
        if size & 0x80:
            size = (size & 0x7F) | data[at] << 7
            at += 1
        if not size or at + size >= names.end or not typed[data[at]]:
            return None
        at += size
    stored_at = _pad(at, names.align)
    stored = data[stored_at : stored_at + 4 * len(markers)]
    return replace(names, end=at) if stored == np.array(markers, "<u4").tobytes() else None


# ---- (3) addresses -------------------------------------------------------------------------------


def _offset_tables(data: bytes, base: int, names: _Names, after: int) -> Iterator[Addrs]:
    """Addresses by each known form of the offsets; `after` is the end of token_index."""
    size = 4 * names.count
    if names.align == 4:
        if after + size <= len(data):
            yield addresses_from_self(_s32(data, after, size), base + after)
        return
    before = names.start - 16
    if before >= _pad(size, 8):
        yield addresses(_s32(data, before - _pad(size, 8), size), _u64(data, before))
    behind = after + _pad(size, 8)
    if behind + 8 <= len(data):
        yield addresses(_s32(data, after, size), _u64(data, behind))


def _s32(data: bytes, at: int, size: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(data, "<i4", size // 4, at)


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _agree(addrs: Addrs, names: list[bytes], text_start: int) -> bool:
    if (addrs[1:] < addrs[:-1]).any():
        return False
    return any(
        names[row][1:] == b"_stext" for row in np.flatnonzero(addrs == np.uint64(text_start))
    )
