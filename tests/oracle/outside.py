# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that ran and is in no table: gone, made at run time, or rewritten; told by its bytes.

The oracle keeps what each address held whenever it ran.  What differs from the tables' text is
decoded here; a transfer from there must be one that its bytes make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import capstone
import numpy as np
import numpy.typing as npt
from capstone import x86_const as x86

from oracle.cfg import Cfg
from oracle.oracle import Counts

U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

MAX_INSN = 15
_DECODER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_DECODER.detail = True


class Outside:
    """Instructions that the tables do not have, by address."""

    def __init__(self, cfg: Cfg, counts: Counts, text: Sequence[tuple[int, bytes]]) -> None:
        """Find them.

        Args:
            cfg: the graph.
            counts: what ran since boot.
            text: (address, bytes) of each image's text, as the tables have it.
        """
        self._cfg = cfg
        self._text = text
        rows = np.flatnonzero(~_as_in_text(cfg, counts, text))
        self._codes: dict[int, set[bytes]] = {}
        self._behind_calls: set[int] = set()
        addrs, lengths = counts.vaddr[rows].tolist(), counts.length[rows].tolist()
        for addr, length, code in zip(addrs, lengths, counts.code[rows], strict=True):
            raw = code[:length].tobytes()
            self._codes.setdefault(addr, set()).add(raw)
            if is_call(raw):
                self._behind_calls.add(addr + length)

    def held(self, addr: int) -> set[bytes]:
        """Instructions that ran at an address and are not in the tables."""
        return self._codes.get(addr, set())

    def code(self, addr: int, length: int) -> bytes:
        """Bytes of the tables' text, empty where there is none."""
        for start, data in self._text:
            if start <= addr < start + len(data):
                return data[addr - start : addr - start + length]
        return b""

    def explains(self, one: int, length: int, other: int) -> bool:
        """Whether such an instruction is at one end of a transfer, and may have made it."""
        if any(self._leads(one, raw, other) for raw in self.held(one) if len(raw) == length):
            return self._is_code(other)
        row = int(self._cfg.rows(np.array([one], np.uint64))[0])
        if row < 0 or int(self._cfg.insns.length[row]) != length:
            return False
        if self._cfg.returns[row] and not self._is_thunk(one):
            return other in self._behind_calls
        if self._cfg.returns[row] or self._cfg.passes[row] >= 0:
            return bool(self.held(other))
        return bool(self.held(other)) and int(self._cfg.insns.target[row]) == other

    def _leads(self, addr: int, raw: bytes, to: int) -> bool:
        goes_on, target = successors(addr, raw)
        if goes_on and to == addr + len(raw):
            return True
        if target is not None:
            return to == target
        if is_return(raw):
            return to in self._behind_calls or self._is_behind_call(to)
        return is_indirect(raw) and self._is_entry(to)

    def _is_thunk(self, addr: int) -> bool:
        return bool(self._cfg.in_thunk(np.array([addr], np.uint64))[0])

    def _is_behind_call(self, addr: int) -> bool:
        where = np.array([addr], np.uint64)
        return bool(self._cfg.comes_back(self._cfg.before(where), self._cfg.rows(where))[0])

    def _is_entry(self, addr: int) -> bool:
        return bool(self._cfg.function_at(np.array([addr], np.uint64))[0] >= 0)

    def _is_code(self, addr: int) -> bool:
        known = self._cfg.rows(np.array([addr], np.uint64))[0] >= 0
        return bool(known) or bool(self.held(addr))


def _as_in_text(cfg: Cfg, counts: Counts, text: Sequence[tuple[int, bytes]]) -> Mask:
    """bool[n]: which rows are instructions of the tables."""
    row = cfg.rows(counts.vaddr)
    known = (row >= 0) & (cfg.insns.length[row] == counts.length)
    length = counts.length.astype(np.int64)[:, None]
    for start, data in text:
        off = (counts.vaddr - np.uint64(start)).astype(np.int64)
        here = np.flatnonzero(known & (off >= 0) & (off < len(data)))
        padded = np.frombuffer(data + bytes(MAX_INSN), np.uint8)
        same = padded[off[here, None] + np.arange(MAX_INSN)] == counts.code[here]
        known[here] &= (same | (np.arange(MAX_INSN) >= length[here])).all(axis=1)
    return np.asarray(known)


# ---- single instructions -----------------------------------------------------------------------


@cache
def _decode(raw: bytes, addr: int) -> capstone.CsInsn | None:
    return next(iter(_instructions(raw, addr)), None)


def _instructions(raw: bytes, addr: int) -> Iterator[capstone.CsInsn]:
    yield from _DECODER.disasm(raw, addr, 1)


def successors(addr: int, raw: bytes) -> tuple[bool, int | None]:
    """Whether an instruction goes on behind itself, and where else it leads if that is known."""
    insn = _decode(raw, addr)
    if insn is None:
        return False, None
    jumps = insn.group(x86.X86_GRP_JUMP) or insn.group(x86.X86_GRP_CALL)
    direct = jumps and insn.operands and insn.operands[0].type == x86.X86_OP_IMM
    ends = insn.id in (x86.X86_INS_JMP, x86.X86_INS_CALL) or insn.group(x86.X86_GRP_RET)
    traps = insn.group(x86.X86_GRP_INT) or insn.group(x86.X86_GRP_IRET)
    target = insn.operands[0].imm & (1 << 64) - 1 if direct else None
    return not ends and not traps, target


def is_call(raw: bytes) -> bool:
    """Whether an instruction is a call."""
    insn = _decode(raw, 0)
    return insn is not None and bool(insn.id == x86.X86_INS_CALL)


def is_return(raw: bytes) -> bool:
    """Whether an instruction is a near return."""
    insn = _decode(raw, 0)
    return insn is not None and bool(insn.id == x86.X86_INS_RET)


def is_indirect(raw: bytes) -> bool:
    """Whether an instruction is a call or jump to where a register or memory says."""
    insn = _decode(raw, 0)
    if insn is None or insn.id not in (x86.X86_INS_JMP, x86.X86_INS_CALL):
        return False
    return bool(insn.operands[0].type != x86.X86_OP_IMM)
