# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges a recorded audit: were the planned pokes made by the kernel's protocol, and only those?

The protocol (text_poke_bp_batch in arch/x86/kernel/alternative.c, v6.1), per batch of sites:
  1. int3 on the first byte of each site; sync
  2. the tail (all bytes but the first) of each site longer than one byte; sync
  3. the new first byte of each site, unless it is int3 itself, maybe several times; sync
where sync runs do_sync_core on every CPU. Writes come in pieces of any size: bytes are judged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oracle.oracle import MARK, WRITE, Records

INT3 = 0xCC
Poke = tuple[int, bytes, bytes]  # address, old, new
Ints = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A write to an executable page that belongs to no poke.

    Attributes:
        addr: its text address, 0 if only the physical one is known.
        size: in bytes.
        caller: the marked address last executed on that CPU before (do_sync_core left out),
            presumably the function at work; None if there was none.
    """

    seq: int
    cpu: int
    addr: int
    phys: int
    size: int
    value: int
    pc: int
    caller: int | None


class Verdict(NamedTuple):
    """What check_pokes found; both lists empty: exactly the plan, by the protocol."""

    violations: list[str]
    foreign: list[Foreign]


class ByteWrite(NamedTuple):
    """One written byte: sequence number, offset in the site, value, row of its event."""

    seq: int
    off: int
    value: int
    row: int


class Step(NamedTuple):
    """Bytes (offset -> value) that are written between two syncs."""

    name: str
    bytes: Mapping[int, int]
    optional: bool


class Syncs:
    """When each CPU executed the sync mark, and when a new batch may have begun."""

    def __init__(self, events: Records, sync_mark: int, cpus: Sequence[int]) -> None:
        self.int3_seqs: list[int] = []  # of all sites' first steps, ascending
        marks = events[(events["kind"] == MARK) & (events["addr"] == np.uint64(sync_mark))]
        self._seqs = {cpu: marks["seq"][marks["cpu"] == cpu].tolist() for cpu in cpus}

    def missing(self, after: int, before: float) -> list[int]:
        """Return the CPUs without a sync strictly between the two sequence numbers."""
        return [cpu for cpu, seqs in self._seqs.items() if not _any_between(seqs, after, before)]

    def next_int3(self, after: int) -> float:
        """Return when the next int3 was written to any site; infinity if none was."""
        i = bisect_right(self.int3_seqs, after)
        return self.int3_seqs[i] if i < len(self.int3_seqs) else float("inf")


def _any_between(seqs: Sequence[int], after: int, before: float) -> bool:
    i = bisect_right(seqs, after)
    return i < len(seqs) and seqs[i] < before


def check_pokes(
    events: Records, pokes: Sequence[Poke], sync_mark: int, cpus: int | Sequence[int]
) -> Verdict:
    """Judge all writes of an audit against a plan.

    Args:
        events: dtype EVENT, in sequence order.
        pokes: in order of application; an address may come again (removal after placement).
        sync_mark: the marked address of do_sync_core.
        cpus: how many CPUs, or their numbers: each of them must sync.
    """
    sites: dict[int, list[Poke]] = {}
    for poke in pokes:
        sites.setdefault(poke[0], []).append(poke)
    violations = [_overlap(*pair) for pair in _overlaps(sites)]
    syncs = Syncs(events, sync_mark, range(cpus) if isinstance(cpus, int) else cpus)
    by_site, strays = _assign(events, sites)
    firsts = (w for writes in by_site.values() for w in writes if (w.off, w.value) == (0, INT3))
    syncs.int3_seqs = sorted(write.seq for write in firsts)
    for addr, rounds in sites.items():
        problem, left = judge_site(rounds, by_site.get(addr, []), syncs)
        violations += [f"poke of {addr:#x}: {problem}"] if problem else []
        strays += left
    return Verdict(violations, _foreign(events, sorted(set(strays)), sync_mark))


def judge_site(
    rounds: Sequence[Poke], writes: Sequence[ByteWrite], syncs: Syncs
) -> tuple[str, list[int]]:
    """Return the first problem of a site ('' if none) and the event rows that no poke explains."""
    at = 0
    for nth, poke in enumerate(rounds):
        if nth and rounds[nth - 1][2] != poke[1]:
            return "the plan's old bytes are not the ones poked before", []
        try:
            at = _judge_poke(poke, writes, at, syncs)
        except _ProblemError as problem:
            return str(problem), []
    return "", [write.row for write in writes[at:]]


class _ProblemError(Exception):
    """A violation of the protocol at one site."""


def _steps(poke: Poke) -> list[Step]:
    _, old, new = poke
    steps = [Step("int3", {0: INT3}, False)]
    if len(new) > 1:
        # The kernel writes an unchanged tail too; another patcher may leave it out.
        steps.append(Step("tail", dict(enumerate(new[1:], 1)), old[1:] == new[1:]))
    if new[0] != INT3:
        steps.append(Step("head", {0: new[0]}, False))
    return steps


def _judge_poke(poke: Poke, writes: Sequence[ByteWrite], at: int, syncs: Syncs) -> int:
    last: tuple[str, int] | None = None  # name and sequence number of the last step's end
    for step in _steps(poke):
        if step.optional and (at >= len(writes) or writes[at].off not in step.bytes):
            continue
        end = _take_step(step, writes, at)
        if last:
            _need_sync(syncs, last, step.name, writes[at].seq)
        last, at = (step.name, writes[end - 1].seq), end
    assert last
    if last[0] == "head":
        at = _past_repeats(writes, at)
        last = ("head", writes[at - 1].seq)
    # After a head comes the batch's last sync; an int3 alone may share it with other sites.
    before = syncs.next_int3(last[1]) if last[0] == "head" else float("inf")
    before = min(before, writes[at].seq if at < len(writes) else before)
    _need_sync(syncs, last, "what follows", before)
    return at


def _past_repeats(writes: Sequence[ByteWrite], at: int) -> int:
    """Skip writes of what was just written: under emulation there are some (docs/design/0007)."""
    head = writes[at - 1]
    while at < len(writes) and (writes[at].off, writes[at].value) == (head.off, head.value):
        at += 1
    return at


def _take_step(step: Step, writes: Sequence[ByteWrite], at: int) -> int:
    left = dict(step.bytes)
    while left:
        if at >= len(writes):
            raise _ProblemError(f"{step.name}: bytes {sorted(left)} were never written")
        write = writes[at]
        if left.pop(write.off, None) != write.value:
            wanted = step.bytes.get(write.off)
            raise _ProblemError(
                f"{step.name}: {write.value:#04x} written to byte {write.off} (seq {write.seq}), "
                f"expected {'no write there' if wanted is None else format(wanted, '#04x')}"
            )
        at += 1
    return at


def _need_sync(syncs: Syncs, last: tuple[str, int], then: str, before: float) -> None:
    name, after = last
    if missing := syncs.missing(after, before):
        cpus = ", ".join(map(str, missing))
        raise _ProblemError(f"no sync on cpu {cpus} between {name} (seq {after}) and {then}")


def _overlaps(sites: Mapping[int, Sequence[Poke]]) -> list[tuple[int, int]]:
    addrs = sorted(sites)
    ends = [addr + max(len(poke[2]) for poke in sites[addr]) for addr in addrs]
    return [(addrs[i], addrs[i + 1]) for i in range(len(addrs) - 1) if ends[i] > addrs[i + 1]]


def _overlap(first: int, second: int) -> str:
    return f"pokes of {first:#x} and {second:#x} overlap"


def _assign(
    events: Records, sites: Mapping[int, Sequence[Poke]]
) -> tuple[dict[int, list[ByteWrite]], list[int]]:
    """Return each site's byte writes in order, and the event rows with bytes outside of all."""
    row, addr, value = _explode(events)
    starts = np.array(sorted(sites), np.uint64)
    sizes = [max(len(poke[2]) for poke in sites[int(start)]) for start in starts]
    ends = starts + np.array(sizes, np.uint64)
    which = np.searchsorted(starts, addr, "right") - 1
    inside = np.zeros(len(row), bool)
    inside[which >= 0] = addr[which >= 0] < ends[which[which >= 0]]
    result: dict[int, list[ByteWrite]] = {}
    seq = events["seq"][row]
    for i in np.flatnonzero(inside).tolist():
        site = int(starts[which[i]])
        write = ByteWrite(int(seq[i]), int(addr[i]) - site, int(value[i]), int(row[i]))
        result.setdefault(site, []).append(write)
    return result, row[~inside].tolist()


def _explode(events: Records) -> tuple[Ints, Ints, Ints]:
    """Return one element per written byte: event row, address, value."""
    rows = np.flatnonzero(events["kind"] == WRITE)
    size = events["size"][rows].astype(np.int64)
    row = np.repeat(rows, size)
    nth = (np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)).astype(np.uint64)
    value = events["value"][row] >> (nth * np.uint64(8)) & np.uint64(0xFF)
    # An unknown text address stays 0, which no site has.
    addr = np.where(events["addr"][row] != 0, events["addr"][row] + nth, np.uint64(0))
    return row, addr, value


def _foreign(events: Records, rows: Sequence[int], sync_mark: int) -> list[Foreign]:
    if not rows:
        return []
    marks = events[(events["kind"] == MARK) & (events["addr"] != np.uint64(sync_mark))]
    of_cpu = {cpu: marks[marks["cpu"] == cpu] for cpu in np.unique(events["cpu"][rows]).tolist()}
    return [_describe(events[row], of_cpu[int(events["cpu"][row])]) for row in rows]


def _describe(event: np.void, marks: Records) -> Foreign:
    """Return a write with the last mark of its CPU before it."""
    before = int(np.searchsorted(marks["seq"], event["seq"]))
    return Foreign(
        seq=int(event["seq"]),
        cpu=int(event["cpu"]),
        addr=int(event["addr"]),
        phys=int(event["phys"]),
        size=int(event["size"]),
        value=int(event["value"]),
        pc=int(event["pc"]),
        caller=int(marks["addr"][before - 1]) if before else None,
    )
