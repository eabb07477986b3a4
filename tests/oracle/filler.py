# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges what is written behind a 5-byte jump that replaced a longer instruction.

Those bytes are dead while the jump is in force, so they need no int3 of their own, but:
  - they become int3 only after the jump's last sync on every CPU,
  - they become native again before the jump's removal begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from oracle.audit import INT3, Foreign, Poke
from oracle.oracle import MARK, WRITE, Records

JUMP_BYTES = 5


def split_pokes(placed: Sequence[Poke]) -> tuple[list[Poke], list[Poke]]:
    """Return the jumps, and what lies behind those that are longer."""
    jumps = [(addr, old[:JUMP_BYTES], new[:JUMP_BYTES]) for addr, old, new in placed]
    rests = [
        (addr + JUMP_BYTES, old[JUMP_BYTES:], new[JUMP_BYTES:])
        for addr, old, new in placed
        if len(new) > JUMP_BYTES
    ]
    return jumps, rests


def check_fillers(
    events: Records, rests: Sequence[Poke], strays: Sequence[Foreign], sync_mark: int, cpus: int
) -> tuple[list[str], list[Foreign]]:
    """Judge the writes that `check_pokes` found to belong to no jump.

    Args:
        events: the whole audit.
        rests: address behind the jump, native bytes, bytes while the jump is in.
        strays: foreign writes.
        sync_mark: of do_sync_core.
        cpus: how many must sync.

    Returns:
        Violations, and the writes that are in no rest either.
    """
    ours: dict[int, list[tuple[int, int]]]
    ours = {addr + off: [] for addr, old, _ in rests for off in range(len(old))}
    others = []
    for write in strays:
        if write.addr not in ours:
            others.append(write)
        for off in range(write.size):
            ours.get(write.addr + off, []).append((write.seq, write.value >> 8 * off & 0xFF))
    syncs = _syncs(events, sync_mark, cpus)
    found = []
    for addr, old, new in rests:
        heads = _writes_at(events, addr - JUMP_BYTES)
        for off, (native, filler) in enumerate(zip(old, new, strict=True)):
            problem = _judge_byte(ours[addr + off], native, filler, heads, syncs)
            found += [f"filler of {addr + off:#x}: {problem}"] if problem else []
    return found, others


def _syncs(events: Records, sync_mark: int, cpus: int) -> list[list[int]]:
    marks = events[(events["kind"] == MARK) & (events["addr"] == np.uint64(sync_mark))]
    return [marks["seq"][marks["cpu"] == cpu].tolist() for cpu in range(cpus)]


def _writes_at(events: Records, addr: int) -> list[tuple[int, int]]:
    """(sequence number, value) of what was written there; of repeats the last."""
    here = events[(events["kind"] == WRITE) & (events["addr"] == np.uint64(addr))]
    values = here["value"] & np.uint64(0xFF)
    last = np.ones(len(values), bool)
    last[:-1] = values[1:] != values[:-1]
    return list(zip(here["seq"][last].tolist(), values[last].tolist(), strict=True))


def _judge_byte(
    writes: Sequence[tuple[int, int]],
    native: int,
    filler: int,
    heads: Sequence[tuple[int, int]],
    syncs: Sequence[Sequence[int]],
) -> str:
    values = [value for _, value in writes]
    if filler != INT3 or values != [INT3, native]:
        return f"{bytes(values).hex()} written, expected {bytes((INT3, native)).hex()}"
    if [value for _, value in heads[:3]] != [INT3, 0xE9, INT3]:
        return "there is no jump before it"
    placed, back = writes[0][0], writes[1][0]
    for cpu, seqs in enumerate(syncs):
        at = bisect_right(seqs, heads[1][0])
        if at == len(seqs) or seqs[at] > placed:
            return f"no sync on cpu {cpu} between the jump and the filler"
    if back > heads[2][0]:
        return "native only after the jump's removal began"
    return ""
