# SPDX-License-Identifier: GPL-2.0-or-later
"""Trampolines: counter, displaced instruction, way back; first measured, then bound."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kernweave.model.plan import Plan, Tactic
from kernweave.x86.counter import Snippet, counter_snippet
from kernweave.x86.poison import poison_code
from kernweave.x86.relocate import encode_jump, relocate_insn

ALIGN = 16
COUNTER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Site:
    """One place to be spliced.

    Attributes:
        addr: run-time address.
        code: the instruction there, dead filler behind it included up to 5 bytes.
        length: bytes of the instruction alone.
        tactic: how.
        dead: mask of registers and flags that are dead before it.
        clobber: mask of registers and flags to overwrite before the counter, a check of `dead`.
    """

    addr: int
    code: bytes
    length: int
    tactic: Tactic
    dead: int
    clobber: int = 0

    @property
    def snippet(self) -> Snippet:
        """The counter for this place."""
        counter = counter_snippet(self.dead)
        if not self.clobber:
            return counter
        poison = poison_code(self.clobber)
        return replace(counter, code=poison + counter.code, hole=len(poison) + counter.hole)


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


def draft(sites: Sequence[Site]) -> Draft:
    """Measure the trampolines; their sizes do not depend on where they go."""
    ordered = tuple(sorted(sites, key=lambda site: site.addr))
    sizes = np.array([len(site.snippet.code) + len(_tail(site, site.addr)) for site in ordered])
    padded = -(-sizes.astype(np.int64) // ALIGN) * ALIGN
    ends = np.cumsum(padded)
    return Draft(ordered, ends - padded, int(ends[-1]) if len(ends) else 0)


def bind(plan: Draft, base: int, offsets: npt.NDArray[np.uint64]) -> Plan:
    """Fill in addresses.

    Args:
        plan: the draft.
        base: run-time address of the first trampoline.
        offsets: uint64[n], gs-relative address of each site's counter.
    """
    code = bytearray(b"\xcc" * plan.size)
    new = np.zeros((len(plan.sites), 5), np.uint8)
    copy = np.zeros(len(plan.sites), np.uint64)
    for i, site in enumerate(plan.sites):
        off = int(plan.off[i])
        body = bytearray(site.snippet.code)
        struct.pack_into("<Q", body, site.snippet.hole, int(offsets[i]))
        copy_addr = base + off + len(body)
        body += _tail(site, copy_addr)
        code[off : off + len(body)] = body
        new[i] = np.frombuffer(encode_jump(site.addr, base + off), np.uint8)
        copy[i] = 0 if site.tactic is Tactic.NOP5 else copy_addr
    old = np.array([list(site.code[:5]) for site in plan.sites], np.uint8).reshape(-1, 5)
    return Plan(
        base=base,
        code=bytes(code),
        addr=np.array([site.addr for site in plan.sites], np.uint64),
        old=old,
        new=new,
        rest=tuple(site.code[5 : site.length] for site in plan.sites),
        tactic=tuple(site.tactic for site in plan.sites),
        spills=tuple(site.snippet.spills for site in plan.sites),
        copy=copy,
        counter=np.arange(len(plan.sites), dtype=np.int32),
    )


def add_traps(plan: Plan, traps: Sequence[Site]) -> Plan:
    """The plan with sites that trap behind those that jump; their counters follow as well."""
    if not traps:
        return plan
    count = len(traps)
    heads = np.array([list(site.code[:5].ljust(5, b"\0")) for site in traps], np.uint8)
    armed = heads.copy()
    armed[:, 0] = 0xCC
    return replace(
        plan,
        addr=np.append(plan.addr, np.array([site.addr for site in traps], np.uint64)),
        old=np.concatenate((plan.old, heads)),
        new=np.concatenate((plan.new, armed)),
        rest=plan.rest + (b"",) * count,
        tactic=plan.tactic + (Tactic.INT3,) * count,
        spills=plan.spills + ((),) * count,
        copy=np.append(plan.copy, np.zeros(count, np.uint64)),
        counter=np.arange(len(plan.addr) + count, dtype=np.int32),
    )


def _tail(site: Site, addr: int) -> bytes:
    """What follows the counter, at `addr`: nothing is left of a nop but the way back."""
    if site.tactic is Tactic.NOP5:
        return encode_jump(addr, site.addr + site.length)
    return relocate_insn(site.code[: site.length], site.addr, addr)
