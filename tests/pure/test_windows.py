# SPDX-License-Identifier: GPL-2.0-or-later
"""Windows and trampolines of a stock kernel's functions: rules that hold for every one of them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernweave.analysis.code import Code, Part, build_code
from kernweave.analysis.imagefile import load_file
from kernweave.errors import Reason
from kernweave.image.sites import Sites, contains
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import fetched_kernel
from kernweave.model.plan import Plan, Tactic
from kernweave.session.attach import make_sites
from kernweave.splice.layout import bind, draft
from kernweave.splice.place import Placement, Rules, place
from kernweave.splice.window import MOST_BYTES, SITE_BYTES, Windows
from kernweave.x86.decode import Flow, Trait
from oracle.copies import disassemble

SEED = 20261122
FUNCTIONS = 800
FAULTING = 60  # functions with an exception-table entry
AWAY = 64 << 20
JUMPS = (Tactic.NOP5, Tactic.JMP32, Tactic.GROUP, Tactic.SPRINGBOARD)
REACH = 128
INT3 = b"\xcc"


@dataclass(frozen=True)
class Sample:
    """Some functions of a kernel, placed."""

    code: Code
    sites: Sites
    rows: npt.NDArray[np.int64]
    placement: Placement


@cache
def parts_of(series: str) -> tuple[list[Part], Sites]:
    tree = fetched_kernel(series)
    if tree is None:
        pytest.skip(f"kernel {series} was not fetched (kernweave lab up)")
    file = load_file(open_image(tree.vmlinuz))
    chance = np.random.default_rng(SEED)
    parts = [part for part in file.parts() if part.code]
    chosen = chance.choice(len(parts), FUNCTIONS, replace=False)
    starts = np.array([part.start for part in parts], np.uint64)
    faulting = np.unique(np.searchsorted(starts, file.sites.exceptions, side="right") - 1)
    chosen = np.union1d(chosen, chance.choice(faulting, FAULTING, replace=False))
    return [parts[i] for i in chosen.tolist()], file.sites


@cache
def make(series: str, share: float, translates: bool = True) -> Sample:
    parts, sites = parts_of(series)
    code = build_code(parts, sites)
    chance = np.random.default_rng(SEED)
    rows = np.flatnonzero(chance.random(len(code.addr)) < share)
    rules = Rules(tactics=JUMPS, translates=translates)
    return Sample(code, sites, rows, place(code, rows, sites, rules))


@pytest.fixture(params=["6.1", "6.12"])
def series(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1.0, 0.1], ids=["every", "some"])
def sample(request: pytest.FixtureRequest, series: str) -> Sample:
    return make(series, request.param)


def sizes_of(code: Code, windows: Windows) -> npt.NDArray[np.uint64]:
    last = windows.end - 1
    found = code.addr[last] + code.length[last] - code.addr[windows.first]
    return np.asarray(found, np.uint64)


def test_windows_are_disjoint_and_nothing_leads_into_them(sample: Sample) -> None:
    code, boards = sample.code, sample.placement.boards
    for windows in (boards.windows, boards.shorts):
        assert (windows.first < windows.end).all()
        assert (windows.end[:-1] <= windows.first[1:]).all()
        inside = np.ones(len(code.addr), bool)
        inside[windows.first] = False
        inner = np.flatnonzero(inside)[windows.of(np.flatnonzero(inside)) >= 0]
        assert not code.landing[inner].any()
        assert (code.part[inner] == code.part[inner - 1]).all()
        goes_on = np.isin(code.flow[inner - 1], (Flow.NEXT, Flow.BRANCH))
        goes_on |= contains(sample.sites.bugs, code.addr[inner - 1])  # a warning
        assert (goes_on & ~contains(sample.sites.fatal_bugs, code.addr[inner - 1])).all()
        assert not (code.trait[inner - 1] & Trait.WAIT).any()
    assert (boards.windows.of(boards.shorts.first) < 0).all()
    assert (sizes_of(code, boards.windows) <= MOST_BYTES).all()
    assert (sizes_of(code, boards.shorts) < SITE_BYTES).all()


def test_what_the_kernel_looks_for_is_in_no_window(sample: Sample) -> None:
    code, sites, boards = sample.code, sample.sites, sample.placement.boards
    tables = (sites.jump_labels, sites.static_calls, sites.ftrace)
    kept = np.flatnonzero(code.index.mark(*tables) | code.in_force)
    assert len(kept) > 100
    assert (boards.windows.of(kept) < 0).all()
    assert (boards.shorts.of(kept) < 0).all()


def test_what_may_fault_is_first_where_it_is(sample: Sample) -> None:
    """A task that sleeps in a fault comes back to where a jump may be by then."""
    code, boards = sample.code, sample.placement.boards
    rows = np.flatnonzero(contains(sample.sites.exceptions, code.addr))
    found = 0
    for windows in (boards.windows, boards.shorts):
        number = windows.of(rows)
        assert (windows.first[number[number >= 0]] == rows[number >= 0]).all()
        found += int((number >= 0).sum())
    assert found > 10 or len(sample.rows) < len(code.addr)


def test_what_is_looked_up_by_address_is_told_with_its_copy(sample: Sample) -> None:
    code, boards = sample.code, sample.placement.boards
    tables = (sample.sites.exceptions, sample.sites.bugs)
    rows = np.flatnonzero(code.index.mark(*tables))
    inside = (boards.windows.of(rows) >= 0) | (boards.shorts.of(rows) >= 0)
    copies = bound(sample)[0].copies
    assert np.sort(copies.native).tolist() == code.addr[rows[inside]].tolist()
    assert (np.diff(copies.addr.astype(np.int64)) > 0).all()
    trampolines = {addr: body for addr, body, _ in bound(sample)[1]}
    starts = sorted(trampolines)
    for addr, native in zip(copies.addr.tolist(), copies.native.tolist(), strict=True):
        start = starts[bisect_right(starts, addr) - 1]
        copy = disassemble(trampolines[start][addr - start :], addr)[0]
        at_home = disassemble(code.raw(int(code.rows_at(np.array([native], np.uint64))[0])), native)
        assert copy.mnemonic == at_home[0].mnemonic


def test_without_translation_they_stay_at_home(series: str) -> None:
    sample = make(series, 1.0, translates=False)
    code, boards = sample.code, sample.placement.boards
    rows = np.flatnonzero(code.index.mark(sample.sites.exceptions, sample.sites.bugs))
    assert len(rows) > 50
    assert (boards.windows.of(rows) < 0).all() and (boards.shorts.of(rows) < 0).all()
    reasons = set(sample.placement.reason[np.isin(sample.rows, rows)])
    assert {Reason.EXCEPTION_ENTRY, Reason.BUG_ENTRY} <= reasons
    assert not reasons & {None, Reason.TOO_SHORT}


def test_interrupts_stay_off_behind_sti(sample: Sample) -> None:
    code, boards = sample.code, sample.placement.boards
    behind = np.flatnonzero((code.trait[:-1] & Trait.SHADOW) != 0) + 1
    for windows in (boards.windows, boards.shorts):
        assert not np.isin(behind, windows.first).any()
        assert not np.isin(behind, windows.end).any()


def test_nearly_everything_is_placed_and_the_rest_has_a_reason(sample: Sample) -> None:
    reasons = sample.placement.reason
    by_address = [reason in (Reason.EXCEPTION_ENTRY, Reason.BUG_ENTRY) for reason in reasons]
    assert np.mean(by_address) < 0.001
    short = np.array([reason is Reason.TOO_SHORT for reason in reasons], bool)
    short &= ~sample.code.in_force[sample.rows]  # counted at the instruction behind
    assert short.mean() < 0.002
    assert all(
        (t is None) != (r is None) for t, r in zip(sample.placement.tactic, reasons, strict=True)
    )


def test_springboards_are_in_reach_and_apart(sample: Sample) -> None:
    code, boards = sample.code, sample.placement.boards
    away = (boards.addr - code.addr[boards.shorts.first] - np.uint64(2)).view(np.int64)
    assert len(away) > 3
    assert ((away >= -REACH) & (away < REACH)).all()
    assert (np.diff(np.sort(boards.addr)) >= SITE_BYTES).all()


def test_trampolines_have_the_same_branches_and_no_call(sample: Sample) -> None:
    """Nothing is weaker than at home: no new indirect branch, nothing runs past an end."""
    plan, windows = bound(sample)
    for addr, code, native in windows:
        found = disassemble(code, addr)
        assert sum(one.size for one in found) == len(code)
        branches = [one for one in found if one.group(1) or one.group(2) or one.group(3)]
        assert not [one for one in branches if one.mnemonic.startswith("call")]
        indirect = [one for one in branches if is_indirect(one)]
        at_home = [one for one in native if is_indirect(one)]
        assert len(indirect) == len(at_home)
        assert found[-1].mnemonic in ("jmp", "int3")
        ends = [i for i, one in enumerate(found) if one.mnemonic in ("ret", "iretq")]
        assert all(found[i + 1].mnemonic == "int3" for i in ends)
    assert len(plan.addr) > 1000


def bound(sample: Sample) -> tuple[Plan, list[tuple[int, bytes, list[Any]]]]:
    """The plan, and (address, trampoline, native instructions) of every site but nops."""
    code, placement = sample.code, sample.placement
    placed = np.flatnonzero([tactic is not None for tactic in placement.tactic])
    live = np.zeros(len(code.addr), np.uint32)
    made = make_sites(
        code,
        sample.sites,
        live,
        replace(placement, rows=placement.rows[placed]),
        placement.tactic[placed],
    )
    layout = draft(made.entries, made.sites)
    base = int(code.addr.max()) + AWAY
    plan = bind(layout, base, np.arange(layout.counted, dtype=np.uint64))
    ends = [*layout.off.tolist()[1:], layout.size]
    found = []
    for site, start, end in zip(made.sites, layout.off.tolist(), ends, strict=True):
        body = plan.code[start:end].rstrip(INT3) + INT3
        native = [one for insn in site.insns for one in disassemble(insn.code, insn.addr)]
        found.append((base + start, body, native))
    return plan, found


def is_indirect(insn: Any) -> bool:
    """Whether a jump or call goes through a register or memory."""
    branch = insn.mnemonic in ("jmp", "call") and insn.operands
    return bool(branch and insn.operands[0].type != 2)
