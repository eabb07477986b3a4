# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock kernels woven: the clones, decoded again, are the native code with counters in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import iced_x86 as iced
import numpy as np
import numpy.typing as npt
import pytest

from clones import Check, Native
from kernweave.analysis.code import Part
from kernweave.analysis.expand import select_rows
from kernweave.analysis.imagefile import FileText, load_file
from kernweave.analysis.inner import find_inner_edges
from kernweave.image.sites import contains
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import fetched_kernel
from kernweave.model.point import Selector
from kernweave.weave.clonemap import Patched, bugs_of, exceptions_of, make_entries, make_mirror
from kernweave.weave.counters import (
    Place,
    places_of,
    select_blocks,
    select_calls,
    select_edges,
    select_entries,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from kernweave.weave.orc import orc_of
from kernweave.weave.scope import Rules, Scope, Why, find_scope
from kernweave.weave.source import Source
from kernweave.x86.decode import Flow, Trait, decode
from second_decoder import boundaries, differences, explain
from woven import Select, Woven, analysed, expected_rows, native_of, weave

U8 = npt.NDArray[np.uint8]
SERIES = ("6.1", "6.12")
AWAY = 0x0900_0040  # from the text to the code cache; a multiple of 64
SEED = 20_261_122
SAMPLE = 1500  # functions
ALL = (
    select_blocks, select_edges, select_entries, select_insns, select_calls, select_returns,
    select_loads, select_stores,
)  # fmt: skip


@dataclass(frozen=True)
class Stock:
    """A stock kernel's file, analysed once."""

    file: FileText
    source: Source
    native: Native

    @cached_property
    def scope(self) -> Scope:
        return find_scope(self.source)

    @cached_property
    def whole(self) -> Woven:
        """Everything woven, blocks and edges counted."""
        return self.weave(select_blocks, select_edges)

    def weave(self, *selects: Select, scope: Scope | None = None) -> Woven:
        return weave(self.source, self.file.base + AWAY, *selects, scope=scope or self.scope)

    @cached_property
    def sample(self) -> Scope:
        """Some functions, chosen at random, and all with something rare in them."""
        functions, code = self.source.tables.functions, self.native.code
        count = len(functions.addr)
        asked = np.zeros(count, bool)
        asked[np.random.default_rng(SEED).choice(count, SAMPLE, replace=False)] = True
        rare = (code.trait & (Trait.SHADOW | Trait.WAIT | Trait.POPF)) != 0
        rare |= np.isin(code.flow, (Flow.LEAVE, Flow.INDIRECT_JUMP))
        asked[functions.parent[code.part[rare]]] = True
        return find_scope(self.source, asked=asked)

    def check(self, woven: Woven, out: U8 | None = None) -> list[str]:
        return Check(self.native, woven.clones(out)).run()


@pytest.fixture(scope="module", params=SERIES)
def stock(request: pytest.FixtureRequest) -> Stock:
    tree = fetched_kernel(request.param)
    if tree is None:
        pytest.skip(f"kernel {request.param} was not fetched (kernweave lab up)")
    file = load_file(open_image(tree.vmlinuz))
    source, code, liveness = analysed(file)
    live = liveness.before(np.arange(len(code.addr)))
    return Stock(
        file,
        source,
        native_of(code, file.text, file.base, file.sites, live),
    )


# ---- the whole kernel ----------------------------------------------------------------------------


def test_clones_of_all_functions_are_native_code_and_counters(stock: Stock) -> None:
    assert stock.check(stock.whole) == []


def test_every_instruction_of_every_cloned_block_has_one_copy(stock: Stock) -> None:
    expected = stock.native.code.addr[expected_rows(stock.native, stock.whole)]
    assert np.array_equal(stock.whole.map.native, expected)


def test_nearly_all_functions_with_an_ftrace_site_are_woven(stock: Stock) -> None:
    functions, scope = stock.source.tables.functions, stock.scope
    homes = functions.is_c & (functions.parent == np.arange(len(functions.addr)))
    assert (scope.woven & homes).sum() > 0.99 * homes.sum()
    cold = stock.source.tables.functions.parent != np.arange(len(functions.addr))
    assert np.array_equal(scope.woven[cold], scope.woven[functions.parent[cold]])


def test_less_than_two_per_cent_of_blocks_bail_out_each_with_a_reason(stock: Stock) -> None:
    scope = stock.scope
    woven = scope.woven[stock.source.tables.blocks.function]
    reasons = Counter(Why(why) for why in scope.block[scope.bail_outs].tolist())
    assert sum(reasons.values()) == int((woven & (scope.block != Why.WOVEN)).sum())
    assert sum(reasons.values()) < 0.02 * woven.sum()


def test_nothing_that_must_be_left_alone_is_woven(stock: Stock) -> None:
    woven, sites = stock.whole.map, stock.source.sites
    for ranges in sites.ranges:
        assert not ranges.overlap(woven.native, woven.native + woven.length).any(), ranges.reason
    trait = stock.source.tables.instructions.trait[woven.insn]
    assert not (trait & (Trait.SWAPGS | Trait.NEAR | Trait.INT3)).any()


def test_same_input_gives_the_same_bytes(stock: Stock) -> None:
    again = stock.weave(select_blocks, select_edges)
    assert np.array_equal(again.out, stock.whole.out)
    assert again.out is not stock.whole.out


def test_another_decoder_has_the_same_boundaries_in_clones(stock: Stock) -> None:
    woven = stock.weave()
    part = Part("clones", "clones", None, woven.base, woven.out.tobytes(), woven.base, True)
    ours = decode([(woven.base, woven.out.tobytes())]).addr
    found = differences([part], ours, boundaries([part]))
    assert [str(one) for one in found if explain(one) is None] == []


# ---- some functions, everything counted ----------------------------------------------------------


@pytest.mark.parametrize("select", ALL)
def test_clones_with_one_kind_of_counters_are_native_code_and_counters(
    stock: Stock, select: Select
) -> None:
    assert stock.check(stock.weave(select, scope=stock.sample)) == []


def test_clones_with_all_counters_are_native_code_and_counters(stock: Stock) -> None:
    woven = stock.weave(*ALL, scope=stock.sample)
    assert stock.check(woven) == []
    held = stock.source.held[woven.impossible]
    bails = stock.sample.bail_outs[stock.source.tables.instructions.block[woven.impossible]]
    behind = stock.source.held[np.minimum(woven.impossible + 1, len(stock.source.held) - 1)]
    assert (held | bails | behind).all()


def test_clones_have_no_indirect_branch_that_is_not_native(stock: Stock) -> None:
    woven, code = stock.weave(*ALL, scope=stock.sample), stock.native.code
    decoded = decode([(woven.base, woven.out.tobytes())])
    indirect = np.isin(decoded.flow, (Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP, Flow.RETURN))
    native = woven.map.natives_of(decoded.addr[indirect])
    assert np.array_equal(code.flow[stock.native.rows(native)], decoded.flow[indirect])


@pytest.mark.parametrize(
    ("select", "selector"),
    [
        (select_insns, Selector.INSNS),
        (select_blocks, Selector.BLOCKS),
        (select_calls, Selector.CALLS),
        (select_returns, Selector.RETURN),
        (select_entries, Selector.ENTRY),
        (select_loads, Selector.LOADS),
        (select_stores, Selector.STORES),
    ],
)
def test_selectors_mean_the_same_instructions_as_elsewhere(
    stock: Stock, select: Select, selector: Selector
) -> None:
    scope, functions = stock.scope, stock.source.tables.functions
    parts = np.flatnonzero(scope.woven)
    if selector is Selector.ENTRY:
        parts = parts[functions.parent[parts] == parts]
    expected = select_rows(stock.native.code, parts.tolist(), selector)
    ours, theirs = (np.zeros(len(stock.source.at), bool) for _ in range(2))
    ours[select(stock.source, scope)[0]] = True
    theirs[expected] = True
    extra = np.flatnonzero(ours & ~theirs)
    if selector is Selector.BLOCKS:  # the tables also part blocks behind calls that do not return
        flow = stock.native.code.flow[extra - 1]
        assert np.isin(flow, (Flow.CALL, Flow.INDIRECT_CALL)).all()
        ours[extra] = False
    assert np.array_equal(ours, theirs)


def test_edges_of_code_alone_are_those_of_the_tables(stock: Stock) -> None:
    code, functions = stock.native.code, stock.source.tables.functions
    lost = functions.addr[~functions.returns]
    comes_back = (code.flow != Flow.CALL) | ~np.isin(code.target, lost)
    inner = find_inner_edges(code, stock.file.sites, comes_back)
    rows = inner.of_parts(np.flatnonzero(stock.scope.woven).tolist())
    places = places_of(inner.kind[rows], code.flow[inner.source[rows]])
    insn, place = select_edges(stock.source, stock.scope)
    ours, theirs = inner.source[rows] * len(Place) + places, insn * len(Place) + place
    assert np.array_equal(np.sort(ours), np.sort(theirs))


def test_random_copies_read_like_their_native_instructions(stock: Stock) -> None:
    woven = stock.whole
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    rows = np.random.default_rng(SEED).choice(len(woven.map.native), 10_000, replace=False)
    rows = rows[~stock.native.labels[woven.map.insn[rows]]]  # those are longer than natively
    targets = woven.map.arrivals_of(stock.native.code.target[woven.map.insn])
    heads = stock.source.tables.instructions.addr[woven.layout.bail]  # these have no copy
    begins = woven.layout.start[woven.layout.bail].astype(np.uint64) + np.uint64(woven.base)
    bails = dict(zip(heads.tolist(), begins.tolist(), strict=True))
    counted = set(woven.clones().counters[0][woven.counters.place == Place.TAKEN].tolist())
    for row in rows.tolist():
        native, clone = int(woven.map.native[row]), int(woven.map.clone[row])
        ours = _decode(stock.native.text, native - stock.file.base, native)
        theirs = _decode(woven.out, clone - woven.base, clone)
        assert ours.mnemonic == theirs.mnemonic, hex(native)
        if not ours.near_branch_target:
            assert formatter.format(ours) == formatter.format(theirs), hex(native)
        elif native not in counted and not contains(
            stock.source.sites.static_calls, woven.map.native[row : row + 1]
        ):
            there = ours.near_branch_target
            expected = int(targets[row]) or bails.get(there, there)
            assert theirs.near_branch_target == expected, hex(native)


def _decode(text: U8, at: int, addr: int) -> iced.Instruction:
    return iced.Decoder(64, text[at : at + 15].tobytes(), ip=addr).decode()


# ---- tables --------------------------------------------------------------------------------------


def test_addresses_map_both_ways(stock: Stock) -> None:
    woven = stock.whole.map
    assert np.array_equal(woven.clones_of(woven.native), woven.clone)
    assert np.array_equal(woven.natives_of(woven.clone), woven.native)
    assert np.array_equal(woven.natives_of(woven.arrival), woven.native)
    assert (np.diff(woven.native.astype(np.int64)) > 0).all()
    assert (np.diff(woven.clone.astype(np.int64)) > 0).all()
    assert not woven.natives_of(woven.clone + np.uint64(1))[woven.size > 1].any()
    calls = np.isin(stock.source.tables.instructions.flow[woven.insn], (Flow.CALL,))
    pushed = woven.clone[calls] + woven.size[calls]
    assert np.array_equal(woven.returns_of(pushed), woven.native[calls] + woven.length[calls])


def test_entries_lead_to_clones_of_whole_functions(stock: Stock) -> None:
    functions = stock.source.tables.functions
    entries = make_entries(stock.source, stock.whole.layout, stock.whole.base)
    homes = stock.scope.woven & (functions.parent == np.arange(len(functions.addr)))
    assert np.array_equal(entries.native, functions.addr[homes])
    assert np.array_equal(entries.clone, entries.slot + np.uint64(5))
    behind = entries.body - entries.native
    assert not ((entries.slot - behind) % np.uint64(16)).any()
    assert set(behind.tolist()) <= {0, 4}
    assert contains(stock.source.sites.ftrace, entries.body).all()
    assert np.array_equal(stock.whole.map.clones_of(entries.body), entries.slot)


def test_every_patchable_place_of_a_clone_has_a_mirror_row(stock: Stock) -> None:
    woven, sites = stock.whole, stock.source.sites
    mirror = make_mirror(stock.source, stock.scope, woven.layout, woven.base)
    tables = (sites.jump_labels, sites.static_calls, sites.ftrace)
    for kind, table in zip(Patched, tables, strict=True):
        rows = mirror.kind == kind
        expected = woven.map.native[contains(np.unique(table), woven.map.native)]
        assert np.array_equal(mirror.native[rows], expected)
        assert (mirror.size[rows] >= mirror.length[rows]).all()
        assert (mirror.size[rows] >= 5).all()
    labels = mirror.kind == Patched.JUMP_LABEL
    row = np.searchsorted(sites.jump_labels, mirror.native[labels])
    inside = woven.map.arrivals_of(sites.jump_targets[row])
    edges = woven.clones()
    taken = edges.counters[0][edges.counters[1] == Place.TAKEN]
    plain = ~contains(np.sort(taken), mirror.native[labels])
    target = np.where(inside, inside, sites.jump_targets[row])
    assert np.array_equal(mirror.target[labels][plain], target[plain])


def test_exceptions_and_bugs_name_the_copies(stock: Stock) -> None:
    woven, sites = stock.whole, stock.source.sites
    faults, bugs = exceptions_of(stock.source, woven.map), bugs_of(stock.source, woven.map)
    for found, table in ((faults, sites.exceptions), (bugs, sites.bugs)):
        native = table[found.row]
        assert np.array_equal(woven.map.natives_of(found.addr), native)
        assert len(native) == contains(table, woven.map.native).sum()
        at = (found.addr - np.uint64(woven.base)).astype(np.int64)
        there = (native - np.uint64(stock.file.base)).astype(np.int64)
        assert np.array_equal(woven.out[at], stock.native.text[there])  # no counter between
    home = woven.map.natives_of(faults.other)
    fixup = sites.fixups[faults.row]
    assert np.array_equal(np.where(home, home, faults.other), fixup)


def test_what_is_fixed_up_at_home_only_has_no_copy(stock: Stock) -> None:
    zeropads = stock.source.sites.zeropads
    assert len(zeropads) > 10
    assert not contains(zeropads, stock.whole.map.native).any()
    rows = stock.source.index.rows(zeropads)
    blocks = stock.source.tables.instructions.block[rows]
    assert (stock.scope.block[blocks] != Why.WOVEN).all()


def test_unwinding_a_copy_finds_the_row_of_its_native_instruction(stock: Stock) -> None:
    woven, orc = stock.whole, stock.file.tables.orc
    found = orc_of(stock.source, stock.scope, woven.layout, orc, woven.base)
    assert (np.diff(found.addr.astype(np.int64)) >= 0).all()
    row = np.searchsorted(found.addr, woven.map.clone, side="right") - 1
    native = np.searchsorted(orc.addr, woven.map.native, side="right") - 1
    assert np.array_equal(found.row[row], native)
    assert not found.pushed[row].any()
    flags = np.array(["flags" in kind.spills for kind in woven.layout.snippets.kinds])
    saving = flags[woven.layout.snippets.kind]
    assert saving.any()
    at = (woven.layout.snippets.at[saving] + 1).astype(np.uint64) + np.uint64(woven.base)
    pushed = found.pushed[np.searchsorted(found.addr, at, side="right") - 1]
    assert (pushed == 8).all()


# ---- faults --------------------------------------------------------------------------------------


def _row_of(woven: Woven, wanted: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]) -> int:
    rows = np.flatnonzero(wanted(woven.source.tables.instructions.flow[woven.map.insn]))
    return int(rows[len(rows) // 2])


def _position(woven: Woven, row: int, back: int = 0) -> int:
    return int(woven.map.clone[row]) - woven.base + int(woven.map.size[row]) - back


def _branch_swapped(woven: Woven, out: U8) -> None:
    at = _position(woven, _row_of(woven, lambda flow: flow == Flow.BRANCH), 5)
    out[at] ^= 1


def _branch_off_by_one(woven: Woven, out: U8) -> None:
    out[_position(woven, _row_of(woven, lambda flow: flow == Flow.BRANCH), 4)] += 1


def _call_off_by_one(woven: Woven, out: U8) -> None:
    out[_position(woven, _row_of(woven, lambda flow: flow == Flow.CALL), 4)] += 1


def _operand_off_by_one(woven: Woven, out: U8) -> None:
    trait = woven.source.tables.instructions.trait[woven.map.insn]
    rows = np.flatnonzero((trait & Trait.RIP) != 0)
    row = rows[woven.map.size[rows] == 7][3]  # no immediate behind the displacement
    out[_position(woven, int(row), 4)] ^= 1


def _copy_changed(woven: Woven, out: U8) -> None:
    rows = np.flatnonzero((woven.map.size == 3) & (woven.map.length == 3))
    out[_position(woven, int(rows[77]), 1)] ^= 8


def _counter_missing(woven: Woven, out: U8) -> None:
    at = woven.layout.snippets.at[100]
    out[at : at + 15] = np.frombuffer(bytes.fromhex("0f1f440000") * 3, np.uint8)


def _counters_exchanged(woven: Woven, out: U8) -> None:
    one, two = (int(at) + 2 for at in woven.layout.snippets.at[[100, 101]])
    out[one], out[two] = out[two], out[one]


def _live_register_lost(woven: Woven, out: U8) -> None:
    """Another register than one that is dead: the argument at an entry."""
    at = int(woven.layout.snippets.at[0])
    out[at : at + 2] = np.frombuffer(b"\x48\xbf", np.uint8)
    out[at + 10 : at + 15] = np.frombuffer(b"\x65\x48\xff\x47\x00", np.uint8)


def _decrement(woven: Woven, out: U8) -> None:
    out[woven.layout.snippets.at[55] + 13] ^= 8


def _slot_missing(woven: Woven, out: U8) -> None:
    at = woven.layout.slots.at[9]
    out[at : at + 5] = 0x90


def _int3_missing(woven: Woven, out: U8) -> None:
    rows = np.flatnonzero(out[(woven.map.clone + woven.map.size - woven.base).astype(int)] == 0xCC)
    out[_position(woven, int(rows[20]))] = 0x90


def _bail_out_elsewhere(woven: Woven, out: U8) -> None:
    out[woven.layout.tails[1][0] + 1] += 1


FAULTS = (
    _branch_swapped, _branch_off_by_one, _call_off_by_one, _operand_off_by_one, _copy_changed,
    _counter_missing, _counters_exchanged, _live_register_lost, _decrement, _slot_missing,
    _int3_missing, _bail_out_elsewhere,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_fault(stock: Stock, fault: Callable[[Woven, U8], None]) -> None:
    woven = stock.weave(select_blocks, scope=stock.sample)
    out = woven.out.copy()
    fault(woven, out)
    assert stock.check(woven, out) != []


def test_check_finds_a_copy_that_is_not_there(stock: Stock) -> None:
    woven = stock.weave(select_blocks, scope=stock.sample)
    clones = woven.clones()
    fewer = replace(clones, native=clones.native[:-1], copy=clones.copy[:-1])
    assert Check(stock.native, fewer).run() != []


# ---- rules ---------------------------------------------------------------------------------------


def test_branches_that_are_safe_by_their_place_stay_there(stock: Stock) -> None:
    asked = stock.sample.woven
    scope = find_scope(stock.source, Rules(line_matters=True), asked)
    woven = stock.weave(select_blocks, scope=scope)
    decoded = decode([(woven.base, woven.out.tobytes())])
    kinds = (Flow.RETURN, Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP)
    assert not np.isin(decoded.flow, kinds).any()
    stay = np.isin(stock.native.code.flow, (Flow.RETURN, Flow.INDIRECT_JUMP))
    assert Check(replace(stock.native, stay=stay), woven.clones()).run() == []
