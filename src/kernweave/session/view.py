# SPDX-License-Identifier: GPL-2.0-or-later
"""What one session sees of its kernel: symbols, patchable sites, native text."""

from __future__ import annotations

import errno
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.driver.client import Driver, Rows
from kernweave.driver.uapi import Owner
from kernweave.errors import DriverError, Reason, UnsupportedError
from kernweave.image.kallsyms import read_kallsyms
from kernweave.image.sites import TABLES, Ranges, Sites, TableSpans, make_ranges, read_sites
from kernweave.image.special import denied_text, special_text
from kernweave.image.symbols import (
    Symbols,
    build_id,
    load_symbols,
    make_symbols,
    save_symbols,
)

Addrs = npt.NDArray[np.uint64]
Originals = list[tuple[int, bytes]]  # address and bytes; where two overlap the later holds

GENERATION = b"kernweave_"  # and a number: a kmod that holds clones
NOP5 = bytes((0x0F, 0x1F, 0x44, 0x00, 0x00))
_PAGE = 4096
_TRIES = 5
_STT_FUNC = 2
_ELF_SYMBOL = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)


def _u64(values: Sequence[int]) -> Addrs:
    return np.array(values, np.uint64)


class KernelView:
    """Reads through the driver what analysis needs; call `refresh` before each attach."""

    def __init__(self, driver: Driver, cache: Path) -> None:
        """Read the kernel's symbols, or take those stored for its build id."""
        self.driver = driver
        self.build_id: str | None = None
        self._kernel = self._kernel_symbols(cache)
        self._table_spans = self._kernel_tables()
        self._static_ranges = denied_text(self._kernel, driver.lookup)
        self._special = special_text(self._kernel, driver.lookup)
        self._kmods: dict[bytes, Symbols] = {}
        self._images: list[Symbols] | None = None
        self._sites = Sites()
        self._patched: Originals = []
        self._in_use = b""
        self.returns: Addrs = np.zeros(0, np.uint64)
        self._seen: list[tuple[Addrs, Addrs, list[bytes]]] = []

    @property
    def images(self) -> list[Symbols]:
        """Symbols of the kernel and then of each kmod."""
        if self._images is None:
            self.refresh()
        assert self._images is not None
        return self._images

    @property
    def sites(self) -> Sites:
        """The kernel's tables about its text, as of the last `refresh`."""
        if self._images is None:
            self.refresh()
        return self._sites

    # ---- symbols -------------------------------------------------------------------------------

    def _kernel_symbols(self, cache: Path) -> Symbols:
        facts, driver = self.driver.facts, self.driver
        notes = driver.lookup(["__start_notes", "__stop_notes"])
        if all(notes):
            self.build_id = build_id(driver.read(notes[0], notes[1] - notes[0]))
        folder = cache / "symbols" / self.build_id if self.build_id else None
        found = folder and load_symbols(folder, facts.text_start, facts.text_end)
        if found:
            return found
        info = driver.lookup(["vmcoreinfo_data", "vmcoreinfo_size"])
        if not all(info):
            raise UnsupportedError("this kernel has no vmcoreinfo, which names its symbol tables")
        addrs, names = read_kallsyms(driver.read, info[0], info[1], facts.text_start)
        symbols = make_symbols(None, addrs, names, facts.text_start, facts.text_end)
        if folder:
            save_symbols(folder, symbols, facts.text_start)
        return symbols

    def _learn_kmods(self, kmods: Rows) -> None:
        """Read the symbols of kmods not seen before, all of them in two requests."""
        new = kmods[[row.tobytes() not in self._kmods for row in kmods]]
        if not len(new):
            return
        sizes = new["symbols"] * np.uint64(_ELF_SYMBOL.itemsize)
        tables = self._read_many(new["symtab"], new["symtab"] + sizes)
        rows = [np.frombuffer(table, _ELF_SYMBOL) for table in tables]
        # nothing says where the strings end; the page in which the last one begins is there
        last = new["strtab"] + _u64([int(row["name"].max(initial=0)) for row in rows])
        strings = self._read_many(new["strtab"], (last | np.uint64(_PAGE - 1)) + np.uint64(1))
        for kmod, table, text in zip(new, rows, strings, strict=True):
            self._kmods[kmod.tobytes()] = _kmod_symbols(kmod, table, text)

    def _read_many(self, starts: Addrs, ends: Addrs) -> list[bytes]:
        """Bytes of many ranges, one request for all."""
        data = self.driver.read_ranges(starts, ends)
        cuts = np.concatenate(([0], np.cumsum((ends - starts).astype(np.int64)))).tolist()
        return [data[a:b] for a, b in itertools.pairwise(cuts)]

    # ---- tables --------------------------------------------------------------------------------

    def _kernel_tables(self) -> TableSpans:
        names = [name for pair in TABLES.values() for name in pair]
        addrs = self.driver.lookup(names)
        pairs = zip(addrs[::2], addrs[1::2], strict=True)
        return TableSpans(dict(zip(TABLES, pairs, strict=True)))

    def refresh(self) -> None:
        """Read again what changes: kmods, kprobes, ftrace, sites of kernweave.

        A kmod may go while it is read: then all is read once more.
        """
        for left in reversed(range(_TRIES)):
            try:
                self._refresh()
                return
            except DriverError as error:
                if error.errno != errno.EFAULT or not left:
                    raise

    def _refresh(self) -> None:
        driver = self.driver
        self._seen.clear()
        kmods = driver.kmods()
        kmods = kmods[[not is_generation(name) for name in kmods["name"].tolist()]]
        self._learn_kmods(kmods)
        self._images = [self._kernel, *(self._kmods[row.tobytes()] for row in kmods)]
        images = [self._table_spans, *(_kmod_spans(row) for row in kmods)]
        self.returns = driver.returns()
        kprobes, placed = driver.kprobes(), driver.placed()
        self._in_use = kprobes.tobytes() + placed.tobytes()
        self._patched = _originals(kprobes, placed)
        records = driver.ftrace_records()["ip"].astype(np.uint64)
        ours = placed["addr"].astype(np.uint64)
        self._sites = read_sites(
            self._prefetch(images),
            images,
            [*self._static_ranges, *self._loaded_ranges(kmods), *_in_use(kprobes, placed)],
            (records, self._busy_records(np.setdiff1d(records, ours))),
            self._special,
            driver.facts.bug_bytes,
        )

    def note_placed(self) -> None:
        """From here on `read_text` puts back what was placed since `refresh`, too."""
        self._patched = _originals(self.driver.kprobes(), self.driver.placed())

    def is_current(self) -> bool:
        """Whether nobody armed or removed a probe since `refresh`: then the text read is native.

        A probe that came after the first look and left before the second is in neither; what it
        wrote is in the text that was read between them, and is not there any more.
        """
        in_use = self.driver.kprobes().tobytes() + self.driver.placed().tobytes()
        return in_use == self._in_use and all(
            self._read_many(starts, ends) == parts for starts, ends, parts in self._seen
        )

    def is_probed(self, starts: Addrs, ends: Addrs) -> bool:
        """Whether kprobes or sites of kernweave are in some ranges now, armed or not."""
        driver = self.driver
        return any(
            bool(ranges.overlap(starts, ends).any())
            for ranges in _in_use(driver.kprobes(), driver.placed())
        )

    def _loaded_ranges(self, kmods: Rows) -> list[Ranges]:
        """What kmods bring: denylist entries, static-call trampolines, and kernweave's own code."""
        denied = self.driver.denylist()
        own = kmods[kmods["name"] == b"kernweave"]
        spans = [
            image.bounds(addr)
            for image in self.images[1:]
            for name, addrs in image.by_name.items()
            if name.startswith("__SCT__")
            for addr in addrs
        ]
        calls = _u64([value for span in spans if span for value in span]).reshape(-1, 2)
        return [
            make_ranges(Reason.DENYLIST, denied["start"], denied["end"]),
            make_ranges(Reason.DENYLIST, own["text_start"], own["text_end"]),
            make_ranges(Reason.STATIC_CALL, calls[:, 0], calls[:, 1]),
        ]

    def _prefetch(self, images: Sequence[TableSpans]) -> Callable[[int, int], bytes]:
        """Read all tables at once; the result hands them out one by one."""
        spans = [span for image in images for span in image.spans.values() if span[1] > span[0]]
        pairs = _u64([value for span in spans for value in span]).reshape(-1, 2)
        tables = self._read_many(pairs[:, 0], pairs[:, 1])
        found = {start: table for (start, _), table in zip(spans, tables, strict=True)}
        return lambda start, size: found[start][:size]

    def _busy_records(self, records: Addrs) -> Addrs:
        """Ftrace sites that do not hold their nop: ftrace, BPF or livepatch uses them."""
        if not len(records):
            return records
        live = self.driver.read_ranges(records, records + np.uint64(5))
        rows = np.frombuffer(live, np.uint8).reshape(-1, 5)
        return np.asarray(records[(rows != np.frombuffer(NOP5, np.uint8)).any(axis=1)])

    # ---- text ----------------------------------------------------------------------------------

    def read_text(self, starts: Addrs, ends: Addrs, *, watched: bool = True) -> list[bytes]:
        """Native bytes of many ranges: what kprobes and kernweave changed is put back.

        Args:
            starts: of the ranges.
            ends: of the ranges.
            watched: `is_current` compares them.
        """
        if not len(starts):
            return []
        parts = self._read_many(starts, ends)
        if watched:
            self._seen.append((starts, ends, list(parts)))
        return put_back(parts, starts, ends, self._patched)


def is_generation(kmod: bytes) -> bool:
    """Whether a kmod of that name holds clones: they are no code to be looked at."""
    return kmod.startswith(GENERATION) and kmod[len(GENERATION) :].isdigit()


def _kmod_symbols(kmod: np.void, table: Rows, strings: bytes) -> Symbols:
    start, end = int(kmod["text_start"]), int(kmod["text_end"])
    inside = (table["value"] >= start) & (table["value"] < end) & (table["info"] & 15 == _STT_FUNC)
    table = table[inside]
    names = [b"t" + strings[at:].split(b"\0", 1)[0] for at in table["name"].tolist()]
    addrs = table["value"].astype(np.uint64)
    # the text's pages are filled up with zeros, which are no code
    sized = len(table) and (table["size"] > 0).all()
    last = int((table["value"] + table["size"]).max()) if sized else end
    return make_symbols(bytes(kmod["name"]).decode(), addrs, names, start, min(last, end))


def _originals(kprobes: Rows, placed: Rows) -> Originals:
    """What to put back, in that order.

    What a kprobe may overwrite behind its own byte can hold another kprobe, or a site of ours.
    """
    pairs = [(int(row["addr"]), row["original"][: row["len"]].tobytes()) for row in kprobes]
    sites = [(int(row["addr"]), row["original"][: row["len"]].tobytes()) for row in placed]
    return [*pairs, *((addr, original[:1]) for addr, original in pairs), *sites]


def put_back(
    parts: Sequence[bytes], starts: Addrs, ends: Addrs, originals: Originals
) -> list[bytes]:
    """The bytes of some ranges with everything put back that was changed there."""
    found = list(parts)
    for row, inside in _overlaps(originals, starts, ends).items():
        found[row] = _overlay(found[row], int(starts[row]), inside)
    return found


def _overlaps(originals: Originals, starts: Addrs, ends: Addrs) -> dict[int, Originals]:
    """By row of the ranges: what is to be put back there, in its order."""
    first = _u64([addr for addr, _ in originals])
    last = first + _u64([len(original) for _, original in originals])
    found: dict[int, Originals] = defaultdict(list)
    if len(starts) < len(first):
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            hit = np.flatnonzero((first < end) & (last > start)).tolist()
            found[row] += [originals[i] for i in hit]
    else:
        for i, original in enumerate(originals):
            for row in np.flatnonzero((starts < last[i]) & (ends > first[i])).tolist():
                found[row].append(original)
    return found


def _overlay(code: bytes, start: int, originals: Originals) -> bytes:
    text = bytearray(code)
    for addr, original in originals:
        at, end = max(addr, start), min(addr + len(original), start + len(text))
        text[at - start : end - start] = original[at - addr : end - addr]
    return bytes(text)


def _in_use(kprobes: Rows, placed: Rows) -> list[Ranges]:
    others = kprobes["owner"] == Owner.OTHERS
    found = []
    for reason, rows, traps in (
        (Reason.BUSY_KPROBE, kprobes[others], True),
        (Reason.BUSY_PLAN, kprobes[~others], True),
        (Reason.BUSY_PLAN, placed, False),
    ):
        starts = rows["addr"].astype(np.uint64)
        ends = starts + rows["len"].astype(np.uint64)
        found.append(make_ranges(reason, starts, ends, traps))
    return found


def _kmod_spans(row: np.void) -> TableSpans:
    return TableSpans({name: (int(row[name]["start"]), int(row[name]["end"])) for name in TABLES})
