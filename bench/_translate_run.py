# SPDX-License-Identifier: GPL-2.0-or-later
"""One translation of a whole kernel, in a process of its own.

    python _translate_run.py INPUT FOLDER SELECTOR

INPUT is a pickled `Input`, FOLDER the cache's for its build, where its analysis is.  The result is
one JSON object.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _analysis_run import Input

from kernweave.analysis import store
from kernweave.weave.bind import translate
from kernweave.weave.clonemap import make_entries, make_map, make_mirror
from kernweave.weave.counters import (
    make_counters,
    select_blocks,
    select_calls,
    select_edges,
    select_entries,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from kernweave.weave.layout import lay_out
from kernweave.weave.scope import Scope, Why, find_scope
from kernweave.weave.source import Source, make_source
from kernweave.x86.counter import Snippet
from kernweave.x86.decode import decode

SELECTORS = {
    "blocks": select_blocks,
    "entry": select_entries,
    "return": select_returns,
    "calls": select_calls,
    "edges": select_edges,
    "loads": select_loads,
    "stores": select_stores,
    "insns": select_insns,
}
_AWAY = 256 << 20  # from the text to the code cache, bytes


def measure(given: Input, folder: Path, selector: str) -> dict[str, Any]:
    """Translate once; the tables come from the cache and are read for the first time."""
    times = [time.perf_counter()]
    found = store.find(folder, given.text, given.base, 0)
    assert found is not None and not len(found.differs)
    times.append(time.perf_counter())
    loaded = time.process_time()
    source = make_source(found.tables, given.text, given.base, given.sites)
    scope = find_scope(source)
    times.append(time.perf_counter())
    counters, number = make_counters(source, scope, *SELECTORS[selector](source, scope))
    layout = lay_out(source, scope, counters)
    times.append(time.perf_counter())
    offsets = np.arange(len(counters.insn), dtype=np.uint64) * np.uint64(8)
    code = translate(source, scope, layout, given.base + _AWAY, offsets)
    times.append(time.perf_counter())
    for table in (make_map, make_entries):
        table(source, layout, given.base + _AWAY)
    make_mirror(source, scope, layout, given.base + _AWAY)
    times.append(time.perf_counter())
    cpu = time.process_time() - loaded
    decode((part.start, part.code) for part in given.parts())
    decoded = time.perf_counter() - times[-1]
    names = ("load", "scope", "layout", "bytes", "maps")
    parts = dict(zip(names, np.diff(times).round(4).tolist(), strict=True))
    kinds = np.bincount(layout.snippets.kind, minlength=len(layout.snippets.kinds))
    return {
        "translate_s": sum(parts.values()) - parts["load"],
        "cpu_s": cpu,
        "decode_s": decoded,
        "parts_s": parts,
        **_figures(source, scope),
        "counters": len(counters.insn),
        "not_possible": int((number < 0).sum()),
        "saves_nothing": _share(kinds, layout.snippets.kinds),
        "code_mib": len(code) / 2**20,
        "native_mib": _native_bytes(source, scope) / 2**20,
    }


def _share(kinds: Any, snippets: Sequence[Snippet]) -> float:
    free = sum(int(n) for n, one in zip(kinds, snippets, strict=True) if not one.spills)
    return free / max(int(kinds.sum()), 1)


def _figures(source: Source, scope: Scope) -> dict[str, Any]:
    tables = source.tables
    homes = tables.functions.parent == np.arange(len(tables.functions.addr))
    woven = scope.woven[tables.blocks.function]
    bails = Counter(Why(why).name.lower() for why in scope.block[scope.bail_outs].tolist())
    left = Counter(Why(why).name.lower() for why in scope.function[homes & ~scope.woven].tolist())
    return {
        "functions": int((homes & scope.woven).sum()),
        "functions_left": dict(left),
        "instructions": int(scope.woven[tables.instructions.function].sum()),
        "blocks": int(woven.sum()),
        "bail_outs": int(scope.bail_outs.sum()),
        "bail_out_share": float(scope.bail_outs.sum() / woven.sum()),
        "bail_out_reasons": dict(bails),
    }


def _native_bytes(source: Source, scope: Scope) -> int:
    chosen = scope.woven[source.tables.instructions.function]
    return int(source.tables.instructions.length[chosen].sum())


def main(args: Sequence[str]) -> None:
    """Measure once and print the result."""
    path, folder, selector = args
    with Path(path).open("rb") as file:
        given = pickle.load(file)
    print(json.dumps(measure(given, Path(folder), selector)))


if __name__ == "__main__":
    # the input is pickled under the name of its module
    main(sys.argv[1:])
