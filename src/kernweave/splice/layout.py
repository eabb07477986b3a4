# SPDX-License-Identifier: GPL-2.0-or-later
"""Trampolines: counters, displaced instructions, way back; first measured, then bound."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.errors import InternalError
from kernweave.model.plan import Plan, Pokes, Tactic
from kernweave.splice.window import SHORT_BYTES, SITE_BYTES
from kernweave.x86.counter import Snippet, counter_snippet
from kernweave.x86.poison import poison_code
from kernweave.x86.relocate import encode_jump, relocate_insn, way_back

ALIGN = 16
COUNTER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Displaced:
    """One instruction of a site.

    Attributes:
        addr: run-time address.
        code: its bytes.
        counted: whether a counter goes before its copy.
        dead: mask of registers and flags that are dead before it.
        clobber: mask of registers and flags to overwrite before the counter, a check of `dead`.
    """

    addr: int
    code: bytes
    counted: bool = True
    dead: int = 0
    clobber: int = 0

    @property
    def snippet(self) -> Snippet:
        """The counter for this place."""
        counter = counter_snippet(self.dead)
        if not self.clobber:
            return counter
        poison = poison_code(self.clobber)
        return replace(counter, code=poison + counter.code, hole=len(poison) + counter.hole)


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
        sites: ascending by address.
        off: int64[n], byte position of each trampoline.
        size: bytes of all of them.
    """

    sites: tuple[Site, ...]
    off: npt.NDArray[np.int64]
    size: int

    @property
    def counted(self) -> int:
        """Number of counters."""
        return sum(insn.counted for site in self.sites for insn in site.insns)


def draft(sites: Sequence[Site]) -> Draft:
    """Measure the trampolines; their sizes do not depend on where they go."""
    ordered = tuple(sorted(sites, key=lambda site: site.addr))
    sizes = np.array([len(_encode(site, site.addr)[0]) for site in ordered])
    padded = -(-sizes.astype(np.int64) // ALIGN) * ALIGN
    ends = np.cumsum(padded)
    return Draft(ordered, ends - padded, int(ends[-1]) if len(ends) else 0)


def bind(plan: Draft, base: int, offsets: npt.NDArray[np.uint64]) -> Plan:
    """Fill in addresses.

    Args:
        plan: the draft.
        base: run-time address of the first trampoline.
        offsets: uint64[n], gs-relative address of the counter of each counted instruction.
    """
    code = bytearray(b"\xcc" * plan.size)
    addr: list[int] = []
    copy: list[int] = []
    spills, tactics, owner = [], [], []
    for i, site in enumerate(plan.sites):
        off = int(plan.off[i])
        body, holes, copies = _encode(site, base + off)
        counted = [insn for insn in site.insns if insn.counted]
        for insn, hole, place in zip(counted, holes, copies, strict=True):
            struct.pack_into("<Q", body, hole, int(offsets[len(addr)]))
            addr.append(insn.addr)
            copy.append(place)
            spills.append(insn.snippet.spills)
            tactics.append(site.tactic)
            owner.append(i)
        code[off : off + len(body)] = body
    pokes, row = _pokes(plan, base)
    return Plan(
        base=base,
        code=bytes(code),
        addr=np.array(addr, np.uint64),
        tactic=tuple(tactics),
        spills=tuple(spills),
        copy=np.array(copy, np.uint64),
        counter=np.arange(len(addr), dtype=np.int32),
        poke=row[np.array(owner, np.int64)].astype(np.int32),
        pokes=pokes,
    )


def _encode(site: Site, addr: int) -> tuple[bytearray, list[int], list[int]]:
    """The trampoline at `addr`; where its counters have their holes, and the copies' addresses.

    Nothing is left of a nop but the way back.
    """
    body = bytearray()
    holes, copies = [], []
    for insn in site.insns:
        if insn.counted:
            snippet = insn.snippet
            holes.append(len(body) + snippet.hole)
            body += snippet.code
            copies.append(0 if site.tactic is Tactic.NOP5 else addr + len(body))
        if site.tactic is not Tactic.NOP5:
            body += relocate_insn(insn.code, insn.addr, addr + len(body))
    last = site.insns[-1]
    return body + way_back(last.code, last.addr, addr + len(body)), holes, copies


def _pokes(plan: Draft, base: int) -> tuple[Pokes, npt.NDArray[np.int64]]:
    """What is written for the sites and their springboards; the row of each site."""
    offs = plan.off.tolist()
    written = {
        site.addr: bytearray(_head(site, base + off))
        for site, off in zip(plan.sites, offs, strict=True)
    }
    old = {site.addr: site.code for site in plan.sites}
    group = {site.addr for site in plan.sites if len(site.insns) > 1}
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
    addrs = sorted(written)
    rows = {addr: row for row, addr in enumerate(addrs)}
    pokes = Pokes(
        addr=np.array(addrs, np.uint64),
        old=tuple(old[addr] for addr in addrs),
        new=tuple(bytes(written[addr]) for addr in addrs),
        group=np.array([addr in group for addr in addrs], bool),
        host=np.array([addr in host for addr in addrs], bool),
    )
    return pokes, np.array([rows[site.addr] for site in plan.sites], np.int64)


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
        counter=np.arange(len(plan.addr) + count, dtype=np.int32),
        poke=np.append(plan.poke, np.full(count, -1, np.int32)),
        trapped=first_bytes,
    )
