# SPDX-License-Identifier: GPL-2.0-or-later
"""A splice that calls a C function of the driver: to yield to others, to find native addresses.

    push %rax .. %r11; pushfq
    mov  %rdx, %rdi                 where that is to be translated
    call target
    mov  %rax, (saved %rdx)         the same
    popfq; pop %r11 .. %rax
    displaced instructions
    jmp  back

Where the C function may sleep, a trampoline's address lies on a stack: the driver counts who is
inside and frees the area only when nobody is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernweave.analysis.code import Code
from kernweave.image.sites import Sites, contains
from kernweave.model.plan import Pokes, Tactic
from kernweave.splice.place import Rules, place
from kernweave.x86.decode import Flow, Trait
from kernweave.x86.relocate import JUMP_BYTES, encode_jump, relocate_insn, way_back

#: rax, rcx, rdx, rsi, rdi, r8 .. r11, then the flags
_SAVE = bytes.fromhex("50 51 52 56 57 4150 4151 4152 4153 9c")
_RESTORE = bytes.fromhex("9d 415b 415a 4159 4158 5f 5e 5a 59 58")
#: register that is translated: what goes before the call, and behind it
_TRANSLATE = {
    None: (b"", b""),
    "rdi": (b"", bytes.fromhex("48 89 44 24 28")),  # mov %rax, 0x28(%rsp)
    "rdx": (bytes.fromhex("48 89 d7"), bytes.fromhex("48 89 44 24 38")),
}
_ALIGN = 16


@dataclass(frozen=True)
class Hook:
    """One such splice.

    Attributes:
        code: the function.
        first: row of the first instruction displaced.
        end: row behind the last.
        target: run-time address of the C function.
        translates: register for whose value it gives another one, if any; then the hook stays as
            long as there are copies that are looked up by their address, else as long as there are
            clones, which have to be told of what happens to text.
    """

    code: Code
    first: int
    end: int
    target: int
    translates: str | None = None

    @property
    def addr(self) -> int:
        """Run-time address of what is displaced."""
        return int(self.code.addr[self.first])

    @property
    def old(self) -> bytes:
        """The bytes there."""
        return b"".join(self.code.raw(row) for row in range(self.first, self.end))


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


def entry_window(code: Code, sites: Sites) -> tuple[int, int] | None:
    """First and end row of what can be displaced where a function has not done anything yet."""
    idle = ((code.trait & Trait.ENDBR) != 0) | contains(sites.ftrace, code.addr)
    row = int(np.argmin(idle))
    rules = Rules(tactics=(Tactic.JMP32, Tactic.GROUP))
    windows = place(code, np.array([row]), sites, rules).boards.windows
    if len(windows.first) != 1 or windows.first[0] != row:
        return None
    return row, int(windows.end[0])


def bind_hooks(hooks: Sequence[Hook], base: int) -> tuple[bytes, Pokes]:
    """The trampolines of hooks, for `base`, and what leads there; ascending by address."""
    body = bytearray()
    new = []
    for hook in hooks:
        body += b"\xcc" * (-len(body) % _ALIGN)
        new.append(encode_jump(hook.addr, base + len(body)).ljust(len(hook.old), b"\xcc"))
        body += _encode(hook, base + len(body))
    pokes = Pokes(
        addr=np.array([hook.addr for hook in hooks], np.uint64),
        old=tuple(hook.old for hook in hooks),
        new=tuple(new),
        group=np.array([hook.end - hook.first > 1 for hook in hooks]),
        host=np.zeros(len(hooks), bool),
        keep=np.array([hook.translates is not None for hook in hooks]),
        stay=np.array([hook.translates is None for hook in hooks]),
    )
    return bytes(body), pokes


def hook_size(hooks: Sequence[Hook]) -> int:
    """Bytes of their trampolines."""
    return len(bind_hooks(hooks, hooks[0].addr)[0])


def _encode(hook: Hook, base: int) -> bytes:
    before, behind = _TRANSLATE[hook.translates]
    call_at = base + len(_SAVE) + len(before)
    call = b"\xe8" + struct.pack("<i", hook.target - (call_at + JUMP_BYTES))
    body = _SAVE + before + call + behind + _RESTORE
    for row in range(hook.first, hook.end):
        body += relocate_insn(hook.code.raw(row), int(hook.code.addr[row]), base + len(body))
    last = hook.end - 1
    return body + way_back(hook.code.raw(last), int(hook.code.addr[last]), base + len(body))
