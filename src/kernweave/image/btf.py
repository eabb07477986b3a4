# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's BTF section as columns: one row per type, the row number is the type id.

References:
    Documentation/bpf/btf.rst; include/uapi/linux/btf.h
"""
# Over 400 lines: the reader checks what the columns promise, and both need the record layouts.

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError

Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.int32]
Wide = npt.NDArray[np.int64]


class Kind(IntEnum):
    """What a row describes; the kernel's names without BTF_KIND_, row 0 is VOID."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


class Passing(IntEnum):
    """How the calling convention sees a type, qualifiers and typedefs taken off."""

    VOID = 0
    INTEGER = 1
    FLOAT = 2
    AGGREGATE = 3
    OTHER = 4


STRUCTS = (Kind.STRUCT, Kind.UNION)
ENUMS = (Kind.ENUM, Kind.ENUM64)
MODIFIERS = (Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG)
SIZED = (Kind.INT, *STRUCTS, *ENUMS, Kind.DATASEC, Kind.FLOAT)
REFERRING = (Kind.PTR, *MODIFIERS, Kind.FUNC, Kind.FUNC_PROTO, Kind.VAR, Kind.DECL_TAG)

#: words after the three of the head: (always, per vlen) of each kind that has any
_TRAILING = {
    Kind.INT: (1, 0), Kind.ARRAY: (3, 0), Kind.STRUCT: (0, 3), Kind.UNION: (0, 3),
    Kind.ENUM: (0, 2), Kind.FUNC_PROTO: (0, 2), Kind.VAR: (1, 0), Kind.DATASEC: (0, 3),
    Kind.DECL_TAG: (1, 0), Kind.ENUM64: (0, 3),
}  # fmt: skip
_ALWAYS, _PER_VLEN = np.zeros((2, 128), np.int32)
_ALWAYS[list(_TRAILING)], _PER_VLEN[list(_TRAILING)] = np.transpose(list(_TRAILING.values()))

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_HEAD_WORDS = 3
_SIZE_LIMIT = np.uint64(1 << 32)
_INTEGER_ARGUMENTS = 6
_MANY = 100  # registers of an argument that is not for certain in integer registers


# Columns of variable length: what belongs to type i are rows first[i] to first[i + 1].


class Members(NamedTuple):
    """Members of every struct and union, as written."""

    first: Ids  # int32[n + 1]
    name_off: Words  # uint32[m], 0 for an anonymous one
    type_id: Ids  # int32[m]
    bit_off: Words  # uint32[m], bits from the start of the struct
    bits: Words  # uint32[m], size of a bit-field, 0 for any other member


class Params(NamedTuple):
    """Parameters of every FUNC_PROTO; a last one of type 0 stands for `...`."""

    first: Ids  # int32[n + 1]
    name_off: Words  # uint32[m], 0 in most types of function pointers
    type_id: Ids  # int32[m]


class Enumerators(NamedTuple):
    """Values of every ENUM and ENUM64."""

    first: Ids  # int32[n + 1]
    name_off: Words  # uint32[m]
    value: Wide  # int64[m], of a 64-bit enum without kind_flag the bits of a uint64


class Functions(NamedTuple):
    """Every FUNC, by type id."""

    type_id: Ids  # int32[f], ascending
    name_off: Words  # uint32[f]
    prototype: Ids  # int32[f], a FUNC_PROTO
    linkage: npt.NDArray[np.uint8]  # uint8[f]: 0 static (kernels: all so far), 1 global, 2 extern


@dataclass(frozen=True, eq=False)
class Btf:
    """The types of a kernel, or of a kernel and one kmod. All columns have n rows.

    Attributes:
        kind: uint8[n], a `Kind`.
        kind_flag: bool[n]: bit-fields (STRUCT), signed (ENUM), union (FWD), attribute (TYPE_TAG).
        vlen: uint32[n]: how many members, parameters, values; of a FUNC the linkage.
        name_off: uint32[n], bytes into `strings`, 0 for an anonymous type.
        size_or_type: uint32[n], bytes (kinds in SIZED) or type id (kinds in REFERRING).
        at: int32[n], word position in `words` of what follows the head of the record.
        words: the type records as they are in memory.
        strings: NUL-terminated names.
    """

    kind: npt.NDArray[np.uint8]
    kind_flag: Bools
    vlen: Words
    name_off: Words
    size_or_type: Words
    at: Ids
    words: Words
    strings: bytes

    def name(self, off: int) -> str:
        """The string at a name offset."""
        return self.strings[off : self.strings.index(b"\0", off)].decode(errors="replace")

    def type_name(self, type_id: int) -> str:
        """Name of a type, empty for an anonymous one."""
        return self.name(int(self.name_off[type_id]))

    def has_kind(self, *kinds: Kind) -> Bools:
        """bool[n]: which rows are of one of these kinds."""
        table = np.zeros(256, bool)
        table[list(kinds)] = True
        return table[self.kind]

    @cached_property
    def target(self) -> Ids:
        """int32[n]: type pointed to, renamed, qualified, returned or held; 0 if none."""
        target = np.where(self.has_kind(*REFERRING), self.size_or_type, 0).astype(np.int32)
        arrays = np.flatnonzero(self.kind == Kind.ARRAY)
        target[arrays] = self.words[self.at[arrays]]
        return target

    @cached_property
    def resolved(self) -> Ids:
        """int32[n]: the type itself, with typedefs, qualifiers and tags taken off."""
        to = np.arange(len(self.kind), dtype=np.int32)
        to = np.where(self.has_kind(*MODIFIERS), self.target, to)
        while (to[to] != to).any():
            to = to[to]
        return to

    @cached_property
    def count(self) -> Words:
        """uint32[n]: elements of an ARRAY, 0 for other kinds."""
        count = np.zeros(len(self.kind), np.uint32)
        arrays = np.flatnonzero(self.kind == Kind.ARRAY)
        count[arrays] = self.words[self.at[arrays] + 2]
        return count

    @cached_property
    def sizes(self) -> Wide:
        """int64[n]: bytes of a value of the type; 0 for void, functions and FWD."""
        size = np.where(self.has_kind(*SIZED), self.size_or_type, 0).astype(np.uint64)
        size[self.kind == Kind.PTR] = 8
        arrays = np.flatnonzero(self.kind == Kind.ARRAY)
        element = self.resolved[self.target[arrays]]
        while True:  # once per dimension
            held = np.minimum(self.count[arrays] * size[element], _SIZE_LIMIT)
            if (held == size[arrays]).all():
                return size[self.resolved].astype(np.int64)
            size[arrays] = held

    def _lists(self, *kinds: Kind) -> tuple[Ids, Ids, Ids]:
        """CSR offsets int32[n + 1], and of each item its type id and its word position."""
        count = np.where(self.has_kind(*kinds), self.vlen, 0)
        first = np.zeros(len(count) + 1, np.int32)
        np.cumsum(count, out=first[1:])
        owner = np.repeat(np.arange(len(count), dtype=np.int32), count)
        item = np.arange(first[-1], dtype=np.int32) - first[owner]
        return first, owner, self.at[owner] + _PER_VLEN[self.kind[owner]] * item

    @cached_property
    def members(self) -> Members:
        """Members of all structs and unions."""
        first, owner, at = self._lists(*STRUCTS)
        place = self.words[at + 2]
        split = self.kind_flag[owner]
        bit_off = np.where(split, place & 0xFFFFFF, place)
        bits = np.where(split, place >> 24, 0).astype(np.uint32)
        return Members(first, self.words[at], _ids(self.words[at + 1]), bit_off, bits)

    @cached_property
    def params(self) -> Params:
        """Parameters of all prototypes."""
        first, _, at = self._lists(Kind.FUNC_PROTO)
        return Params(first, self.words[at], _ids(self.words[at + 1]))

    @cached_property
    def enumerators(self) -> Enumerators:
        """Values of all enums."""
        first, owner, at = self._lists(*ENUMS)
        low = self.words[at + 1]
        value = np.where(self.kind_flag[owner], low.view(np.int32), low.astype(np.int64))
        wide = np.flatnonzero(self.kind[owner] == Kind.ENUM64)
        high = self.words[at[wide] + 2].astype(np.int64)
        value[wide] = high << 32 | low[wide]
        return Enumerators(first, self.words[at], value)

    @cached_property
    def functions(self) -> Functions:
        """All functions, by type id."""
        rows = np.flatnonzero(self.kind == Kind.FUNC).astype(np.int32)
        linkage = self.vlen[rows].astype(np.uint8)
        return Functions(rows, self.name_off[rows], self.target[rows], linkage)

    @cached_property
    def function_ids(self) -> dict[str, list[int]]:
        """Type ids of each function name, ascending: static functions may share a name."""
        return self._ids_by_name(self.functions.type_id)

    @cached_property
    def struct_ids(self) -> dict[str, list[int]]:
        """Type ids of each struct and union name, ascending; anonymous ones are left out."""
        return self._ids_by_name(np.flatnonzero(self.has_kind(*STRUCTS) & (self.name_off != 0)))

    def _ids_by_name(self, rows: npt.NDArray[np.signedinteger]) -> dict[str, list[int]]:
        table: dict[str, list[int]] = {}
        for row, off in zip(rows.tolist(), self.name_off[rows].tolist(), strict=True):
            table.setdefault(self.name(off), []).append(row)
        return table

    def find_function(self, name: str) -> int | None:
        """The first FUNC called `name`; None if there is none, or they differ in their class."""
        ids = self.function_ids.get(name, [])
        classes = self.prototype_class[self.target[ids]] if ids else ()
        return ids[0] if len(set(classes)) == 1 else None

    def find_struct(self, name: str) -> list[int]:
        """Type ids of the structs and unions called `name`, ascending; empty if there is none."""
        return self.struct_ids.get(name, [])

    @cached_property
    def passing(self) -> npt.NDArray[np.uint8]:
        """uint8[n]: the `Passing` of a value of each type."""
        table = np.full(256, Passing.OTHER, np.uint8)
        table[Kind.VOID] = Passing.VOID
        table[[Kind.INT, Kind.PTR, *ENUMS]] = Passing.INTEGER
        table[Kind.FLOAT] = Passing.FLOAT
        table[list(STRUCTS)] = Passing.AGGREGATE
        return table[self.kind[self.resolved]]

    @cached_property
    def prototype_class(self) -> Ids:
        """int32[n]: the signature class of each FUNC_PROTO, -1 for other kinds.

        Two prototypes have one class if and only if they agree on the number of parameters, on
        `...`, and on the `Passing` and size of the result and of each parameter. Signedness and
        what a pointer points to do not count.
        """
        rows = np.flatnonzero(self.kind == Kind.FUNC_PROTO)
        code = self.sizes << 3 | self.passing
        codes = code[self.params.type_id].tobytes()
        results = code[self.target[rows]].tolist()
        spans = (self.params.first[rows] * 8).tolist(), (self.params.first[rows + 1] * 8).tolist()
        seen: dict[tuple[int, bytes], int] = {}
        classes = np.full(len(self.kind), -1, np.int32)
        classes[rows] = [
            seen.setdefault((result, codes[start:end]), len(seen))
            for result, start, end in zip(results, *spans, strict=True)
        ]
        return classes

    @cached_property
    def signature_class(self) -> Ids:
        """int32[f]: `prototype_class` of each function, in the order of `functions`."""
        return self.prototype_class[self.functions.prototype]

    @cached_property
    def argument_registers(self) -> npt.NDArray[np.int8]:
        """int8[f]: how many of rdi, rsi, rdx, rcx, r8, r9 hold arguments, by the prototype.

        -1 where the prototype does not tell: an aggregate or float by value (as a result too: its
        address may take rdi), `...`, or more than six. A compiler that drops parameters of a
        function, and renames it, does not change its prototype.

        References:
            System V ABI, AMD64 supplement 1.0, 3.2.3
        """
        held = np.where(self.passing == Passing.INTEGER, (self.sizes + 7) // 8, _MANY)
        total = np.append(0, np.cumsum(held[self.params.type_id]))
        needed = total[self.params.first[1:]] - total[self.params.first[:-1]]
        needed[self.passing[self.target] == Passing.AGGREGATE] = _MANY
        found = needed[self.functions.prototype]
        return np.where(found <= _INTEGER_ARGUMENTS, found, -1).astype(np.int8)


def _ids(words: Words) -> Ids:
    return words.astype(np.int32)


_EMPTY = Btf(
    kind=np.zeros(1, np.uint8),
    kind_flag=np.zeros(1, bool),
    vlen=np.zeros(1, np.uint32),
    name_off=np.zeros(1, np.uint32),
    size_or_type=np.zeros(1, np.uint32),
    at=np.zeros(1, np.int32),
    words=np.zeros(0, np.uint32),
    strings=b"",
)


def read_btf(data: bytes, base: Btf | None = None) -> Btf:
    """The types of one BTF section.

    Args:
        data: the section: of the kernel, `__start_BTF` to `__stop_BTF`.
        base: the kernel's types, if the section is a kmod's. The result holds them too.

    Raises:
        UnsupportedError: wrong magic, version or flags; a section that ends early or overlaps
            another; a kind this file does not know; a name, type id or size out of range.

    References:
        libbpf f7a6b9eaff3e ("bpf: Extend BTF UAPI vlen, kinds to use unused bits"): 24 and 7 of
        them; before, the added ones were 0
    """
    base = base or _EMPTY
    words, strings = _sections(data)
    strings = base.strings + strings
    if strings[:1] != b"\0" or strings[-1:] != b"\0":
        raise _damaged(f"its {len(strings)} bytes of names do not begin and end with a 0 byte")
    at = _record_starts(words, len(base.kind))
    info = words[at + 1]
    btf = Btf(
        kind=np.append(base.kind, (info >> 24 & 0x7F).astype(np.uint8)),
        kind_flag=np.append(base.kind_flag, info >> 31 != 0),
        vlen=np.append(base.vlen, info & 0xFFFFFF),
        name_off=np.append(base.name_off, words[at]),
        size_or_type=np.append(base.size_or_type, words[at + 2]),
        at=np.append(base.at, at + np.int32(len(base.words) + _HEAD_WORDS)),
        words=np.append(base.words, words),
        strings=strings,
    )
    _check(btf)
    return btf


def _damaged(what: str) -> UnsupportedError:
    return UnsupportedError(f"cannot read this kernel's BTF: {what}")


def _sections(data: bytes) -> tuple[Words, bytes]:
    if len(data) < _HEADER.size:
        raise _damaged(f"it has {len(data)} bytes, its header alone needs {_HEADER.size}")
    magic, version, flags, head, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
    if (magic, version, flags) != (_MAGIC, 1, 0):
        raise _damaged(
            f"magic 0x{magic:04x}, version {version}, flags {flags}; known are 0x{_MAGIC:04x}, 1, 0"
        )
    types, names = head + type_off, head + str_off
    ends = types + type_len, names + str_len
    if head < _HEADER.size or max(ends) > len(data) or type_len % 4:
        raise _damaged(
            f"{type_len} bytes of types at {types} and {str_len} of names at {names} "
            f"do not fit behind a header of {head} in {len(data)} bytes"
        )
    if types < ends[1] and names < ends[0]:
        raise _damaged(f"types at {types} to {ends[0]} overlap names at {names} to {ends[1]}")
    return np.frombuffer(data, "<u4", type_len // 4, types), data[names : ends[1]]


def _record_starts(words: Words, first_id: int) -> Ids:
    """Word position of each record: what a record at any word would take, then the chain."""
    info = words[1:-1]  # of a head at any word: the last one possible ends the section
    kind = info >> 24 & 0x7F
    vlen = (info & 0xFFFFFF).astype(np.int32)
    sizes = (_HEAD_WORDS + _ALWAYS[kind] + _PER_VLEN[kind] * vlen).tolist()
    starts, at = [], 0
    while at < len(sizes):
        starts.append(at)
        at += sizes[at]
    found = np.array(starts, np.int32)
    unknown = np.flatnonzero((kind[found] > max(Kind)) | (kind[found] == Kind.VOID))
    if len(unknown):
        row = unknown[0]
        raise _damaged(f"type {first_id + row} is of the unknown kind {kind[found[row]]}")
    if at != len(words):
        row, end = first_id + len(starts), at + _HEAD_WORDS
        if at > len(words):
            row, end = row - 1, at
        raise _damaged(f"type {row} ends at byte {4 * end}, the types end at {4 * len(words)}")
    return found


def _check(btf: Btf) -> None:
    """Every name, type id and size is in range, and no type is made of itself."""
    lists = (btf.members, btf.params, btf.enumerators)
    offs = [btf.name_off, *(columns.name_off for columns in lists)]
    ids = [btf.target, btf.members.type_id, btf.params.type_id]
    for what, columns, end in (
        ("name offset", offs, len(btf.strings)),
        ("type id", [column.view(np.uint32) for column in ids], len(btf.kind)),
    ):
        largest = max(column.max(initial=0) for column in columns)
        if largest >= end:
            raise _damaged(f"{what} {largest} is out of range, they end at {end}")
    wrong = btf.functions.type_id[btf.kind[btf.functions.prototype] != Kind.FUNC_PROTO]
    if len(wrong):
        raise _damaged(f"function type {wrong[0]} has no prototype")
    hop = btf.target
    for _ in range(len(hop).bit_length()):
        hop = hop[hop]
    if hop.any():
        raise _damaged(f"type {np.argmax(hop != 0)} is made of itself")
    if (btf.sizes >= _SIZE_LIMIT).any():
        raise _damaged(f"type {np.argmax(btf.sizes)} has 4 GiB or more")
