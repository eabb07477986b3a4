# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares what an attachment counted with what the oracle saw executed.

What was changed is read from the kernel, not taken from the plan: native instructions before
the commit, trampolines while they are reachable. All instructions are told by capstone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import capstone
import numpy as np
import numpy.typing as npt
from capstone import x86_const as x86

from kernweave.model.plan import Plan, Tactic
from kernweave.model.point import Kind
from kernweave.session.session import Session
from oracle.copies import why_different
from oracle.lab import OracleLab
from oracle.oracle import Counts

NOP5 = bytes.fromhex("0f1f440000")
MAX_INSN = 15
TACTICS = ("nop5", "jmp32")
Fault = Callable[[Plan], Plan]
Hits = dict[tuple[int, Kind], int]

_DECODER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_DECODER.detail = True
_MASK = (1 << 64) - 1
_NO_WAY_ON = (x86.X86_INS_JMP, x86.X86_INS_RET)


@dataclass(frozen=True)
class Site:
    """One changed place, as read from the kernel.

    Attributes:
        addr: of the site.
        tactic: how it was spliced.
        native: bytes of its one instruction, before the commit.
        behind: bytes of the instruction behind it.
        entered_behind: whether a branch of the function leads to the instruction behind.
        start: of the trampoline: where the site's jump leads.
        code: bytes of the trampoline.
        copy: address of the displaced copy; for `nop5` of the jump back.
    """

    addr: int
    tactic: Tactic
    native: bytes
    behind: bytes
    entered_behind: bool
    start: int
    code: bytes
    copy: int

    @property
    def copy_code(self) -> bytes:
        """Bytes of the copy: one instruction, or two for a direct call; b"" if it is none."""
        found = _decode(self.code[self.copy - self.start :], self.copy)
        count = 2 if self.native.lstrip(b"\x2e\x3e")[:1] == b"\xe8" else 1
        return b"".join(bytes(insn.bytes) for insn in found[:count])

    @property
    def arrival(self) -> bytes:
        """Bytes of the copy's first instruction, whose executions are hits."""
        found = _decode(self.code[self.copy - self.start :], self.copy)
        return bytes(found[0].bytes) if found else b""


@dataclass(frozen=True)
class Measured:
    """One attachment, from before its commit to after its quiescence.

    Attributes:
        sites: by address.
        functions: names of those with a point that is placed.
        hits: what kernweave says, per point.
        window: executions from before the commit to after detach, taken at two stops; of the
            sites, what is behind their nops, and their copies.
        inside: the same between end of commit and start of detach.
    """

    sites: dict[int, Site]
    functions: frozenset[str]
    hits: Hits
    window: Counts
    inside: Counts


def measure(
    machine: OracleLab,
    k: Session,
    points: Sequence[str],
    work: Callable[[], None],
    fault: Fault | None = None,
) -> Measured:
    """Count `points` during `work`, the plan changed by `fault`."""
    witness = _Witness(k, fault)
    before = machine.snapshot()
    with k.count(*points, tactics=TACTICS, amend=witness) as attachment:
        plan = attachment.plan
        live = k.read(plan.base, len(plan.code))
        sites = witness.sites(live)
        begin = machine.snapshot()
        work()
        end = machine.snapshot()
    after = machine.snapshot()
    assert attachment.text_restored
    assert attachment.exact().all()
    keys = [(point.addr, point.kind) for point in attachment.placed]
    hits = dict(zip(keys, attachment.hits().tolist(), strict=True))
    functions = frozenset(point.function for point in attachment.placed)
    window, inside = (_only(sites, counts) for counts in (after.since(before), end.since(begin)))
    return Measured(sites, functions, hits, window, inside)


def _only(sites: dict[int, Site], counts: Counts) -> Counts:
    """Return the rows that the comparison needs: of half a million, a few thousand."""
    wanted = [addr for site in sites.values() for addr in (site.addr, site.addr + 5, site.copy)]
    rows = np.isin(counts.vaddr, np.array(wanted, np.uint64))
    return Counts(
        counts.vaddr[rows],
        counts.length[rows],
        counts.code[rows],
        counts.count[rows],
        counts.per_cpu[rows],
    )


class _Witness:
    """Is shown the plan before its commit; reads what it is going to change."""

    def __init__(self, session: Session, fault: Fault | None) -> None:
        self._session, self._fault = session, fault

    def __call__(self, plan: Plan) -> Plan:
        read = self._session.driver.read_ranges
        data = read(plan.addr, plan.addr + np.uint64(2 * MAX_INSN))
        step = 2 * MAX_INSN
        self._native = [data[at : at + step] for at in range(0, len(data), step)]
        self._targets = _branch_targets(self._session, plan)
        self._plan = self._fault(plan) if self._fault else plan
        return self._plan

    def sites(self, live: bytes) -> dict[int, Site]:
        plan = self._plan
        starts = [
            _jump_target(new.tobytes(), int(a)) for a, new in zip(plan.addr, plan.new, strict=True)
        ]
        ends = sorted({*starts, plan.base + len(live)})
        found = {}
        for row, addr in enumerate(plan.addr.tolist()):
            start = starts[row]
            end = ends[bisect_right(ends, start)]
            code = live[start - plan.base : end - plan.base]
            here, behind = _decode(self._native[row], addr)[:2]
            nop5 = plan.tactic[row] is Tactic.NOP5
            copy = _way_back(code, start) if nop5 else int(plan.copy[row])
            found[addr] = Site(
                addr, plan.tactic[row], bytes(here.bytes), bytes(behind.bytes),
                behind.address in self._targets, start, code, copy,
            )  # fmt: skip
        return found


def _decode(code: bytes, addr: int) -> list[Any]:
    return list(_DECODER.disasm(code, addr))


def _jump_target(jump: bytes, addr: int) -> int:
    assert jump[0] == 0xE9, jump.hex()
    return addr + 5 + int.from_bytes(jump[1:], "little", signed=True)


def _way_back(code: bytes, start: int) -> int:
    """Return the address of a trampoline's jump; its counter has none."""
    jumps = [insn for insn in _decode(code, start) if insn.id == x86.X86_INS_JMP]
    return int(jumps[0].address)


def _branch_targets(session: Session, plan: Plan) -> set[int]:
    """Return what direct branches of the functions with `nop5` sites, .cold included, lead to."""
    image = session.view.images[0]
    starts = set()
    for row, tactic in enumerate(plan.tactic):
        bounds = image.bounds(int(plan.addr[row]))
        if tactic is Tactic.NOP5 and bounds:
            starts |= {bounds[0], *image.find(f"{image.name_at[bounds[0]]}.cold")}
    targets = set()
    for start in starts:
        bounds = image.bounds(start)
        assert bounds is not None
        for insn in _decode(session.read(start, bounds[1] - start), start):
            if insn.group(x86.X86_GRP_BRANCH_RELATIVE):
                targets.add(insn.operands[0].imm & _MASK)
    return targets


# ---- comparison --------------------------------------------------------------------------------


def differences(measured: Measured) -> list[str]:
    """Return everything in which counters, copies and executions do not agree."""
    sites = measured.sites
    expected = arrivals(measured)
    found = [why for site in sites.values() for why in _wrong_code(site)]
    for (addr, _), hits in measured.hits.items():
        if hits != expected[addr]:
            found.append(f"{addr:#x}: {hits} hits, {expected[addr]} executions of the copy")
    native = measured.inside.at_code(list(sites), [site.native for site in sites.values()])
    for addr, missed in zip(sites, native.tolist(), strict=True):
        if missed:
            found.append(f"{addr:#x}: the original was executed {missed} times while placed")
    return found + _wrong_entries(measured)


def arrivals(measured: Measured) -> dict[int, int]:
    """Return, by site, executions of the copy; of the jump back where nothing was displaced."""
    sites = list(measured.sites.values())
    counts = measured.window.at_code([s.copy for s in sites], [s.arrival for s in sites])
    return dict(zip(measured.sites, counts.tolist(), strict=True))


def per_cpu(measured: Measured) -> dict[int, tuple[int, int]]:
    """Return the same per CPU."""
    window = measured.window
    order = np.argsort(window.vaddr, kind="stable")
    result = {}
    for addr, site in measured.sites.items():
        bounds = np.array([site.copy, site.copy + 1], np.uint64)
        low, high = np.searchsorted(window.vaddr, bounds, "left", order)
        cpus: npt.NDArray[np.uint64] = window.per_cpu[order[low:high]].sum(axis=0)
        result[addr] = (int(cpus[0]), int(cpus[1]))
    return result


def _wrong_code(site: Site) -> list[str]:
    """Judge a trampoline from its copy on: the native instruction, and the way back."""
    after = site.addr + len(site.native)
    if site.tactic is Tactic.NOP5:
        wrong = "" if site.native == NOP5 else "the site is no nop of ftrace"
        back = _decode(site.code[site.copy - site.start :], site.copy)[0]
        return _named(site, wrong, _wrong_way_back(back, after))
    copy = site.copy_code
    wrong = why_different(site.native, site.addr, copy, site.copy)
    native = _decode(site.native, site.addr)[0]
    if native.id in (*_NO_WAY_ON, x86.X86_INS_CALL):
        return _named(site, wrong)
    at = site.copy + len(copy)
    back = _decode(site.code[at - site.start :], at)[0]
    return _named(site, wrong, _wrong_way_back(back, after))


def _wrong_way_back(insn: Any, after: int) -> str:
    if insn.id == x86.X86_INS_JMP and insn.operands[0].imm & _MASK == after:
        return ""
    return f"{insn.mnemonic} {insn.op_str} instead of a jump back to {after:#x}"


def _named(site: Site, *problems: str) -> list[str]:
    return [f"{site.addr:#x}: {problem}" for problem in problems if problem]


def _wrong_entries(measured: Measured) -> list[str]:
    """Compare `nop5` counters with native code alone.

    Whoever arrives behind the nop came through the nop or through the trampoline.
    """
    sites, window = measured.sites, measured.window
    found = []
    for (addr, _), hits in measured.hits.items():
        site = sites[addr]
        if site.tactic is not Tactic.NOP5 or site.entered_behind:
            continue
        through, behind = window.at_code([addr, addr + 5], [NOP5, site.behind]).tolist()
        if other := sites.get(addr + 5):
            behind += int(window.at_code([other.copy], [other.arrival])[0])
        if through + hits != behind:
            found.append(f"{addr:#x}: {hits} hits, {behind - through} arrivals behind the nop")
    return found


# ---- faults to be seeded -----------------------------------------------------------------------


def overwrite(plan: Plan, *edits: tuple[int, bytes]) -> Plan:
    """Return the plan with other bytes at some offsets of its code."""
    code = bytearray(plan.code)
    for off, data in edits:
        code[off : off + len(data)] = data
    assert bytes(code) != plan.code
    return replace(plan, code=bytes(code))


def counter_at(plan: Plan, addr: int) -> tuple[int, int, int]:
    """Return where in the plan's code a site's counter is: its offset, `inc`, what follows."""
    row = plan.addr.tolist().index(addr)
    start = _jump_target(plan.new[row].tobytes(), addr) - plan.base
    hole = -1
    for insn in _decode(plan.code[start : start + 64], start):
        if insn.id == x86.X86_INS_MOVABS:
            hole = insn.address + insn.size - 8
        if insn.id == x86.X86_INS_INC:
            return hole, insn.address, insn.address + insn.size
    raise AssertionError(f"no counter in the trampoline of {addr:#x}")
