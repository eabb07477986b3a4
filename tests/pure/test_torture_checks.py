# SPDX-License-Identifier: GPL-2.0-or-later
"""What a torture looks at can be wrong, and is then found; which cells are due."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from guest import Text

import torture
import torture_rows as rows

TEXT = Text(0x1000, bytes(range(200)), (0x1010,))
GOOD = torture.Tally(3, Counter(jmp32=7), Counter(too_short=2), 11)
END = torture.End(TEXT, TEXT, [], [])
PLACES = torture.Places(
    ["f", "g"],
    np.repeat(np.array([0, 1], np.int32), 50),
    np.tile(np.arange(0, 100, 2, dtype=np.uint32), 2),
    np.arange(10),
)
ROW = rows.Row(
    "c0ffee", False, "2026-01-01", "6.1", "6.1.0", "full", 5, 10, 3, {"jmp32": 7}, {}, 11, 0, "ok"
)


def with_byte(at: int) -> Text:
    data = bytearray(TEXT.data)
    data[at] ^= 1
    return replace(TEXT, data=bytes(data))


def test_torture_that_left_all_as_it_was_has_no_problem() -> None:
    assert torture.find_problems(GOOD, END) == []


def test_one_byte_left_different_is_reported_with_its_address() -> None:
    (problem,) = torture.find_problems(GOOD, replace(END, after=with_byte(0x42)))
    assert problem == "1 bytes of text differ: 0x1042"


def test_static_key_that_the_kernel_flipped_is_no_problem() -> None:
    assert torture.find_problems(GOOD, replace(END, after=with_byte(0x14))) == []


def test_site_that_was_not_restored_is_reported() -> None:
    (problem,) = torture.find_problems(replace(GOOD, unrestored=["0x1020"]), END)
    assert problem == "not restored: 0x1020"


def test_complaint_of_the_kernel_and_failed_load_are_reported() -> None:
    failed = torture.judge_shift("vm, fork", 2, "fail: vm: wrong data\nunsuccessful run completed")
    end = replace(END, trouble=["BUG: x"], load=failed)
    complaint, load = torture.find_problems(GOOD, end)
    assert complaint == "the kernel complains: BUG: x"
    assert load.startswith("the load (vm, fork) ended with 2: fail: vm: wrong data")


def test_load_that_says_nothing_of_success_failed() -> None:
    assert torture.judge_shift("vm", 0, "") != []
    assert torture.judge_shift("vm", 0, "info: successful run completed in 12 s") == []


@pytest.mark.parametrize(
    "nothing",
    [{"rounds": 0}, {"placed": Counter[str]()}, {"hits": 0}],
    ids=lambda one: next(iter(one)),
)
def test_torture_that_did_nothing_proves_nothing(nothing: dict[str, object]) -> None:
    (problem,) = torture.find_problems(replace(GOOD, **nothing), END)  # type: ignore[arg-type]
    assert problem.endswith("prove nothing")


def test_same_seed_draws_the_same_points() -> None:
    one, two, other = (torture.Draw(PLACES, seed) for seed in (1, 1, 2))
    first = [one.request() for _ in range(20)]
    assert first == [two.request() for _ in range(20)]
    assert first != [other.request() for _ in range(20)]


def test_draw_names_instructions_and_limits_traps() -> None:
    draw = torture.Draw(PLACES, 3)
    requests = [draw.request() for _ in range(200)]
    known = {f"{name}+{off:#x}" for name in "fg" for off in range(0, 100, 2)}
    assert all(0 < len(one.points) <= 100 and set(one.points) <= known for one in requests)
    trapping = [one for one in requests if "int3" in one.tactics]
    assert 0 < len(trapping) < len(requests) / 2
    assert all(len(one.points) <= torture.MOST_TRAPS for one in trapping)


# ---- rows --------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert rows.read_rows(file) == []
    for row in (ROW, replace(ROW, result="1 bytes of text differ: 0x1")):
        rows.append_row(row, file)
    assert [row.result for row in rows.read_rows(file)] == ["ok", "1 bytes of text differ: 0x1"]
    assert rows.read_rows(file)[0] == ROW


@pytest.mark.parametrize(
    ("change", "done"),
    [
        ({}, True),
        ({"minutes": 60}, True),
        ({"minutes": 9}, False),
        ({"dirty": True}, False),
        ({"result": "not restored: 0x1"}, False),
        ({"commit": "0ld"}, False),
        ({"mode": "voluntary"}, False),
        ({"kernel": "6.12"}, False),
    ],
    ids=str,
)
def test_cell_is_done_by_a_good_row_of_this_commit(change: dict[str, object], done: bool) -> None:
    row = replace(ROW, **change)  # type: ignore[arg-type]
    assert (
        rows.is_done([row], ("6.1", "full", "splice"), 10, lambda commit: commit == "c0ffee")
        == done
    )


def test_checked_out_commit_has_its_own_subject() -> None:
    if not (rows.ROOT / ".git").exists():
        pytest.skip("not in a clone")
    assert rows.has_subject(rows.head())
    assert not rows.has_subject("0" * 40)
