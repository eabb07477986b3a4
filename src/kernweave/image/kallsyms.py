# SPDX-License-Identifier: GPL-2.0-or-later
"""Every symbol of the running kernel, decoded from its own kallsyms tables."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError

Read = Callable[[int, int], bytes]

_TABLES = (
    "kallsyms_names",
    "kallsyms_num_syms",
    "kallsyms_token_table",
    "kallsyms_token_index",
    "kallsyms_offsets",
    "kallsyms_relative_base",
)


def _table_addresses(read: Read, vmcoreinfo: int, size: int) -> dict[str, int]:
    note = read(int.from_bytes(read(vmcoreinfo, 8), "little"), _u64(read, size))
    found = dict(re.findall(rb"SYMBOL\((kallsyms_\w+)\)=([0-9a-f]+)", note))
    addrs = {name: int(found.get(name.encode(), b"0"), 16) for name in _TABLES}
    missing = [name for name, addr in addrs.items() if not addr]
    if missing:
        raise UnsupportedError(
            f"this kernel's vmcoreinfo does not name {missing[0]}",
            help="use a kernel of 6.1 or later with CONFIG_CRASH_CORE",
        )
    return addrs


def _u64(read: Read, addr: int) -> int:
    return int.from_bytes(read(addr, 8), "little")


def _tokens(read: Read, addrs: dict[str, int]) -> list[bytes]:
    index = np.frombuffer(read(addrs["kallsyms_token_index"], 512), "<u2").astype(int)
    table = read(addrs["kallsyms_token_table"], int(index[-1]) + 256)
    return [table[start : table.index(b"\0", start)] for start in index]


def _decode_names(data: bytes, count: int, tokens: list[bytes]) -> list[bytes]:
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


def _addresses(raw: npt.NDArray[np.int32], base: int) -> npt.NDArray[np.uint64]:
    """Run-time addresses.

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


def read_kallsyms(
    read: Read, vmcoreinfo_data: int, vmcoreinfo_size: int, stext: int
) -> tuple[npt.NDArray[np.uint64], list[bytes]]:
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
    base = _u64(read, addrs["kallsyms_relative_base"])
    raw = np.frombuffer(read(addrs["kallsyms_offsets"], 4 * count), "<i4")
    tokens = _tokens(read, addrs)
    # The names' end is not named anywhere; the markers follow, so reading up to
    # the token table covers them whatever the order of the other tables is.
    after = [addr for addr in addrs.values() if addr > addrs["kallsyms_names"]]
    data = read(addrs["kallsyms_names"], min(after) - addrs["kallsyms_names"])
    names = _decode_names(data, count, tokens)
    found = _addresses(raw, base)
    if stext not in found:
        raise UnsupportedError("kallsyms does not hold _stext at its address")
    return found, names
