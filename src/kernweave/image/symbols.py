# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions of a kernel image by name and by address, cached per build id."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SCHEMA = 2
_FUNCTION_TYPES = b"tTwW"


@dataclass(frozen=True)
class Symbols:
    """Function symbols of one image (the kernel, or one kmod), by address.

    Attributes:
        kmod: name of the kmod, None for the kernel itself.
        addr: uint64[n], ascending, equal ones possible (aliases).
        names: n names, in the order of `addr`.
        end: address after the last byte of text.
        local: addresses that no symbol of theirs makes known to other files.
    """

    kmod: str | None
    addr: npt.NDArray[np.uint64]
    names: tuple[str, ...]
    end: int
    local: frozenset[int] = frozenset()

    @cached_property
    def starts(self) -> list[int]:
        """Distinct function addresses, ascending."""
        return [int(addr) for addr in np.unique(self.addr)]

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Distinct addresses of each name, ascending."""
        table: dict[str, list[int]] = {}
        for name, addr in zip(self.names, self.addr.tolist(), strict=True):
            addrs = table.setdefault(name, [])
            if addr not in addrs:
                addrs.append(addr)
        return table

    @cached_property
    def name_at(self) -> dict[int, str]:
        """The preferred name of each function address: the one a user would write."""
        best: dict[int, str] = {}
        for name, addr in zip(self.names, self.addr.tolist(), strict=True):
            if addr not in best or _rank(name) < _rank(best[addr]):
                best[addr] = name
        return best

    def find(self, name: str) -> list[int]:
        """Addresses of the functions called `name`, ascending; empty if there is none."""
        return self.by_name.get(name, [])

    def match(self, glob: str) -> list[tuple[str, int]]:
        """(name, address) of every function matching a glob; aliases of one address once."""
        fits = re.compile(fnmatch.translate(glob)).match
        chosen: dict[int, str] = {}
        for name, addrs in self.by_name.items():
            if name.endswith(".cold") or not fits(name):
                continue
            for addr in addrs:
                if addr not in chosen or _rank(name) < _rank(chosen[addr]):
                    chosen[addr] = name
        return [(chosen[addr], addr) for addr in sorted(chosen)]

    def bounds(self, addr: int) -> tuple[int, int] | None:
        """(start, end) of the function that holds `addr`; end is exclusive."""
        row = bisect_right(self.starts, addr) - 1
        if row < 0 or addr >= self.end:
            return None
        last = row + 1 == len(self.starts)
        return self.starts[row], self.end if last else self.starts[row + 1]

    def near(self, name: str, count: int = 3) -> list[str]:
        """Names that look like `name`, for an error message."""
        import difflib

        pool = [other for other in self.by_name if name in other or other in name]
        pool = pool if len(pool) >= count else list(self.by_name)
        return difflib.get_close_matches(name, pool, count, 0.6)


def _rank(name: str) -> tuple[bool, bool, int, str]:
    marker = name.endswith(("_start", "_end", "_begin"))
    return (marker, name.startswith("__") or "." in name, len(name), name)


def make_symbols(
    kmod: str | None,
    addrs: npt.NDArray[np.uint64],
    typed_names: Iterable[bytes],
    start: int,
    end: int,
) -> Symbols:
    """Keep the functions in [start, end) and sort them.

    Args:
        kmod: whose symbols they are.
        addrs: uint64[n] run-time addresses.
        typed_names: n names with their kallsyms type letter in front.
        start: first byte of text.
        end: after the last byte of text.
    """
    rows = [
        (addr, name[1:].decode(errors="replace"), name[:1] == b"t")
        for addr, name in zip(addrs.tolist(), typed_names, strict=True)
        if start <= addr < end and name[0] in _FUNCTION_TYPES and not name.startswith(b"__pfx_", 1)
    ]
    rows.sort()
    table = np.array([addr for addr, _, _ in rows], np.uint64)
    shared = {addr for addr, _, local in rows if not local}
    hidden = frozenset(addr for addr, _, _ in rows if addr not in shared)
    return Symbols(kmod, table, tuple(name for _, name, _ in rows), end, hidden)


def save_symbols(folder: Path, symbols: Symbols, start: int) -> None:
    """Store the kernel's symbols relative to `start`; written aside, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    np.save(aside / "off.npy", (symbols.addr - np.uint64(start)).astype(np.uint32))
    local = np.array(sorted(symbols.local), np.uint64) - np.uint64(start)
    np.save(aside / "local.npy", local.astype(np.uint32))
    (aside / "names.txt").write_text("\n".join(symbols.names))
    (aside / "table.json").write_text(json.dumps({"schema": _SCHEMA, "rows": len(symbols.names)}))
    try:
        aside.rename(folder)
    except OSError:  # somebody else stored the same build first, or a bad one is in the way
        shutil.rmtree(aside, ignore_errors=True)


def load_symbols(folder: Path, start: int, end: int) -> Symbols | None:
    """The stored symbols at this boot's addresses, or None if they are not there or broken."""
    try:
        head = json.loads((folder / "table.json").read_text())
        off = np.load(folder / "off.npy")
        local = np.load(folder / "local.npy").astype(np.uint64) + np.uint64(start)
        names = tuple((folder / "names.txt").read_text().split("\n"))
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if head != {"schema": _SCHEMA, "rows": len(names)} or len(off) != len(names):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    addr = off.astype(np.uint64) + np.uint64(start)
    return Symbols(None, addr, names, end, frozenset(local.tolist()))


def build_id(notes: bytes) -> str | None:
    """The GNU build id in an ELF notes section, hexadecimal, or None."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = np.frombuffer(notes[at : at + 12], "<u4").tolist()
        name_at = at + 12
        data_at = name_at + (name_size + 3 & ~3)
        if kind == 3 and notes[name_at : name_at + name_size] == b"GNU\0":
            return notes[data_at : data_at + size].hex()
        at = data_at + (size + 3 & ~3)
    return None
