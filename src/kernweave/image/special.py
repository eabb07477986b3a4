# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel's special text, found by the linker's symbols and by name.

There no point may be placed, or calls and jumps mean something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kernweave.errors import Reason
from kernweave.image.denied import is_denied
from kernweave.image.sites import (
    OTHER_MODES,
    RETURN_THUNKS,
    TEXT_RANGES,
    TRACER_CALLS,
    Ranges,
    SpecialText,
    make_ranges,
)
from kernweave.image.symbols import Symbols

Lookup = Callable[[Sequence[str]], Sequence[int]]
Span = tuple[int, int]

_THUNK_BOUNDS = ("__indirect_thunk_start", "__indirect_thunk_end")
_THUNK_PREFIX = "__x86_indirect_"
_STATIC_BOUNDS = ("__static_call_text_start", "__static_call_text_end")


def special_text(symbols: Symbols, lookup: Lookup) -> SpecialText:
    """Thunks, static-call trampolines, and what is not 64-bit code.

    Args:
        symbols: the kernel's functions.
        lookup: address of each symbol of any type, 0 where there is none.
    """
    static = lookup(_STATIC_BOUNDS)
    return SpecialText(
        np.array(_named(symbols, RETURN_THUNKS), np.uint64),
        _thunks(symbols, lookup),
        ((static[0], static[1]),),
        tuple(_bounds(symbols, _named(symbols, OTHER_MODES))),
        np.array(_named(symbols, TRACER_CALLS), np.uint64),
    )


def denied_text(symbols: Symbols, lookup: Lookup) -> list[Ranges]:
    """Stretches in which no point may be placed.

    Args:
        symbols: the kernel's functions.
        lookup: address of each symbol of any type, 0 where there is none.
    """
    edges = lookup([name for first, last, _ in TEXT_RANGES for name in (first, last)])
    found = [
        _ranges(reason, [(start, end)])
        for (_, _, reason), start, end in zip(TEXT_RANGES, edges[::2], edges[1::2], strict=True)
        if start and end > start
    ]
    names = (*filter(is_denied, symbols.by_name), *RETURN_THUNKS)
    spans = [_thunks(symbols, lookup), *_bounds(symbols, _named(symbols, names))]
    return [*found, _ranges(Reason.DENYLIST, [span for span in spans if span[1] > span[0]])]


def _thunks(symbols: Symbols, lookup: Lookup) -> Span:
    """Text through which indirect calls and jumps go.

    Some kernels (6.1) have the linker's symbols for it, later ones (6.12, 7.2) only those of the
    thunks, which lie one behind the other; what is between them is taken along.
    """
    start, end = lookup(_THUNK_BOUNDS)
    if start and end > start:
        return start, end
    names = [name for name in symbols.by_name if name.startswith(_THUNK_PREFIX)]
    spans = _bounds(symbols, _named(symbols, names))
    if not spans:
        return 0, 0
    return min(start for start, _ in spans), max(end for _, end in spans)


def _named(symbols: Symbols, names: Sequence[str]) -> list[int]:
    return [addr for name in names for addr in symbols.find(name)]


def _bounds(symbols: Symbols, addrs: Sequence[int]) -> list[Span]:
    return [span for span in map(symbols.bounds, addrs) if span]


def _ranges(reason: Reason, spans: Sequence[Span]) -> Ranges:
    pairs = np.array(spans, np.uint64).reshape(-1, 2)
    return make_ranges(reason, pairs[:, 0], pairs[:, 1])
