# SPDX-License-Identifier: GPL-2.0-or-later
"""Places in clones to native ones, from a file: exact at boundaries, the instruction within."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kernweave.weave.mapfile import (
    Names,
    claim_name,
    load_all,
    load_names,
    names_clones,
    save_names,
    symbolize,
)


def offsets(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


#: two clones: instructions of 2, 5 and 1 bytes with counters of 14 before the first and the last
NAMES = Names(
    names=("vfs_read", "fput", "twice", "twice"),
    sizes=offsets(8, 4, 1, 1),
    starts=offsets(0, 48, 64, 80),
    begins=offsets(0, 14, 16, 16, 21, 35, 48, 48),
    ends=offsets(16, 21, 36, 52),
    native_begins=offsets(0, 0, 2, 2, 7, 7, 0, 0),
    native_ends=offsets(2, 7, 8, 4),
    base=0xFFFFFFFFC0660000,
)


def test_boundaries_are_exact_and_counters_belong_to_what_they_count() -> None:
    expected = {0: 0, 3: 0, 14: 0, 15: 0, 16: 2, 20: 2, 21: 7, 30: 7, 35: 7, 36: 8}
    found = {at: NAMES.native("vfs_read", at) for at in expected}
    assert found == {at: f"vfs_read+{native:#x}/0x8" for at, native in expected.items()}
    assert NAMES.native("fput", 4) == "fput+0x4/0x4"
    assert NAMES.native("twice", 0) is None
    assert NAMES.native("nobody", 0) is None


def test_places_with_their_address_need_no_generation(tmp_path: Path) -> None:
    for kmod in ("kernweave_3", "kernweave_4"):  # the same code at the same address
        save_names(tmp_path, kmod, NAMES)
    known = load_all(tmp_path)
    assert [names.base for names in known] == [NAMES.base, NAMES.base]
    line = "\t    ffffffffc0660015 vfs_read.kw+0x15 ([kernel.kallsyms])\n"
    found = symbolize(line, lambda _: None, lambda: known)
    assert found == "\t    ffffffffc0660015 vfs_read+0x7 ([kernel.kallsyms])\n"
    elsewhere = line.replace("0015 ", "0016 ")
    assert symbolize(elsewhere, lambda _: None, lambda: known) == elsewhere
    assert names_clones(elsewhere) and not names_clones(found)
    others = [*known, replace(NAMES, native_begins=NAMES.native_begins + 1)]
    assert symbolize(line, lambda _: None, lambda: others) == line


def test_files_of_another_version_are_not_known(tmp_path: Path) -> None:
    np.savez(tmp_path / "kernweave_5.npz", names=np.array(["vfs_read"]))
    assert load_names(tmp_path, "kernweave_5") is None and load_all(tmp_path) == []


def test_lines_keep_everything_but_places_in_known_clones(tmp_path: Path) -> None:
    save_names(tmp_path, "kernweave_3", NAMES)
    line = "[  1.5]  ? vfs_read.kw+0x15/0x30 [kernweave_3] ksys_read+0x1/0x2 fput.kw+0x0/0x4 [x]\n"
    native = "[  1.5]  ? vfs_read+0x7/0x8 ksys_read+0x1/0x2 fput.kw+0x0/0x4 [x]\n"
    assert symbolize(line, lambda kmod: load_names(tmp_path, kmod)) == native
    other = line.replace("_3]", "_4]")
    assert symbolize(other, lambda kmod: load_names(tmp_path, kmod)) == other


def test_names_of_kmods_are_new_and_old_files_go(tmp_path: Path) -> None:
    claimed = [claim_name(tmp_path, {"kernweave_2"}) for _ in range(12)]
    assert claimed == [f"kernweave_{number}" for number in (0, 1, *range(3, 13))]
    assert len(list(tmp_path.iterdir())) == 8
    assert load_names(tmp_path, claimed[-1]) is None  # claimed, not saved
