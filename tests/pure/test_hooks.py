# SPDX-License-Identifier: GPL-2.0-or-later
"""Splices that call the driver: what they save, translate and give back, on real kernels."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kernweave.analysis.code import Code, build_code
from kernweave.analysis.imagefile import load_file
from kernweave.image.sites import Sites
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.session.hooks import SEARCHES
from kernweave.splice.hook import Hook, bind_hooks, entry_window, hook_size
from oracle.copies import disassemble

AWAY = 64 << 20
SAVED = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")


@cache
def functions(series: str) -> tuple[dict[str, Code], Sites]:
    tree = fetched_kernel(series)
    if tree is None:
        pytest.skip(f"kernel {series} was not fetched (kernweave lab up)")
    file = load_file(open_image(tree.vmlinuz))
    parts = {part.symbol: part for part in file.parts() if part.symbol in SEARCHES}
    return {name: build_code([part], file.sites) for name, part in parts.items()}, file.sites


@pytest.mark.parametrize("series", KERNEL_SERIES)
def test_searches_by_address_can_be_hooked_before_they_did_anything(series: str) -> None:
    codes, sites = functions(series)
    assert set(codes) == set(SEARCHES)
    for name, code in codes.items():
        window = entry_window(code, sites)
        assert window, name
        before = code.writes[: window[0]]
        assert not before.any(), name  # the register is as the caller left it


@pytest.mark.parametrize("register", sorted(set(SEARCHES.values())))
def test_hook_gives_a_register_another_value_and_saves_the_others(register: str) -> None:
    codes, sites = functions("6.1")
    code = codes["__warn"]
    window = entry_window(code, sites)
    assert window
    hook = Hook(code, *window, int(code.addr[0]) + AWAY // 2, register)
    base = hook.addr + AWAY
    body, pokes = bind_hooks([hook], base)
    assert len(body) == hook_size([hook])
    text = [f"{insn.mnemonic} {insn.op_str}".strip() for insn in disassemble(body, base)]
    saves = [f"push {name}" for name in SAVED]
    assert text[: len(saves)] == saves
    call = text.index(f"call {hook.target:#x}")
    argument = [] if register == "rdi" else [f"mov rdi, {register}"]
    assert text[len(saves) : call] == ["pushfq", *argument]
    behind = call + 2 + 1 + len(saves)
    # the saved register's place: flags are on top, then the last one pushed
    place = 8 * (len(SAVED) - SAVED.index(register))
    assert text[call + 1] == f"mov qword ptr [rsp + {place:#x}], rax"
    assert text[call + 2 : behind] == ["popfq", *(f"pop {name}" for name in reversed(SAVED))]
    native = [code.raw(row) for row in range(*window)]
    assert body.endswith(b"".join(native) + body[-5:])
    assert text[-1] == f"jmp {hook.addr + len(hook.old):#x}"
    assert pokes.keep.tolist() == [True]
    assert pokes.new[0][5:] == b"\xcc" * (len(hook.old) - 5)
    assert np.array_equal(pokes.addr, [hook.addr])
