# SPDX-License-Identifier: GPL-2.0-or-later
"""An ELF file as memory at its link addresses."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kernweave.errors import UnsupportedError

# Elf64_Ehdr after e_ident, Elf64_Phdr, Elf64_Shdr
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")

_IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_X86_64 = 62
_LOAD = 1
_ALLOC = 2
_MOST_BYTES = 1 << 30  # KERNEL_IMAGE_SIZE


@dataclass(frozen=True, slots=True)
class Segment:
    """One loaded range: `file_bytes` bytes from `off` in the file, then zeros up to `end`."""

    start: int
    end: int
    off: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Elf:
    """What an ELF file loads.

    Attributes:
        data: the whole file, and what may follow it.
        segments: loaded ranges, in the order of the file.
        sections: (start, end) link addresses of every section that takes memory, by name.
    """

    data: bytes
    segments: tuple[Segment, ...]
    sections: dict[str, tuple[int, int]]

    def read(self, addr: int, size: int) -> bytes:
        """Bytes at a link address; those that the file does not hold are zero.

        Raises:
            UnsupportedError: [addr, addr + size) is not inside one loaded segment.
        """
        for segment in self.segments:
            if segment.start <= addr and addr + size <= segment.end and size >= 0:
                skip = addr - segment.start
                held = max(0, min(size, segment.file_bytes - skip))
                begin = segment.off + skip
                return self.data[begin : begin + held] + bytes(size - held)
        raise UnsupportedError(f"the kernel file loads nothing at {addr:#x}, {size} bytes")


def parse_elf(data: bytes) -> Elf:
    """Read the tables of a 64-bit x86 ELF file.

    Raises:
        UnsupportedError: it is no such file, or a table points outside it.

    References:
        System V ABI, ELF-64 object file format
    """
    try:
        return _parse(data)
    except (struct.error, OverflowError) as error:  # OverflowError: an offset over 2**63
        raise UnsupportedError(
            f"the kernel's ELF file is cut short: {error}, {len(data)} bytes are there"
        ) from error


def _parse(data: bytes) -> Elf:
    head = _HEADER.unpack_from(data)
    if not head[0].startswith(_IDENT) or head[2] != _X86_64:
        raise UnsupportedError(f"not a 64-bit x86 ELF file: begins with {data[:20].hex()}")
    segments_at, sections_at = head[5], head[6]
    segment_bytes, segment_rows, section_bytes, section_rows, names_row = head[9:14]
    if (segment_bytes, section_bytes) != (_SEGMENT.size, _SECTION.size):
        raise UnsupportedError(
            f"the kernel's ELF file has table rows of {segment_bytes} and {section_bytes} bytes, "
            f"{_SEGMENT.size} and {_SECTION.size} are known"
        )
    rows = [
        _SEGMENT.unpack_from(data, segments_at + i * _SEGMENT.size) for i in range(segment_rows)
    ]
    segments = tuple(
        _segment(data, start, off, file_bytes, size)
        for kind, _, off, start, _, file_bytes, size, _ in rows
        if kind == _LOAD
    )
    return Elf(data, segments, _sections(data, sections_at, section_rows, names_row))


def _segment(data: bytes, start: int, off: int, file_bytes: int, size: int) -> Segment:
    held = off + file_bytes <= len(data) and file_bytes <= size
    if not held or size > _MOST_BYTES or start + size > 1 << 64:
        raise UnsupportedError(
            f"the kernel's ELF file has {len(data)} bytes, its segment at {start:#x} of {size} "
            f"bytes needs {file_bytes} from {off}"
        )
    return Segment(start, start + size, off, file_bytes)


def _sections(data: bytes, at: int, count: int, names_row: int) -> dict[str, tuple[int, int]]:
    rows = [_SECTION.unpack_from(data, at + i * _SECTION.size) for i in range(count)]
    if names_row >= count:
        raise UnsupportedError(
            f"the kernel's ELF file names none of its {count} sections",
            help="use the file as the distribution ships it, with its section table",
        )
    names_at, names_bytes = rows[names_row][4:6]
    names = data[names_at : names_at + names_bytes]
    found: dict[str, tuple[int, int]] = {}
    for name_at, _, flags, start, _, size, *_ in rows:
        name = names[name_at:].split(b"\0", 1)[0].decode(errors="replace")
        if flags & _ALLOC and name not in found:
            found[name] = (start, start + size)
    return found
