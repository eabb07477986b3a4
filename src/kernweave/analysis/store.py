# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel's tables on disk, for every later boot of the same text.

Addresses are stored as offsets from the first byte of text.  One folder holds what was found for
one text; a kernel has several where CPUs or boot options differ, because the kernel patches
itself at boot.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.analysis.kernel import KernelTables, Landings, Stored, Stretches
from kernweave.analysis.normal import Print, differing
from kernweave.model.table import Column, columns, load_tables, save_tables
from kernweave.model.tables import Blocks, Edges, Functions, Instructions

SCHEMA = 12  # of the folders; one more whenever the analysis finds something else
MAX_TEXTS = 6  # per build id; the oldest goes
_OURS = f"{SCHEMA}-*"  # another version's folders are left alone, so that two can take turns
_STORED = "[!.]*"  # a name with a dot is being written
_ADDRESSES = {"addr", "last", "target"}
_WITHOUT_ADDRESSES = ("edges", "print")
_NOWHERE = np.uint32(0xFFFF_FFFF)
_KINDS: dict[str, Any] = {
    "functions": Functions,
    "instructions": Instructions,
    "blocks": Blocks,
    "edges": Edges,
    "stretches": Stretches,
    "landings": Landings,
    "print": Print,
}


@dataclass(frozen=True)
class Found:
    """A stored analysis that fits the text at hand.

    Attributes:
        tables: at the addresses of this boot.
        differs: int64[d], byte positions where the text differs from the one analysed.
        print: of that one.
        base: its run-time address then.
    """

    tables: KernelTables
    differs: npt.NDArray[np.int64]
    print: Print
    base: int


def save(folder: Path, found: Stored) -> None:
    """Store under the folder of a build id."""
    arrays: dict[str, Column] = {}
    tables = {name: getattr(found.tables, name) for name in _KINDS if name != "print"}
    for name, table in (*tables.items(), ("print", found.print)):
        relative = name not in _WITHOUT_ADDRESSES
        for field, column in columns(table).items():
            moves = relative and field in _ADDRESSES
            arrays[f"{name}.{field}"] = _offsets(column, found.base) if moves else column
    arrays["names"] = np.frombuffer("\n".join(found.tables.names).encode(), np.uint8)
    digest = hashlib.sha256(found.print.text.tobytes()).hexdigest()[:16]
    save_tables(folder / f"{SCHEMA}-{digest}", {"schema": SCHEMA, "base": found.base}, arrays)
    _forget_oldest(folder)


def find(folder: Path, text: bytes, base: int, most: int) -> Found | None:
    """The stored analysis of the text that differs least from `text`.

    Args:
        folder: of the build id.
        text: the text at hand.
        base: its run-time address.
        most: how many bytes may differ.
    """
    best: tuple[Path, int, Print, npt.NDArray[np.int64]] | None = None
    for one in sorted(folder.glob(_OURS)):
        known = _load_print(one)
        if known is None or len(known[1].text) != len(text):
            continue
        positions = differing(known[1], text, base - known[0])
        if len(positions) <= most and (best is None or len(positions) < len(best[3])):
            best = (one, *known, positions)
    if best is None:
        return None
    path, then, known_print, positions = best
    tables = _load(path, base, then)
    return None if tables is None else Found(tables, positions, known_print, then)


def functions_at(
    tables: KernelTables, positions: npt.NDArray[np.int64], base: int
) -> npt.NDArray[np.bool_]:
    """bool[f]: the functions that hold these byte positions of a text that begins at `base`."""
    found = np.zeros(len(tables.functions.addr), bool)
    addrs = np.uint64(base) + positions.astype(np.uint64)
    rows = np.searchsorted(tables.functions.addr, addrs, side="right") - 1
    found[rows[rows >= 0]] = True
    return found


def _base(folder: Path) -> int | None:
    """Where the text was when it was analysed."""
    try:
        return int(json.loads((folder / "table.json").read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_print(folder: Path) -> tuple[int, Print] | None:
    base = _base(folder)
    arrays = load_tables(folder, {"schema": SCHEMA, "base": base})
    if arrays is None or base is None:
        return None
    try:
        return base, Print(**_of(arrays, "print"))
    except (KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _of(arrays: dict[str, Column], name: str) -> dict[str, Column]:
    prefix = f"{name}."
    return {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}


def _load(folder: Path, base: int, then: int) -> KernelTables | None:
    arrays = load_tables(folder, {"schema": SCHEMA, "base": then})
    if arrays is None:
        return None
    tables: dict[str, Any] = {}
    try:
        for name, kind in _KINDS.items():
            found = _of(arrays, name)
            for field in _ADDRESSES & found.keys():
                if name not in _WITHOUT_ADDRESSES:
                    found[field] = _addresses(found[field], base)
            tables[name] = kind(**found)
        del tables["print"]
        return KernelTables(tuple(arrays["names"].tobytes().decode().split("\n")), **tables)
    except (KeyError, TypeError):  # written by another version
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _offsets(addrs: Column, base: int) -> npt.NDArray[np.uint32]:
    """Addresses from the base on; what is before it (0: none) or not near becomes "nowhere"."""
    off = addrs - np.uint64(base)
    near = (addrs >= np.uint64(base)) & (off < np.uint64(_NOWHERE))
    return np.where(near, off, _NOWHERE).astype(np.uint32)


def _addresses(offsets: Column, base: int) -> npt.NDArray[np.uint64]:
    wide = offsets.astype(np.uint64)
    wide += np.uint64(base)
    wide[offsets == _NOWHERE] = 0
    return wide


def _forget_oldest(folder: Path) -> None:
    kept = sorted(folder.glob(_STORED), key=_age)
    for path in kept[:-MAX_TEXTS]:
        shutil.rmtree(path, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0
