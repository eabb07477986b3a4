# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads and stores by operands, one instruction at a time and many at once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kernweave.x86.memory import Memory, find_memory, memory_of

NONE, LOAD, STORE, BOTH = Memory(0), Memory.LOAD, Memory.STORE, Memory.LOAD | Memory.STORE

CASES = {
    "mov 8(%rdi),%rax": ("488b4708", LOAD),
    "mov %rax,8(%rdi)": ("48894708", STORE),
    "movl $1,(%rdi)": ("c70701000000", STORE),
    "mov %gs:0x1000,%rax": ("65488b042500100000", LOAD),
    "movabs 0x1122334455667788,%al": ("a08877665544332211", LOAD),
    "add %rax,8(%rsp)": ("4801442408", BOTH),
    "add 8(%rsp),%rax": ("4803442408", LOAD),
    "cmpq $1,(%rax)": ("48833801", LOAD),
    "testb $1,(%rax)": ("f60001", LOAD),
    "incl (%rax)": ("ff00", BOTH),
    "lock cmpxchg %rcx,(%rdi)": ("f0480fb10f", BOTH),
    "xchg %rax,(%rdi)": ("488707", BOTH),
    "lock xadd %eax,(%rdi)": ("f00fc107", BOTH),
    "bt %rax,(%rdi)": ("480fa307", LOAD),
    "lock bts %rax,(%rdi)": ("f0480fab07", BOTH),
    "sete (%rdi)": ("0f9407", STORE),
    "cmovne (%rdi),%rax": ("480f4507", LOAD),
    "movnti %rax,(%rdi)": ("480fc307", STORE),
    "movzbl (%rdi),%eax": ("0fb607", LOAD),
    "mul (%rdi)": ("48f727", LOAD),
    "movsb": ("a4", BOTH),
    "rep stosq": ("f348ab", STORE),
    "lodsb": ("ac", LOAD),
    "cmpsb": ("a6", LOAD),
    "fxsave64 (%rdi)": ("480fae07", STORE),
    "jmp *(%rax)": ("ff20", LOAD),
    "lea 8(%rdi),%rax": ("488d4708", NONE),
    "prefetcht0 (%rdi)": ("0f180f", NONE),
    "nopl 0(%rax)": ("0f1f4000", NONE),
    "push (%rax)": ("ff30", NONE),
    "pop (%rax)": ("8f00", NONE),
    "push %rax": ("50", NONE),
    "call *(%rax)": ("ff10", NONE),
    "call rel32": ("e800000000", NONE),
    "ret": ("c3", NONE),
    "mov %rax,%rbx": ("4889c3", NONE),
    "not an instruction": ("06", NONE),
}


@pytest.mark.parametrize("name", CASES)
def test_operands_tell_loads_and_stores(name: str) -> None:
    code, expected = CASES[name]
    assert memory_of(bytes.fromhex(code)) == expected


def test_many_at_once_are_the_same_as_one_at_a_time() -> None:
    rng = random.Random(1)
    codes = [bytes.fromhex(code) for code, _ in CASES.values()] * 50
    rng.shuffle(codes)
    length = np.array([len(code) for code in codes], np.uint8)
    at = np.cumsum(length, dtype=np.int64) - length
    found = find_memory(b"".join(codes), at, length)
    assert found.tolist() == [int(memory_of(code)) for code in codes]
