# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of code written to many places at once: each byte of them and no other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kernweave.x86.counter import bind_counters, counter_kinds, counter_snippet
from kernweave.x86.decode import ALL_MASK
from kernweave.x86.scatter import copy_bytes, write_numbers, write_pieces


@pytest.mark.parametrize("seed", range(20))
def test_copied_pieces_are_where_they_should_be_and_nothing_else_changes(seed: int) -> None:
    rng = random.Random(seed)
    size = [rng.randrange(0, 17) for _ in range(rng.randrange(0, 60))]
    text = np.frombuffer(rng.randbytes(400), np.uint8)
    at = [rng.randrange(0, 400 - one) for one in size]
    to, end = [], 0
    for one in size:
        end += rng.randrange(0, 4)
        to.append(end)
        end += one
    out = np.frombuffer(rng.randbytes(end + 3), np.uint8).copy()
    expected = out.copy()
    for here, there, one in zip(at, to, size, strict=True):
        expected[there : there + one] = text[here : here + one]
    copy_bytes(out, np.array(to, np.int32), text, np.array(at, np.int32), np.array(size, np.uint8))
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("size", range(1, 30))
def test_pieces_of_any_size_are_written_exactly(size: int) -> None:
    rng = random.Random(size)
    pieces = np.frombuffer(rng.randbytes(7 * size), np.uint8).reshape(7, size)
    out = np.zeros(7 * (size + 2) + 1, np.uint8)
    to = np.arange(7) * (size + 2) + 1
    write_pieces(out, to, pieces)
    rows = out[1:].reshape(7, size + 2)
    assert (rows[:, :size] == pieces).all()
    assert not rows[:, size:].any()


def test_numbers_are_written_little_endian() -> None:
    out = np.zeros(12, np.uint8)
    write_numbers(out, np.array([1, 7]), np.array([-2, 0x01020304], np.int32))
    assert out.tobytes().hex() == "00fe ffff ff00 0004 0302 0100".replace(" ", "")


def test_counters_of_many_places_are_those_of_each_place() -> None:
    rng = random.Random(1)
    live = [0, ALL_MASK, *(rng.getrandbits(22) for _ in range(500))]
    kind, snippets = counter_kinds(np.array(live, np.uint32))
    for mask, number in zip(live, kind.tolist(), strict=True):
        assert snippets[number] == counter_snippet(ALL_MASK & ~mask)


def test_bound_counters_hold_their_offsets() -> None:
    snippet = counter_snippet(0)
    offsets = np.array([0, 0x1122_3344_5566_7788], np.uint64)
    for code, offset in zip(bind_counters(snippet, offsets), offsets.tolist(), strict=True):
        hole = slice(snippet.hole, snippet.hole + 8)
        assert code[hole].tobytes() == offset.to_bytes(8, "little")
        assert code.tobytes().replace(code[hole].tobytes(), bytes(8)) == snippet.code


def test_depths_follow_pushes_and_pops() -> None:
    assert counter_snippet(ALL_MASK).depths == ()
    both = counter_snippet(0)  # pushfq; push %r11; movabs; inc; pop %r11; popfq
    end = len(both.code)
    assert both.depths == ((1, 8), (3, 16), (end - 1, 8), (end, 0))
    flags = counter_snippet(1 << 11)
    assert flags.depths == ((1, 8), (len(flags.code), 0))
