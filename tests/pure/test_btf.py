# SPDX-License-Identifier: GPL-2.0-or-later
"""BTF sections, written here type by type: columns, look-ups, C text, damaged input."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernweave.errors import InternalError, UnsupportedError, UsageError
from kernweave.image.btf import Btf, Kind, read_btf
from kernweave.image.btf_text import (
    declare,
    describe,
    members_of,
    offset_of,
    parameters,
    prototype,
    values_of,
)

#: a member, parameter or enumerator: its name, then its other words
Item = tuple[str, *tuple[int, ...]]


class Section:
    """A BTF section under construction; every method that adds a type returns its id."""

    def __init__(self, base: Section | None = None) -> None:
        self.shared: bytes = base.names if base else b""
        self.names: bytes = b"" if base else b"\0"
        self.next_id: int = base.next_id if base else 1
        self.types: bytes = b""

    def name(self, text: str) -> int:
        if not text:
            return 0
        self.names += text.encode() + b"\0"
        return len(self.shared) + len(self.names) - len(text.encode()) - 1

    def add(
        self,
        kind: int,
        name: str = "",
        value: int = 0,
        items: Sequence[Item] = (),
        *,
        vlen: int | None = None,
        flag: bool = False,
        words: Sequence[int] = (),
    ) -> int:
        info = (len(items) if vlen is None else vlen) | kind << 24 | flag << 31
        self.types += struct.pack("<III", self.name(name), info, value)
        for item_name, *rest in items:
            listed = [self.name(item_name), *rest]
            self.types += b"".join(struct.pack("<I", word & 0xFFFFFFFF) for word in listed)
        self.types += b"".join(struct.pack("<I", word & 0xFFFFFFFF) for word in words)
        self.next_id += 1
        return self.next_id - 1

    def number(self, name: str, size: int) -> int:
        return self.add(Kind.INT, name, size, words=[8 * size])

    def ptr(self, target: int) -> int:
        return self.add(Kind.PTR, value=target)

    def array(self, element: int, count: int) -> int:
        return self.add(Kind.ARRAY, words=[element, 1, count])

    def proto(self, result: int, *params: Item) -> int:
        return self.add(Kind.FUNC_PROTO, value=result, items=params)

    def func(self, name: str, result: int, *params: Item) -> int:
        return self.add(Kind.FUNC, name, self.proto(result, *params), vlen=1)

    def data(self, head: int = 24) -> bytes:
        start = struct.pack("<HBBI", 0xEB9F, 1, 0, head)
        parts = struct.pack("<IIII", 0, len(self.types), len(self.types), len(self.names))
        return (start + parts).ljust(head, b"\0") + self.types + self.names

    def read(self, base: Btf | None = None) -> Btf:
        return read_btf(self.data(), base)


def every_kind() -> Section:
    made = Section()
    number = made.number("int", 4)
    made.ptr(number)
    made.array(number, 3)
    made.add(Kind.STRUCT, "s", 8, [("a", number, 0), ("b", number, 32)])
    made.add(Kind.UNION, "u", 4, [("x", number, 0)])
    made.add(Kind.ENUM, "e", 4, [("ONE", 1)])
    made.add(Kind.FWD, "fwd", flag=True)
    made.add(Kind.TYPEDEF, "t", number)
    made.add(Kind.VOLATILE, value=number)
    made.add(Kind.CONST, value=number)
    made.add(Kind.RESTRICT, value=2)
    proto = made.proto(number, ("p", 2), ("", 0))
    made.add(Kind.FUNC, "f", proto, vlen=1)
    var = made.add(Kind.VAR, "v", number, words=[1])
    made.add(Kind.DATASEC, ".data", 4, vlen=1, words=[var, 0, 4])
    made.add(Kind.FLOAT, "double", 8)
    made.add(Kind.DECL_TAG, "tag", 4, words=[-1])
    made.add(Kind.TYPE_TAG, "user", number)
    made.add(Kind.ENUM64, "e64", 8, [("BIG", 0, 1)])
    return made


def test_read_every_kind_gives_one_row_each_in_the_order_of_the_section() -> None:
    btf = every_kind().read()
    kinds = [Kind(kind).name for kind in btf.kind]
    assert " ".join(kinds) == (
        "VOID INT PTR ARRAY STRUCT UNION ENUM FWD TYPEDEF VOLATILE CONST RESTRICT "
        "FUNC_PROTO FUNC VAR DATASEC FLOAT DECL_TAG TYPE_TAG ENUM64"
    )
    names = ",".join(btf.type_name(row) for row in range(len(btf.kind)))
    assert names == ",int,,,s,u,e,fwd,t,,,,,f,v,.data,double,tag,user,e64"
    assert btf.vlen.tolist() == [0, 0, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0, 0, 1]
    assert btf.target.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 2, 1, 12, 1, 0, 0, 4, 1, 0]
    assert btf.sizes.tolist() == [0, 4, 8, 12, 8, 4, 4, 0, 4, 4, 4, 8, 0, 0, 0, 4, 8, 0, 4, 8]
    assert btf.resolved[[8, 9, 10, 11, 18]].tolist() == [1, 1, 1, 2, 1]
    assert np.flatnonzero(btf.kind_flag).tolist() == [7]
    assert np.flatnonzero(btf.count).tolist() == [3]


def test_read_every_kind_gives_the_lists_of_each() -> None:
    btf = every_kind().read()
    members, params, enumerators = btf.members, btf.params, btf.enumerators
    assert np.diff(members.first).tolist() == [0] * 4 + [2, 1] + [0] * 14
    assert [btf.name(off) for off in members.name_off.tolist()] == ["a", "b", "x"]
    assert members.type_id.tolist() == [1, 1, 1]
    assert members.bit_off.tolist() == [0, 32, 0]
    assert np.flatnonzero(np.diff(params.first)).tolist() == [12]
    assert params.type_id.tolist() == [2, 0]
    assert np.flatnonzero(np.diff(enumerators.first)).tolist() == [6, 19]
    assert enumerators.value.tolist() == [1, 1 << 32]
    assert [column.tolist() for column in btf.functions[::2]] == [[13], [12]]
    assert btf.functions.linkage.tolist() == [1]
    assert parameters(btf, 13) == [("p", 2), ("", 0)]
    assert prototype(btf, 13) == "int f(int *p, ...)"


def test_read_no_types_gives_void_alone() -> None:
    btf = Section().read()
    assert btf.kind.tolist() == [Kind.VOID]
    assert declare(btf, 0) == "void"
    assert not len(btf.signature_class) and not len(btf.argument_registers)


@pytest.mark.parametrize("last", [Kind.PTR, Kind.FUNC_PROTO, Kind.FWD])
def test_read_last_record_without_trailing_words_is_a_row(last: Kind) -> None:
    made = Section()
    made.number("int", 4)
    made.add(last)
    assert made.read().kind.tolist() == [Kind.VOID, Kind.INT, last]


def test_read_longer_header_and_names_before_types_are_the_same_types() -> None:
    made = every_kind()
    expected = made.read()
    pad = -len(made.names) % 4
    parts = struct.pack("<IIII", len(made.names) + pad, len(made.types), 0, len(made.names))
    swapped = struct.pack("<HBBI", 0xEB9F, 1, 0, 24) + parts + made.names + bytes(pad) + made.types
    for data in (made.data(32), swapped, made.data() + b"layout"):
        btf = read_btf(data)
        assert btf.words.tolist() == expected.words.tolist()
        assert btf.strings == expected.strings
        assert btf.at.tolist() == expected.at.tolist()


def test_read_more_than_65535_values_uses_the_upper_bits_of_vlen() -> None:
    made = Section()
    made.add(Kind.ENUM, "e", 4, vlen=70_000, words=[0, 7] * 70_000)
    made.number("int", 4)
    btf = made.read()
    assert btf.kind.tolist() == [Kind.VOID, Kind.ENUM, Kind.INT]
    assert btf.enumerators.value.tolist() == [7] * 70_000


def test_read_with_base_continues_its_ids_and_names() -> None:
    kernel = every_kind()
    base = kernel.read()
    kmod = Section(kernel)
    local = kmod.add(Kind.STRUCT, "mine", 16, [("s", 4, 0), ("n", 1, 64)])
    func = kmod.func("probe", 1, ("dev", kmod.ptr(local)), ("old", 8))
    btf = kmod.read(base)
    assert local == len(base.kind)
    assert prototype(btf, func) == "int probe(struct mine *dev, t old)"
    assert offset_of(btf, "mine", "s.b")[1:] == (1, 32, 0)
    assert btf.functions.type_id.tolist() == [13, func]
    assert [describe(btf, row) for row in range(local)] == [
        describe(base, row) for row in range(local)
    ]
    assert len(base.kind) == 20


def test_sizes_of_nested_arrays_multiply() -> None:
    made = Section()
    short = made.number("short", 2)
    inner = made.array(short, 3)
    outer = made.array(made.add(Kind.TYPEDEF, "row", inner), 5)
    none = made.array(outer, 0)
    assert made.read().sizes[[inner, outer, none]].tolist() == [6, 30, 0]


def with_structs() -> Section:
    made = Section()
    number = made.number("int", 4)
    inner = made.add(Kind.STRUCT, "inner", 8, [("a", number, 0), ("b", number, 32)])
    union = made.add(Kind.UNION, "", 4, [("x", number, 0), ("y", number, 0)])
    hidden = made.add(Kind.STRUCT, "", 8, [("", union, 0), ("z", number, 32)])
    quoted = made.add(Kind.CONST, value=hidden)
    flags = [("on", number, 3 << 24 | 192), ("off", number, 1 << 24 | 195), ("", number, 196)]
    made.add(
        Kind.STRUCT,
        "outer",
        28,
        [("head", number, 0), ("", quoted, 32), ("in", inner, 96), *flags],
        flag=True,
    )
    made.add(Kind.STRUCT, "twice", 4)
    made.add(Kind.UNION, "twice", 8)
    return made


def test_members_of_struct_flattens_anonymous_ones_and_splits_bit_fields() -> None:
    btf = with_structs().read()
    found = [
        (m.name, m.bit_off, m.bits, m.off) for m in members_of(btf, btf.find_struct("outer")[0])
    ]
    assert found == [
        ("head", 0, 0, 0),
        ("x", 32, 0, 4),
        ("y", 32, 0, 4),
        ("z", 64, 0, 8),
        ("in", 96, 0, 12),
        ("on", 192, 3, 24),
        ("off", 195, 1, 24),
    ]
    assert members_of(btf, 1) == []


def test_members_of_struct_without_bit_fields_uses_all_32_bits_of_the_offset() -> None:
    made = Section()
    row = made.add(Kind.STRUCT, "s", 1 << 29, [("far", made.number("int", 4), 5 << 24)])
    assert members_of(made.read(), row) == [("far", 1, 5 << 24, 0)]


def test_offset_of_path_adds_the_offsets_of_each_step() -> None:
    btf = with_structs().read()
    assert offset_of(btf, "outer", "in.b") == ("b", 1, 128, 0)
    assert offset_of(btf, "outer", "in").off == 12


@pytest.mark.parametrize(
    ("struct_name", "path", "message"),
    [
        ("none", "a", "0 structs of this kernel are called none"),
        ("twice", "a", "2 structs of this kernel are called twice"),
        ("outer", "in.c", "struct inner has no member c"),
        ("outer", "head.a", "int has no member a"),
    ],
)
def test_offset_of_unknown_or_ambiguous_is_refused(
    struct_name: str, path: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        offset_of(with_structs().read(), struct_name, path)


def test_values_of_enums_follow_sign_and_width() -> None:
    made = Section()
    ids = [
        made.add(Kind.ENUM, "u32", 4, [("A", 0xFFFFFFFF), ("B", 1)]),
        made.add(Kind.ENUM, "s32", 4, [("A", 0xFFFFFFFF), ("B", 1)], flag=True),
        made.add(Kind.ENUM64, "u64", 8, [("A", 0, 0xFFFFFFFF), ("B", 5, 6)]),
        made.add(Kind.ENUM64, "s64", 8, [("A", 0, 0xFFFFFFFF)], flag=True),
        made.add(Kind.TYPEDEF, "t", 2),
        made.number("int", 4),
    ]
    btf = made.read()
    assert [dict(values_of(btf, row)) for row in ids] == [
        {"A": 0xFFFFFFFF, "B": 1},
        {"A": -1, "B": 1},
        {"A": 0xFFFFFFFF << 32, "B": 6 << 32 | 5},
        {"A": -1 << 32},
        {"A": -1, "B": 1},
        {},
    ]


def test_prototype_of_vfs_read_is_as_in_the_source() -> None:
    made = Section()
    file = made.ptr(made.add(Kind.FWD, "file"))
    buf = made.ptr(made.add(Kind.TYPE_TAG, "user", made.number("char", 1)))
    size = made.add(Kind.TYPEDEF, "size_t", made.number("unsigned long", 8))
    pos = made.ptr(made.add(Kind.TYPEDEF, "loff_t", made.number("long long", 8)))
    signed = made.add(Kind.TYPEDEF, "ssize_t", made.number("long", 8))
    read = made.func(
        "vfs_read", signed, ("file", file), ("buf", buf), ("count", size), ("pos", pos)
    )
    btf = made.read()
    text = "ssize_t vfs_read(struct file *file, char __user *buf, size_t count, loff_t *pos)"
    assert prototype(btf, read) == text
    assert parameters(btf, read) == [("file", file), ("buf", buf), ("count", size), ("pos", pos)]
    with pytest.raises(InternalError, match=f"type {file} is PTR, not FUNC"):
        prototype(btf, file)


def build(made: Section, *steps: str | int) -> int:
    """A type from the inside out: a name for a base, then what is put around it."""
    row = 0
    for step in steps:
        if isinstance(step, int):
            row = made.array(row, step)
        elif step in Kind.__members__:
            row = made.add(Kind[step], value=row)
        elif step == "(int)":
            row = made.proto(row, ("", 1))
        else:
            row = made.number(step, 4)
    return row


@pytest.mark.parametrize(
    ("steps", "named", "alone"),
    [
        (["VOLATILE", "PTR"], "volatile void *x", "volatile void *"),
        (["char", "CONST", "PTR", "CONST"], "const char *const x", "const char *const"),
        (["char", "CONST", "VOLATILE"], "const volatile char x", "const volatile char"),
        (["char", "VOLATILE", "CONST"], "const volatile char x", "const volatile char"),
        (["char", "PTR", "RESTRICT", "PTR"], "char *restrict *x", "char *restrict *"),
        (["char", 2, 3], "char x[3][2]", "char [3][2]"),
        (["char", 2, "PTR"], "char (*x)[2]", "char (*)[2]"),
        (["char", "PTR", 2], "char *x[2]", "char *[2]"),
        (["char", "CONST", 2, "CONST"], "const char x[2]", "const char [2]"),
        (["char", 2, "CONST", "PTR"], "const char (*x)[2]", "const char (*)[2]"),
        (["char", "(int)"], "char x(int)", "char (int)"),
        (["char", "(int)", "PTR"], "char (*x)(int)", "char (*)(int)"),
        (["char", "PTR", "(int)", "PTR", 4], "char *(*x[4])(int)", "char *(*[4])(int)"),
        (["char", "(int)", "VOLATILE", "PTR"], "char (*x)(int)", "char (*)(int)"),
        (["(int)", "PTR", "(int)"], "void (*x(int))(int)", "void (*(int))(int)"),
        (["(int)", "PTR", "CONST", "PTR"], "void (*const *x)(int)", "void (*const *)(int)"),
    ],
)  # fmt: skip
def test_declare_nested_types_in_the_order_of_c(
    steps: list[str | int], named: str, alone: str
) -> None:
    made = Section()
    made.number("int", 4)
    row = build(made, *steps)
    btf = made.read()
    assert declare(btf, row, "x") == named
    assert declare(btf, row) == alone


@pytest.mark.parametrize(
    ("kind", "name", "flag", "text"),
    [
        (Kind.STRUCT, "a", False, "struct a"),
        (Kind.STRUCT, "", False, "struct {...}"),
        (Kind.UNION, "", False, "union {...}"),
        (Kind.ENUM, "", False, "enum {...}"),
        (Kind.ENUM64, "e", True, "enum e"),
        (Kind.FWD, "f", False, "struct f"),
        (Kind.FWD, "f", True, "union f"),
        (Kind.FLOAT, "double", False, "double"),
        (Kind.TYPEDEF, "t", False, "typedef void t"),
        (Kind.DATASEC, ".data", False, "section .data"),
        (Kind.TYPE_TAG, "rcu", False, "void __rcu"),
        (Kind.TYPE_TAG, "odd", False, 'void __attribute__((btf_type_tag("odd")))'),
        (Kind.TYPE_TAG, "address_space(1)", True, "void __attribute__((address_space(1)))"),
    ],
)
def test_describe_each_kind_names_it(kind: Kind, name: str, flag: bool, text: str) -> None:
    made = Section()
    row = made.add(kind, name, flag=flag)
    assert describe(made.read(), row) == text


def test_describe_variables_functions_and_what_tags_them() -> None:
    made = Section()
    var = made.add(Kind.VAR, "jiffies", made.number("long", 8), words=[1])
    func = made.func("f", 0)
    plain = made.add(Kind.DECL_TAG, "kfunc", func, words=[-1])
    named = made.add(Kind.DECL_TAG, "cold", var, words=[-1], flag=True)
    btf = made.read()
    assert [describe(btf, row) for row in (var, func, plain, named)] == [
        "long jiffies",
        "void f(void)",
        'void f(void) __attribute__((btf_decl_tag("kfunc")))',
        "long jiffies __attribute__((cold))",
    ]


def signatures() -> tuple[Section, dict[str, int]]:
    made = Section()
    types = {"void": 0} | {f"int{8 * size}": made.number("i", size) for size in (1, 2, 4, 8, 16)}
    types["uint32"] = made.add(Kind.TYPEDEF, "u32", made.add(Kind.CONST, value=types["int32"]))
    types["enum"] = made.add(Kind.ENUM, "e", 4)
    types["enum64"] = made.add(Kind.ENUM64, "e", 8)
    types["ptr"] = made.ptr(0)
    types["other_ptr"] = made.ptr(types["int8"])
    types["float"] = made.add(Kind.FLOAT, "float", 4)
    types["struct"] = made.add(Kind.STRUCT, "s", 4)
    types["union"] = made.add(Kind.UNION, "u", 4)
    types["big"] = made.add(Kind.STRUCT, "b", 8)
    return made, types


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("void int32", "void uint32", True),
        ("void int32", "void enum", True),
        ("ptr other_ptr", "other_ptr ptr", True),
        ("void ptr", "void int64", True),
        ("void enum64", "void int64", True),
        ("void struct", "void union", True),
        ("void", "void", True),
        ("void", "int32", False),
        ("void int32", "void int64", False),
        ("void int32", "void struct", False),
        ("void int32", "void float", False),
        ("void struct", "void big", False),
        ("void int32", "void int32 int32", False),
        ("void int32", "int32 int32", False),
        ("void int32", "void int32 void", False),
        ("void int32 int64", "void int64 int32", False),
    ],
)
def test_signature_class_is_shared_by_what_is_called_alike(
    left: str, right: str, same: bool
) -> None:
    made, types = signatures()
    for text in (left, right):
        result, *params = (types[word] for word in text.split())
        made.func("f", result, *(("p", param) for param in params))
    classes = made.read().signature_class
    assert classes.dtype == np.int32
    assert (classes[0] == classes[1]) == same


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("void", 0),
        ("ptr", 0),
        ("void int8", 1),
        ("int64 ptr enum uint32 int16 enum64 int8", 6),
        ("void int128 int32", 3),
        ("void int128 int128 int128", 6),
        ("void int128 int128 int128 int8", -1),
        ("void" + 7 * " ptr", -1),
        ("void ptr void", -1),
        ("void ptr struct", -1),
        ("void ptr union", -1),
        ("void float", -1),
        ("float ptr", 1),
        ("struct ptr", -1),
    ],
)
def test_argument_registers_count_or_say_uncertain(text: str, registers: int) -> None:
    made, types = signatures()
    made.func("before", 0, ("p", types["ptr"]))
    result, *params = (types[word] for word in text.split())
    made.func("f", result, *(("p", param) for param in params))
    assert made.read().argument_registers.tolist() == [1, registers]


def test_find_function_of_shared_name_needs_one_class() -> None:
    made, types = signatures()
    one = made.func("agree", 0, ("a", types["ptr"]))
    two = made.func("agree", 0, ("b", types["int64"]))
    made.func("differ", 0, ("a", types["ptr"]))
    made.func("differ", 0)
    btf = made.read()
    assert btf.function_ids["agree"] == [one, two]
    assert btf.find_function("agree") == one
    assert btf.find_function("differ") is None
    assert btf.find_function("absent") is None


def changed(at: int, value: int, size: int = 4) -> bytes:
    data = bytearray(every_kind().data())
    data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


def only(kind: int, **rest: int) -> bytes:
    made = Section()
    made.add(kind, **rest)  # type: ignore[arg-type]
    return made.data()


def nested_arrays() -> bytes:
    made = Section()
    made.array(made.array(made.array(made.number("long", 8), 1 << 20), 1 << 31), 1 << 31)
    return made.data()


def circle() -> bytes:
    made = Section()
    made.ptr(2)
    made.add(Kind.CONST, value=3)
    made.add(Kind.TYPEDEF, "t", 1)
    return made.data()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes, its header alone needs 24"),
        (changed(0, 0x9FEB, 2), "magic 0x9feb, version 1, flags 0; known are 0xeb9f, 1, 0"),
        (changed(2, 2, 1), "magic 0xeb9f, version 2"),
        (changed(3, 1, 1), "flags 1; known"),
        (changed(4, 20), "do not fit behind a header of 20"),
        (changed(8, 4), r"types at 28 to \d+ overlap names at \d+ to \d+"),
        (changed(16, 8), "overlap names at 32"),
        (changed(12, 6), "6 bytes of types at 24 and"),
        (
            every_kind().data()[:-1],
            r"of names at \d+ do not fit behind a header of 24 in \d+ bytes",
        ),
        (changed(12, 8), "type 1 ends at byte 12, the types end at 8"),
        (changed(12, 12), "type 1 ends at byte 16, the types end at 12"),
        (changed(20, 0), "its 0 bytes of names do not begin and end with a 0 byte"),
        (changed(20, 3), "its 3 bytes of names do not begin and end"),
        (changed(24, 1 << 16), "name offset 65536 is out of range"),
        (only(0), "type 1 is of the unknown kind 0"),
        (only(20), "type 1 is of the unknown kind 20"),
        (only(0x7F), "type 1 is of the unknown kind 127"),
        (only(Kind.STRUCT, vlen=2), "type 1 ends at byte 36, the types end at 12"),
        (only(Kind.PTR, value=2), "type id 2 is out of range, they end at 2"),
        (only(Kind.PTR, value=1 << 31), "type id 2147483648 is out of range"),
        (only(Kind.PTR, value=1), "type 1 is made of itself"),
        (only(Kind.FUNC), "function type 1 has no prototype"),
        (circle(), "type 1 is made of itself"),
        (nested_arrays(), "type 3 has 4 GiB or more"),
    ],
)
def test_read_damaged_section_is_refused_with_numbers(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot read this kernel's BTF: .*({message})"):
        read_btf(data)


def test_read_bad_member_or_parameter_is_refused() -> None:
    for kind, item in ((Kind.STRUCT, ("m", 9, 0)), (Kind.FUNC_PROTO, ("p", 9))):
        made = Section()
        made.add(kind, "", 8, [item])
        with pytest.raises(UnsupportedError, match=r"type id [89] is out of range, they end at 2"):
            made.read()


def test_members_of_struct_in_itself_is_refused() -> None:
    made = Section()
    row = made.add(Kind.STRUCT, "s", 4, [("", 1, 0)])
    with pytest.raises(UnsupportedError, match="a struct that holds itself: type 1"):
        members_of(made.read(), row)


def test_declare_prototype_that_takes_itself_is_refused() -> None:
    made = Section()
    row = made.proto(0, ("", 1))
    with pytest.raises(UnsupportedError, match="nests prototypes 9 deep: type 1"):
        declare(made.read(), row)


@settings(deadline=None)
@given(st.integers(0, len(every_kind().data()) - 1))
def test_read_truncated_anywhere_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedError):
        read_btf(every_kind().data()[:size])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(every_kind().data()) - 1), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )
)
def test_read_changed_bytes_is_refused_or_every_row_can_be_used(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(every_kind().data())
    for at, value in changes:
        data[at] = value
    try:
        btf = read_btf(bytes(data))
        for row in range(len(btf.kind)):
            describe(btf, row), members_of(btf, row), values_of(btf, row)
    except UnsupportedError:
        return
    assert len(btf.signature_class) == len(btf.argument_registers) == len(btf.functions.type_id)
