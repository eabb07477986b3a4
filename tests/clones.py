# SPDX-License-Identifier: GPL-2.0-or-later
"""A code cache judged by its bytes alone: what is there, and nothing else.

The clones are decoded again.  Each of their instructions must be a copy, part of a counter, a jump
of the kinds listed in `weave/layout.py`, or filler; each copy must do what the native
instruction does; control must go from piece to piece as it goes natively.  What was asked for is
given by native addresses, what lives where by the analysis; nothing is taken from the translator
but the addresses of the copies, and all of them are checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Code
from kernweave.weave.counters import Place
from kernweave.x86.decode import FLAGS_MASK, Decoded, Flow, Trait, decode

Addrs = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

CALLS = (Flow.CALL, Flow.INDIRECT_CALL)
NO_FALL = (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE)
NOP5 = bytes.fromhex("0f1f440000")
CARRY = 1 << 20
RSP = 4


@dataclass(frozen=True)
class Native:
    """The native side.

    Attributes:
        code: all instructions.
        text: uint8[bytes], the text, some bytes behind it included.
        base: its run-time address.
        live: uint32[n], what is live before each instruction.
        labels: bool[n], jump labels.
        label_target: uint64[n], where each of them leads as a jump.
        static: bool[n], static-call sites.
        stay: bool[n], instructions that must not be copied: a jump to them is their copy.
    """

    code: Code
    text: U8
    base: int
    live: npt.NDArray[np.uint32]
    labels: Mask
    label_target: Addrs
    static: Mask
    stay: Mask

    @cached_property
    def end(self) -> Addrs:
        """uint64[n]: behind each instruction."""
        return self.code.addr + self.code.length

    def byte_at(self, addr: Addrs) -> U8:
        return self.text[(addr - np.uint64(self.base)).astype(np.int64)]

    def rows(self, addrs: Addrs) -> Rows:
        return self.code.rows_at(addrs)


@dataclass(frozen=True)
class Clones:
    """The other side.

    Attributes:
        out: uint8[bytes], the code cache.
        base: its run-time address.
        native: uint64[m], instructions that have copies, ascending.
        copy: uint64[m], addresses of the copies.
        counters: (native address, `Place`) of every counter, in the order of `offsets`.
        offsets: uint64[c], distinct per-CPU offsets.
        bails: uint64[b], native addresses of blocks that are not cloned.
        entries: uint64[e], native addresses of functions that must have a slot.
        slots: uint64[e], theirs.
    """

    out: U8
    base: int
    native: Addrs
    copy: Addrs
    counters: tuple[Addrs, U8]
    offsets: Addrs
    bails: Addrs
    entries: Addrs
    slots: Addrs


class Check:
    """All findings about one code cache are in `wrong`, as words with a native address."""

    def __init__(self, native: Native, clones: Clones) -> None:
        """Decode the clones and find their pieces."""
        self.native, self.clones = native, clones
        self.wrong: list[str] = []
        self.code: Decoded = decode([(clones.base, clones.out.tobytes())])
        self.at = (self.code.addr - np.uint64(clones.base)).astype(np.int64)
        self.padded = np.append(clones.out, np.zeros(16, np.uint8))
        self.end = self.code.addr + self.code.length
        self.role = np.zeros(len(self.code.addr), np.uint8)  # how often each has a meaning
        self.insn = native.rows(clones.native)
        self.row = self.find(clones.copy)

    def run(self) -> list[str]:
        self.demand("copy of no instruction", self.insn >= 0, self.clones.native)
        self.demand("copy is no instruction", self.row >= 0, self.clones.native)
        if self.wrong:
            return self.wrong
        self.role[self.row] += 1
        self.counters()
        self.slots()
        self.arrivals()
        self.copies()
        self.branches()
        self.stubs()
        self.successors()
        filler = (self.code.trait & Trait.INT3) != 0
        self.demand("meaningless or ambiguous", (self.role == 1) | (filler & (self.role == 0)),
                    self.code.addr)  # fmt: skip
        return self.wrong

    # ---- tools -----------------------------------------------------------------------------------

    def demand(self, what: str, good: Mask, addr: Addrs) -> None:
        for one in addr[~good][:5].tolist():
            self.wrong.append(f"{what}: {one:#x} ({int((~good).sum())} in all)")

    def find(self, addrs: Addrs) -> Rows:
        """Clone instructions at some addresses, -1: none begins there."""
        row = np.minimum(np.searchsorted(self.code.addr, addrs), len(self.code.addr) - 1)
        return np.where(self.code.addr[row] == addrs, row, -1)

    def bytes_of(self, rows: Rows, count: int) -> U8:
        """uint8[m, count]: the first bytes of clone instructions."""
        return np.asarray(self.padded[self.at[rows][:, None] + np.arange(count)])

    # ---- pieces ----------------------------------------------------------------------------------

    def counters(self) -> None:
        """Every counter once: register or flags saved where they live, and nothing else."""
        clones, code = self.clones, self.code
        is_copy = np.zeros(len(code.addr), bool)
        is_copy[self.row] = True
        head = np.flatnonzero((code.length == 10) & ~is_copy)
        first = self.bytes_of(head, 10)
        movabs = (first[:, 0] & 0xFE == 0x48) & (first[:, 1] & 0xF8 == 0xB8)
        head, first = head[movabs], first[movabs]
        register = (first[:, 1] & 7) | (first[:, 0] & 1) << 3
        offset = np.ascontiguousarray(first[:, 2:]).view("<u8")[:, 0]
        order = np.argsort(clones.offsets)
        place = np.minimum(np.searchsorted(clones.offsets[order], offset), len(order) - 1)
        known = clones.offsets[order][place] == offset if len(order) else np.zeros(0, bool)
        self.demand("offset of no counter", known, code.addr[head])
        number = order[place[known]]
        head, register = head[known], register[known]
        seen = np.bincount(number, minlength=len(order))
        self.demand("counter not there once", seen == 1, clones.counters[0])
        self.c_begin = np.zeros(len(order), np.uint64)
        self.c_end = np.zeros(len(order), np.uint64)
        self.c_begin[number], self.c_end[number] = self._frame(head, register, number)

    def _frame(self, head: Rows, register: U8, number: Rows) -> tuple[Addrs, Addrs]:
        """Where counters begin and end; what they save."""
        code, addr = self.code, self.code.addr[head]
        inc = self.bytes_of(head + 1, 5)
        good = (inc[:, 0] == 0x65) & (inc[:, 1] == (0x48 | register >> 3)) & (inc[:, 2] == 0xFF)
        good &= (inc[:, 3] == (0x40 | register & 7)) & (inc[:, 4] == 0)
        good &= ~np.isin(register & 7, (RSP,))
        self.demand("counter does not count", good, addr)
        before, after = self.bytes_of(head - 1, 2), self.bytes_of(head + 2, 2)
        push = (before[:, 0] == (0x40 | register >> 3)) & (before[:, 1] == (0x50 | register & 7))
        pop = (after[:, 0] == (0x40 | register >> 3)) & (after[:, 1] == (0x58 | register & 7))
        live = self._live(number)
        is_live = (live >> register & 1).astype(bool)
        spill = push & pop & (code.length[head - 1] == 2) & (code.length[head + 2] == 2)
        # a native push or pop may be beside it: only what is live is taken for a spill
        spill &= is_live
        self.demand("live register lost", ~is_live | spill, addr)
        first, last = head - spill, head + 1 + spill
        flags = (self.bytes_of(first - 1, 1)[:, 0] == 0x9C) & (
            self.bytes_of(last + 1, 1)[:, 0] == 0x9D
        )
        flags &= (live & (FLAGS_MASK & ~CARRY)) != 0
        self.demand("live flags lost", ((live & (FLAGS_MASK & ~CARRY)) == 0) | flags, addr)
        first, last = first - flags, last + flags
        for back in range(6):
            rows = first + back
            self.role[rows[rows <= last]] += 1
        return code.addr[first], self.end[last]

    def _live(self, number: Rows) -> npt.NDArray[np.uint32]:
        native, (where, place) = self.native, self.clones.counters
        addr, kind = where[number], place[number]
        row = native.rows(addr)
        target = np.where(native.labels[row], native.label_target[row], native.code.target[row])
        seen = np.where(kind == Place.BEHIND, native.end[row], addr)
        row = native.rows(np.where(kind == Place.TAKEN, target, seen))
        return np.where(row >= 0, native.live[row], np.uint32(0xFFFF_FFFF))

    def slots(self) -> None:
        """The copy of the nop behind the endbr64 of every function, or at its start."""
        clones, native = self.clones, self.native
        row = self.find(clones.slots)
        self.demand("no slot", row >= 0, clones.entries)
        row = row[row >= 0]
        is_nop = (self.bytes_of(row, 5) == np.frombuffer(NOP5, np.uint8)).all(axis=1)
        self.demand("slot is no nop", is_nop, self.code.addr[row])
        insn = native.rows(clones.entries)
        endbr = (native.code.trait[insn] & Trait.ENDBR) != 0
        self.s_native = clones.entries + np.where(endbr, native.code.length[insn], np.uint8(0))
        copy = self.copy_of(self.s_native)
        self.demand("slot is not the nop's copy", copy == clones.slots, clones.entries)
        copy = self.copy_of(clones.entries[endbr])
        end = copy + native.code.length[insn[endbr]]
        self.demand("slot not behind endbr64", end == clones.slots[endbr], clones.entries[endbr])
        start = clones.slots.copy()
        start[endbr] = copy
        self.demand("function not aligned", start % np.uint64(16) == 0, clones.entries)

    def copy_of(self, native: Addrs) -> Addrs:
        """Copies of native instructions, 0: none."""
        row = np.minimum(np.searchsorted(self.clones.native, native), len(self.clones.native) - 1)
        return np.where(self.clones.native[row] == native, self.clones.copy[row], np.uint64(0))

    def arrivals(self) -> None:
        """Where control must arrive for each native instruction: counter or copy.

        What is counted before a slot is behind it: `successors` looks at that.
        """
        clones = self.clones
        where, place = clones.counters
        heads = clones.bails
        keys = np.concatenate((clones.native, heads))
        values = np.concatenate((clones.copy, np.zeros(len(heads), np.uint64)))
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        self.demand("cloned and not cloned", np.diff(keys, prepend=np.uint64(0)) > 0, keys)
        for addr in heads.tolist():  # the jump is behind the counter, or alone
            values[np.searchsorted(keys, addr)] = self._bail(addr)
        before = (place == Place.BEFORE) & ~np.isin(where, self.s_native)
        at = np.searchsorted(keys, where[before])
        good = (at < len(keys)) & (keys[np.minimum(at, len(keys) - 1)] == where[before])
        good &= values[np.minimum(at, len(keys) - 1)] == self.c_end[before]
        self.demand("counter not before its copy", good, where[before])
        values[at[good]] = self.c_begin[before][good]
        self.a_native, self.a_clone = keys, values

    def _bail(self, addr: int) -> int:
        """The jump to a native block: its only job is to lead there."""
        rows = self._jumps_to(addr)
        good = [row for row in rows if not self.role[row]]
        if len(good) != 1 and good:  # others are tails; the counter or the branches tell which
            number = [
                int(end) for (at, end) in zip(self.clones.counters[0].tolist(),
                                             self.c_end.tolist(), strict=True) if at == addr
            ]  # fmt: skip
            good = [row for row in good if int(self.code.addr[row]) in number] or good[-1:]
        if not good:
            self.wrong.append(f"no bail-out: {addr:#x}")
            return 0
        self.role[good[0]] += 1
        return int(self.code.addr[good[0]])

    def _jumps_to(self, addr: int) -> list[int]:
        code = self.code
        found = (code.flow == Flow.JUMP) & (code.target == np.uint64(addr))
        return [int(row) for row in np.flatnonzero(found)]

    def arrival(self, native: Addrs) -> Addrs:
        """Where a jump to a native instruction must lead: into the clone if it is there."""
        at = np.minimum(np.searchsorted(self.a_native, native), len(self.a_native) - 1)
        return np.where(self.a_native[at] == native, self.a_clone[at], native)

    # ---- copies ----------------------------------------------------------------------------------

    def copies(self) -> None:
        """Every copy is its native instruction; branches are judged by `branches`."""
        native, code = self.native, self.code
        insn, row, addr = self.insn, self.row, self.clones.native
        stay = native.stay[insn]
        jumps = (code.flow[row] == Flow.JUMP) & (code.target[row] == addr)
        self.demand("copy of what must stay", jumps | ~stay, addr)
        same = ~native.labels[insn] & (native.code.target[insn] == 0) & ~stay
        rip = (native.code.trait[insn] & Trait.RIP) != 0
        size, disp = native.code.length[insn], code.disp[row]
        there, here = self.native_at(insn), self.at[row]
        self.demand("copy of another length", ~same | (code.length[row] == size), addr)
        late = native.static[insn] & (size < 5)  # five bytes, though the return has but one
        differs = np.zeros(len(insn), bool)
        for byte in range(15):
            field = rip & (byte >= disp) & (byte < disp + 4)
            chosen = ((byte < size) & ~field) | (late & (byte < 5))
            differs |= chosen & (native.text[there + byte] != self.padded[here + byte])
        self.demand("copy differs", ~differs | ~same, addr)
        where = np.flatnonzero(rip)
        ours = native.code.addr[insn] + self._number(native.text, there + disp)
        theirs = code.addr[row] + self._number(self.padded, here + disp)
        self.demand("operand moved", (ours == theirs)[where], addr[where])

    def native_at(self, insn: Rows) -> Rows:
        """int64[m]: byte positions of native instructions in the text."""
        return (self.native.code.addr[insn] - np.uint64(self.native.base)).astype(np.int64)

    def _number(self, text: U8, at: Rows) -> Addrs:
        """uint64[m]: four-byte numbers, sign-extended."""
        number = np.zeros(len(at), np.uint32)
        for byte in range(4):
            number |= text[at + byte].astype(np.uint32) << np.uint32(8 * byte)
        return number.view(np.int32).astype(np.int64).view(np.uint64)

    def branches(self) -> None:
        """Direct branches: the same condition, and to where the native one leads."""
        native, code = self.native, self.code
        label = native.labels[self.insn]
        chosen = np.flatnonzero(label | (native.code.target[self.insn] != 0))
        insn, row, label = self.insn[chosen], self.row[chosen], label[chosen]
        off = label & (native.code.flow[insn] != Flow.JUMP)
        addr = native.code.addr[insn]
        nop = (self.bytes_of(row[off], 5) == np.frombuffer(NOP5, np.uint8)).all(axis=1)
        self.demand("jump label is no nop", nop, addr[off])
        on = ~off
        target = np.where(native.static[insn], native.code.target[insn],
                          self.arrival(native.code.target[insn]))  # fmt: skip
        stub = self._stub_of(addr)
        target = np.where(stub, stub, target)
        self.demand(
            "branch of another kind", (code.flow[row] == native.code.flow[insn])[on], addr[on]
        )
        self.demand("branch elsewhere", (code.target[row] == target)[on], addr[on])
        self.demand("short branch", (code.imm_size[row] == 4)[on], addr[on])
        cond = on & (native.code.flow[insn] == Flow.BRANCH)
        opcode = self.padded[self.at[row] + code.length[row] - 5] & 15
        self.demand("other condition", (self._condition(insn) == opcode)[cond], addr[cond])
        long = on & (native.code.length[insn] >= 5)
        self.demand(
            "other prefix", (code.length[row] == native.code.length[insn])[long], addr[long]
        )
        size = native.code.length[insn].astype(np.int64)
        at = self.native_at(insn)
        for byte in range(11):
            inside = long & (byte < size - 4)
            self.demand("other opcode", (native.text[at + byte] ==
                        self.padded[self.at[row] + byte])[inside], addr[inside])  # fmt: skip

    def _condition(self, insn: Rows) -> U8:
        """Low half of a conditional branch's opcode: 7x rel8, or 0f 8x rel32."""
        native = self.native
        end = (native.end[insn] - np.uint64(native.base)).astype(np.int64)
        short = native.code.length[insn] == 2
        opcode = np.where(short, native.text[end - 2], native.text[end - 5])
        return np.asarray(opcode & 15, np.uint8)

    def _stub_of(self, addr: Addrs) -> Addrs:
        where, place = self.clones.counters
        taken = np.flatnonzero(place == Place.TAKEN)
        order = taken[np.argsort(where[taken])]
        if not len(order):
            return np.zeros(len(addr), np.uint64)
        at = np.minimum(np.searchsorted(where[order], addr), len(order) - 1)
        return np.where(where[order][at] == addr, self.c_begin[order[at]], np.uint64(0))

    def stubs(self) -> None:
        """Behind the counter of a taken edge: a jump to where the branch leads."""
        native, (where, place) = self.native, self.clones.counters
        taken = place == Place.TAKEN
        insn = native.rows(where[taken])
        row = self.find(self.c_end[taken])
        label = native.labels[insn]
        target = np.where(label, native.label_target[insn], native.code.target[insn])
        good = (row >= 0) & (self.code.flow[row] == Flow.JUMP)
        good &= self.code.target[row] == self.arrival(target)
        self.demand("stub leads elsewhere", good, where[taken])
        self.role[row[good]] += 1

    def successors(self) -> None:
        """Behind each copy comes what comes natively; nothing runs on where nothing ran on."""
        native, code, insn = self.native, self.code, self.insn
        end = self.end[self.row].copy()
        ret5 = native.static[insn] & (native.code.length[insn] < 5) & ~native.stay[insn]
        end[ret5] = code.addr[self.row[ret5]] + np.uint64(5)
        behind_native = np.where(ret5, native.code.addr[insn] + np.uint64(5), native.end[insn])
        where, place = self.clones.counters
        entry = (place == Place.BEFORE) & np.isin(where, self.s_native)
        for behind in (entry, place == Place.BEHIND):
            at = np.searchsorted(self.clones.native, where[behind])
            good = end[at] == self.c_begin[behind]
            self.demand("counter not behind its copy", good, where[behind])
            end[at] = self.c_end[behind]
        next_arrival = self.arrival(behind_native)
        row = self.find(end)
        safe = np.maximum(row, 0)
        goes_on = next_arrival == end
        int3 = (row >= 0) & ((code.trait[safe] & Trait.INT3) != 0)
        jump = (row >= 0) & (code.flow[safe] == Flow.JUMP) & (code.target[safe] == behind_native)
        jump &= self.role[safe] == 0
        falls = ~np.isin(native.code.flow[insn], NO_FALL) | native.labels[insn]
        was_int3 = native.byte_at(behind_native) == 0xCC
        good = np.where(was_int3, int3 | goes_on, ~falls | goes_on | jump)
        self.demand("wrong successor", good, self.clones.native)
        used = jump & falls & ~goes_on & ~was_int3
        self.role[safe[used]] += 1
