# SPDX-License-Identifier: GPL-2.0-or-later
"""Liveness across calls: known answers for each rule about callees whose code is at hand.

That nothing live is ever called dead is checked on the CPU, in exec/test_liveness_calls_cpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from exec.asm import NOP5, RET, Item, Program, call, jcc, jmp, jmp_short, mem, op, program, reg
from kernweave.analysis.code import Part, build_code
from kernweave.analysis.liveness import live_before
from kernweave.image.sites import Sites
from pure.test_liveness import (
    ARGUMENTS,
    AT_RETURN,
    EVERYTHING,
    FLAGS,
    KEPT,
    REGISTERS,
    addrs,
    names,
)

MAIN = 0xFFFF_FFFF_8100_1000
F = MAIN + 0x100
G = MAIN + 0x200
COLD = MAIN + 0x800
OUTSIDE = 0xFFFF_FFFF_8190_0000  # not in the code; it has an ftrace site where a test says so
ONLY_RSP = {"rsp"}  # a call pushes

UD2, ENDBR = op("UD2"), op("ENDBR64")
COPY = op("MOV_R64_RM64", "rax", "rcx")
TEST = op("TEST_RM64_R64", "rdi", "rdi")
DEC = op("DEC_RM64", "rdi")
NOP5_BYTES = bytes((0x0F, 0x1F, 0x44, 0x00, 0x00))
XOR5_BYTES = bytes((0x66, 0x66, 0x48, 0x31, 0xC0))  # a static call that gives 0


@dataclass(frozen=True, slots=True)
class Text:
    """One part of the code."""

    source: Program
    is_c: bool = False
    group: int = 0  # of another part, for a cold one


def zero(name: str) -> Item:
    """Overwrite a register and leave the flags alone."""
    return op("MOV_R64_IMM64", name, 0)


def asm(addr: int, *items: Item) -> Text:
    return Text(program(addr, *items))


def c(addr: int, *items: Item, group: int = 0) -> Text:
    return Text(program(addr, *items), is_c=True, group=group)


def live(sites: Sites, *texts: Text) -> dict[int, set[str]]:
    """What is live before each instruction, by address."""
    parts = [
        Part("f", "f", None, t.source.addr, t.source.code, t.group or t.source.addr, t.is_c)
        for t in texts
    ]
    code = build_code(parts, sites)
    masks = live_before(code, sites)
    return {int(addr): names(int(mask)) for addr, mask in zip(code.addr, masks, strict=True)}


def at_call(*texts: Text, sites: Sites | None = None, behind: tuple[Item, ...] = ()) -> set[str]:
    """What is live before a call of F in a C function without an ftrace site."""
    main = c(MAIN, call(F), *behind, RET)
    return live(sites or Sites(), main, *texts)[MAIN]


# ---- what a callee reads, overwrites and keeps --------------------------------------------------


def test_callee_reads_only_what_its_code_reads() -> None:
    assert at_call(asm(F, COPY, RET)) == AT_RETURN - {"rax"} | {"rcx"}


def test_callee_overwrites_on_every_path() -> None:
    found = at_call(asm(F, TEST, jcc("e", "other"), COPY, RET, "other", COPY, RET))
    assert found == AT_RETURN - {"rax"} | {"rdi", "rcx"}


def test_callee_overwrites_on_one_path_kills_nothing() -> None:
    source = program(F, TEST, jcc("e", "out"), COPY, "out", RET)
    assert at_call(Text(source)) == AT_RETURN | {"rdi", "rcx"}


def test_register_that_callee_keeps_is_live_across_the_call() -> None:
    found = at_call(asm(F, zero("r9"), RET), behind=(op("MOV_R64_RM64", "rax", "r8"),))
    assert found == AT_RETURN - {"rax"} | {"r8"}


def test_register_that_callee_overwrites_is_dead_before_the_call() -> None:
    found = at_call(asm(F, zero("r8"), RET), behind=(op("MOV_R64_RM64", "rax", "r8"),))
    assert found == AT_RETURN - {"rax"}


def test_register_that_callee_saves_and_restores_is_read_by_the_save() -> None:
    saves = asm(F, op("PUSH_R64", "r8"), zero("r8"), op("POP_R64", "r8"), RET)
    assert at_call(saves) == AT_RETURN | {"r8"}


@pytest.mark.parametrize(
    ("item", "kept"), [(COPY, {"cf"}), (op("XOR_R32_RM32", "eax", "eax"), set())], ids=str
)
def test_flags_pass_through_callee_that_leaves_them_alone(item: Item, kept: set[str]) -> None:
    found = at_call(asm(F, item, RET), behind=(op("SBB_R64_RM64", "rdx", "rdx"),))
    assert found & FLAGS == kept


def test_flags_that_callee_reads_are_live_before_the_call() -> None:
    assert at_call(asm(F, op("ADC_R64_RM64", "rax", "rcx"), RET)) & FLAGS == {"cf"}


def test_callers_with_different_needs_do_not_share_them() -> None:
    one = c(MAIN, call(F), op("MOV_R64_RM64", "rax", "r8"), RET)
    two = c(G, call(F), op("MOV_R64_RM64", "rax", "r9"), RET)
    found = live(Sites(), one, two, asm(F, zero("rdx"), RET))
    needed = AT_RETURN - {"rax", "rdx"}
    assert (found[MAIN], found[G]) == (needed | {"r8"}, needed | {"r9"})


def test_callee_itself_returns_everything_to_callers_that_are_not_known() -> None:
    found = live(Sites(), c(MAIN, call(F), RET), asm(F, COPY, RET))
    assert found[F] == EVERYTHING - {"rax"}


def test_call_through_two_functions_adds_up() -> None:
    found = at_call(asm(F, call(G), zero("rdx"), RET), asm(G, COPY, zero("rcx"), RET))
    assert found == AT_RETURN - {"rax", "rdx"} | {"rcx"}


def test_order_of_parts_does_not_matter() -> None:
    texts = (
        c(MAIN, call(F), RET),
        asm(F, call(G), zero("rdx"), RET),
        asm(G, COPY, RET),
    )
    assert live(Sites(), *texts) == live(Sites(), *reversed(texts))


# ---- callees that do not return -----------------------------------------------------------------

NORETURN = {
    "fatal bug": (asm(F, UD2),),
    "endless loop": (asm(F, "head", jmp_short("head")),),
    "call of one that does not": (asm(F, call(G), RET), asm(G, UD2)),
    "jump to one that does not": (asm(F, jmp(G)), asm(G, UD2)),
    "endless recursion": (asm(F, call(F), RET),),
    "endless recursion of two": (asm(F, call(G), RET), asm(G, call(F), RET)),
}


@pytest.mark.parametrize("name", NORETURN)
def test_call_that_does_not_return_needs_nothing_behind_it(name: str) -> None:
    sites = Sites(bugs=addrs(F, G), fatal_bugs=addrs(F, G))
    assert at_call(*NORETURN[name], sites=sites) == ONLY_RSP


def test_callee_that_does_not_return_still_reads() -> None:
    fatal = asm(F, op("MOV_RM64_R64", mem(reg("rsp"), disp=-8), "rsi"), UD2)
    sites = Sites(bugs=addrs(fatal.source.at[1]), fatal_bugs=addrs(fatal.source.at[1]))
    assert at_call(fatal, sites=sites) == ONLY_RSP | {"rsi"}


def test_warning_returns() -> None:
    warns = asm(F, UD2, RET)
    assert at_call(warns, sites=Sites(bugs=addrs(F))) == AT_RETURN


def test_fatal_bug_on_one_path_leaves_the_other() -> None:
    source = program(F, TEST, jcc("e", "bug"), zero("rax"), RET, "bug", UD2)
    sites = Sites(bugs=addrs(source.labels["bug"]), fatal_bugs=addrs(source.labels["bug"]))
    assert at_call(Text(source), sites=sites) == AT_RETURN - {"rax"} | {"rdi"}


def test_c_callee_that_does_not_return_reads_its_arguments() -> None:
    fatal = c(F, NOP5, UD2)
    sites = Sites(ftrace=addrs(F), fatal_bugs=addrs(fatal.source.at[1]))
    assert at_call(fatal, sites=sites) == ARGUMENTS


def test_loop_that_an_unknown_call_may_leave_returns() -> None:
    assert at_call(asm(F, "head", call(OUTSIDE), jmp_short("head"))) >= AT_RETURN


# ---- recursion ----------------------------------------------------------------------------------


def test_recursion_overwrites_what_its_last_round_overwrites() -> None:
    source = program(
        F, TEST, jcc("e", "base"), DEC, call(F), RET, "base", zero("r8"), COPY, RET
    )  # fmt: skip
    found = at_call(Text(source), behind=(op("MOV_R64_RM64", "rdx", "r8"),))
    assert found == AT_RETURN - {"rax", "rdx"} | {"rdi", "rcx"}


def test_recursion_keeps_what_a_round_may_keep() -> None:
    source = program(F, TEST, jcc("e", "out"), DEC, call(F), zero("r8"), "out", RET)
    found = at_call(Text(source), behind=(op("MOV_R64_RM64", "rdx", "r8"),))
    assert found == AT_RETURN - {"rdx"} | {"rdi", "r8"}


def test_mutual_recursion_reaches_the_least_solution() -> None:
    f = program(F, TEST, jcc("e", "base"), call(G), RET, "base", zero("r8"), RET)
    g = program(G, DEC, call(F), op("ADD_R64_RM64", "rax", "rsi"), RET)
    found = live(Sites(), c(MAIN, call(F), op("MOV_R64_RM64", "rdx", "r8"), RET), Text(f), Text(g))
    assert found[MAIN] == AT_RETURN - {"rdx"} | {"rdi", "rsi"}


# ---- other ways to get there --------------------------------------------------------------------


def test_tail_call_takes_the_summary_of_its_target() -> None:
    expected = AT_RETURN - {"rax"} | {"rcx"}
    target = asm(G, COPY, RET)
    assert at_call(asm(F, jmp(G)), target) == expected
    assert live(Sites(), c(MAIN, jmp(G)), target)[MAIN] == expected


def test_conditional_tail_call_has_both_paths() -> None:
    source = program(F, TEST, jcc("e", G), zero("rax"), RET)
    found = at_call(Text(source), asm(G, op("MOV_R64_RM64", "rdx", "rcx"), RET))
    assert found == AT_RETURN | {"rdi", "rcx"}


def test_cold_part_belongs_to_the_summary() -> None:
    hot = program(F, TEST, jcc("e", COLD), zero("rax"), "back", RET)
    cold = asm(COLD, op("MOV_R64_RM64", "rax", "r9"), jmp(hot.labels["back"]))
    assert at_call(Text(hot), cold) == AT_RETURN - {"rax"} | {"rdi", "r9"}


def test_jump_from_cold_part_keeps_flags_that_the_hot_part_reads() -> None:
    # gcc does this: __flush_smp_call_function_queue of 6.1 jumps to its cold part so
    hot = program(MAIN, NOP5, "back", op("SBB_R64_RM64", "rax", "rax"), RET)
    jump = c(COLD, TEST, jmp(hot.labels["back"]), group=MAIN)
    assert live(Sites(), Text(hot, is_c=True), jump)[jump.source.at[1]] & FLAGS == {"cf"}
    assert live(Sites(), jump)[jump.source.at[1]] & FLAGS == FLAGS


def test_call_into_the_middle_takes_the_summary_from_there() -> None:
    source = program(F, zero("rcx"), "middle", COPY, RET)
    found = live(
        Sites(),
        c(MAIN, call(F), RET),
        c(G, call(source.labels["middle"]), RET),
        Text(source),
    )
    assert found[MAIN] == AT_RETURN - {"rax"}
    assert found[G] == AT_RETURN - {"rax"} | {"rcx"}


def test_function_that_falls_into_the_next_part_takes_its_summary() -> None:
    first = program(F, op("MOV_R64_RM64", "rcx", "r8"))
    second = asm(F + len(first.code), COPY, RET)
    assert at_call(Text(first), second) == AT_RETURN - {"rax"} | {"r8"}
    assert at_call(Text(first)) == REGISTERS - {"rcx"} | FLAGS  # what follows is not at hand


def test_call_for_its_push_alone_goes_on_inside() -> None:
    # __FILL_RETURN_BUFFER up to 5.18: the call never returns to the loop behind it
    source = program(
        F,
        call("inside"),
        "trap",
        op("PAUSE"),
        jmp_short("trap"),
        "inside",
        op("LEA_R64_M", "rsp", mem(reg("rsp"), disp=8)),
        COPY,
        RET,
    )
    assert live(Sites(), Text(source, is_c=True))[F] == AT_RETURN - {"rax"} | {"rcx"}
    assert at_call(Text(source)) == AT_RETURN - {"rax"} | {"rcx"}


def test_call_of_a_local_subroutine_keeps_what_follows_it() -> None:
    source = program(
        F, call("local"), op("MOV_R64_RM64", "rdx", "r9"), RET, "local", COPY, RET
    )  # fmt: skip
    assert at_call(Text(source)) >= {"rcx", "r9"}


# ---- what may lead elsewhere --------------------------------------------------------------------


def test_call_through_thunk_text_is_an_indirect_call() -> None:
    thunk = asm(G, zero("rcx"), RET)
    sites = Sites(thunks=(G, G + 0x20))
    assert live(sites, c(MAIN, call(G), RET), thunk)[MAIN] == REGISTERS
    assert live(sites, asm(MAIN, call(G), RET), thunk)[MAIN] == EVERYTHING
    assert live(sites, c(MAIN, jmp(G)), thunk)[MAIN] == REGISTERS
    assert live(sites, c(MAIN, jcc("e", G), RET), thunk)[MAIN] == EVERYTHING


def test_call_of_a_static_call_trampoline_is_an_indirect_call() -> None:
    trampoline = asm(G, jmp(F))
    target = asm(F, zero("rcx"), RET)
    sites = Sites(static_text=((G, G + 0x20),))
    assert live(sites, c(MAIN, call(G), RET), trampoline, target)[MAIN] == REGISTERS


@pytest.mark.parametrize("now", [call(F), NOP5_BYTES, XOR5_BYTES], ids=["call", "nop", "xor"])
def test_static_call_may_lead_anywhere_whatever_it_is_now(now: Item) -> None:
    main, target = c(MAIN, now, RET), asm(F, zero("rcx"), RET)
    assert live(Sites(static_calls=addrs(MAIN)), main, target)[MAIN] == REGISTERS
    assert live(Sites(), main, target)[MAIN] <= AT_RETURN


@pytest.mark.parametrize("now", [jmp(F), RET], ids=["jmp", "ret"])
def test_static_tail_call_may_lead_anywhere_whatever_it_is_now(now: Item) -> None:
    main, target = c(MAIN, now), asm(F, zero("rcx"), RET)
    assert live(Sites(static_calls=addrs(MAIN)), main, target)[MAIN] == REGISTERS
    assert live(Sites(), main, target)[MAIN] <= AT_RETURN


def test_static_call_inside_a_callee_makes_it_read_every_register() -> None:
    callee = asm(F, NOP5_BYTES, zero("rcx"), RET)
    assert at_call(callee, sites=Sites(static_calls=addrs(F))) == EVERYTHING
    assert at_call(callee) == AT_RETURN


def test_fault_in_callee_kills_nothing_and_goes_to_its_fixup() -> None:
    source = program(
        F,
        op("MOV_R64_RM64", "rax", mem(reg("rdi"))),
        RET,
        "fixup",
        op("MOV_R64_RM64", "rdx", "rcx"),
        RET,
    )
    sites = Sites(exceptions=addrs(F), fixups=addrs(source.labels["fixup"]))
    assert at_call(Text(source)) == AT_RETURN - {"rax"} | {"rdi"}
    assert at_call(Text(source), sites=sites) == AT_RETURN | {"rdi", "rcx"}


@pytest.mark.parametrize("now", ["nop", "jump"])
def test_jump_label_in_callee_goes_both_ways_whatever_it_is_now(now: str) -> None:
    source = program(
        F,
        NOP5 if now == "nop" else jmp("slow"),
        COPY,
        RET,
        "slow",
        op("MOV_R64_RM64", "rdx", "rsi"),
        RET,
    )
    sites = Sites(jump_labels=addrs(F), jump_targets=addrs(source.labels["slow"]))
    assert at_call(Text(source), sites=sites) == AT_RETURN | {"rcx", "rsi"}


@pytest.mark.parametrize("item", [op("IRETQ"), op("SYSRETQ"), op("JMP_RM64", "rcx")], ids=str)
def test_callee_that_leaves_for_good_reads_every_register(item: Item) -> None:
    assert at_call(asm(F, zero("r8"), item)) >= REGISTERS - {"r8"}


# ---- C functions --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(NOP5,), (ENDBR, NOP5)], ids=["plain", "endbr"])
def test_c_callee_loses_what_is_not_kept_and_reads_every_argument(start: tuple[Item, ...]) -> None:
    callee = c(F, *start, op("MOV_R64_RM64", "rax", "rdi"), RET)
    sites = Sites(ftrace=addrs(callee.source.at[len(start) - 1]))
    found = at_call(callee, sites=sites, behind=(op("MOV_R64_RM64", "rdx", "r10"),))
    assert found == ARGUMENTS | KEPT


def test_c_callee_called_from_assembly_loses_only_what_its_code_overwrites() -> None:
    callee = c(F, NOP5, op("MOV_R64_RM64", "rax", "rdi"), RET)
    found = live(Sites(ftrace=addrs(F)), asm(MAIN, call(F), RET), callee)
    assert found[MAIN] == EVERYTHING - {"r10", "r11"} - FLAGS


def test_c_callee_without_ftrace_site_is_taken_by_its_code() -> None:
    callee = asm(F, op("MOV_R64_RM64", "rax", "rdi"), RET)
    found = at_call(callee, behind=(op("MOV_R64_RM64", "rdx", "r10"),))
    assert found == AT_RETURN - {"rax", "rdx"} | {"rdi", "r10"}


def test_c_callee_that_reads_a_kept_register_needs_it() -> None:
    callee = c(F, NOP5, op("PUSH_R64", "rbx"), zero("rbx"), op("POP_R64", "rbx"), RET)
    found = at_call(callee, sites=Sites(ftrace=addrs(F)), behind=(zero("rbx"),))
    assert found == ARGUMENTS | KEPT


# ---- values that nothing has defined ------------------------------------------------------------

INDIRECT = op("CALL_RM64", "rbx")
DEFINED_SITES = Sites(ftrace=addrs(MAIN, OUTSIDE))
PASSED = REGISTERS - {"r10", "r11"}


def at_last(*items: Item, texts: tuple[Text, ...] = (), sites: Sites = DEFINED_SITES) -> set[str]:
    """What is live before the instruction before the last, in a C function with an ftrace site."""
    main = c(MAIN, NOP5, *items, RET)
    return live(sites, main, *texts)[main.source.at[-2]]


def test_indirect_call_reads_nothing_that_c_was_entered_without() -> None:
    assert at_last(INDIRECT) == PASSED


@pytest.mark.parametrize(
    ("item", "name"),
    [
        (op("MOV_R64_RM64", "r10", "rdi"), "r10"),
        (op("MOV_R8_RM8", "r10l", "al"), "r10"),
        (op("MOV_R64_RM64", "r11", mem(reg("rdi"))), "r11"),
        (op("CMOVE_R64_RM64", "r11", "rdi"), "r11"),
    ],
    ids=["whole", "byte", "loaded", "conditional"],
)
def test_indirect_call_reads_what_something_defined(item: Item, name: str) -> None:
    assert at_last(item, INDIRECT) == PASSED | {name}


def test_indirect_call_reads_what_one_path_defined() -> None:
    found = at_last(jcc("e", "skip"), zero("r10"), "skip", INDIRECT)
    assert found == PASSED | {"r10"}


def test_indirect_call_behind_a_c_call_reads_only_results_and_kept() -> None:
    assert at_last(call(OUTSIDE), INDIRECT) == AT_RETURN
    assert at_last(call(OUTSIDE), zero("rdi"), INDIRECT) == AT_RETURN | {"rdi"}


def test_value_defined_before_a_c_call_is_lost_by_it() -> None:
    assert "r10" not in at_last(zero("r10"), call(OUTSIDE), INDIRECT)


def test_indirect_call_behind_an_assembly_call_reads_everything() -> None:
    assert at_last(call(F), INDIRECT, texts=(asm(F, COPY, RET),)) == REGISTERS


def test_indirect_call_behind_another_reads_all_but_the_temporary_registers() -> None:
    assert at_last(call(OUTSIDE), INDIRECT, INDIRECT) == PASSED
    assert at_last(zero("r11"), INDIRECT, INDIRECT) == PASSED | {"r11"}


def test_value_lives_across_an_indirect_call_though_the_callee_does_not_read_it() -> None:
    # preempt_schedule_thunk, by a static call, keeps every register
    main = c(MAIN, NOP5, zero("r10"), INDIRECT, op("MOV_R64_RM64", "rax", "r10"), RET)
    assert "r10" in live(DEFINED_SITES, main)[main.source.at[2]]


def test_indirect_call_from_assembly_reads_everything() -> None:
    assert live(Sites(), asm(MAIN, NOP5, INDIRECT, RET))[MAIN + 5] == EVERYTHING


def test_indirect_call_at_a_jump_table_target_reads_everything() -> None:
    # behind a call of which nobody knows that it does not return: only the table leads there
    table = op("JMP_RM64", mem(index=reg("rax"), scale=8, disp=0x1000))
    assert at_last(table, call(OUTSIDE), INDIRECT) == REGISTERS
