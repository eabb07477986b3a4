# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares what an attachment counted with what the oracle saw executed.

What was changed is read from the kernel, not taken from the plan: native instructions before
the commit, trampolines while they are reachable. All instructions are told by capstone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from capstone import x86_const as x86

from kernweave.model.plan import Plan, Tactic
from kernweave.model.point import Kind
from kernweave.session.session import Session
from oracle.copies import disassemble, why_different
from oracle.lab import OracleLab
from oracle.oracle import Counts, Oracle

NOP5 = bytes.fromhex("0f1f440000")
MAX_INSN = 15
TACTICS = ("nop5", "jmp32", "group", "springboard")
Fault = Callable[[Plan], Plan]
Hits = dict[tuple[int, Kind], int]

_MASK = (1 << 64) - 1
_FAULT_ENTRIES = ("asm_exc_page_fault", "asm_exc_general_protection")
_NO_WAY_ON = (x86.X86_INS_JMP, x86.X86_INS_RET, x86.X86_INS_IRETQ)


@dataclass(frozen=True)
class Site:
    """One counted instruction, as read from the kernel.

    Attributes:
        addr: of the instruction.
        tactic: how it was spliced.
        native: its bytes, before the commit.
        behind: bytes of the instruction behind it.
        entered_behind: whether a branch of the function leads to the instruction behind.
        copy: address of the displaced copy; for `nop5` of the jump back.
        code: bytes from the copy on.
    """

    addr: int
    tactic: Tactic
    native: bytes
    behind: bytes
    entered_behind: bool
    copy: int
    code: bytes

    @property
    def arrival(self) -> bytes:
        """Bytes of the copy's first instruction, whose executions are hits."""
        found = disassemble(self.code, self.copy)
        return bytes(found[0].bytes) if found else b""


@dataclass(frozen=True)
class Window:
    """One changed place, as read from the kernel.

    Attributes:
        addr: of its first instruction.
        insns: address and native bytes of each instruction there.
        start: of the trampoline: where the jump there leads, through its springboard if it is
            short.
        code: bytes of the trampoline, and of those behind it.
    """

    addr: int
    insns: tuple[tuple[int, bytes], ...]
    start: int
    code: bytes


@dataclass(frozen=True)
class Measured:
    """One attachment, from before its commit to after its quiescence.

    Attributes:
        sites: by address.
        windows: what was changed.
        functions: names of those with a point that is placed.
        hits: what kernweave says, per point.
        window: executions from before the commit to after detach, taken at two stops; of the
            sites, what is behind their nops, and their copies.
        inside: the same between end of commit and start of detach.
        restarts: by address of a copy that may fault, its executions that are no arrivals.
    """

    sites: dict[int, Site]
    windows: tuple[Window, ...]
    functions: frozenset[str]
    hits: Hits
    window: Counts
    inside: Counts
    restarts: dict[int, int]


def measure(
    machine: OracleLab,
    k: Session,
    points: Sequence[str],
    work: Callable[[], None],
    fault: Fault | None = None,
) -> Measured:
    """Count `points` during `work`, the plan changed by `fault`."""
    witness = _Witness(k, machine.oracle, fault)
    before = machine.snapshot()
    try:
        with k.splice(*points, tactics=TACTICS, amend=witness) as attachment:
            plan = attachment.plan
            live = k.read(plan.base, len(plan.code))
            sites, windows = witness.sites(live), witness.windows(live)
            begin = machine.snapshot()
            work()
            end = machine.snapshot()
        after = machine.snapshot()
    finally:
        restarts = witness.restarts()
    assert attachment.text_restored
    assert attachment.exact().all()
    counted = plan.addr[attachment.site].tolist()  # behind an endbr64 that was asked for
    keys = [(addr, point.kind) for addr, point in zip(counted, attachment.placed, strict=True)]
    hits = dict(zip(keys, attachment.hits().tolist(), strict=True))
    functions = frozenset(point.function for point in attachment.placed)
    window, inside = (_only(sites, counts) for counts in (after.since(before), end.since(begin)))
    return Measured(sites, windows, functions, hits, window, inside, restarts)


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

    def __init__(self, session: Session, oracle: Oracle, fault: Fault | None) -> None:
        self._session, self._oracle, self._fault = session, oracle, fault
        self._watched = False

    def __call__(self, plan: Plan) -> Plan:
        read = self._session.driver.read_ranges
        step = 2 * MAX_INSN
        data = read(plan.addr, plan.addr + np.uint64(step))
        self._native = [data[at : at + step] for at in range(0, len(data), step)]
        sizes = np.array([len(old) for old in plan.pokes.old])
        self._old = read(plan.pokes.addr, plan.pokes.addr + sizes.astype(np.uint64))
        self._targets = _branch_targets(self._session, plan)
        self._plan = self._fault(plan) if self._fault else plan
        self._watch(plan)
        return self._plan

    def _watch(self, plan: Plan) -> None:
        """Measure restarts of what may fault, from before anybody can be there."""
        copies = plan.copies.addr.tolist()
        if not copies:
            return
        sizes = [
            disassemble(_at(plan.code, addr - plan.base, MAX_INSN), addr)[0].size for addr in copies
        ]
        find = self._session.view.images[0].find
        self._oracle.watch(copies, sizes, [find(name)[0] for name in _FAULT_ENTRIES])
        self._watched = True

    def restarts(self) -> dict[int, int]:
        """Executions of each copy that may fault that were no arrivals; ends the measurement."""
        if not self._watched:
            return {}
        self._watched = False
        rows = self._oracle.unwatch()
        return dict(zip(rows["vaddr"].tolist(), rows["restarts"].tolist(), strict=True))

    def sites(self, live: bytes) -> dict[int, Site]:
        plan = self._plan
        found = {}
        for row, addr in enumerate(plan.addr.tolist()):
            here, behind = disassemble(self._native[row], addr)[:2]
            if plan.tactic[row] is Tactic.NOP5:
                start = _trampoline(plan, int(plan.poke[row]))
                copy = _way_back(_at(live, start - plan.base, 64), start)
            else:
                copy = int(plan.copy[row])
            found[addr] = Site(
                addr, plan.tactic[row], bytes(here.bytes), bytes(behind.bytes),
                behind.address in self._targets, copy, _at(live, copy - plan.base, 2 * MAX_INSN),
            )  # fmt: skip
        return found

    def windows(self, live: bytes) -> tuple[Window, ...]:
        plan, at, found = self._plan, 0, []
        for row, addr in enumerate(plan.pokes.addr.tolist()):
            native = self._old[at : at + len(plan.pokes.old[row])]
            at += len(plan.pokes.old[row])
            insns = [(i.address & _MASK, bytes(i.bytes)) for i in disassemble(native, addr)]
            while insns and insns[-1][1] == b"\xcc":
                insns.pop()
            if not insns:  # a springboard in filler
                continue
            start = _trampoline(plan, row)
            code = _at(live, start - plan.base, 512)
            found.append(Window(addr, tuple(insns), start, code))
        return tuple(found)


def _at(code: bytes, at: int, size: int) -> bytes:
    return code[at : at + size]


def _trampoline(plan: Plan, row: int) -> int:
    """Return where a poke leads in the end."""
    addr, new = int(plan.pokes.addr[row]), plan.pokes.new[row]
    if new[0] == 0xEB:
        board = addr + 2 + int.from_bytes(new[1:2], "little", signed=True)
        host = int(np.searchsorted(plan.pokes.addr, np.uint64(board), side="right")) - 1
        off = board - int(plan.pokes.addr[host])
        addr, new = board, plan.pokes.new[host][off:]
    return _jump_target(new[:5], addr)


def _jump_target(jump: bytes, addr: int) -> int:
    assert jump[0] == 0xE9, jump.hex()
    return addr + 5 + int.from_bytes(jump[1:], "little", signed=True)


def _way_back(code: bytes, start: int) -> int:
    """Return the address of a trampoline's jump; its counter has none."""
    jumps = [insn for insn in disassemble(code, start) if insn.id == x86.X86_INS_JMP]
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
        for insn in disassemble(session.read(start, bounds[1] - start), start):
            if insn.group(x86.X86_GRP_BRANCH_RELATIVE):
                targets.add(insn.operands[0].imm & _MASK)
    return targets


# ---- comparison --------------------------------------------------------------------------------


def differences(measured: Measured) -> list[str]:
    """Return everything in which counters, copies and executions do not agree."""
    sites = measured.sites
    expected = arrivals(measured)
    found = [why for one in measured.windows for why in _wrong_window(one, sites)]
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
    return {
        site.addr: count - measured.restarts.get(site.copy, 0)
        for site, count in zip(sites, counts.tolist(), strict=True)
    }


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


def _wrong_window(window: Window, sites: dict[int, Site]) -> list[str]:
    """Judge a trampoline: counters where they belong, every native instruction, the way back."""
    first = sites.get(window.addr)
    at, after = window.start, window.addr
    if first and first.tactic is Tactic.NOP5:
        wrong = "" if window.insns == ((window.addr, NOP5),) else "the site is no nop of ftrace"
        return _named(window, wrong, _wrong_counter(window, at, first.copy),
                      _wrong_way_back(window, first.copy, window.addr + len(NOP5)))  # fmt: skip
    problems = []
    for addr, native in window.insns:
        if site := sites.get(addr):
            problems.append(_wrong_counter(window, at, site.copy))
            at = site.copy
        found = disassemble(window.code[at - window.start :], at)
        direct = native.lstrip(b"\x2e\x3e")[:1] == b"\xe8"
        copy = b"".join(bytes(insn.bytes) for insn in found[: 2 if direct else 1])
        problems.append(why_different(native, addr, copy, at))
        at, after = at + len(copy), addr + len(native)
    last = disassemble(window.insns[-1][1], window.insns[-1][0])[0]
    if last.id not in (*_NO_WAY_ON, x86.X86_INS_CALL):
        problems.append(_wrong_way_back(window, at, after))
    return _named(window, *problems)


#: what a counter consists of, in this order; only two of them are always there
_COUNTER = (x86.X86_INS_PUSHFQ, x86.X86_INS_PUSH, x86.X86_INS_MOVABS, x86.X86_INS_INC,
            x86.X86_INS_POP, x86.X86_INS_POPFQ)  # fmt: skip


def _wrong_counter(window: Window, start: int, end: int) -> str:
    code = window.code[start - window.start : end - window.start]
    found = [insn.id for insn in disassemble(code, start)]
    steps = [_COUNTER.index(one) if one in _COUNTER else -1 for one in found]
    if steps != sorted(set(steps)) or not {2, 3} <= set(steps) or -1 in steps:
        return f"{code.hex()} at {start:#x} is no counter"
    return ""


def _wrong_way_back(window: Window, at: int, after: int) -> str:
    insn = disassemble(window.code[at - window.start :], at)[0]
    if insn.id == x86.X86_INS_JMP and insn.operands[0].imm & _MASK == after:
        return ""
    return f"{insn.mnemonic} {insn.op_str} instead of a jump back to {after:#x}"


def _named(window: Window, *problems: str) -> list[str]:
    return [f"{window.addr:#x}: {problem}" for problem in problems if problem]


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
    saved = plan.spills[row]
    size = 15 + 2 * ("flags" in saved) + 4 * any(one != "flags" for one in saved)
    start = int(plan.copy[row]) - size
    if plan.tactic[row] is Tactic.NOP5:
        start = _trampoline(plan, int(plan.poke[row]))
    start -= plan.base
    hole = -1
    for insn in disassemble(plan.code[start : start + 64], start):
        if insn.id == x86.X86_INS_MOVABS:
            hole = insn.address + insn.size - 8
        if insn.id == x86.X86_INS_INC:
            return hole, insn.address, insn.address + insn.size
    raise AssertionError(f"no counter in the trampoline of {addr:#x}")
