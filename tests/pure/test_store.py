# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache of a kernel's tables: found again at any base, never wrong whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from iced_x86 import Register

from exec.asm import INT3, NOP5, RET, Program, call, jcc, jmp, mem, op, program
from kernweave.analysis.code import Part
from kernweave.analysis.hints import find_btf, prototype_arguments, taken_addresses
from kernweave.analysis.kernel import Hints, KernelTables, Stored, analyse_text
from kernweave.analysis.store import MAX_TEXTS, SCHEMA, Found, find, functions_at, save
from kernweave.image.sites import Sites
from kernweave.model.table import columns

BASE = 0xFFFF_FFFF_8100_0000
SLIDE = 0x2A0_0000
PER_CPU = 0x1_2340  # of a kernel whose per-CPU area begins at zero
NUMBER = 0x1122_3344_5566_7788
ALLOCATED = 0xFF11_0A23_4567_8000  # of a table that is allocated at boot
MOST = 8
NAMES = ("reads", "calls", "locks")
TABLES = ("functions", "instructions", "blocks", "edges", "stretches")
LOCK, DS = b"\xf0", b"\x3e"


@dataclass(frozen=True)
class Kernel:
    """Three small functions at some base, and what the kernel's tables say of them."""

    base: int
    program: Program
    text: bytes
    parts: list[Part]
    sites: Sites

    def analyse(self, arguments: dict[str, int] | None = None) -> Stored:
        hints = Hints(addrs(self.base), arguments or {})
        return analyse_text(self.parts, self.sites, hints, self.text, self.base)

    def at(self, label: str) -> int:
        """Byte position of a label."""
        return self.program.labels[label] - self.base


def addrs(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, np.uint64)


def kernel(slide: int = 0, other: int = 0) -> Kernel:
    """The kernel at a base; `other` makes the code another one."""
    base = BASE + slide
    low = base + 0x1230 - (1 << 64)
    here = program(
        base,
        "reads", NOP5,
        op("MOV_R64_RM64", "rax", mem(disp=base + 0x1230)),
        op("MOV_RM64_IMM32", "rcx", low),
        op("INC_RM64", mem(Register.RIP, disp=PER_CPU, segment=Register.GS)),
        op("ADD_R64_RM64", "rax", mem(Register.RIP, disp=base + 0x1400)),
        op("MOV_R64_IMM64", "rdx", NUMBER),
        op("MOV_R64_IMM64", "rsi", ALLOCATED - (1 << 64)),
        RET, INT3, INT3,
        "calls", NOP5,
        *(op("MOV_R32_IMM32", "eax", other + i) for i in range(4 if other else 0)),
        "label", NOP5,
        "static", call("reads"),
        op("CMP_RM64_IMM8", "rdi", 5), jcc("e", "slow"),
        call("locks"), RET,
        "slow", op("XOR_R32_RM32", "eax", "eax"), RET, INT3,
        "locks", NOP5,
        "lock", LOCK + bytes.fromhex("48ff07"),  # lock incq (%rdi)
        jmp("reads"), INT3, INT3,
    )  # fmt: skip
    labels = here.labels
    starts = [*(labels[name] for name in NAMES), base + len(here.code)]
    parts = [
        Part(name, name, None, start, here.code[start - base : end - base], start, True)
        for name, start, end in zip(NAMES, starts[:-1], starts[1:], strict=True)
    ]
    sites = Sites(
        ftrace=addrs(*starts[:-1]),
        jump_labels=addrs(labels["label"]),
        jump_targets=addrs(labels["slow"]),
        static_calls=addrs(labels["static"]),
    )
    return Kernel(base, here, here.code, parts, sites)


def with_bytes(text: bytes, at: int, new: bytes) -> bytes:
    return text[:at] + new + text[at + len(new) :]


def differences(found: KernelTables, right: KernelTables) -> list[str]:
    """Columns in which two sets of tables differ."""
    pairs = [(name, getattr(found, name), getattr(right, name)) for name in TABLES]
    wrong = [
        f"{name}.{field}"
        for name, ours, theirs in pairs
        for field, column in columns(ours).items()
        if not np.array_equal(column, columns(theirs)[field])
    ]
    return wrong + ["names"] * (found.names != right.names)


def look_up(folder: Path, now: Kernel, text: bytes | None = None) -> Found | None:
    """What is stored for a kernel's text; if anything, then the right tables."""
    found = find(folder, text or now.text, now.base, MOST)
    if found is not None:
        assert differences(found.tables, now.analyse().tables) == []
    return found


def must_find(folder: Path, now: Kernel, text: bytes | None = None) -> Found:
    found = look_up(folder, now, text)
    assert found is not None
    return found


# ---- the same text ------------------------------------------------------------------------------


def test_text_is_found_again_without_a_difference(tmp_path: Path) -> None:
    save(tmp_path, kernel().analyse())
    assert must_find(tmp_path, kernel()).differs.tolist() == []


@pytest.mark.parametrize(("then", "now"), [(0, SLIDE), (SLIDE, 0), (SLIDE, 3 * SLIDE)])
def test_text_at_another_base_is_found_with_its_addresses(
    tmp_path: Path, then: int, now: int
) -> None:
    save(tmp_path, kernel(then).analyse())
    assert kernel(then).text != kernel(now).text
    assert must_find(tmp_path, kernel(now)).differs.tolist() == []


def test_wrong_base_is_told_by_the_operands_that_did_not_move(tmp_path: Path) -> None:
    save(tmp_path, kernel().analyse())
    moved = kernel(SLIDE)
    found = find(tmp_path, moved.text, BASE + 2 * SLIDE, MOST)
    assert found is None or len(found.differs)


@pytest.mark.parametrize(
    ("label", "new"),
    [
        ("label", b"\xe9\x10\0\0\0"),
        ("label", b"\x66\x90\x0f\x1f\0"),
        ("static", b"\x0f\x1f\x44\0\0"),
        ("static", b"\xe8\x78\x56\x34\x12"),
        ("reads", b"\xe8\x78\x56\x34\x12"),
        ("lock", DS),
    ],
)
@pytest.mark.parametrize("slide", [0, SLIDE])
def test_what_the_kernel_patches_itself_is_no_difference(
    tmp_path: Path, label: str, new: bytes, slide: int
) -> None:
    save(tmp_path, kernel().analyse())
    now = kernel(slide)
    text = with_bytes(now.text, now.at(label), new)
    assert text != now.text
    assert must_find(tmp_path, now, text).differs.tolist() == []


@pytest.mark.parametrize(("constant", "same"), [(ALLOCATED, True), (NUMBER, False)])
def test_only_where_memory_was_allocated_is_no_difference(
    tmp_path: Path, constant: int, same: bool
) -> None:
    save(tmp_path, kernel().analyse())
    now = kernel()
    at = now.text.index(constant.to_bytes(8, "little"))
    text = with_bytes(now.text, at, (constant + 0x1234_5678_9000).to_bytes(8, "little"))
    assert (must_find(tmp_path, now, text).differs.tolist() == []) == same


@pytest.mark.parametrize("slide", [0, SLIDE])
def test_one_flipped_byte_concerns_exactly_the_function_that_holds_it(
    tmp_path: Path, slide: int
) -> None:
    stored = kernel().analyse()
    save(tmp_path, stored)
    now = kernel(slide)
    free = np.setdiff1d(np.arange(len(now.text)), stored.print.patched).tolist()
    assert len(free) > 70
    for at in free:
        text = with_bytes(now.text, at, bytes((now.text[at] ^ 1 << at % 8,)))
        found = must_find(tmp_path, now, text)
        where = found.differs.tolist()
        # an operand that moved is compared whole
        operand = np.flatnonzero((stored.print.absolute <= at) & (at < stored.print.absolute + 8))
        assert where == [at] or (len(operand) and at in where), hex(at)
        (row,) = np.flatnonzero(functions_at(found.tables, found.differs, now.base)).tolist()
        assert now.parts[row].start <= now.base + at < now.parts[row].end


def test_text_of_another_cpu_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, kernel().analyse())
    other = bytearray(kernel().text)
    places = np.setdiff1d(np.arange(len(other)), kernel().analyse().print.patched)
    for at in places[: MOST + 1].tolist():
        other[at] ^= 0x55
    assert find(tmp_path, bytes(other), BASE, MOST) is None
    assert find(tmp_path, kernel().text + b"\xcc", BASE, MOST) is None
    assert find(tmp_path, kernel(other=1).text, BASE, 1 << 20) is None


def test_nearest_of_several_texts_is_used(tmp_path: Path) -> None:
    for other in (3, 0, 2):
        save(tmp_path, kernel(other=other).analyse())
    for other in (0, 2, 3):
        assert must_find(tmp_path, kernel(other=other)).differs.tolist() == []


def test_only_the_newest_texts_stay(tmp_path: Path) -> None:
    for other in range(1, MAX_TEXTS + 3):
        save(tmp_path, kernel(other=16 * other).analyse())
        for rank, path in enumerate(
            sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
        ):
            os.utime(path, (rank, rank))
    assert len(list(tmp_path.iterdir())) == MAX_TEXTS
    must_find(tmp_path, kernel(other=16 * (MAX_TEXTS + 2)))


# ---- faults -------------------------------------------------------------------------------------


def stored_folder(tmp_path: Path) -> Path:
    save(tmp_path, kernel().analyse())
    (folder,) = tmp_path.iterdir()
    return folder


def truncate(path: Path, size: Callable[[int], int]) -> None:
    os.truncate(path, size(path.stat().st_size))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def overwrite_start(path: Path) -> None:
    path.write_bytes(bytes(16) + path.read_bytes()[16:])


HARM: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: truncate(path, lambda size: 0),
    "half": lambda path: truncate(path, lambda size: size // 2),
    "one byte short": lambda path: truncate(path, lambda size: size - 1),
    "one byte long": lambda path: truncate(path, lambda size: size + 1),
    "other start": overwrite_start,
    "a folder": become_folder,
}


TORN = f"{SCHEMA}-torn"


@pytest.mark.parametrize("harm", HARM)
def test_torn_file_is_never_used_and_removed(tmp_path: Path, harm: str) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(stored_folder(tmp_path / "stored"), pristine)
    names = sorted(path.name for path in pristine.iterdir())
    assert "table.json" in names and len(names) > 30
    cache = tmp_path / "cache"
    for name in names:
        shutil.copytree(pristine, cache / TORN)
        HARM[harm](cache / TORN / name)
        assert look_up(cache, kernel()) is None, name
        assert list(cache.iterdir()) == [], name
    save(cache, kernel().analyse())
    must_find(cache, kernel())


@pytest.mark.parametrize(
    ("key", "value"), [("schema", 0), ("schema", "1"), ("files", {}), ("files", None)]
)
def test_other_head_is_never_used_and_removed(tmp_path: Path, key: str, value: object) -> None:
    head = stored_folder(tmp_path) / "table.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), key: value}))
    assert look_up(tmp_path, kernel()) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"schema": 1}'])
def test_head_that_is_none_is_never_used(tmp_path: Path, text: str) -> None:
    (stored_folder(tmp_path) / "table.json").write_text(text)
    assert look_up(tmp_path, kernel()) is None
    save(tmp_path, kernel().analyse())
    must_find(tmp_path, kernel())


def test_folder_of_another_version_is_left_alone(tmp_path: Path) -> None:
    stored_folder(tmp_path).rename(tmp_path / f"{SCHEMA + 1}-text")
    assert look_up(tmp_path, kernel()) is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{SCHEMA + 1}-text"]


def test_strangers_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    stored_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    aside = tmp_path / ".aside-of-another"
    aside.mkdir()
    (aside / "table.json").write_text("{")
    must_find(tmp_path, kernel())
    assert aside.exists(), "somebody else is writing it"


# ---- places where nothing can be written --------------------------------------------------------


def test_cache_below_a_file_stores_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "analysis"
    save(folder, kernel().analyse())
    assert look_up(folder, kernel()) is None


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_cache_is_read_and_nothing_else(tmp_path: Path) -> None:
    with mounted(tmp_path / "cache", "size=4m") as cache:
        save(cache, kernel().analyse())
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        save(cache, kernel(other=1).analyse())
        must_find(cache, kernel())
        assert look_up(cache, kernel(other=1)) is None


def test_read_only_cache_of_a_user_stores_nothing(tmp_path: Path) -> None:
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    save(tmp_path, kernel().analyse())
    assert look_up(tmp_path, kernel()) is None
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("size", ["4k", "64k", "120k"])
def test_full_disk_stores_nothing_and_leaves_nothing(tmp_path: Path, size: str) -> None:
    with mounted(tmp_path / "cache", f"size={size}") as cache:
        save(cache, kernel().analyse())
        assert look_up(cache, kernel()) is None
        assert list(cache.iterdir()) == []


@pytest.mark.parametrize("most", [0, 100, 200, 300, 500])
def test_file_that_cannot_grow_stores_nothing_and_leaves_nothing(tmp_path: Path, most: int) -> None:
    stored = kernel().analyse()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        save(tmp_path, stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert look_up(tmp_path, kernel()) is None
    assert list(tmp_path.iterdir()) == []


# ---- several at once ----------------------------------------------------------------------------

ROUNDS = 12


def write_many(folder: Path, first: int, others: int) -> None:
    """Store texts over and over, at changing bases; one process of several."""
    for turn in range(ROUNDS):
        which = first + turn % others
        save(folder, kernel(SLIDE * (turn % 3), other=16 * which).analyse())


@pytest.mark.parametrize(("second", "others"), [(1, 1), (2, 1), (1, 2 * MAX_TEXTS)])
def test_two_writers_and_a_reader_see_right_tables(
    tmp_path: Path, second: int, others: int
) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [
        spawn.Process(target=write_many, args=(tmp_path, first, others)) for first in (1, second)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        look_up(tmp_path, kernel(SLIDE, other=16))
        look_up(tmp_path, kernel(other=32))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert 0 < len(list(tmp_path.iterdir())) <= MAX_TEXTS
    if others == 1:
        must_find(tmp_path, kernel(other=16 * second))


def test_tables_in_use_outlive_their_folder(tmp_path: Path) -> None:
    save(tmp_path, kernel().analyse())
    found = must_find(tmp_path, kernel())
    shutil.rmtree(tmp_path)
    assert differences(found.tables, kernel().analyse().tables) == []


# ---- kernels that lack something ----------------------------------------------------------------


def test_kernel_without_types_or_exports_has_no_hints(tmp_path: Path) -> None:
    def read(addr: int, size: int) -> bytes:
        raise AssertionError("nothing is there")

    def lookup(names: object) -> list[int]:
        return [0] * len(names)  # type: ignore[arg-type]

    assert find_btf(read, lookup) is None
    assert prototype_arguments(None) == {}
    assert taken_addresses(read, lookup, (BASE, BASE + 4096)).tolist() == []
    save(tmp_path, kernel().analyse({}))
    assert must_find(tmp_path, kernel()).tables.functions.arguments.tolist() == [-1] * 3


def test_kernel_without_any_site_is_stored(tmp_path: Path) -> None:
    """No column has rows for what such a kernel does not have."""
    plain = program(BASE, op("XOR_R32_RM32", "eax", "eax"), RET)
    part = Part("f", "f", None, BASE, plain.code, BASE, False)
    bare = replace(kernel(), text=plain.code, parts=[part], sites=Sites())
    save(tmp_path, bare.analyse())
    assert must_find(tmp_path, bare).differs.tolist() == []
