# SPDX-License-Identifier: GPL-2.0-or-later
"""Special text of kernels whose linker has symbols for it, and of those that have only names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kernweave.errors import Reason
from kernweave.image.special import denied_text, special_text
from kernweave.image.symbols import Symbols

TEXT = 0xFFFF_FFFF_8100_0000
LINKER = {
    "__indirect_thunk_start": TEXT + 0x100,
    "__indirect_thunk_end": TEXT + 0x1F0,
    "__static_call_text_start": TEXT + 0x200,
    "__static_call_text_end": TEXT + 0x280,
}
FUNCTIONS = {
    "first": 0x0,
    "__x86_indirect_thunk_rax": 0x100,
    "__x86_indirect_thunk_r15": 0x120,
    "__x86_return_thunk": 0x140,
    "last": 0x300,
    "pvh_start_xen": 0x340,
    "bpf_dispatcher_x": 0x360,
    "__rcu_read_lock.cold": 0x370,
    "end": 0x380,
}


def image(functions: Mapping[str, int]) -> Symbols:
    addr = np.array([TEXT + off for off in functions.values()], np.uint64)
    return Symbols(None, addr, tuple(functions), TEXT + 0x400)


def lookup(names: Sequence[str]) -> list[int]:
    return [LINKER.get(name, 0) for name in names]


def nothing(names: Sequence[str]) -> list[int]:
    return [0 for _ in names]


def denied(addr: int, symbols: Symbols) -> list[Reason]:
    start = np.array([addr], np.uint64)
    found = denied_text(symbols, nothing)
    return [ranges.reason for ranges in found if ranges.overlap(start, start + np.uint64(1))[0]]


def test_linker_symbols_bound_the_thunks() -> None:
    found = special_text(image(FUNCTIONS), lookup)
    assert found.thunks == (TEXT + 0x100, TEXT + 0x1F0)
    assert found.static_text == ((TEXT + 0x200, TEXT + 0x280),)
    assert found.return_thunks.tolist() == [TEXT + 0x140]
    assert found.other_modes == ((TEXT + 0x340, TEXT + 0x360),)


def test_thunks_are_found_by_name_where_the_linker_has_no_symbols() -> None:
    assert special_text(image(FUNCTIONS), nothing).thunks == (TEXT + 0x100, TEXT + 0x140)


def test_kernel_without_thunks_has_none() -> None:
    plain = {name: off for name, off in FUNCTIONS.items() if "thunk" not in name}
    assert special_text(image(plain), nothing).thunks == (0, 0)
    assert denied(TEXT, image(plain)) == []


def test_thunks_and_named_functions_are_denied_whatever_the_linker_names() -> None:
    symbols = image(FUNCTIONS)
    for off in (0x100, 0x13F, 0x140, 0x36F, 0x370):
        assert denied(TEXT + off, symbols) == [Reason.DENYLIST], hex(off)
    for off in (0x0, 0xFF, 0x300, 0x380):
        assert denied(TEXT + off, symbols) == [], hex(off)
