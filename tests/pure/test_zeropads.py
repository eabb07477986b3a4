# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads whose faults are fixed up at home only: known by their type, refused, and in no window."""

from __future__ import annotations

import struct
from dataclasses import replace

import iced_x86 as iced
import numpy as np
import numpy.typing as npt
import pytest

from exec.asm import NOP5, RET, Item, mem, op, program
from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.imagefile import FileText, load_file
from kernweave.errors import Reason
from kernweave.image.columns import EX_TYPE_ZEROPAD
from kernweave.image.sites import Sites, SpecialText, TableSpans, contains, read_sites
from kernweave.image.tables import find_spans
from kernweave.image.vmlinuz import KernelFile, open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.model.plan import Tactic
from kernweave.splice.board import Boards
from kernweave.splice.place import Rules, place

ADDR = 0xFFFF_FFFF_8100_1000
KMOD = 0xFFFF_FFFF_C000_0000
UACCESS = 3
MOVE = op("MOV_R64_RM64", "rax", "rbx")
LOAD = op("MOV_R64_RM64", "rax", mem(iced.Register.RDI))
WIDE_LOAD = op("MOV_R64_RM64", "rax", mem(iced.Register.RDI, disp=0x1000))
MOV_FROM_MEMORY = 0x8B
NONE = np.zeros(0, np.uint64)
TRANSLATED = Rules(translates=True)


def inside(boards: Boards, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool[m]: which rows are displaced, wanted or not; evicted ones have a window, too."""
    return np.asarray((boards.windows.of(rows) >= 0) | (boards.shorts.of(rows) >= 0))


# ---- tables of two images ------------------------------------------------------------------------


def table(start: int, rows: list[tuple[int, int, int]]) -> bytes:
    found = b""
    for addr, fixup, data in rows:
        at = start + len(found)
        found += struct.pack("<iiI", addr - at, fixup - at - 4, data)
    return found


def test_zeropads_of_all_images_are_known_by_the_type_of_their_rows() -> None:
    reg, imm = 9 << 8, 0xFFF2 << 16
    rows = {
        ADDR + 0x800: [
            (ADDR + 0x40, ADDR + 0x43, EX_TYPE_ZEROPAD),
            (ADDR + 0x10, ADDR + 0x80, UACCESS | EX_TYPE_ZEROPAD << 8),
        ],
        KMOD + 0x800: [
            (KMOD + 0x20, KMOD + 0x23, EX_TYPE_ZEROPAD | reg | imm),
            (KMOD + 0x30, KMOD + 0x33, UACCESS | reg),
        ],
    }
    data = {start: table(start, found) for start, found in rows.items()}
    spans = [TableSpans({"exceptions": (at, at + len(found))}) for at, found in data.items()]
    sites = read_sites(
        lambda addr, size: data[addr][:size],
        [*spans, TableSpans({})],
        (),
        (NONE, NONE),
        SpecialText(NONE),
        12,
    )
    assert sites.exceptions.tolist() == [ADDR + 0x10, ADDR + 0x40, KMOD + 0x20, KMOD + 0x30]
    assert sites.fixups.tolist() == [ADDR + 0x80, ADDR + 0x43, KMOD + 0x23, KMOD + 0x33]
    assert sites.zeropads.tolist() == [ADDR + 0x40, KMOD + 0x20]


# ---- a function of some loads --------------------------------------------------------------------


@pytest.mark.parametrize("load", [LOAD, WIDE_LOAD], ids=["group", "jmp32"])
@pytest.mark.parametrize("tactics", [tuple(Tactic), (Tactic.INT3,)], ids=["all", "int3"])
def test_zeropad_is_refused_and_what_is_beside_it_is_not(
    load: Item, tactics: tuple[Tactic, ...]
) -> None:
    source = program(ADDR, NOP5, MOVE, MOVE, load, MOVE, MOVE, RET)
    part = Part("f", "f", None, ADDR, source.code, ADDR, True)
    faulting = np.array([source.at[3]], np.uint64)
    other = Sites(exceptions=faulting, fixups=np.array([source.at[4]], np.uint64))
    sites = replace(other, zeropads=faulting)
    code = build_code([part], sites)
    rows = np.arange(len(code.addr))
    rules = replace(TRANSLATED, tactics=tactics)
    found = place(code, rows, sites, rules)
    assert (found.tactic[3], found.reason[3]) == (None, Reason.EXCEPTION_ENTRY)
    assert found.reason[[1, 2, 4, 5]].tolist() == [None] * 4
    assert not inside(found.boards, rows[3:4]).any()
    if tactics != (Tactic.INT3,):  # it is the type that matters
        assert place(code, rows, other, rules).tactic[3] in (Tactic.JMP32, Tactic.GROUP)


def test_zeropad_is_in_no_window_of_the_instruction_before_it() -> None:
    source = program(ADDR, NOP5, MOVE, LOAD, MOVE, MOVE, RET)
    sites = Sites(zeropads=np.array([source.at[2]], np.uint64))  # no entry: it could be swept in
    code = build_code([Part("f", "f", None, ADDR, source.code, ADDR, True)], sites)
    before = np.array([1])
    assert inside(place(code, before, Sites(), TRANSLATED).boards, np.array([2])).all()
    assert not inside(place(code, before, sites, TRANSLATED).boards, np.array([2])).any()


# ---- stock kernels -------------------------------------------------------------------------------


Stock = tuple[KernelFile, FileText]


@pytest.fixture(scope="module", params=KERNEL_SERIES)
def stock(request: pytest.FixtureRequest) -> Stock:
    tree = fetched_kernel(request.param)
    if tree is None:
        pytest.skip(f"kernel {request.param} was not fetched (kernweave lab up)")
    kernel = open_image(tree.vmlinuz)
    return kernel, load_file(kernel)


def loading(file: FileText) -> tuple[Code, npt.NDArray[np.int64]]:
    """The functions that have zeropads, and the rows of these."""
    parts = [part for part in file.parts() if part.code]
    starts = np.array([part.start for part in parts], np.uint64)
    home = np.unique(np.searchsorted(starts, file.sites.zeropads, side="right") - 1)
    code = build_code([parts[i] for i in home.tolist()], file.sites)
    return code, np.flatnonzero(contains(file.sites.zeropads, code.addr))


def test_stock_zeropads_are_loads_with_their_fixup_right_behind(stock: Stock) -> None:
    sites = stock[1].sites
    code, rows = loading(stock[1])
    assert 10 <= len(rows) == len(sites.zeropads)
    assert {code.raw(row)[1] for row in rows.tolist()} == {MOV_FROM_MEMORY}
    fixups = sites.fixups[np.searchsorted(sites.exceptions, code.addr[rows])]
    assert (fixups == code.addr[rows] + code.length[rows]).all()


def test_stock_zeropads_are_read_alike_from_memory_and_from_the_file(stock: Stock) -> None:
    kernel, file = stock
    spans = {"exceptions": find_spans(kernel.lookup, live=False)["exceptions"]}
    special = SpecialText(NONE)
    found = read_sites(kernel.read, [TableSpans(spans)], (), (NONE, NONE), special, 12)
    for name in ("exceptions", "fixups", "zeropads"):
        assert np.array_equal(getattr(found, name), getattr(file.sites, name)), name


@pytest.mark.parametrize("tactics", [tuple(Tactic), tuple(Tactic)[:-1]], ids=["all", "no int3"])
def test_stock_zeropads_are_refused_and_in_no_window(
    stock: Stock, tactics: tuple[Tactic, ...]
) -> None:
    code, rows = loading(stock[1])
    everything = np.arange(len(code.addr))
    found = place(code, everything, stock[1].sites, replace(TRANSLATED, tactics=tactics))
    assert set(found.reason[rows]) == {Reason.EXCEPTION_ENTRY}
    assert set(found.tactic[rows]) == {None}
    assert not inside(found.boards, rows).any()
    others = np.setdiff1d(everything, rows)
    alone = place(code, others, stock[1].sites, replace(TRANSLATED, tactics=tactics))
    assert not inside(alone.boards, rows).any()
