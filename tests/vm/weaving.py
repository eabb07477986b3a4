# SPDX-License-Identifier: GPL-2.0-or-later
"""Weaves functions of a running kernel by hand: a generation, and redirects through an area.

Nothing mirrors what the kernel rewrites, and nobody is brought out of a clone: the lab is for this
only, and is taken down with the generation in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from guest import kmodctl

from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk
from kernweave.driver.link import Link
from kernweave.image.tables import find_spans, read_tables
from kernweave.lab.cache import cache_dir
from kernweave.session.generations import Kernel
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from kernweave.weave.bind import translate
from kernweave.weave.clonemap import CloneMap, Entries, make_entries, make_map
from kernweave.weave.counters import Counters, make_counters
from kernweave.weave.generation import Woven, make_generation, read_template
from kernweave.weave.layout import lay_out
from kernweave.weave.scope import find_scope
from kernweave.weave.source import Source, make_source
from woven import Select

Mask = npt.NDArray[np.bool_]
NAME = "kernweave_0"
_CHUNK = 32 << 10  # bytes of per-CPU memory
_NOP5 = bytes.fromhex("0f1f440000")
_JUMP = 0xE9


def live_source(session: Session) -> Source:
    """The running kernel's own image."""
    image = session.view.images[0]
    text, base = session.analysis._text()
    found = session.analysis.kernel
    if found.changed.any():
        found = session.analysis._analyse(text, base)
    assert base == image.starts[0]
    return make_source(found.tables, text, base, session.view.sites)


@dataclass(frozen=True)
class Live:
    """A loaded generation.

    Attributes:
        session: through which it was made.
        area: holds the counters' memory, and jumps to clones.
        chunks: the counters' memory.
        woven: what the generation was made of.
        base: where its text is.
    """

    session: Session
    area: Area
    chunks: tuple[Chunk, ...]
    woven: Woven
    base: int

    @property
    def counters(self) -> Counters:
        return self.woven.layout.counters

    @cached_property
    def map(self) -> CloneMap:
        return make_map(self.woven.source, self.woven.layout, self.base)

    @cached_property
    def entries(self) -> Entries:
        return make_entries(self.woven.source, self.woven.layout, self.base)

    def text(self) -> bytes:
        """What the loaded text should be."""
        woven = self.woven
        return translate(
            woven.source, woven.scope, woven.layout, self.base, woven.offsets
        ).tobytes()

    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[c]: hits of each counter, of all CPUs."""
        driver = self.session.driver
        parts = [driver.counters(self.area, chunk, _CHUNK).sum(axis=0) for chunk in self.chunks]
        return np.concatenate(parts)[: len(self.counters.insn)]

    def enter(self) -> int:
        """Redirect every woven function's entry; the transaction's number."""
        driver, entries = self.session.driver, self.entries
        jumps = np.zeros((len(entries.native), 5), np.uint8)
        jumps[:, 0] = _JUMP
        at = np.uint64(self.area.addr) + np.uint64(5) * np.arange(len(jumps), dtype=np.uint64)
        jumps[:, 1:] = _distances(at, entries.clone)
        driver.write(self.area, 0, jumps.tobytes())
        driver.seal(self.area)
        pokes = np.zeros(len(jumps), uapi.POKE)
        sites = self.woven.source.sites.ftrace
        pokes["addr"] = sites[np.searchsorted(sites, entries.native)]
        assert (pokes["addr"] - entries.native <= 4).all()
        pokes["len"] = len(_NOP5)
        pokes["old"][:, :5] = np.frombuffer(_NOP5, np.uint8)
        pokes["new_"][:, 0] = _JUMP
        pokes["new_"][:, 1:5] = _distances(pokes["addr"], at)
        return driver.commit(self.area, pokes)


def _distances(at: npt.NDArray[np.uint64], to: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    away = (to - at - np.uint64(5)).view(np.int64).astype("<i4")
    return away.view(np.uint8).reshape(-1, 4)


def weave_live(
    session: Session,
    link: Link,
    series: str,
    source: Source,
    asked: Mask,
    selects: Sequence[Select],
) -> Live:
    """Load clones of some functions; nothing leads to them yet.

    Args:
        session: with the kernel.
        link: another one, to load the kmod.
        series: of the kernel.
        source: its image.
        asked: bool[f], which functions.
        selects: what is counted.
    """
    driver = session.driver
    scope = find_scope(source, asked=asked)
    found = [select(source, scope) for select in selects]
    insn = np.concatenate([rows for rows, _ in found])
    counters, _ = make_counters(source, scope, insn, np.concatenate([at for _, at in found]))
    area = driver.area(5 * max(int(scope.woven.sum()), 1))
    number = -(-8 * len(counters.insn) // _CHUNK)
    chunks = tuple(driver.percpu(area, _CHUNK) for _ in range(number))
    per = np.uint64(_CHUNK // 8)
    row = np.arange(len(counters.insn), dtype=np.uint64)
    starts = np.array([chunk.offset for chunk in chunks], np.int64).view(np.uint64)
    offsets = starts[row // per] + np.uint64(8) * (row % per)
    image = session.view.images[0]
    names = [
        image.name_at.get(addr, f"f{addr:x}") for addr in source.tables.functions.addr.tolist()
    ]
    tables = read_tables(session.read, find_spans(driver.lookup, live=True), (0, (1 << 64) - 1))
    woven = Woven(source, scope, lay_out(source, scope, counters), offsets, names, tables)
    template = read_template(driver_kmod(series, print).read_bytes())
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        file = Path(folder) / f"{NAME}.ko"
        file.write_bytes(make_generation(woven, template, NAME))
        assert kmodctl(link, "load", str(file)) == "ok"
    (row_,) = [one for one in driver.kmods() if bytes(one["name"]).rstrip(b"\0") == NAME.encode()]
    return Live(session, area, chunks, woven, int(row_["text_start"]))


def make_kernel(session: Session, series: str, source: Source) -> Kernel:
    """What generations of a lab's kernel are made with."""
    tables = read_tables(
        session.read, find_spans(session.driver.lookup, live=True), (0, (1 << 64) - 1)
    )
    template = read_template(driver_kmod(series, print).read_bytes())
    return Kernel(session.driver, session._link, template, tables, session.view.images[0])


def pick(source: Source, number: int, seed: int) -> Mask:
    """bool[f]: some functions, drawn by chance."""
    asked = np.zeros(len(source.tables.functions.addr), bool)
    number = min(number, len(asked))
    asked[np.random.default_rng(seed).choice(len(asked), number, replace=False)] = True
    return asked
