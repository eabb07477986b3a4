# SPDX-License-Identifier: GPL-2.0-or-later
"""One measurement of the analysis, in a process of its own.

    python _analysis_run.py cold|warm|flips|points INPUT FOLDER

INPUT is a pickled `Input`, FOLDER the cache's for its build.  The result is one JSON object.
"""

from __future__ import annotations

import functools
import json
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kernweave.analysis import kernel, liveness, store
from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.expand import select_rows
from kernweave.analysis.kernel import Hints
from kernweave.analysis.normal import make_print
from kernweave.analysis.parts import make_parts
from kernweave.image.sites import Sites
from kernweave.image.symbols import Symbols
from kernweave.model.point import Selector
from kernweave.model.table import columns
from kernweave.splice.place import Rules, place
from kernweave.x86.counter import saves_nothing
from kernweave.x86.decode import REGS_MASK, decode

_FLIPS = 200
_SEED = 20_261_122
_MOST_DIFFERING = 4096
_SELECTORS = (
    Selector.ENTRY, Selector.BLOCKS, Selector.RETURN, Selector.CALLS, Selector.INSNS,
)  # fmt: skip

#: what the parts of a run are called, and where they are done; a part inside another is not in it
_STAGES = (
    (kernel, "decode", "decode"),
    (kernel, "make_print", "print"),
    (kernel, "arrange", "blocks"),
    (liveness, "build_flow", "flow"),
    (kernel, "solve_liveness", "liveness"),
    (kernel, "tables_of", "tables"),
)


@dataclass(frozen=True)
class Input:
    """What is in memory when the analysis begins.

    Attributes:
        release: of the kernel.
        base: run-time address of `text`.
        text: the kernel's text.
        symbols: its functions.
        sites: its tables.
        hints: what its data and types tell.
    """

    release: str
    base: int
    text: bytes
    symbols: Symbols
    sites: Sites
    hints: Hints

    def parts(self) -> list[Part]:
        """Its functions."""
        return make_parts(self.symbols, self.base, self.text, self.sites)


def cold(given: Input, folder: Path) -> dict[str, Any]:
    """Analyse and store; nothing is in the cache."""
    before = _peak_bytes()
    spent: dict[str, float] = defaultdict(float)
    for module, name, stage in _STAGES:
        _time(module, name, stage, spent)
    began = time.perf_counter()
    parts = given.parts()
    spent["functions"] = time.perf_counter() - began
    found = kernel.analyse_text(parts, given.sites, given.hints, given.text, given.base)
    ended = time.perf_counter()
    peak = _peak_bytes()
    store.save(folder, found)
    tables = found.tables
    return {
        "cold_s": ended - began,
        "parts_s": {**spent, "save": time.perf_counter() - ended},
        "input_mib": before / 2**20,
        "peak_mib": peak / 2**20,
        "functions": len(tables.names),
        "instructions": len(tables.instructions.addr),
        "blocks": len(tables.blocks.addr),
        "edges": len(tables.edges.source),
        "stored_mib": sum(file.stat().st_size for file in folder.rglob("*.npy")) / 2**20,
    }


def _time(module: ModuleType, name: str, stage: str, spent: dict[str, float]) -> None:
    """Add the seconds of every call of a function to a stage, less those of stages inside it."""
    plain: Callable[..., Any] = getattr(module, name)

    @functools.wraps(plain)
    def call(*args: Any) -> Any:
        inside = sum(spent.values())
        began = time.perf_counter()
        result = plain(*args)
        spent[stage] += time.perf_counter() - began - (sum(spent.values()) - inside)
        return result

    setattr(module, name, call)


def _peak_bytes() -> int:
    """Most memory this program has had; ru_maxrss would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def warm(given: Input, folder: Path) -> dict[str, Any]:
    """Find what is stored of another boot, and read all of it."""
    began = time.perf_counter()
    found = store.find(folder, given.text, given.base, _MOST_DIFFERING)
    assert found is not None
    changed = store.functions_at(found.tables, found.differs, given.base)
    usable = time.perf_counter()
    tables = found.tables
    for table in (tables.functions, tables.instructions, tables.blocks, tables.edges):
        for column in columns(table).values():
            column.max()
    return {
        "warm_s": usable - began,
        "read_all_s": time.perf_counter() - usable,
        "peak_mib": _peak_bytes() / 2**20,
        "changed": int(changed.sum()),
    }


def flips(given: Input, folder: Path) -> dict[str, Any]:
    """How many functions one flipped byte costs, at places that the kernel does not patch."""
    found = store.find(folder, given.text, given.base, 0)
    assert found is not None and not len(found.differs)
    decoded = decode((part.start, part.code) for part in given.parts())
    known = make_print(given.text, given.base, decoded, given.sites)
    free = np.ones(len(given.text), bool)
    free[known.patched] = False
    free[: given.symbols.starts[0] - given.base] = False
    places = np.random.default_rng(_SEED).choice(np.flatnonzero(free), _FLIPS, replace=False)
    counts: dict[int, int] = defaultdict(int)
    for at in places.tolist():
        text = bytearray(given.text)
        text[at] ^= 1 << at % 8
        one = store.find(folder, bytes(text), given.base, _MOST_DIFFERING)
        assert one is not None and one.differs.tolist() == [at]
        counts[int(store.functions_at(one.tables, one.differs, given.base).sum())] += 1
    return {"flipped": _FLIPS, "functions_invalidated": dict(counts)}


def points(given: Input, folder: Path) -> dict[str, Any]:
    """Of the points that can be placed, how many need no save for a counter."""
    del folder
    code = build_code(given.parts(), given.sites)
    found = liveness.solve_liveness(
        code, given.sites, kernel.closed_parts(code, given.sites, given.hints)
    )
    live = found.before(np.arange(len(code.addr)))
    nothing, dead_register = saves_nothing(live), (live & REGS_MASK) != REGS_MASK
    shares = {}
    for selector in _SELECTORS:
        rows = select_rows(code, _wanted(code, selector), selector)
        placement = place(code, rows, given.sites, Rules())
        placed = rows[np.array([tactic is not None for tactic in placement.tactic], bool)]
        shares[selector.name.lower()] = {
            "points": len(rows),
            "placeable": len(placed),
            "register_dead": float(dead_register[placed].mean()),
            "nothing_saved": float(nothing[placed].mean()),
        }
    return shares


def _wanted(code: Code, selector: Selector) -> list[int]:
    """Rows of the functions; for entries without their cold parts."""
    homes = [row for row, part in enumerate(code.parts) if part.start == part.group]
    return homes if selector is Selector.ENTRY else list(range(len(code.parts)))


def main(args: Sequence[str]) -> None:
    """Run one measurement and print its result."""
    what, source, folder = args
    measure = {"cold": cold, "warm": warm, "flips": flips, "points": points}[what]
    with Path(source).open("rb") as file:
        given = pickle.load(file)
    print(json.dumps(measure(given, Path(folder))))


if __name__ == "__main__":
    # pickled under the name of the module, wherever that was
    from _analysis_run import main as run

    run(sys.argv[1:])
