# SPDX-License-Identifier: GPL-2.0-or-later
"""Generations loaded by another loader: code, tables and names are those of the clones."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from kernweave.analysis.imagefile import FileText, load_file
from kernweave.driver.uapi import PatchedKind
from kernweave.errors import UnsupportedError
from kernweave.image.orc import OrcReg
from kernweave.image.tables import Layout as TableLayout
from kernweave.image.tables import Tables, read_tables
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.session.target import read_kmod
from kernweave.weave.bind import translate
from kernweave.weave.clonemap import bugs_of, exceptions_of, make_map
from kernweave.weave.counters import make_counters, select_blocks, select_insns
from kernweave.weave.generation import Template, Woven, make_generation, read_template
from kernweave.weave.handover import make_handover
from kernweave.weave.layout import lay_out
from kernweave.weave.orc import orc_of
from kernweave.weave.scope import find_scope
from loader import Loaded, load
from woven import analysed

SERIES = ("6.1", "6.12")
AWAY = 0x0900_0000
SEED, SAMPLE = 20_261_122, 800
SPANS = {
    "exceptions": "__ex_table", "bugs": "__bug_table", "orc_ips": ".orc_unwind_ip",
    "orc_entries": ".orc_unwind",
}  # fmt: skip
TEMPLATE = Template(
    (b"license=GPL", b"vermagic=1"), bytes(24) + b"kernweave".ljust(872, b"\0"), 24, ()
)


@dataclass(frozen=True)
class Made:
    """A generation of a stock kernel, and the same loaded."""

    file: FileText
    woven: Woven
    data: bytes
    base: int
    loaded: Loaded

    def tables(self) -> Tables:
        """The tables of the generation, read as the kernel's own."""
        spans = {name: self.loaded.span(section) for name, section in SPANS.items()}
        native = self.file.tables.layout
        layout = TableLayout(native.bug_bytes, native.alternative_bytes, native.orc)
        return read_tables(self.loaded.read, spans, (0, (1 << 64) - 1), layout)


@pytest.fixture(scope="module", params=SERIES)
def made(request: pytest.FixtureRequest) -> Made:
    tree = fetched_kernel(request.param)
    if tree is None:
        pytest.skip(f"kernel {request.param} was not fetched (kernweave lab up)")
    file = load_file(open_image(tree.vmlinuz))
    source, _, _ = analysed(file)
    functions = source.tables.functions
    asked = np.zeros(len(functions.addr), bool)
    chosen = np.random.default_rng(SEED).choice(len(asked), SAMPLE, replace=False)
    asked[functions.parent[chosen]] = True
    faulty = source.index.rows(file.tables.exceptions.addr[::10])
    asked[functions.parent[source.tables.instructions.function[faulty[faulty >= 0]]]] = True
    scope = find_scope(source, asked=asked)
    rows, places = zip(
        *(select(source, scope) for select in (select_blocks, select_insns)), strict=True
    )
    counters, _ = make_counters(source, scope, np.concatenate(rows), np.concatenate(places))
    offsets = np.uint64(0x1234_6000) + np.uint64(8) * np.arange(len(counters.insn), dtype=np.uint64)
    names = [f"f{addr:x}" for addr in functions.addr.tolist()]
    woven = Woven(source, scope, lay_out(source, scope, counters), offsets, names, file.tables)
    data = make_generation(woven, TEMPLATE, "kernweave_7")
    base = file.base + AWAY
    return Made(file, woven, data, base, load(data, base))


def test_loaded_text_is_the_translation_for_its_address(made: Made) -> None:
    woven = made.woven
    expected = translate(woven.source, woven.scope, woven.layout, made.base, woven.offsets)
    assert made.loaded.data[".text"] == expected.tobytes()
    assert len(expected) > 100_000


def test_exceptions_are_those_of_the_copies(made: Made) -> None:
    clones = make_map(made.woven.source, made.woven.layout, made.base)
    expected = exceptions_of(made.woven.source, clones)
    found, native = made.tables().exceptions, made.file.tables.exceptions
    assert np.array_equal(found.addr, expected.addr) and len(found.addr) > 20
    assert np.array_equal(found.fixup, expected.other)
    row = np.searchsorted(native.addr, made.woven.source.sites.exceptions[expected.row])
    for name in ("type", "reg", "flags", "imm"):
        assert np.array_equal(getattr(found, name), getattr(native, name)[row]), name


def test_bugs_are_those_of_the_copies(made: Made) -> None:
    clones = make_map(made.woven.source, made.woven.layout, made.base)
    expected = bugs_of(made.woven.source, clones)
    found, native = made.tables().bugs, made.file.tables.bugs
    assert np.array_equal(found.addr, expected.addr) and len(found.addr) > 20
    row = np.searchsorted(native.addr, made.woven.source.sites.bugs[expected.row])
    for name in ("file", "line", "flags"):
        assert np.array_equal(getattr(found, name), getattr(native, name)[row]), name


def test_unwind_rows_are_native_ones_and_what_counters_push(made: Made) -> None:
    woven = made.woven
    expected = orc_of(woven.source, woven.scope, woven.layout, made.file.tables.orc, made.base)
    found, native = made.tables().orc, made.file.tables.orc
    assert np.array_equal(found.addr, expected.addr)
    known = expected.row >= 0
    row = expected.row[known]
    assert np.array_equal(found.bits[known], native.bits[row])
    assert np.array_equal(found.bp_offset[known], native.bp_offset[row])
    deeper = found.sp_offset[known].astype(int) - native.sp_offset[row]
    stack = np.isin(native.sp_reg[row], (OrcReg.SP, OrcReg.SP_INDIRECT))
    assert np.array_equal(deeper, np.where(stack, expected.pushed[known], 0))
    assert (found.sp_reg[~known] == OrcReg.UNDEFINED).all()


def test_names_are_those_of_the_functions_with_a_suffix(made: Made) -> None:
    functions, scope = made.woven.source.tables.functions, made.woven.scope
    wanted = {f"{made.woven.names[row]}.kw" for row in np.flatnonzero(scope.woven).tolist()}
    assert set(made.loaded.functions) == wanted
    ends = {addr + size for addr, size in made.loaded.functions.values()}
    starts = {addr for addr, _ in made.loaded.functions.values()}
    assert min(starts) == made.base
    assert ends - starts == {made.base + made.woven.layout.total}
    assert len(wanted) > 500 and len(functions.addr) > len(wanted)


def test_kmod_says_what_its_kernel_asks_for(made: Made) -> None:
    assert bytes(made.loaded.data[".modinfo"]) == (
        b"license=GPL\0vermagic=1\0depends=\0name=kernweave_7\0"
    )
    module = made.loaded.data[".gnu.linkonce.this_module"]
    assert bytes(module) == bytes(24) + b"kernweave_7".ljust(872, b"\0")


def test_binutils_has_nothing_to_say_against_it(made: Made, tmp_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    (tmp_path / "kw.ko").write_bytes(made.data)
    done = subprocess.run(
        ["readelf", "--wide", "--headers", "--relocs", "--symbols", "kw.ko"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "kernweave" not in done.stdout  # the name is in data only
    assert done.stdout.count("R_X86_64_PC32") > 1000


# ---- templates -----------------------------------------------------------------------------------


def test_template_is_read_back_from_a_kmod(made: Made) -> None:
    found = read_template(made.data)
    assert found.info == TEMPLATE.info
    assert (found.name_at, len(found.module)) == (24, 896)


def test_other_files_are_refused(made: Made) -> None:
    for data in (b"", b"\x7fELF", bytes(100), made.data[:200], made.data[: len(made.data) // 2]):
        with pytest.raises(UnsupportedError):
            read_template(data)
    with pytest.raises(UnsupportedError, match="not the file of a kmod"):
        read_template(made.data.replace(b"\0name=", b"\0game="))


def test_kmods_of_the_kernel_itself_are_templates() -> None:
    for series in KERNEL_SERIES:
        tree = fetched_kernel(series)
        if tree is None:
            pytest.skip(f"kernel {series} was not fetched (kernweave lab up)")
        found = read_template(read_kmod(tree.modules))
        assert any(tree.release.encode() in line for line in found.info)


def test_bug_tables_of_another_layout_are_refused(made: Made) -> None:
    other = TableLayout(8, 14, made.file.tables.layout.orc)
    woven = replace(made.woven, native=replace(made.file.tables, layout=other))
    with pytest.raises(UnsupportedError, match="rows of 8 bytes"):
        make_generation(woven, TEMPLATE, "kernweave_7")


# ---- what the driver is told ---------------------------------------------------------------------

NOP5 = bytes.fromhex("0f1f440000")


def test_driver_is_told_of_entries_and_parts_in_order(made: Made) -> None:
    rows = make_handover(made.woven, "kernweave_0", made.base)
    source, functions = made.woven.source, made.woven.source.tables.functions
    assert (np.diff(rows.entries["site"].astype(np.int64)) > 0).all()
    assert np.isin(rows.entries["site"], source.sites.ftrace).all()
    for row in rows.entries:
        assert made.loaded.read(int(row["slot"]), 5) == NOP5
        assert int(row["clone"]) - int(row["slot"]) == 5
        assert row["body"] == row["site"]
    assert (rows.parts["start"][1:] >= rows.parts["end"][:-1]).all()
    assert int(made.woven.scope.woven.sum()) == len(rows.parts)
    part = np.searchsorted(functions.addr, rows.parts["start"])
    home = np.searchsorted(functions.addr, rows.entries["site"], side="right") - 1
    assert (functions.parent[part] == home[rows.parts["entry"]]).all()


def test_driver_is_told_where_calls_return_and_instructions_begin(made: Made) -> None:
    rows = make_handover(made.woven, "kernweave_0", made.base)
    source, text = made.woven.source, made.woven.source.text
    instructions = source.tables.instructions
    for places in (rows.returns, rows.insns):
        assert (np.diff(places["clone"].astype(np.int64)) >= 0).all()
        assert (np.diff(places["native"].astype(np.int64)) >= 0).all()
    native = rows.insns["native"].astype(np.uint64) + np.uint64(rows.native_base)
    assert np.isin(native, instructions.addr).all()
    clone = np.frombuffer(bytes(made.loaded.data[".text"]), np.uint8)
    ends = rows.returns["native"].astype(np.int64), rows.returns["clone"].astype(np.int64)
    calls = np.isin(text[ends[0] - 5], (0xE8,)) | np.isin(text[ends[0] - 2], (0xFF, 0x41))
    assert calls.mean() > 0.9  # the others have operands or prefixes
    direct = text[ends[0] - 5] == 0xE8
    assert (clone[ends[1] - 5][direct] == 0xE8).mean() > 0.99
    starts = rows.insns["native"].astype(np.int64), rows.insns["clone"].astype(np.int64)
    begins = np.append(np.diff(starts[0]) > 0, True)  # the copies: behind their counters
    plain = begins & (text[starts[0]] == 0x55)  # push %rbp
    assert plain.sum() > 100 and (clone[starts[1][plain]] == 0x55).all()


def test_driver_is_told_of_what_the_kernel_patches(made: Made) -> None:
    rows = make_handover(made.woven, "kernweave_0", made.base).mirrors
    source = made.woven.source
    sites = np.concatenate((source.sites.jump_labels, source.sites.static_calls))
    assert np.isin(rows["native"], sites).all() and len(rows) > 50
    for row in rows:
        at = int(row["native"]) - source.base
        native, clone = source.text[at : at + 5].tobytes(), made.loaded.read(int(row["clone"]), 5)
        if row["kind"] == PatchedKind.JUMP_LABEL and native[0] in b"\xe9\xeb":
            away = int.from_bytes(clone[1:], "little", signed=True)
            assert clone[0] == 0xE9 and int(row["clone"]) + 5 + away == int(row["target"])
        elif row["kind"] == PatchedKind.JUMP_LABEL:
            assert clone == NOP5
        else:
            assert row["len"] == 5 and clone[0] == native[0]
