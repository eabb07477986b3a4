# SPDX-License-Identifier: GPL-2.0-or-later
"""Trampolines: counters, displaced instructions, way back; first measured, then bound."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kernweave.errors import InternalError
from kernweave.model.plan import Copies, Plan, Pokes, Tactic
from kernweave.splice.window import SHORT_BYTES, SITE_BYTES
from kernweave.x86.counter import Snippet
from kernweave.x86.poison import poisoned_counter
from kernweave.x86.relocate import JUMP_BYTES, encode_jump, relocate_insn, way_back

ALIGN = 16
COUNTER_BYTES = 8
NOP5 = bytes.fromhex("0f1f440000")


@dataclass(frozen=True, slots=True)
class Displaced:
    """One instruction of a site.

    Attributes:
        addr: run-time address.
        code: its bytes.
        counted: whether a counter goes before its copy.
        dead: mask of registers and flags that are dead before it.
        searched: whether the kernel looks it up by its address when it faults or traps.
        clobber: mask of registers and flags to overwrite before the counter, a check of `dead`.
    """

    addr: int
    code: bytes
    counted: bool = True
    dead: int = 0
    searched: bool = False
    clobber: int = 0

    @property
    def snippet(self) -> Snippet:
        """The counter for this place."""
        return poisoned_counter(self.dead, self.clobber)


@dataclass(frozen=True)
class Entries:
    """Nops of ftrace to be spliced, as columns: there are many, and all are alike.

    Attributes:
        addr: uint64[e], run-time addresses, ascending.
        dead: uint32[e], masks of registers and flags that are dead there.
        clobber: uint32[e], masks of those to overwrite before the counter.
    """

    addr: npt.NDArray[np.uint64]
    dead: npt.NDArray[np.uint32]
    clobber: npt.NDArray[np.uint32]

    def snippets(self) -> list[tuple[Snippet, npt.NDArray[np.int64]]]:
        """Each snippet there is, and the rows that have it."""
        both = self.dead.astype(np.uint64) << np.uint64(32) | self.clobber
        kinds, kind = np.unique(both, return_inverse=True)
        return [
            (poisoned_counter(one >> 32, one & 0xFFFF_FFFF), np.flatnonzero(kind == i))
            for i, one in enumerate(kinds.tolist())
        ]


def make_entries(addr: npt.NDArray[np.uint64], dead: npt.NDArray[np.uint32]) -> Entries:
    """Sort entries by address."""
    order = np.argsort(addr)
    return Entries(addr[order], dead[order], np.zeros(len(addr), np.uint32))


@dataclass(frozen=True, slots=True)
class Site:
    """One place to be spliced.

    Attributes:
        addr: run-time address of its first instruction.
        code: what is replaced, filler behind it included.
        insns: the instructions there.
        tactic: how.
        board: run-time address of the springboard of a site that is too short for a jump.
    """

    addr: int
    code: bytes
    insns: tuple[Displaced, ...]
    tactic: Tactic
    board: int | None = None


@dataclass(frozen=True)
class Draft:
    """Sites with jumps, with the room their trampolines need, before any address is known.

    Attributes:
        entries: nops; their trampolines come first.
        sites: the others, ascending by address.
        entry_off: int64[e], byte position of each entry's trampoline.
        off: int64[n], byte position of each site's trampoline.
        size: bytes of all of them.
    """

    entries: Entries
    sites: tuple[Site, ...]
    entry_off: npt.NDArray[np.int64]
    off: npt.NDArray[np.int64]
    size: int

    @property
    def counted(self) -> int:
        """Number of counters."""
        others = sum(insn.counted for site in self.sites for insn in site.insns)
        return len(self.entries.addr) + others


def draft(entries: Entries, sites: Sequence[Site]) -> Draft:
    """Measure the trampolines; their sizes do not depend on where they go."""
    ordered = tuple(sorted(sites, key=lambda site: site.addr))
    sizes = np.zeros(len(entries.addr), np.int64)
    for snippet, rows in entries.snippets():
        sizes[rows] = len(snippet.code) + JUMP_BYTES
    sizes = np.append(sizes, [len(_encode(site, site.addr)[0]) for site in ordered])
    padded = -(-sizes.astype(np.int64) // ALIGN) * ALIGN
    ends = np.cumsum(padded)
    count = len(entries.addr)
    starts = ends - padded
    size = int(ends[-1]) if len(ends) else 0
    return Draft(entries, ordered, starts[:count], starts[count:], size)


def bind(plan: Draft, base: int, offsets: npt.NDArray[np.uint64]) -> Plan:
    """Fill in addresses.

    Args:
        plan: the draft.
        base: run-time address of the first trampoline.
        offsets: uint64[n], gs-relative address of the counter of each counted instruction.
    """
    entries, count = plan.entries, len(plan.entries.addr)
    code = bytearray(b"\xcc" * plan.size)
    spills: list[tuple[str, ...]] = [()] * count
    for snippet, rows in entries.snippets():
        _write_entries(code, plan, base, offsets, snippet, rows)
        for row in rows.tolist():
            spills[row] = snippet.spills
    addr: list[int] = []
    copy: list[int] = []
    searched: list[tuple[int, int]] = []
    tactics, owner = [], []
    for i, site in enumerate(plan.sites):
        off = int(plan.off[i])
        body, holes, copies = _encode(site, base + off)
        for insn, hole, place in zip(site.insns, holes, copies, strict=True):
            if insn.searched:
                searched.append((place, insn.addr))
            if hole is None:
                continue
            struct.pack_into("<Q", body, hole, int(offsets[count + len(addr)]))
            addr.append(insn.addr)
            copy.append(place)
            spills.append(insn.snippet.spills)
            tactics.append(site.tactic)
            owner.append(site.addr)
        code[off : off + len(body)] = body
    pokes = _pokes(plan, base)
    every = np.append(entries.addr, np.array(addr, np.uint64))
    places = np.append(entries.addr, np.array(owner, np.uint64))
    order = np.argsort(every)
    words = [Tactic.NOP5] * count + tactics
    return Plan(
        base=base,
        code=bytes(code),
        addr=every[order],
        tactic=tuple(words[i] for i in order.tolist()),
        spills=tuple(spills[i] for i in order.tolist()),
        copy=np.append(np.zeros(count, np.uint64), np.array(copy, np.uint64))[order],
        counter=order.astype(np.int32),
        poke=np.searchsorted(pokes.addr, places[order]).astype(np.int32),
        pokes=pokes,
        copies=Copies(*np.array(searched, np.uint64).reshape(-1, 2).T),
    )


def _write_entries(
    code: bytearray,
    plan: Draft,
    base: int,
    offsets: npt.NDArray[np.uint64],
    snippet: Snippet,
    rows: npt.NDArray[np.int64],
) -> None:
    """Trampolines of all entries with one snippet; of a nop nothing is left but the way back."""
    text = np.frombuffer(code, np.uint8)
    start = plan.entry_off[rows]
    body = np.frombuffer(snippet.code + b"\xe9", np.uint8)
    text[start[:, None] + np.arange(len(body))] = body
    hole = offsets[rows].astype("<u8").view(np.uint8).reshape(-1, 8)
    text[start[:, None] + snippet.hole + np.arange(8)] = hole
    jump = _u64(start + len(snippet.code)) + np.uint64(base)
    back = plan.entries.addr[rows] + np.uint64(SITE_BYTES)
    text[start[:, None] + len(body) + np.arange(4)] = _distances(jump, back)


def _u64(addr: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return np.asarray(addr).astype(np.uint64)


def _distances(
    jump: npt.NDArray[np.uint64], target: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint8]:
    """uint8[n, 4]: displacements of five-byte jumps.

    Raises:
        InternalError: a target is more than 2 GiB away.
    """
    away = (target - jump - np.uint64(JUMP_BYTES)).view(np.int64)
    if ((away < -(1 << 31)) | (away >= 1 << 31)).any():
        raise InternalError("a trampoline is out of reach")
    return away.astype("<i4").view(np.uint8).reshape(-1, 4)


def _encode(site: Site, addr: int) -> tuple[bytearray, list[int | None], list[int]]:
    """The trampoline at `addr`; where each counter has its hole, and the copies' addresses."""
    body = bytearray()
    holes: list[int | None] = []
    copies = []
    for insn in site.insns:
        holes.append(len(body) + insn.snippet.hole if insn.counted else None)
        if insn.counted:
            body += insn.snippet.code
        copies.append(addr + len(body))
        body += relocate_insn(insn.code, insn.addr, addr + len(body))
    last = site.insns[-1]
    return body + way_back(last.code, last.addr, addr + len(body)), holes, copies


def _pokes(plan: Draft, base: int) -> Pokes:
    """What is written for entries, sites and springboards."""
    written, old, host = _site_pokes(plan, base)
    group = {site.addr for site in plan.sites if len(site.insns) > 1}
    addrs = sorted(written)
    count = len(plan.entries.addr)
    trampoline = _u64(plan.entry_off) + np.uint64(base)
    heads = np.full((count, JUMP_BYTES), 0xE9, np.uint8)
    heads[:, 1:] = _distances(plan.entries.addr, trampoline)
    jumps = heads.tobytes()
    every = np.append(plan.entries.addr, np.array(addrs, np.uint64))
    order = np.argsort(every)
    olds = [NOP5] * count + [old[addr] for addr in addrs]
    news = [jumps[at : at + JUMP_BYTES] for at in range(0, len(jumps), JUMP_BYTES)]
    news += [bytes(written[addr]) for addr in addrs]
    plain = [False] * count
    return Pokes(
        addr=every[order],
        old=tuple(olds[i] for i in order.tolist()),
        new=tuple(news[i] for i in order.tolist()),
        group=np.array(plain + [addr in group for addr in addrs], bool)[order],
        host=np.array(plain + [addr in host for addr in addrs], bool)[order],
        keep=np.zeros(len(every), bool),
        stay=np.zeros(len(every), bool),
    )


def _site_pokes(plan: Draft, base: int) -> tuple[dict[int, bytearray], dict[int, bytes], set[int]]:
    """New and old bytes by address, and which of them have springboards."""
    offs = plan.off.tolist()
    written = {
        site.addr: bytearray(_head(site, base + off))
        for site, off in zip(plan.sites, offs, strict=True)
    }
    old = {site.addr: site.code for site in plan.sites}
    starts = sorted(written)
    host = set()
    for site, off in zip(plan.sites, offs, strict=True):
        if site.board is None:
            continue
        jump = encode_jump(site.board, base + off)
        around = starts[bisect_right(starts, site.board) - 1]
        at = site.board - around
        if 0 < at < len(written[around]):
            written[around][at : at + SITE_BYTES] = jump
        else:  # in filler
            around = site.board
            written[around], old[around] = bytearray(jump), b"\xcc" * SITE_BYTES
        host.add(around)
    return written, old, host


def _head(site: Site, trampoline: int) -> bytes:
    """The bytes of a site: its jump, and int3."""
    if site.board is None:
        jump = encode_jump(site.addr, trampoline)
    else:
        distance = site.board - (site.addr + SHORT_BYTES)
        if not -128 <= distance < 128:
            raise InternalError(f"springboard {site.board:#x} is out of reach of {site.addr:#x}")
        jump = b"\xeb" + struct.pack("b", distance)
    return jump.ljust(len(site.code), b"\xcc")


def add_traps(plan: Plan, addrs: Sequence[int], first_bytes: bytes) -> Plan:
    """The plan with instructions that trap behind those displaced; their counters follow as well.

    Args:
        plan: the others.
        addrs: run-time addresses, ascending.
        first_bytes: the first native byte of each.
    """
    count = len(addrs)
    return replace(
        plan,
        addr=np.append(plan.addr, np.array(addrs, np.uint64)),
        tactic=plan.tactic + (Tactic.INT3,) * count,
        spills=plan.spills + ((),) * count,
        copy=np.append(plan.copy, np.zeros(count, np.uint64)),
        counter=np.append(plan.counter, np.arange(count, dtype=np.int32) + len(plan.addr)),
        poke=np.append(plan.poke, np.full(count, -1, np.int32)),
        trapped=first_bytes,
    )
