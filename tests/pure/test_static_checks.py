# SPDX-License-Identifier: GPL-2.0-or-later
"""Instruction boundaries of the stock kernels, whole text: another decoder, the kernel's tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kernweave.analysis.code import Part
from kernweave.analysis.imagefile import FileText, load_file
from kernweave.analysis.lookup import RowIndex
from kernweave.image.vmlinuz import KernelFile, open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.x86.decode import Decoded, Flow, decode
from second_decoder import Region, boundaries, differences, explain, explain_invalid

Addrs = npt.NDArray[np.uint64]

TABLE = Path(__file__).parents[2] / "docs" / "boundaries.md"
#: the text that the figures in the table are of
BUILD_IDS = {
    "6.1": "eb4fbcd037e7253717950bf2b93bd5566f47c56f",
    "6.12": "780f2f47538a4f6dd89290f22e78060edf2b1cfb",
    "7.2": "f8da1e460d1343b62f4a8880ae5ce63634756e7a",
}
_CALLS = (Flow.CALL, Flow.JUMP, Flow.BRANCH)


@dataclass(frozen=True)
class Stock:
    """A stock kernel's text, decoded by both decoders."""

    series: str
    kernel: KernelFile
    file: FileText
    parts: list[Part]
    decoded: Decoded

    @cached_property
    def theirs(self) -> Addrs:
        return boundaries(self.parts)

    @cached_property
    def regions(self) -> list[Region]:
        return differences(self.parts, self.decoded.addr, self.theirs)

    @cached_property
    def index(self) -> RowIndex:
        return RowIndex(self.decoded.addr)

    @cached_property
    def replacement_insns(self) -> frozenset[int]:
        """Addresses of the instructions that alternatives put into the text."""
        table = self.file.tables.alternatives
        places = zip(table.replacement.tolist(), table.replacement_length.tolist(), strict=True)
        stretches = [(addr, self.kernel.read(addr, size)) for addr, size in places if size]
        return frozenset(decode(stretches).addr.tolist())

    def inside(self, addrs: Addrs) -> Addrs:
        """Those in the text; init text and text freed after boot are outside."""
        start, end = self.parts[0].start, self.file.symbols.end
        return addrs[(addrs >= np.uint64(start)) & (addrs < np.uint64(end))]


@pytest.fixture(scope="module", params=KERNEL_SERIES)
def stock(request: pytest.FixtureRequest) -> Iterator[Stock]:
    tree = fetched_kernel(request.param)
    if tree is None:
        pytest.skip(f"kernel {request.param} was not fetched (kernweave lab up)")
    kernel = open_image(tree.vmlinuz)
    file = load_file(kernel)
    parts = file.parts()
    decoded = decode((part.start, part.code) for part in parts)
    yield Stock(request.param, kernel, file, parts, decoded)


# ---- another decoder -----------------------------------------------------------------------------


def unexplained(regions: list[Region]) -> list[str]:
    return [str(region) for region in regions if explain(region) is None]


def test_boundaries_are_those_of_another_decoder(stock: Stock) -> None:
    assert unexplained(stock.regions) == []


def test_instructions_we_do_not_know_are_explained(stock: Stock) -> None:
    found = explain_invalid(stock.parts, stock.decoded)
    assert [hex(addr) for addr, why in found if why is None] == []


def test_differences_are_as_many_as_documented(stock: Stock) -> None:
    if stock.kernel.build_id != BUILD_IDS[stock.series]:
        pytest.skip(f"another build of {stock.series}: {stock.kernel.release}")
    found = Counter(filter(None, map(explain, stock.regions)))
    starts = {region.start for region in stock.regions}
    for addr, why in explain_invalid(stock.parts, stock.decoded):
        if why and addr not in starts:
            found[why] += 1
    found["instructions"] = len(stock.decoded.addr)
    assert found == documented(stock.series)


def documented(series: str) -> Counter[str]:
    """One column of the table, without its zeros."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().splitlines()
        if re.fullmatch(r"\| [^|]+ \| [\d,]+ \| [\d,]+ \| [\d,]+ \|", line)
    ]
    column = 1 + KERNEL_SERIES.index(series)
    counts = {row[0]: int(row[column].replace(",", "")) for row in rows}
    return Counter({why: count for why, count in counts.items() if count})


def test_shifted_boundary_is_found(stock: Stock) -> None:
    long = np.flatnonzero(stock.decoded.length > 2)
    rows = long[[7, len(long) // 2, -7]]
    ours = stock.decoded.addr.copy()
    ours[rows[:2]] += np.uint64(1)
    regions = differences(stock.parts, np.delete(ours, rows[2]), stock.theirs)
    assert len(unexplained(regions)) == 3


# ---- the kernel's tables -------------------------------------------------------------------------


def columns(stock: Stock) -> dict[str, Addrs]:
    """Everything but ORC; of an alternative both ends."""
    tables, alternatives = stock.file.tables, stock.file.tables.alternatives
    return {
        "return_sites": tables.return_sites,
        "retpoline_sites": tables.retpoline_sites,
        "call_sites": tables.call_sites,
        "endbr_seals": tables.endbr_seals,
        "lock_prefixes": tables.lock_prefixes,
        "ftrace": tables.ftrace,
        "jump_labels": tables.jump_labels.addr,
        "jump_targets": tables.jump_labels.target,
        "static_calls": tables.static_calls.addr,
        "exceptions": tables.exceptions.addr,
        "fixups": tables.exceptions.fixup,
        "bugs": tables.bugs.addr,
        "alternatives": alternatives.addr,
        "alternatives_end": alternatives.addr + alternatives.length.astype(np.uint64),
    }


def off_boundaries(stock: Stock, addrs: Addrs) -> Addrs:
    inside = stock.inside(addrs)
    return inside[stock.index.rows(inside) < 0]


def test_table_addresses_are_boundaries(stock: Stock) -> None:
    found = {name: off_boundaries(stock, column) for name, column in columns(stock).items()}
    assert {name: list(map(hex, addrs)) for name, addrs in found.items() if len(addrs)} == {}


def test_shifted_table_address_is_found(stock: Stock) -> None:
    for name, column in columns(stock).items():
        shifted = stock.inside(column).copy()
        if not len(shifted):
            assert stock.series == "6.1" and name in ("call_sites", "endbr_seals")
            continue
        longer = stock.decoded.length[stock.index.rows(shifted)] > 1
        row = int(np.flatnonzero(longer)[len(shifted) // 3 % int(longer.sum())])
        shifted[row] += np.uint64(1)
        assert off_boundaries(stock, shifted).tolist() == [int(shifted[row])], name


def unexplained_orc(stock: Stock, addrs: Addrs) -> list[str]:
    """ORC rows off our boundaries for which there is no reason.

    Where an alternative is longer than one instruction objtool describes all variants at once: a
    row may be at a boundary of the replacement, or of the nops behind it.  Some rows begin in
    the int3 filler behind a function, most of which is not decoded, or with 32-bit code.
    """
    file, table = stock.file, stock.file.tables.alternatives
    off = off_boundaries(stock, addrs)
    first = np.searchsorted(table.addr, off - np.uint64(255)).tolist()
    last = np.searchsorted(table.addr, off).tolist()
    found = []
    for addr, start, end in zip(off.tolist(), first, last, strict=True):
        inside = [row for row in range(start, end) if addr < table.addr[row] + table.length[row]]
        filler = file.text[addr - file.base - 1 :][:2] == b"\xcc\xcc"
        if filler or any(start <= addr < end for start, end in file.sites.other_modes):
            continue
        if not any(_in_replacement(stock, row, addr) for row in inside):
            found.append(hex(addr))
    return found


def _in_replacement(stock: Stock, row: int, addr: int) -> bool:
    table = stock.file.tables.alternatives
    size, off = int(table.replacement_length[row]), addr - int(table.addr[row])
    if off >= size:
        return True  # a nop of one byte, until they are joined at boot
    return int(table.replacement[row]) + off in stock.replacement_insns


def test_orc_rows_are_at_boundaries_of_text_or_of_a_replacement(stock: Stock) -> None:
    assert unexplained_orc(stock, stock.file.tables.orc.addr) == []


def test_shifted_orc_row_is_found(stock: Stock) -> None:
    orc = stock.file.tables.orc.addr
    rows = stock.index.rows(orc)
    long = np.flatnonzero((rows >= 0) & (stock.decoded.length[rows] > 1))
    shifted = orc.copy()
    shifted[long[len(long) // 2]] += np.uint64(1)
    assert len(unexplained_orc(stock, shifted)) == 1


def test_retpoline_and_return_sites_lead_to_thunks(stock: Stock) -> None:
    sites, tables = stock.file.sites, stock.file.tables
    for column in (tables.retpoline_sites, tables.return_sites):
        rows = stock.index.rows(stock.inside(column))
        direct = rows[np.isin(stock.decoded.flow[rows], _CALLS)]
        target = stock.decoded.target[direct]
        thunk = (target >= np.uint64(sites.thunks[0])) & (target < np.uint64(sites.thunks[1]))
        assert len(direct) > 1000
        assert (thunk | np.isin(target, sites.return_thunks)).all()
        assert np.isin(target, sites.return_thunks).any() == (column is tables.return_sites)
