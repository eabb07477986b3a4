# SPDX-License-Identifier: GPL-2.0-or-later
"""Object files placed in memory as the kernel's module loader does it, from the ELF standard."""

from __future__ import annotations

import struct
from dataclasses import dataclass

SHT_SYMTAB, SHT_RELA, SHT_NOBITS = 2, 4, 8
SHF_ALLOC = 2
R_X86_64_PC32 = 2


@dataclass(frozen=True)
class Loaded:
    """A loaded object file: its sections' addresses and bytes, and its functions."""

    at: dict[str, int]
    data: dict[str, bytearray]
    functions: dict[str, tuple[int, int]]  # address and size

    def read(self, addr: int, size: int) -> bytes:
        for name, start in self.at.items():
            if start <= addr and addr + size <= start + len(self.data[name]):
                return bytes(self.data[name][addr - start : addr - start + size])
        raise AssertionError(f"nothing at {addr:#x}")

    def span(self, name: str) -> tuple[int, int]:
        return self.at[name], self.at[name] + len(self.data[name])


def load(file: bytes, base: int) -> Loaded:
    """Place all sections one behind the other, the first one at `base`, and relocate them."""
    table, count, names_row = _header(file)
    rows = [struct.unpack_from("<IIQQQQIIQQ", file, table + 64 * row) for row in range(count)]
    names = [_string(file, rows[names_row][4] + row[0]) for row in rows]
    at, data, where = {}, {}, base
    for name, (_, kind, flags, _, off, size, _, _, align, _) in zip(names, rows, strict=True):
        if flags & SHF_ALLOC:
            assert kind != SHT_NOBITS
            where += -where % max(align, 1)
            at[name], data[name] = where, bytearray(file[off : off + size])
            where += size
    symbols, functions = [], {}
    for _, kind, _, _, off, size, link, _, _, entry in rows:
        if kind == SHT_SYMTAB:
            for place in range(off, off + size, entry):
                name_at, info, _, section, value, length = struct.unpack_from(
                    "<IBBHQQ", file, place
                )
                addr = value + (at[names[section]] if section else 0)
                symbols.append(addr)
                if info & 15 == 2:
                    functions[_string(file, rows[link][4] + name_at)] = (addr, length)
    for _, kind, _, _, off, size, _, target, _, entry in rows:
        if kind == SHT_RELA:
            _relocate(
                file[off : off + size], entry, symbols, at[names[target]], data[names[target]]
            )
    return Loaded(at, data, functions)


def _header(file: bytes) -> tuple[int, int, int]:
    ident, kind, machine, version, _, _, table, _, size, _, _, entry, count, names = (
        struct.unpack_from("<16sHHIQQQIHHHHHH", file)
    )
    assert ident[:7] == b"\x7fELF\x02\x01\x01" and (kind, machine, version) == (1, 62, 1)
    assert (size, entry) == (64, 64)
    return table, count, names


def _string(file: bytes, at: int) -> str:
    return file[at : file.index(b"\0", at)].decode()


def _relocate(rows: bytes, entry: int, symbols: list[int], start: int, data: bytearray) -> None:
    for off, info, addend in struct.iter_unpack("<QQq", rows):
        assert info & 0xFFFF_FFFF == R_X86_64_PC32
        assert not any(data[off : off + 4]), "the loader wants zeros where it writes"
        distance = (symbols[info >> 32] + addend - (start + off)) & (1 << 64) - 1
        distance -= distance >> 63 << 64
        data[off : off + 4] = struct.pack("<i", distance)
    assert entry == 24
