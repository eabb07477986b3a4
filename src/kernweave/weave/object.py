# SPDX-License-Identifier: GPL-2.0-or-later
"""An ELF object file with relocations, as the kernel's module loader reads it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError

Column = npt.NDArray[Any]

# Elf64_Ehdr, Elf64_Shdr
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"),
     ("size", "<u8")]
)  # fmt: skip
_RELOCATION = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])

_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian, version 1
_OBJECT, _X86_64 = 1, 62
_PROGBITS, _SYMTAB, _STRTAB, _RELA, _NOBITS = 1, 2, 3, 4, 8
_INFO_LINK = 0x40
_LOCAL_FUNCTION, _LOCAL_SECTION = 2, 3  # STB_LOCAL << 4 | STT_FUNC, STT_SECTION
_PC32 = 2


class Flags(IntFlag):
    """SHF_*: what the loader does with a section."""

    WRITE = 1
    ALLOC = 2
    EXEC = 4


@dataclass(frozen=True)
class Fields:
    """Four-byte fields of a section that hold a distance from themselves.

    Attributes:
        at: int64[r], byte position of each in its section.
        to: uint64[r], where the distance leads: a byte position in the text, or an address.
        inside: bool[r], it is a position in the text.
        off: int64[r], added to the distance.
    """

    at: Column
    to: Column
    inside: Column
    off: Column


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: of the section.
        data: its bytes; those of `fields` are zeros.
        flags: SHF_*.
        align: bytes.
        fields: what the loader fills in.
    """

    name: str
    data: bytes
    flags: Flags = Flags.ALLOC
    align: int = 8
    fields: Sequence[Fields] = field(default=())


@dataclass(frozen=True)
class Symbols:
    """Functions of the text, of section 1.

    Attributes:
        names: of each.
        at: int64[s], byte position in the text.
        size: int64[s], bytes.
    """

    names: Sequence[str]
    at: Column
    size: Column


def write_object(sections: Sequence[Section], symbols: Symbols) -> bytes:
    """An object file.

    Args:
        sections: the first one is the text.
        symbols: what the text has.

    References:
        System V ABI, ELF-64 object file format; v6.1 kernel/module/main.c,
        elf_validity_check(), apply_relocations()
    """
    count = len(sections)
    related = [number for number, one in enumerate(sections, 1) if one.fields]
    symtab = count + len(related) + 1
    rows, strings = _symbol_rows(symbols)
    every = [
        *((one.name, _PROGBITS, int(one.flags), one.data, 0, 0, one.align, 0) for one in sections),
        *(
            (
                f".rela{sections[number - 1].name}", _RELA, _INFO_LINK,
                _relocations(sections[number - 1].fields), symtab, number, 8, _RELOCATION.itemsize,
            )
            for number in related
        ),
        (
            ".symtab", _SYMTAB, 0, rows, symtab + 1, len(rows) // _SYMBOL.itemsize, 8,
            _SYMBOL.itemsize,
        ),
        (".strtab", _STRTAB, 0, strings, 0, 0, 1, 0),
    ]  # fmt: skip
    names, name_at = _strings([name for name, *_ in every] + [".shstrtab"])
    every.append((".shstrtab", _STRTAB, 0, names, 0, 0, 1, 0))
    out, heads = bytearray(_HEADER.size), [bytes(_SECTION.size)]
    for at, (_, kind, flags, data, link, info, align, entry) in zip(name_at, every, strict=True):
        out += bytes(-len(out) % max(align, 8))
        heads.append(
            _SECTION.pack(at, kind, flags, 0, len(out), len(data), link, info, align, entry)
        )
        out += data
    out += bytes(-len(out) % 8)
    out[: _HEADER.size] = _HEADER.pack(
        _IDENT, _OBJECT, _X86_64, 1, 0, 0, len(out), 0, _HEADER.size, 0, 0, _SECTION.size,
        len(heads), len(heads) - 1,
    )  # fmt: skip
    return bytes(out + b"".join(heads))


def _symbol_rows(symbols: Symbols) -> tuple[bytes, bytes]:
    """Rows of the symbol table, all of them local, and its strings; row 1 is the text."""
    strings, name_at = _strings(symbols.names)
    rows = np.zeros(2 + len(symbols.names), _SYMBOL)
    rows["shndx"][1:] = 1
    rows["info"][1] = _LOCAL_SECTION
    rows["info"][2:] = _LOCAL_FUNCTION
    rows["name"][2:] = name_at
    rows["value"][2:] = symbols.at
    rows["size"][2:] = symbols.size
    return rows.tobytes(), strings


def _strings(names: Sequence[str]) -> tuple[bytes, list[int]]:
    data, at = bytearray(1), []
    for name in names:
        at.append(len(data))
        data += name.encode() + b"\0"
    return bytes(data), at


def _relocations(parts: Sequence[Fields]) -> bytes:
    """R_X86_64_PC32 against the text, or against symbol 0, whose value is 0."""
    tables = []
    for part in parts:
        rows = np.zeros(len(part.at), _RELOCATION)
        rows["offset"] = part.at
        rows["info"] = part.inside.astype(np.uint64) << np.uint64(32) | np.uint64(_PC32)
        rows["addend"] = part.to.astype(np.uint64).view(np.int64) + part.off
        tables.append(rows)
    found = np.concatenate(tables)
    return found[np.argsort(found["offset"], kind="stable")].tobytes()


def read_sections(data: bytes) -> dict[str, bytes]:
    """The bytes of each section of an object file, by name; of the first one of a name.

    Raises:
        UnsupportedError: it is no such file, or cut short.
    """
    try:
        head = _HEADER.unpack_from(data)
        at, size, count, names_row = head[6], *head[11:14]
        if head[0] != _IDENT or head[1:3] != (_OBJECT, _X86_64) or size != _SECTION.size:
            raise UnsupportedError("this is no object file of the kernel's")
        rows = [_SECTION.unpack_from(data, at + size * row) for row in range(count)]
        names_at = rows[names_row][4]
    except (struct.error, IndexError) as error:
        raise UnsupportedError(f"the object file is cut short at {len(data)} bytes") from error
    found: dict[str, bytes] = {}
    for name_at, kind, _, _, off, length, *_ in rows[1:]:
        start = names_at + name_at
        name = data[start : data.find(b"\0", start)].decode(errors="replace")
        if kind != _NOBITS:
            found.setdefault(name, data[off : off + length])
    return found
