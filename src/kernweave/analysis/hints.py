# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel's data and types tell of its functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kernweave.image.btf import Btf, read_btf
from kernweave.image.rows import Addrs, Read

Lookup = Callable[[Sequence[str]], Sequence[int]]
Pairs = tuple[tuple[str, str], ...]

_DATA: Pairs = (
    ("__start_rodata", "__end_rodata"),
    ("_sdata", "_edata"),
    ("__bss_start", "__bss_stop"),
)
_PER_CPU = ("__per_cpu_offset", "__per_cpu_start", "__per_cpu_end")
_EXPORTS: Pairs = (
    ("__start___ksymtab", "__stop___ksymtab"),
    ("__start___ksymtab_gpl", "__stop___ksymtab_gpl"),
)
_BTF: Pairs = (("__start_BTF", "__stop_BTF"),)
_SYMBOL_BYTES = 12  # of struct kernel_symbol, its value first and relative to itself


def taken_addresses(read: Read, lookup: Lookup, bounds: tuple[int, int]) -> Addrs:
    """uint64[t]: what data may hold as addresses of functions, and what is exported; ascending.

    Data of a running kernel hold more than those of a file: what init text, now gone, stored
    there.

    Args:
        read: memory of the kernel, or of a kernel file.
        lookup: address of each symbol, 0 where there is none.
        bounds: (start, end) of text.
    """
    words = [exported_addresses(read, lookup)]
    for start, end in (*_spans(lookup, _DATA), *_first_cpu(read, lookup)):
        data = read(start, end - start)
        words.append(np.frombuffer(data[: len(data) // 8 * 8], "<u8"))
    found = np.concatenate(words)
    return np.unique(found[(found >= np.uint64(bounds[0])) & (found < np.uint64(bounds[1]))])


def exported_addresses(read: Read, lookup: Lookup) -> Addrs:
    """uint64[x]: what kmods may link against; ascending.

    Args:
        read: memory of the kernel, or of a kernel file.
        lookup: address of each symbol, 0 where there is none.
    """
    found = [np.zeros(0, np.uint64)]
    for start, end in _spans(lookup, _EXPORTS):
        rows = np.frombuffer(read(start, end - start), "<i4").reshape(-1, _SYMBOL_BYTES // 4)
        place = np.uint64(start) + np.uint64(_SYMBOL_BYTES) * np.arange(len(rows), dtype="u8")
        found.append(place + rows[:, 0].astype(np.int64).view(np.uint64))
    return np.unique(np.concatenate(found))


def _first_cpu(read: Read, lookup: Lookup) -> list[tuple[int, int]]:
    """(start, end) of the static per-CPU data of CPU 0, if it has any; in a file the template.

    References:
        arch/x86/kernel/setup_percpu.c, BOOT_PERCPU_OFFSET
    """
    offsets, start, end = lookup(_PER_CPU)
    if not offsets or end <= start:
        return []
    first = int.from_bytes(read(offsets, 8), "little") + start & (1 << 64) - 1
    return [(first, first + end - start)]


def find_btf(read: Read, lookup: Lookup) -> Btf | None:
    """The kernel's types; None if it was built without."""
    spans = _spans(lookup, _BTF)
    return read_btf(read(spans[0][0], spans[0][1] - spans[0][0])) if spans else None


def prototype_arguments(btf: Btf | None) -> dict[str, int]:
    """Argument registers of every function that BTF knows by one prototype, -1 of the others."""
    if btf is None:
        return {}
    rows = zip(btf.functions.name_off.tolist(), btf.argument_registers.tolist(), strict=True)
    found: dict[str, int] = {}
    for off, count in rows:
        name = btf.name(off)
        found[name] = count if found.get(name, count) == count else -1
    return found


def _spans(lookup: Lookup, symbols: Pairs) -> list[tuple[int, int]]:
    addrs = lookup([name for pair in symbols for name in pair])
    pairs = zip(addrs[::2], addrs[1::2], strict=True)
    return [(start, end) for start, end in pairs if start and end > start]
