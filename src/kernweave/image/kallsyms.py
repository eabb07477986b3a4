# SPDX-License-Identifier: GPL-2.0-or-later
"""Every symbol of the running kernel, decoded from its own kallsyms tables."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError

Read = Callable[[int, int], bytes]
Addrs = npt.NDArray[np.uint64]

_TABLES = (
    "kallsyms_names",
    "kallsyms_num_syms",
    "kallsyms_token_table",
    "kallsyms_token_index",
    "kallsyms_offsets",
)
_BASE = "kallsyms_relative_base"  # gone in 7.0


def _table_addresses(read: Read, vmcoreinfo: int, size: int) -> dict[str, int]:
    note = read(int.from_bytes(read(vmcoreinfo, 8), "little"), _u64(read, size))
    found = dict(re.findall(rb"SYMBOL\((kallsyms_\w+)\)=([0-9a-f]+)", note))
    addrs = {name: int(found.get(name.encode(), b"0"), 16) for name in (*_TABLES, _BASE)}
    missing = [name for name in _TABLES if not addrs[name]]
    if missing:
        raise UnsupportedError(
            f"this kernel's vmcoreinfo does not name {missing[0]}",
            help="use a kernel of 6.1 or later with CONFIG_CRASH_CORE",
        )
    return addrs


def _u64(read: Read, addr: int) -> int:
    return int.from_bytes(read(addr, 8), "little")


def _tokens(read: Read, addrs: dict[str, int]) -> list[bytes]:
    index = read(addrs["kallsyms_token_index"], 512)
    last = int.from_bytes(index[-2:], "little")
    return cut_tokens(read(addrs["kallsyms_token_table"], last + 256), index)


def cut_tokens(table: bytes, index: bytes) -> list[bytes]:
    """The 256 strings of token_table, by the 256 16-bit offsets of token_index."""
    starts = np.frombuffer(index, "<u2").tolist()
    return [table[start : table.index(b"\0", start)] for start in starts]


def decode_names(data: bytes, count: int, tokens: list[bytes]) -> list[bytes]:
    """Names with their type letter in front; a length byte over 127 has a second one.

    References:
        73bbb94466fd ("kallsyms: support "big" kernel symbols")
    """
    names = []
    at = 0
    expand = tokens.__getitem__
    for _ in range(count):
        size = data[at]
        at += 1
        if size & 0x80:
            size = (size & 0x7F) | data[at] << 7
            at += 1
        names.append(b"".join(map(expand, data[at : at + size])))
        at += size
    return names


def addresses(raw: npt.NDArray[np.int32], base: int) -> Addrs:
    """Addresses of offsets relative to one base.

    With absolute per-CPU symbols the offsets of all others are negative; without, an image is
    far too small for an offset to have its top bit set.

    References:
        kernel/kallsyms.c, kallsyms_sym_address(), with and without KALLSYMS_ABSOLUTE_PERCPU
    """
    wide = raw.astype(np.int64)
    if not (raw < 0).any():
        return np.uint64(base) + raw.astype(np.uint64)
    relative = np.uint64(base) + (-1 - wide).view(np.uint64)
    return np.where(wide >= 0, wide.view(np.uint64), relative)


def addresses_from_self(raw: npt.NDArray[np.int32], table: int) -> Addrs:
    """Addresses of offsets, each relative to its own place in the table at `table`.

    References:
        a081b5789255 ("kallsyms: Get rid of kallsyms relative base")
    """
    place = np.uint64(table) + 4 * np.arange(len(raw), dtype=np.uint64)
    return place + raw.astype(np.int64).view(np.uint64)


def read_kallsyms(
    read: Read, vmcoreinfo_data: int, vmcoreinfo_size: int, stext: int
) -> tuple[Addrs, list[bytes]]:
    """All symbols of the kernel image, kmods excluded.

    Args:
        read: kernel memory.
        vmcoreinfo_data: address of the pointer of that name.
        vmcoreinfo_size: address of the variable of that name.
        stext: run-time address of `_stext`, to check the decoding.

    Returns:
        uint64[n] run-time addresses and n names, each with its type letter in front.

    Raises:
        UnsupportedError: vmcoreinfo lacks the tables, or they do not hold `_stext`.

    References:
        5fd8fea935a1 ("vmcoreinfo: include kallsyms symbols")
    """
    addrs = _table_addresses(read, vmcoreinfo_data, vmcoreinfo_size)
    count = _u64(read, addrs["kallsyms_num_syms"]) & 0xFFFFFFFF
    raw = np.frombuffer(read(addrs["kallsyms_offsets"], 4 * count), "<i4")
    tokens = _tokens(read, addrs)
    # The names' end is not named anywhere; the markers follow, so reading up to
    # the token table covers them whatever the order of the other tables is.
    after = [addr for addr in addrs.values() if addr > addrs["kallsyms_names"]]
    data = read(addrs["kallsyms_names"], min(after) - addrs["kallsyms_names"])
    names = decode_names(data, count, tokens)
    if addrs[_BASE]:
        found = addresses(raw, _u64(read, addrs[_BASE]))
    else:
        found = addresses_from_self(raw, addrs["kallsyms_offsets"])
    if stext not in found:
        raise UnsupportedError("kallsyms does not hold _stext at its address")
    return found, names
