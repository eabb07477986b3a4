# SPDX-License-Identifier: GPL-2.0-or-later
"""Assembled functions woven: what is cloned, what bails out, and the bytes of rare copies."""

from __future__ import annotations

from dataclasses import replace

import iced_x86 as iced
import numpy as np
import numpy.typing as npt
import pytest

from exec.asm import NOP5, RET, Branch, Item, call, jcc, jmp, jmp_short, mem, op, program
from kernweave.analysis.code import Part
from kernweave.analysis.kernel import Hints, analyse
from kernweave.errors import InternalError, Reason
from kernweave.image.sites import Sites, make_ranges
from kernweave.weave.bind import translate
from kernweave.weave.clonemap import Patched, exceptions_of, make_entries, make_mirror
from kernweave.weave.counters import Place, make_counters, select_blocks, select_insns
from kernweave.weave.scope import Rules, Scope, Why, find_scope, native_blocks
from kernweave.weave.source import Source, make_source
from woven import Woven, weave

BASE = 0xFFFF_FFFF_8100_0000
CACHE = BASE + 0x400_0000
ROOM = 0x100
MOVE = op("MOV_R64_RM64", "rax", "rbx")
ENDBR = op("ENDBR64")
LOAD = op("MOV_R64_RM64", "rax", mem(iced.Register.RDI))
STI, HLT = op("STI"), op("HLT")
Functions = tuple[tuple[Item, ...], ...]


def addrs(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(sorted(values), np.uint64)


def at(number: int) -> int:
    """Where a function is."""
    return BASE + ROOM * number


def source_of(
    *functions: tuple[Item, ...], sites: Sites | None = None, cold: bool = False
) -> Source:
    """Functions with an ftrace site each; with `cold` the last one is the first one's cold part."""
    parts, text, ftrace = [], bytearray(b"\xcc" * ROOM * len(functions)), []
    for number, items in enumerate(functions):
        made = program(at(number), *items)
        code = made.code.ljust(ROOM, b"\xcc")
        text[ROOM * number : ROOM * (number + 1)] = code
        home = at(0) if cold and number == len(functions) - 1 else at(number)
        parts.append(Part("f", "f", None, at(number), code, home, True))
        ftrace += [a for a, item in zip(made.at, _instructions(items), strict=True) if item is NOP5]
    found = replace(sites or Sites(), ftrace=addrs(*ftrace))
    tables = analyse(parts, found, Hints(np.zeros(0, np.uint64), {}))
    return make_source(tables, bytes(text), BASE, found)


def _instructions(items: tuple[Item, ...]) -> list[Item]:
    return [item for item in items if not isinstance(item, str)]


def clone_of(woven: Woven, native: int) -> bytes:
    """The bytes of one instruction's copy."""
    row = int(np.searchsorted(woven.map.native, np.uint64(native)))
    assert woven.map.native[row] == native
    start = int(woven.map.clone[row]) - woven.base
    return woven.out[start : start + int(woven.map.size[row])].tobytes()


def reason_of(scope: Scope, source: Source, native: int) -> Why:
    """Why the block that begins at an address is cloned or not."""
    return Why(scope.block[np.searchsorted(source.tables.blocks.addr, np.uint64(native))])


# ---- functions -----------------------------------------------------------------------------------


def test_function_without_ftrace_site_is_not_woven() -> None:
    source = source_of((NOP5, RET), (MOVE, RET))
    assert find_scope(source).function.tolist() == [Why.WOVEN, Why.NO_ENTRY]


def test_function_of_a_denied_range_is_not_woven() -> None:
    ranges = make_ranges(Reason.NOINSTR, addrs(at(1) + 8), addrs(at(1) + 9))
    source = source_of((NOP5, RET), (NOP5, MOVE, RET), sites=Sites(ranges=(ranges,)))
    assert find_scope(source).function.tolist() == [Why.WOVEN, Why.DENIED]


def test_function_that_ftrace_uses_is_not_woven() -> None:
    source = source_of((ENDBR, NOP5, RET), sites=Sites(ftrace_busy=addrs(at(0) + 4)))
    assert find_scope(source).function.tolist() == [Why.BUSY_FTRACE]


def test_function_with_swapgs_is_not_woven() -> None:
    source = source_of((NOP5, op("SWAPGS"), RET))
    assert find_scope(source).function.tolist() == [Why.SWAPGS]


def test_cold_part_goes_with_its_function() -> None:
    functions: Functions = ((NOP5, jcc("e", at(2)), RET), (NOP5, RET), (MOVE, jmp(at(0) + 11)))
    source = source_of(*functions, cold=True)
    asked = np.array([True, False, False])
    scope = find_scope(source, asked=asked)
    assert scope.function.tolist() == [Why.WOVEN, Why.NOT_ASKED, Why.WOVEN]
    guilty: Functions = (*functions[:2], (op("SWAPGS"), jmp(at(0) + 11)))
    scope = find_scope(source_of(*guilty, cold=True))
    assert scope.function.tolist() == [Why.SWAPGS, Why.WOVEN, Why.SWAPGS]


def test_function_whose_first_block_cannot_be_cloned_is_not_woven() -> None:
    source = source_of((NOP5, op("IRETQ")))
    assert find_scope(source).function.tolist() == [Why.ENTRY_BLOCK]


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ((Branch(iced.Code.JRCXZ_REL8_64, "out"), MOVE), Why.NEAR),
        ((op("IRETQ"),), Why.LEAVES),
        ((b"\xcd\x80",), Why.TRAP),
        ((call("inside"), MOVE, "inside", MOVE), Why.INSIDE_CALL),
        ((b"\x06",), Why.NOT_KNOWN),
        ((b"\x2e\xeb\x02", MOVE), Why.NOT_KNOWN),
        ((op("UD2"),), Why.WOVEN),
        ((b"\x67\x0f\xb9\x40\x0c",), Why.WOVEN),
        ((STI, HLT), Why.WOVEN),
    ],
)
def test_block_is_cloned_unless_there_is_a_reason(items: tuple[Item, ...], why: Why) -> None:
    source = source_of((NOP5, jcc("e", "out"), *items, "out", RET))
    block = at(0) + 11
    assert reason_of(find_scope(source), source, block) == why


def test_block_in_a_shadow_takes_the_one_before_along() -> None:
    source = source_of((NOP5, jcc("e", "there"), STI, "there", op("IRETQ")))
    scope = find_scope(source)
    assert reason_of(scope, source, at(0) + 12) == Why.LEAVES
    assert reason_of(scope, source, at(0) + 11) == Why.SHADOW


def test_fault_inside_an_instruction_is_a_bail_out() -> None:
    sites = Sites(exceptions=addrs(at(0) + 12), fixups=addrs(at(0) + 11))
    source = source_of((NOP5, jcc("e", "there"), MOVE, "there", RET), sites=sites)
    assert reason_of(find_scope(source), source, at(0) + 11) == Why.TABLE


@pytest.mark.parametrize(("zeropads", "why"), [(0, Why.WOVEN), (1, Why.ZEROPAD)])
def test_load_that_is_fixed_up_right_behind_it_only_is_a_bail_out(zeropads: int, why: Why) -> None:
    load = addrs(at(0) + 14)
    sites = Sites(exceptions=load, fixups=addrs(at(0) + 17), zeropads=load[:zeropads])
    source = source_of((NOP5, jcc("e", "there"), MOVE, "there", LOAD, MOVE, RET), sites=sites)
    scope = find_scope(source)
    assert reason_of(scope, source, at(0) + 14) == why
    woven = weave(source, CACHE, select_insns)
    assert (at(0) + 14 in woven.map.native.tolist()) == (why is Why.WOVEN)
    assert len(exceptions_of(source, woven.map).row) == 1 - zeropads


@pytest.mark.parametrize(
    ("rules", "why"), [(Rules(), Why.WOVEN), (Rules(locks_live=True), Why.LOCK)]
)
def test_lock_prefix_bails_out_while_it_may_be_patched(rules: Rules, why: Why) -> None:
    locked = b"\xf0\x48\x0f\xc1\x1d\x00\x00\x00\x00"
    source = source_of((NOP5, jcc("e", "there"), locked, "there", RET))
    assert reason_of(find_scope(source, rules), source, at(0) + 11) == why


def test_what_follows_a_bail_out_may_run_natively() -> None:
    locked = b"\xf0\x48\x0f\xc1\x1d\x00\x00\x00\x00"
    one = (NOP5, jcc("e", "there"), jcc("b", "other"), locked, "there", RET, "other", MOVE, RET)
    source = source_of(one, (NOP5, jcc("e", "over"), MOVE, "over", RET))
    for rules, count in ((Rules(), 0), (Rules(locks_live=True), 2)):
        native = native_blocks(source, find_scope(source, rules))
        assert native.sum() == count
        starts = source.tables.blocks.addr[native].tolist()
        assert starts == [at(0) + 17, at(0) + 26][:count]


def test_bail_out_is_a_jump_to_the_native_block_behind_its_counter() -> None:
    source = source_of((NOP5, jcc("e", "there"), MOVE, "there", op("IRETQ")))
    woven = weave(source, CACHE, select_blocks)
    assert not len(woven.impossible)
    (row,) = woven.layout.bail.tolist()
    jump = int(woven.layout.copy[row])
    code = woven.out[jump : jump + 5].tobytes()
    native = at(0) + 14
    assert iced.Decoder(64, code, ip=CACHE + jump).decode().near_branch_target == native
    snippets = woven.layout.snippets
    (number,) = np.flatnonzero(woven.counters.insn == row).tolist()
    assert woven.layout.start[row] == snippets.at[number]
    assert jump == snippets.at[number] + len(snippets.kinds[snippets.kind[number]].code)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "copy"),
    [
        (b"\x66\x90", "0f1f440000"),
        (NOP5, "0f1f440000"),
        (jmp_short("out"), "e903000000"),
        (jmp("out"), "e903000000"),
    ],
)
def test_jump_label_has_room_for_a_jump(label: Item, copy: str) -> None:
    items: tuple[Item, ...] = (NOP5, MOVE, label, MOVE, "out", RET)
    made = program(at(0), *items)
    sites = Sites(jump_labels=addrs(at(0) + 8), jump_targets=addrs(made.labels["out"]))
    source = source_of(items, sites=sites)
    source = replace(source, sites=replace(source.sites, ftrace=addrs(at(0))))
    woven = weave(source, CACHE)
    assert clone_of(woven, at(0) + 8).hex() == copy
    mirror = make_mirror(source, woven.scope, woven.layout, CACHE)
    row = mirror.kind.tolist().index(Patched.JUMP_LABEL)
    assert (mirror.native[row], mirror.size[row]) == (at(0) + 8, 5)
    assert mirror.length[row] == made.at[3] - made.at[2]
    assert mirror.target[row] == woven.map.arrivals_of(addrs(made.labels["out"]))[0]


@pytest.mark.parametrize(
    "held", [b"\xc3\xcc\xcc\xcc\xcc", b"\x2e\x2e\x2e\x31\xc0", b"\x0f\x1f\x44\0\0"]
)
def test_static_call_keeps_five_bytes_whatever_it_holds(held: bytes) -> None:
    items: tuple[Item, ...] = (NOP5, MOVE, held, RET)
    source = source_of(items, sites=Sites(static_calls=addrs(at(0) + 8)))
    woven = weave(source, CACHE)
    assert clone_of(woven, at(0) + 8) == held
    mirror = make_mirror(source, woven.scope, woven.layout, CACHE)
    row = mirror.kind.tolist().index(Patched.STATIC_CALL)
    assert (mirror.length[row], mirror.size[row]) == (5, 5)


def test_static_call_goes_to_native_code_and_others_to_clones() -> None:
    items: tuple[Item, ...] = (NOP5, call(at(1)), call(at(1)), RET)
    source = source_of(items, (NOP5, RET), sites=Sites(static_calls=addrs(at(0) + 5)))
    woven = weave(source, CACHE)
    entries = make_entries(source, woven.layout, CACHE)
    targets = []
    for native in (at(0) + 5, at(0) + 10):
        clone = int(woven.map.clones_of(addrs(native))[0])
        code = clone_of(woven, native)
        targets.append(iced.Decoder(64, code, ip=clone).decode().near_branch_target)
    assert targets == [at(1), int(entries.slot[1])]


def with_bytes(source: Source, native: int, code: bytes) -> Source:
    """The same tables, as of an earlier boot, and another text."""
    text = source.text.copy()
    text[native - BASE : native - BASE + len(code)] = np.frombuffer(code, np.uint8)
    return replace(source, text=text)


NOP5_BYTES = bytes.fromhex("0f1f440000")
RETURN = b"\xc3\xcc\xcc\xcc\xcc"


@pytest.mark.parametrize("before", [NOP5_BYTES, RETURN, bytes.fromhex("e8f3000000")])
@pytest.mark.parametrize("now", [NOP5_BYTES, RETURN, bytes.fromhex("e8f3000000")])
def test_static_call_is_what_its_bytes_are_now(before: bytes, now: bytes) -> None:
    items: tuple[Item, ...] = (NOP5, MOVE, before, MOVE, RET)
    then = source_of(items, (NOP5, RET), sites=Sites(static_calls=addrs(at(0) + 8)))
    source = with_bytes(then, at(0) + 8, now)
    woven = weave(source, CACHE)
    code = clone_of(woven, at(0) + 8)
    if now[0] == 0xE8:
        clone = int(woven.map.clones_of(addrs(at(0) + 8))[0])
        assert iced.Decoder(64, code, ip=clone).decode().near_branch_target == at(1)
    else:
        assert code == now


@pytest.mark.parametrize(("before", "now"), [("6690", "eb03"), ("eb03", "6690")])
def test_jump_label_is_what_its_bytes_are_now(before: str, now: str) -> None:
    items: tuple[Item, ...] = (NOP5, MOVE, bytes.fromhex(before), MOVE, "out", RET)
    sites = Sites(jump_labels=addrs(at(0) + 8), jump_targets=addrs(at(0) + 13))
    source = with_bytes(source_of(items, sites=sites), at(0) + 8, bytes.fromhex(now))
    code = clone_of(weave(source, CACHE), at(0) + 8)
    assert code.hex() == ("e903000000" if now == "eb03" else "0f1f440000")


def test_slot_is_behind_the_endbr64_or_at_the_start() -> None:
    woven = weave(source_of((ENDBR, NOP5, RET), (NOP5, RET)), CACHE)
    entries = make_entries(woven.source, woven.layout, CACHE)
    starts = woven.map.clones_of(addrs(at(0), at(1)))
    assert (entries.slot - starts).tolist() == [4, 0]
    assert (entries.clone - entries.slot).tolist() == [5, 5]
    assert entries.body.tolist() == [at(0) + 4, at(1)]
    assert (starts % np.uint64(16)).tolist() == [0, 0]


def test_counter_of_an_endbr64_is_behind_it() -> None:
    woven = weave(source_of((ENDBR, NOP5, RET)), CACHE, select_blocks)
    assert woven.out[:9].tobytes().hex() == "f30f1efa0f1f440000"
    assert woven.counters.insn.tolist() == [1]
    assert woven.counters.place.tolist() == [Place.BEFORE]
    assert woven.layout.snippets.at.tolist() == [9]


def test_counter_of_the_first_instruction_is_behind_the_slot_and_loops_lead_to_the_slot() -> None:
    woven = weave(source_of((NOP5, MOVE, jmp(at(0)))), CACHE, select_blocks)
    entries = make_entries(woven.source, woven.layout, CACHE)
    assert (entries.slot.tolist(), entries.clone.tolist()) == ([CACHE], [CACHE + 5])
    assert woven.layout.snippets.at.tolist() == [5]
    clone = int(woven.map.clones_of(addrs(at(0) + 8))[0])
    loop = iced.Decoder(64, clone_of(woven, at(0) + 8), ip=clone).decode()
    assert loop.near_branch_target == CACHE


def test_entry_instruction_of_another_size_than_a_slot_is_not_woven() -> None:
    source = source_of((NOP5, MOVE, RET), (NOP5, RET))
    lengths = source.tables.instructions.length.copy()
    lengths[0] = 4
    rows = replace(source.tables.instructions, length=lengths)
    tables = replace(source.tables, instructions=rows)
    scope = find_scope(replace(source, tables=tables))
    assert scope.function.tolist() == [Why.ENTRY_BLOCK, Why.WOVEN]


def test_nothing_comes_between_sti_and_its_shadow() -> None:
    source = source_of((NOP5, STI, HLT, MOVE, RET))
    woven = weave(source, CACHE, select_insns)
    assert source.tables.instructions.addr[woven.impossible].tolist() == [at(0) + 6]
    clone = woven.map.clones_of(addrs(at(0) + 5, at(0) + 6))
    assert clone[1] == clone[0] + 1


def test_return_that_is_safe_by_its_place_stays_there() -> None:
    source = source_of((NOP5, op("CALL_RM64", "rax"), RET, b"\xcc"), (NOP5, MOVE, RET, b"\xcc"))
    scope = find_scope(source, Rules(line_matters=True))
    assert scope.function.tolist() == [Why.ENTRY_BLOCK, Why.WOVEN]
    woven = weave(source, CACHE, scope=scope)
    native = at(1) + 8
    clone = int(woven.map.clones_of(addrs(native))[0])
    jump = iced.Decoder(64, clone_of(woven, native), ip=clone).decode()
    assert (jump.mnemonic, jump.near_branch_target) == (iced.Mnemonic.JMP, native)
    assert woven.out[clone - CACHE + 5] == 0xCC


def test_int3_behind_a_return_is_kept_and_code_that_runs_on_goes_back() -> None:
    functions: Functions = ((NOP5, RET, b"\xcc"), (NOP5, *[MOVE] * 83, b"\x90\x90"))
    woven = weave(source_of(*functions, (NOP5, RET)), CACHE)
    first = int(woven.map.clones_of(addrs(at(0) + 5))[0]) - CACHE
    assert woven.out[first : first + 2].tobytes() == b"\xc3\xcc"
    rows, jumps = woven.layout.tails
    assert len(rows) == 1
    code = woven.out[int(jumps[0]) : int(jumps[0]) + 5].tobytes()
    target = iced.Decoder(64, code, ip=CACHE + int(jumps[0])).decode().near_branch_target
    assert at(1) + 5 + 83 * 3 <= target <= at(2)


def test_fault_is_fixed_up_in_the_clone() -> None:
    sites = Sites(exceptions=addrs(at(0) + 5), fixups=addrs(at(0) + 9))
    source = source_of((NOP5, MOVE, RET, MOVE, RET), sites=sites)
    woven = weave(source, CACHE, select_insns)
    found = exceptions_of(source, woven.map)
    assert found.addr.tolist() == woven.map.clones_of(addrs(at(0) + 5)).tolist()
    assert found.other.tolist() == woven.map.arrivals_of(addrs(at(0) + 9)).tolist()


def test_counters_that_share_a_place_are_one() -> None:
    source = source_of((NOP5, MOVE, RET))
    scope = find_scope(source)
    insn, place = np.array([2, 0, 2]), np.zeros(3, np.uint8)
    counters, number = make_counters(source, scope, insn, place)
    assert counters.insn.tolist() == [0, 2]
    assert number.tolist() == [1, 0, 1]


def test_code_cache_out_of_reach_is_an_error() -> None:
    woven = weave(
        source_of((NOP5, op("MOV_R64_RM64", "rax", mem(iced.Register.RIP, disp=BASE)), RET)), CACHE
    )
    with pytest.raises(InternalError, match="2 GiB"):
        translate(woven.source, woven.scope, woven.layout, BASE - (3 << 30), woven.offsets)


def test_nothing_to_weave_gives_no_bytes() -> None:
    woven = weave(source_of((MOVE, RET)), CACHE, select_blocks)
    assert (woven.layout.total, len(woven.out), len(woven.map.native)) == (0, 0, 0)
