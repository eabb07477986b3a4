# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions to blocks: padding left out, leaders found, room measured, cold parts kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from exec.asm import INT3, NOP, NOP5, RET, Item, Program, jcc, jmp, jmp_short, op, program
from kernweave.analysis.code import Code, Part, build_code
from kernweave.image.sites import Sites
from kernweave.x86.decode import Trait

ADDR = 0xFFFF_FFFF_8100_1000
COLD = ADDR + 0x10_0000
MOVE = op("MOV_R64_RM64", "rax", "rbx")  # 3 bytes
ENDBR = op("ENDBR64")
LONG_NOP = op("NOP_RM32", "eax")  # 3 bytes


def part(code: Program, name: str = "f", group: int = ADDR, is_c: bool = True) -> Part:
    return Part(name, name, None, code.addr, code.code, group, is_c)


def build(*items: Item, sites: Sites | None = None) -> tuple[Program, Code]:
    code = program(ADDR, *items)
    return code, build_code([part(code)], sites or Sites())


def leaders(code: Code) -> list[int]:
    return [int(addr) for addr in code.addr[code.leader]]


def addrs(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def test_straight_code_is_one_block() -> None:
    source, code = build(NOP5, MOVE, MOVE, RET)
    assert code.addr.tolist() == list(source.at)
    assert leaders(code) == [ADDR]
    assert code.room.tolist() == code.length.tolist()


def test_branch_makes_leaders_of_target_and_successor() -> None:
    source, code = build(MOVE, jcc("e", "out"), MOVE, "out", RET)
    assert leaders(code) == [ADDR, source.at[2], source.labels["out"]]


def test_loop_makes_a_leader_of_its_head() -> None:
    source, code = build(MOVE, "head", MOVE, jcc("ne", "head"), RET)
    assert leaders(code) == [ADDR, source.labels["head"], source.at[3]]


def test_call_and_trap_do_not_end_a_block() -> None:
    _, code = build(MOVE, op("CALL_RM64", "rax"), op("UD2"), MOVE, RET)
    assert leaders(code) == [ADDR]


@pytest.mark.parametrize("end", [RET, jmp(ADDR), op("JMP_RM64", "rax"), op("IRETQ")], ids=str)
def test_padding_behind_the_end_of_flow_is_left_out(end: Item) -> None:
    source, code = build(MOVE, end, LONG_NOP, NOP, INT3)
    assert code.addr.tolist() == list(source.at[:2])
    assert code.room[1] == code.length[1]  # nops may be entered from outside


def test_nops_before_a_target_are_left_out_and_no_room() -> None:
    source, code = build(jcc("e", "out"), RET, LONG_NOP, NOP, "out", MOVE, RET)
    assert code.addr.tolist() == [source.at[0], source.at[1], *source.at[4:]]
    assert code.room.tolist() == [6, 1, 3, 1]
    assert leaders(code) == [source.at[0], source.at[1], source.labels["out"]]


@pytest.mark.parametrize("seal", ["660f1f00", "0f1f40d6"])
def test_nop_in_the_place_of_endbr64_is_not_the_entry(seal: str) -> None:
    source, code = build(bytes.fromhex(seal), MOVE, bytes.fromhex(seal), RET)
    assert code.entries.tolist() == [1]
    assert code.addr.tolist() == list(source.at)
    assert [bool(trait & Trait.ENDBR) for trait in code.trait.tolist()] == [True, *3 * [False]]


def test_what_arrives_at_endbr_is_told_behind_it_unless_others_arrive_there() -> None:
    _, code = build(ENDBR, MOVE, jcc("e", ADDR), RET)
    assert code.past_endbr(np.arange(4)).tolist() == [1, 1, 2, 3]
    _, code = build(ENDBR, "loop", MOVE, jcc("e", "loop"), RET)
    assert code.past_endbr(np.arange(4)).tolist() == [0, 1, 2, 3]
    _, code = build(ENDBR)
    assert code.past_endbr(np.arange(1)).tolist() == [0]


@pytest.mark.parametrize("seal", ["660f1f00", "0f1f40d6"])
def test_nop_in_the_place_of_endbr64_is_told_behind_it_before_ftrace(seal: str) -> None:
    _, code = build(bytes.fromhex(seal), NOP5, MOVE, RET)
    assert code.past_endbr(np.arange(4)).tolist() == [1, 1, 2, 3]
    _, code = build(bytes.fromhex(seal), MOVE, RET)
    assert code.past_endbr(np.arange(3)).tolist() == [0, 1, 2]


def test_nop_that_control_reaches_is_kept() -> None:
    source, code = build(MOVE, NOP, LONG_NOP, MOVE, RET)
    assert code.addr.tolist() == list(source.at)


def test_nop_behind_a_call_is_kept() -> None:
    source, code = build(op("CALL_RM64", "rax"), NOP, RET)
    assert code.addr.tolist() == list(source.at)


def test_targeted_nop_behind_a_return_is_kept_with_those_after_it() -> None:
    source, code = build(jcc("e", "out"), RET, NOP, "out", NOP, NOP, RET)
    assert code.addr.tolist() == [source.at[i] for i in (0, 1, 3, 4, 5)]
    assert code.room.tolist() == [6, 1, 1, 1, 1]


def test_int3_behind_a_return_is_room() -> None:
    _, code = build(RET, INT3, INT3, INT3, INT3)
    assert code.room.tolist() == [5]


def test_jump_label_behind_a_return_is_kept_and_ends_the_room() -> None:
    source = program(ADDR, RET, NOP5, INT3)
    sites = Sites(jump_labels=addrs(source.at[1]), jump_targets=addrs(ADDR))
    code = build_code([part(source)], sites)
    assert code.addr.tolist() == list(source.at[:2])
    assert code.room.tolist() == [1, 6]


def test_first_instruction_is_kept_even_if_it_is_filler() -> None:
    source, code = build(NOP, NOP, RET)
    assert code.addr.tolist() == list(source.at)


def test_trailing_nops_are_left_out_where_nothing_follows() -> None:
    source, code = build(MOVE, op("UD2"), NOP, NOP)
    assert code.addr.tolist() == list(source.at[:2])


def test_jump_label_ends_a_block_and_its_target_starts_one() -> None:
    source = program(ADDR, MOVE, NOP5, MOVE, RET, "slow", MOVE, RET)
    sites = Sites(jump_labels=addrs(source.at[1]), jump_targets=addrs(source.labels["slow"]))
    code = build_code([part(source)], sites)
    assert leaders(code) == [ADDR, source.at[2], source.labels["slow"]]


def test_fixup_starts_a_block() -> None:
    source = program(ADDR, MOVE, MOVE, "fixup", MOVE, RET)
    sites = Sites(exceptions=addrs(source.at[0]), fixups=addrs(source.labels["fixup"]))
    assert leaders(build_code([part(source)], sites)) == [ADDR, source.labels["fixup"]]


def test_cold_part_has_rows_of_its_own_and_its_targets_are_leaders() -> None:
    hot = program(ADDR, MOVE, jcc("e", COLD + 3), "back", MOVE, RET, INT3)
    cold = program(COLD, MOVE, "in", MOVE, jmp(hot.labels["back"]))
    code = build_code([part(hot), part(cold, "f.cold")], Sites())
    assert code.part.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert leaders(code) == [ADDR, hot.labels["back"], COLD, cold.labels["in"]]
    assert [int(code.parts[i].group) for i in code.part] == [ADDR] * 7
    assert code.raw(6) == cold.code[6:]


def test_room_ends_with_the_part() -> None:
    first = program(ADDR, RET, INT3, INT3)
    second = program(ADDR + 3, RET, INT3)
    code = build_code([part(first), part(second, "g", ADDR + 3)], Sites())
    assert code.room.tolist() == [3, 2]
    assert code.leader.tolist() == [True, True]


def test_filler_run_does_not_reach_into_the_next_part() -> None:
    first = program(ADDR, RET, NOP)
    second = program(ADDR + 2, NOP, MOVE, RET)
    code = build_code([part(first), part(second, "g", ADDR + 2)], Sites())
    assert code.addr.tolist() == [ADDR, *second.at]


def test_rows_at_finds_instructions_in_any_part_order() -> None:
    hot = program(ADDR, MOVE, RET)
    cold = program(COLD, MOVE, RET)
    code = build_code([part(cold, "f.cold"), part(hot)], Sites())
    asked = addrs(ADDR, ADDR + 1, ADDR + 3, COLD, COLD + 3, 0, 1 << 63)
    assert code.rows_at(asked).tolist() == [2, -1, 3, 0, 1, -1, -1]


def test_no_parts_make_an_empty_table() -> None:
    code = build_code([], Sites())
    assert len(code.addr) == len(code.leader) == len(code.room) == 0
    assert code.rows_at(addrs(ADDR)).tolist() == [-1]


def test_room_of_short_jump_counts_the_filler() -> None:
    _, code = build("top", MOVE, jmp_short("top"), INT3, INT3, INT3)
    assert code.room.tolist() == [3, 5]
