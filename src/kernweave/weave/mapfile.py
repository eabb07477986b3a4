# SPDX-License-Identifier: GPL-2.0-or-later
"""Clone maps in files: for whoever reads a trace when the clones have gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.weave.clonemap import make_map
from kernweave.weave.generation import SUFFIX, Woven
from kernweave.weave.source import I32

Offsets = npt.NDArray[np.uint32]

_KEPT = 8  # files; a line of an older generation stays as it is
_PLACE = re.compile(
    rf"(?P<name>[\w.$]+){re.escape(SUFFIX)}\+0x(?P<at>[0-9a-f]+)/0x[0-9a-f]+"
    r" \[(?P<kmod>kernweave_[0-9]+)\]"
)
_PLACE_AT = re.compile(
    rf"(?P<addr>\b[0-9a-f]{{16}}) (?P<name>[\w.$]+){re.escape(SUFFIX)}"
    r"\+0x(?P<at>[0-9a-f]+)(?![/\w])"
)
_ANY_PLACE = re.compile(rf"{re.escape(SUFFIX)}\+0x[0-9a-f]")


@dataclass(frozen=True)
class Names:
    """Where places in clones are natively.

    Attributes:
        names: of functions and their parts, in the order of their clones.
        sizes: uint32[p], native bytes of each.
        starts: uint32[p], where each clone begins, from the start of the text.
        begins: uint32[b], ascending: where control arrives at copies, and where they begin.
        ends: uint32[e], ascending: where copies end.
        native_begins: uint32[b], native offset of each, in its function or part.
        native_ends: uint32[e], the same.
        base: run-time address of the text.
    """

    names: tuple[str, ...]
    sizes: Offsets
    starts: Offsets
    begins: Offsets
    ends: Offsets
    native_begins: Offsets
    native_ends: Offsets
    base: int

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Of several of one name nobody knows which is meant: they have -1."""
        found: dict[str, int] = {}
        for row, name in enumerate(self.names):
            found[name] = -1 if name in found else row
        return found

    def native(self, name: str, offset: int) -> str | None:
        """`name+0x1f/0x90` for a place in the clone of that name; None: there is no such clone."""
        row = self._rows.get(name, -1)
        if row < 0:
            return None
        at = int(self.starts[row]) + offset
        return f"{name}+{self._native_at(at):#x}/{int(self.sizes[row]):#x}"

    def is_at(self, name: str, offset: int, addr: int) -> bool:
        """Whether a place in the clone of that name has that run-time address."""
        row = self._rows.get(name, -1)
        return row >= 0 and self.base + int(self.starts[row]) + offset == addr

    def _native_at(self, at: int) -> int:
        """Inside of a counter or a copy: where its instruction begins."""
        row = int(np.searchsorted(self.begins, at, side="right")) - 1
        if row >= 0 and self.begins[row] == at:
            return int(self.native_begins[row])
        end = int(np.searchsorted(self.ends, at))
        if end < len(self.ends) and self.ends[end] == at:
            return int(self.native_ends[end])
        return int(self.native_begins[max(row, 0)])


def make_names(woven: Woven, base: int) -> Names:
    """The names of a generation whose text is at `base`."""
    clones = make_map(woven.source, woven.layout, 0)
    functions = woven.source.tables.functions
    part = np.flatnonzero(woven.scope.woven & (functions.first_insn >= 0))
    begins = np.append(clones.arrival, clones.clone)
    native = clones.native - functions.addr[clones.function]
    order = np.argsort(begins, kind="stable")
    return Names(
        names=tuple(woven.names[row] for row in part.tolist()),
        sizes=functions.size[part].astype(np.uint32),
        starts=_offsets(woven.layout.start[functions.first_insn[part]]),
        begins=_offsets(begins[order]),
        ends=_offsets(clones.clone + clones.size),
        native_begins=_offsets(np.append(native, native)[order]),
        native_ends=_offsets(native + clones.length),
        base=base,
    )


def _offsets(values: npt.NDArray[np.uint64] | I32) -> Offsets:
    return np.asarray(values, np.uint32)


def claim_name(folder: Path, taken: set[str]) -> str:
    """A kmod's name that no generation has had yet; its file is there, empty."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem.rpartition("_")[2]) for path in _files(folder)), default=-1) + 1
    while True:
        name = f"kernweave_{number}"
        number += 1
        if name in taken:
            continue
        try:
            (folder / f"{name}.npz").open("x").close()
        except FileExistsError:
            continue
        _drop_old(folder)
        return name


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("kernweave_*.npz"))


def _drop_old(folder: Path) -> None:
    newest = sorted(_files(folder), key=lambda path: int(path.stem.rpartition("_")[2]))
    for path in newest[:-_KEPT]:
        path.unlink(missing_ok=True)
    for part in folder.glob("kernweave_*.part"):  # of who was killed
        if not part.with_suffix(".npz").exists():
            part.unlink(missing_ok=True)


def save_names(folder: Path, kmod: str, names: Names) -> None:
    """Keep the names of a generation."""
    columns = {name: getattr(names, name) for name in Names.__dataclass_fields__}
    columns["base"] = np.uint64(names.base)
    part = folder / f"{kmod}.part"
    with part.open("wb") as file:
        np.savez(file, **{**columns, "names": np.array(names.names)})
    part.replace(folder / f"{kmod}.npz")


def load_names(folder: Path, kmod: str) -> Names | None:
    """The names of a generation; None if they are not there any more."""
    try:
        with np.load(folder / f"{kmod}.npz") as found:
            columns = {name: found[name] for name in Names.__dataclass_fields__}
    except (OSError, EOFError, KeyError):  # gone, claimed only, of another version
        return None
    scalars = {"names": tuple(columns["names"].tolist()), "base": int(columns["base"])}
    return Names(**{**columns, **scalars})


def load_all(folder: Path) -> list[Names]:
    """The names of all generations that are known."""
    found = (load_names(folder, path.stem) for path in _files(folder))
    return [names for names in found if names is not None]


def symbolize(
    line: str, find: Callable[[str], Names | None], known: Callable[[], Sequence[Names]] = tuple
) -> str:
    """A line of a trace with native places instead of those in clones.

    Args:
        line: as the kernel printed it, or perf, which names no generation but the address.
        find: a generation's names, by its kmod's; None: they are not known, and the place stays.
        known: all generations that may be meant by an address.
    """

    def native(match: re.Match[str]) -> str:
        names = find(match["kmod"])
        found = names.native(match["name"], int(match["at"], 16)) if names else None
        return found or match[0]

    def native_at(match: re.Match[str]) -> str:
        name, at, addr = match["name"], int(match["at"], 16), int(match["addr"], 16)
        meant = (names for names in known() if names.is_at(name, at, addr))
        places = {names.native(name, at) for names in meant}
        place = places.pop() if len(places) == 1 else None
        return f"{match['addr']} {place.partition('/')[0]}" if place else match[0]

    return _PLACE_AT.sub(native_at, _PLACE.sub(native, line))


def names_clones(line: str) -> bool:
    """Whether places in clones are left in a line."""
    return _ANY_PLACE.search(line) is not None
