# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's tables about its text: known rows come out as columns, the rest is refused."""

import contextlib
import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernweave.errors import UnsupportedError
from kernweave.image.columns import (
    ALTERNATIVE_DIRECT_CALL,
    ALTERNATIVE_NOT,
    BUG_ARGS,
    BUG_ONCE,
    BUG_WARNING,
)
from kernweave.image.orc import ORC_FORMATS, OrcReg, OrcType
from kernweave.image.tables import (
    FREED_AFTER_BOOT,
    TABLE_SYMBOLS,
    Layout,
    Tables,
    find_spans,
    read_tables,
)

TEXT = 0xFFFFFFFF81000000
BOUNDS = (TEXT, TEXT + 0x100000)
TABLES = TEXT + 0x40000
HASH_6_12, HASH_7_2 = (key for key in ORC_FORMATS if key)


class Image:
    """Tables one after the other, `put` where the next one is free."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.spans: dict[str, tuple[int, int]] = {}

    def put(self, name: str, row: str, rows: Sequence[Sequence[int]], relative: int = 0) -> None:
        """Add a table; the first `relative` fields of a row are relative to their place."""
        start = TABLES + len(self.data)
        for values in rows:
            at, kinds = TABLES + len(self.data), row
            fields = list(values)
            for i in range(relative):
                fields[i] -= at + struct.calcsize("<" + kinds[:i])
            self.data += struct.pack("<" + kinds, *fields)
        self.spans[name] = (start, TABLES + len(self.data))

    def put_bytes(self, name: str, data: bytes) -> None:
        start = TABLES + len(self.data)
        self.data += data
        self.spans[name] = (start, start + len(data))

    def read(self, addr: int, size: int) -> bytes:
        return bytes(self.data[addr - TABLES : addr - TABLES + size])

    def tables(self, layout: Layout | None = None) -> Tables:
        return read_tables(self.read, self.spans, BOUNDS, layout)


def hexes(values: Sequence[int] | np.ndarray) -> list[str]:
    return [f"{int(value) - TEXT:#x}" for value in values]


# ---- rows that are the same in every kernel ------------------------------------------------------


def test_exceptions_come_out_by_address_with_the_parts_of_their_data() -> None:
    image = Image()
    rows = [
        (TEXT + 0x90, TEXT + 0x99, 3),
        (TEXT + 0x10, TEXT + 0x80, 17 | 9 << 8 | 2 << 12 | 0xFFF2 << 16),
    ]
    image.put("exceptions", "iiI", rows, 2)
    found = image.tables().exceptions
    assert hexes(found.addr) == ["0x10", "0x90"]
    assert hexes(found.fixup) == ["0x80", "0x99"]
    assert found.type.tolist() == [17, 3]
    assert (found.reg.tolist(), found.flags.tolist()) == ([9, 0], [2, 0])
    assert found.imm.tolist() == [-14, 0]


def test_jump_labels_have_their_flags_split_from_the_key() -> None:
    image = Image()
    key = TEXT + 0x8000
    rows = [(TEXT + 9, TEXT + 50, key | 1), (TEXT + 5, TEXT + 40, key + 16 | 2)]
    image.put("jump_labels", "iiq", rows, 3)
    found = image.tables().jump_labels
    assert hexes(found.addr) == ["0x5", "0x9"]
    assert hexes(found.target) == ["0x28", "0x32"]
    assert hexes(found.key) == ["0x8010", "0x8000"]
    assert (found.branch.tolist(), found.init.tolist()) == ([False, True], [True, False])


def test_static_calls_have_their_flags_split_from_the_key() -> None:
    image = Image()
    key = TEXT + 0x8000
    rows = [(TEXT + 9, key | 1), (TEXT + 5, key + 8 | 2), (TEXT + 7, key)]
    image.put("static_calls", "ii", rows, 2)
    found = image.tables().static_calls
    assert hexes(found.addr) == ["0x5", "0x7", "0x9"]
    assert hexes(found.key) == ["0x8008", "0x8000", "0x8000"]
    assert found.tail.tolist() == [False, False, True]
    assert found.init.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "name", ["return_sites", "retpoline_sites", "call_sites", "endbr_seals", "lock_prefixes"]
)
def test_sites_are_relative_and_sorted(name: str) -> None:
    image = Image()
    image.put(name, "i", [(TEXT + 7,), (TEXT + 3,)], 1)
    tables = image.tables()
    assert hexes(getattr(tables, name)) == ["0x3", "0x7"]
    assert name not in tables.missing and "bugs" in tables.missing


@pytest.mark.parametrize("name", ["ftrace", "denylist"])
def test_functions_are_absolute_and_sorted(name: str) -> None:
    image = Image()
    image.put(name, "Q", [(TEXT + 7,), (TEXT + 3,)])
    assert hexes(getattr(image.tables(), name)) == ["0x3", "0x7"]


def test_empty_rows_are_counted_where_the_kernel_has_them_and_refused_elsewhere() -> None:
    image = Image()
    image.put("lock_prefixes", "i", [(TEXT + 7,)], 1)
    image.put_bytes("lock_prefixes", struct.pack("<i", TEXT + 7 - TABLES - 4) + bytes(12))
    image.put("ftrace", "Q", [(0,), (TEXT + 3,), (0,)])
    tables = image.tables()
    assert (hexes(tables.lock_prefixes), hexes(tables.ftrace)) == (["0x7"], ["0x3"])
    assert tables.empty_rows == {"lock_prefixes": 3, "ftrace": 2}
    image.put("return_sites", "i", [(0,)])
    with pytest.raises(UnsupportedError, match="1 of 1 rows in the kernel's table return_sites"):
        image.tables()


# ---- rows that differ between kernels ------------------------------------------------------------

FLAGS = BUG_WARNING | BUG_ONCE | 9 << 8
FILE = TEXT + 0x3000


@pytest.mark.parametrize(
    ("size", "row", "relative", "first", "second"),
    [
        (8, "iHH", 1, (TEXT + 9, FLAGS, 0), (TEXT + 5, 0, 0)),
        (12, "iiHH", 2, (TEXT + 9, FILE, 77, FLAGS), (TEXT + 5, FILE, 8, 0)),
        (16, "iiiHH", 3, (TEXT + 9, FILE, FILE, 77, FLAGS), (TEXT + 5, FILE, FILE, 8, 16)),
    ],
)
def test_bugs_are_read_with_the_row_size_that_fits(
    size: int, row: str, relative: int, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    image = Image()
    image.put("bugs", row, [first, second] * 6, relative)  # 12 rows: every size divides them
    tables = image.tables()
    assert tables.layout.bug_bytes == size
    bugs = tables.bugs
    assert hexes(bugs.addr) == ["0x5"] * 6 + ["0x9"] * 6
    assert bugs.flags.tolist() == [BUG_ARGS if size == 16 else 0] * 6 + [FLAGS] * 6
    assert bugs.line.tolist() == ([0] * 12 if size == 8 else [8] * 6 + [77] * 6)
    assert set(bugs.file.tolist()) == {0 if size == 8 else FILE}


def test_bugs_of_a_kmod_take_the_layout_of_its_kernel() -> None:
    image = Image()
    image.put("bugs", "iiHH", [(TEXT + 9, FILE, 77, 0)], 2)
    with pytest.raises(UnsupportedError, match="table bugs fit none of the known row sizes"):
        image.tables()
    assert image.tables(Layout(bug_bytes=12)).bugs.line.tolist() == [77]


@pytest.mark.parametrize(
    ("size", "row", "feature", "feature_not"),
    [
        (12, "iiHBB", (0x2E3,), (0x8007,)),
        (14, "iiHHBB", (0x2E3, ALTERNATIVE_DIRECT_CALL), (7, ALTERNATIVE_NOT)),
    ],
)
def test_alternatives_are_read_with_the_row_size_that_fits(
    size: int, row: str, feature: tuple[int, ...], feature_not: tuple[int, ...]
) -> None:
    image = Image()
    rows = [(TEXT + 9, FILE, *feature, 5, 3), (TEXT + 5, FILE + 3, *feature_not, 7, 0)]
    image.put("alternatives", row, rows * 21, 2)  # 42 rows: both sizes divide them
    tables = image.tables()
    assert tables.layout.alternative_bytes == size
    found = tables.alternatives
    assert hexes(found.addr) == ["0x5"] * 21 + ["0x9"] * 21
    assert hexes(found.replacement[[0, 41]]) == ["0x3003", "0x3000"]
    assert found.feature[[0, 41]].tolist() == [7, 0x2E3]
    other = ALTERNATIVE_DIRECT_CALL if size == 14 else 0
    assert found.flags[[0, 41]].tolist() == [ALTERNATIVE_NOT, other]
    assert found.length[[0, 41]].tolist() == [7, 5]
    assert found.replacement_length[[0, 41]].tolist() == [0, 3]


def orc_image(header: str, bits: Sequence[int]) -> Image:
    image = Image()
    if header:
        image.put_bytes("orc_header", bytes.fromhex(header))
    places = [(TEXT + 0x10 * (len(bits) - i),) for i in range(len(bits))]
    image.put("orc_ips", "i", places, 1)
    image.put("orc_entries", "hhH", [(8 * i, -16, value) for i, value in enumerate(bits)])
    return image


END_6_1, REGS_6_1 = 1 << 10, 1 << 8
SIGNAL = 1 << 11
ORC_CASES = {
    # descending addresses: undefined, end of stack, call, registers, part of the registers
    "": (0, END_6_1, 5 | 1 << 4, 5 | REGS_6_1, 9 | REGS_6_1 << 1),
    HASH_6_12: (0, 1 << 8, 5 | 1 << 4 | 2 << 8, 5 | 3 << 8 | SIGNAL, 9 | 4 << 8 | SIGNAL),
    HASH_7_2: (0, 1 << 8, 3 | 8 << 4 | 2 << 8, 3 | 3 << 8 | SIGNAL, 9 | 4 << 8 | SIGNAL),
}


@pytest.mark.parametrize("header", ORC_CASES)
def test_orc_of_every_format_means_the_same(header: str) -> None:
    bits = ORC_CASES[header]
    tables = orc_image(header, bits).tables()
    assert tables.layout.orc is ORC_FORMATS[header]
    orc = tables.orc
    assert hexes(orc.addr) == ["0x10", "0x20", "0x30", "0x40", "0x50"]
    assert orc.type.tolist() == list(OrcType)[::-1]
    assert orc.signal.tolist() == [True, True, False, False, False]
    assert orc.sp_reg.tolist() == [OrcReg.SP_INDIRECT, OrcReg.SP, OrcReg.SP, 0, 0]
    assert orc.bp_reg.tolist() == [0, 0, OrcReg.PREV_SP, 0, 0]
    assert orc.sp_offset.tolist() == [32, 24, 16, 8, 0]
    assert orc.bp_offset.tolist() == [-16] * 5
    assert orc.bits.tolist() == list(bits[::-1])


@pytest.mark.parametrize(
    ("header", "bits", "message"),
    [
        ("00" * 20, 0, "format that is not known: 0000"),
        ("", SIGNAL, "bits 0x0800, more than its format \\(6.1\\)"),
        ("", 3 << 8, "more than its format"),
        ("", 10, "register 10, its format \\(6.1\\) has 10"),
        (HASH_6_12, 5 << 8, "more than its format \\(6.12\\)"),
        (HASH_6_12, 1 << 12, "more than its format"),
        (HASH_7_2, 11 << 4, "register 11, its format \\(7.2\\) has 11"),
    ],
)
def test_orc_of_another_format_is_unsupported(header: str, bits: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        orc_image(header, [bits]).tables()


def test_orc_addresses_and_entries_must_be_equally_many() -> None:
    image = orc_image("", [0, 0])
    start, end = image.spans["orc_entries"]
    image.spans["orc_entries"] = (start, end - 6)
    with pytest.raises(UnsupportedError, match="2 ORC addresses and 1 ORC entries"):
        image.tables()


# ---- spans ---------------------------------------------------------------------------------------


def test_tables_that_are_not_there_are_empty_and_named() -> None:
    tables = Image().tables()
    assert tables.missing == tuple(name for name in TABLE_SYMBOLS if name != "orc_header")
    assert tables.layout == Layout()
    values = [getattr(tables, field.name) for field in dataclasses.fields(tables)]
    columns = [getattr(value, "addr", value) for value in values]
    assert {len(column) for column in columns if isinstance(column, np.ndarray)} == {0}


def test_find_spans_leaves_out_what_a_running_kernel_freed() -> None:
    symbols = [symbol for pair in TABLE_SYMBOLS.values() for symbol in pair]
    addr_of = {symbol: TEXT + i for i, symbol in enumerate(symbols) if "orc" not in symbol}

    def lookup(names: Sequence[str]) -> list[int]:
        return [addr_of.get(name, 0) for name in names]

    at_rest, live = find_spans(lookup, live=False), find_spans(lookup, live=True)
    assert at_rest.keys() - live.keys() == FREED_AFTER_BOOT
    assert not [name for name in at_rest if "orc" in name]
    assert at_rest["exceptions"] == (TEXT, TEXT + 1)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("exceptions", bytes(13), "13 bytes, not a multiple of its rows of 12"),
        ("jump_labels", bytes(24), "24 bytes, not a multiple of its rows of 16"),
        ("static_calls", b"\0\0\0\x7f" + bytes(4), "1 of 1 rows .* lead outside"),
        ("ftrace", struct.pack("<Q", TEXT - 1), "the first to 0xffffffff80ffffff"),
        ("bugs", bytes(10), "the 10 bytes of the kernel's table bugs fit none of .* 8, 12, 16"),
        ("alternatives", bytes(84), "table alternatives fit none of .* 12, 14"),
    ],
)
def test_tables_that_do_not_fit_are_unsupported(name: str, data: bytes, message: str) -> None:
    image = Image()
    image.put_bytes(name, data)
    with pytest.raises(UnsupportedError, match=message):
        image.tables()


def test_tables_that_fit_several_row_sizes_are_unsupported_without_a_layout() -> None:
    image = Image()
    image.put_bytes("alternatives", b"\xfe" * 84)
    wide = (TEXT - 0x2000000, TEXT)
    with pytest.raises(UnsupportedError, match="fit all of the known row sizes 12, 14"):
        read_tables(image.read, image.spans, wide)
    tables = read_tables(image.read, image.spans, wide, Layout(alternative_bytes=14))
    assert tables.alternatives.length.tolist() == [0xFE] * 6


def test_spans_that_cannot_be_read_are_unsupported() -> None:
    image = Image()
    image.spans = {"bugs": (TABLES + 12, TABLES)}
    with pytest.raises(UnsupportedError, match="before"):
        image.tables()
    image.spans = {"bugs": (TABLES, TABLES + 12)}
    with pytest.raises(UnsupportedError, match="12 bytes, 0 were read"):
        image.tables()
    image.spans = {"nonsense": (TABLES, TABLES)}
    with pytest.raises(UnsupportedError, match="no kernel table is called nonsense"):
        image.tables()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*TABLE_SYMBOLS]), st.binary(max_size=96)))
def test_tables_of_any_bytes_are_read_or_unsupported(contents: dict[str, bytes]) -> None:
    image = Image()
    for name, data in contents.items():
        image.put_bytes(name, data)
    with contextlib.suppress(UnsupportedError):
        image.tables()
