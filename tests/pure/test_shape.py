# SPDX-License-Identifier: GPL-2.0-or-later
"""Shapes: what is left out of an instruction never changes what it does."""

from __future__ import annotations

import random

import iced_x86 as iced
import numpy as np
import pytest

from kernweave.analysis.lookup import RowIndex
from kernweave.x86.decode import decode
from kernweave.x86.effect import effect_of
from kernweave.x86.shape import FILL, distinct, read_signed, shapes, words

SEEDS = range(8)
_COMMON = (0x48, 0x0F, 0x66, 0x65, 0xF3, 0x41, 0x83, 0xC1, 0xC0, 0x81, 0x8B, 0x05, 0x3A, 0x38)


def random_text(seed: int, size: int = 30_000) -> bytes:
    """Noise in which prefixes, escapes and groups are frequent."""
    rng = random.Random(seed)
    return bytes(
        rng.choice(_COMMON) if rng.random() < 0.4 else rng.randrange(256) for _ in range(size)
    )


def shape_of(text: str) -> str:
    code = bytes.fromhex(text)
    length = np.array([len(code)], np.uint8)
    found, kind = shapes(*words(code, np.zeros(1, np.int64), length), length)
    assert kind.tolist() == [0]
    return found[0].hex()


@pytest.mark.parametrize("seed", SEEDS)
def test_decoding_by_shape_equals_decoding_each_instruction(seed: int) -> None:
    text = random_text(seed)
    columns = decode([(0x1000, text)])
    at = 0
    for row, length in enumerate(columns.length.tolist()):
        effect = effect_of(text[at : at + length])
        found = (columns.flow, columns.trait, columns.reads, columns.writes, columns.disp)
        assert tuple(int(column[row]) for column in found) == effect[:5], (seed, hex(at))
        at += length
    assert at == len(text)


@pytest.mark.parametrize(
    ("code", "shape"),
    [
        ("e812345678", "e811111111"),
        ("0f8412345678", "0f8411111111"),
        ("7405", "7411"),
        ("488b0512345678", "488b0511111111"),
        ("488b4508", "488b4511"),
        ("488b442408", "488b442411"),
        ("488b848412345678", "488b848411111111"),
        ("48c7051234567801020304", "48c7051111111111111111"),
        ("48b80102030405060708", "48b81111111111111111"),
        ("83c001", "83c011"),
        ("c1e000", "c1e000"),
        ("0fa4c305", "0fa4c305"),
        ("4889e5", "4889e5"),
        ("c3", "c3"),
        ("2ee812345678", "2ee811111111"),
        ("c5f877", "c5f877"),
    ],
)
def test_shape_leaves_displacement_and_immediate_out(code: str, shape: str) -> None:
    assert shape_of(code) == shape


def test_fill_is_no_special_value() -> None:
    assert FILL not in (0, 1, 0xFF)


@pytest.mark.parametrize("seed", SEEDS)
def test_distinct_finds_equal_rows_and_only_those(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 40, 5000, np.uint64) << np.uint64(56)
    high = rng.integers(0, 3, 5000, np.uint64)
    length = rng.integers(1, 4, 5000).astype(np.uint8)
    rows, kind = distinct(low, high, length)
    keys = list(zip(low.tolist(), high.tolist(), length.tolist(), strict=True))
    assert len(rows) == len(set(keys))
    assert [keys[rows[k]] for k in kind.tolist()] == keys


def test_distinct_of_nothing_is_nothing() -> None:
    none = np.zeros(0, np.uint64)
    rows, kind = distinct(none, none, np.zeros(0, np.uint8))
    assert (len(rows), len(kind)) == (0, 0)


def test_signed_numbers_of_every_size() -> None:
    text = bytes.fromhex("ff fe ff 80000000 ffffffffffffff7f")
    at = np.array([0, 1, 3, 7])
    size = np.array([1, 2, 4, 8], np.uint8)
    assert read_signed(text, at, size).tolist() == [-1, -2, 0x80, (1 << 63) - 1]


def test_words_do_not_reach_behind_the_instruction() -> None:
    code = bytes(range(1, 16))
    length = np.array([3, 15], np.uint8)
    low, high = words(code, np.zeros(2, np.int64), length)
    assert low.tolist() == [0x030201, 0x0807060504030201]
    assert high.tolist() == [0, 0x0F0E0D0C0B0A09]


@pytest.mark.parametrize("count", [0, 10, 5000])
def test_row_index_finds_rows_however_many_there_are(count: int) -> None:
    base = np.uint64(0xFFFF_FFFF_8100_0000)
    addr = base + np.random.default_rng(1).permutation(2 * count)[:count].astype(np.uint64)
    index = RowIndex(addr)
    far = np.array([0, 1, base - np.uint64(1), base + np.uint64(1 << 20)], np.uint64)
    asked = np.append(addr, far)
    assert index.rows(asked).tolist() == [*range(count), -1, -1, -1, -1]
    assert np.flatnonzero(index.mark(addr[:3], asked[-2:])).tolist() == list(range(min(3, count)))


def test_decoder_agrees_with_a_plain_loop() -> None:
    text = random_text(99)
    lengths = [ins.len for ins in iced.Decoder(64, text)]
    assert decode([(0, text)]).length.tolist() == lengths
