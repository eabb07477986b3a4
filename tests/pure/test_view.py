# SPDX-License-Identifier: GPL-2.0-or-later
"""Native text: what was changed in some ranges is put back, however many there are of either."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kernweave.session.view import Originals, put_back

BASE = 0xFFFF_FFFF_8100_0000
SIZE = 4000


@pytest.mark.parametrize("ranges", [1, 500])
@pytest.mark.parametrize("patches", [0, 1, 50])
def test_what_was_changed_is_put_back(ranges: int, patches: int) -> None:
    draw = random.Random(ranges * 1000 + patches)
    whole = bytearray(draw.randbytes(SIZE))
    spans = [sorted(draw.sample(range(SIZE + 1), 2)) for _ in range(ranges)]
    found = [bytes(whole[start:end]) for start, end in spans]
    originals: Originals = []
    for _ in range(patches):
        at, original = draw.randrange(-10, SIZE + 10), draw.randbytes(draw.randrange(1, 24))
        originals.append((BASE + at, original))
        for i, byte in enumerate(original):
            if 0 <= at + i < SIZE:
                whole[at + i] = byte
    starts, ends = (
        np.array(column, np.uint64) + np.uint64(BASE) for column in zip(*spans, strict=True)
    )
    assert put_back(found, starts, ends, originals) == [bytes(whole[a:b]) for a, b in spans]
