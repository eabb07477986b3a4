# SPDX-License-Identifier: GPL-2.0-or-later
"""A splice that calls a C function of the driver: how kernweave yields to ftrace and kprobes.

    push %rax .. %r11; pushfq
    call target
    popfq; pop %r11 .. %rax
    displaced instruction
    jmp  back

The C function may sleep, and then a trampoline's address lies on a stack: the driver counts who
is inside and frees the area only when nobody is.
"""

from __future__ import annotations

import struct

import numpy as np

from kernweave.analysis.code import Code
from kernweave.image.sites import Sites
from kernweave.model.plan import Pokes, Tactic
from kernweave.splice.place import Rules, place
from kernweave.x86.decode import Flow
from kernweave.x86.relocate import JUMP_BYTES, encode_jump, relocate_insn, way_back

#: rax, rcx, rdx, rsi, rdi, r8 .. r11, then the flags
_SAVE = bytes.fromhex("50 51 52 56 57 4150 4151 4152 4153 9c")
_RESTORE = bytes.fromhex("9d 415b 415a 4159 4158 5f 5e 5a 59 58")


def hook_row(code: Code, part: int, sites: Sites) -> int:
    """The first instruction of a part's entry block that one jump can replace, -1 if none."""
    rows = np.flatnonzero(code.part == part)
    leaders = np.flatnonzero(code.leader[rows])
    entry = rows[: leaders[1]] if len(leaders) > 1 else rows
    placement = place(code, entry, sites, Rules(tactics=(Tactic.JMP32,)))
    fits = [row for row, tactic in zip(entry, placement.tactic, strict=True) if tactic]
    return int(fits[0]) if fits else -1


def call_row(code: Code, callee: int, sites: Sites) -> int:
    """The call of a function, at which its arguments are known; -1: none that can be displaced."""
    rows = np.flatnonzero((code.flow == Flow.CALL) & (code.target == np.uint64(callee)))
    placement = place(code, rows, sites, Rules(tactics=(Tactic.JMP32,)))
    return int(rows[0]) if len(rows) == 1 and placement.tactic[0] else -1


def hook_size(code: Code, row: int) -> int:
    """Bytes of the hook's trampoline."""
    return len(_encode(code, row, int(code.addr[row]), int(code.addr[row])))


def bind_hook(code: Code, row: int, target: int, base: int) -> tuple[bytes, Pokes]:
    """The trampoline of a hook at an instruction of `code`, for `base`, and what leads there."""
    addr, raw = int(code.addr[row]), code.raw(row)
    jump = encode_jump(addr, base).ljust(len(raw), b"\xcc")
    none = np.zeros(1, bool)
    pokes = Pokes(np.array([addr], np.uint64), (raw,), (jump,), none, none)
    return _encode(code, row, target, base), pokes


def _encode(code: Code, row: int, target: int, base: int) -> bytes:
    addr, raw = int(code.addr[row]), code.raw(row)
    call_at = base + len(_SAVE)
    call = b"\xe8" + struct.pack("<i", target - (call_at + JUMP_BYTES))
    body = _SAVE + call + _RESTORE
    body += relocate_insn(raw, addr, base + len(body))
    return body + way_back(raw, addr, base + len(body))
