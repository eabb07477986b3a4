# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code on the real CPU: from any register and flag state, in a child of its own.

Every byte of a code map that holds no code is int3, so whatever address control goes to becomes
the outcome's `rip`.  Everything lies below 2 GiB, as kernel text lies in the top 2 GiB: both fit
a sign-extended 32-bit immediate.
"""

from __future__ import annotations

import random
import re
import signal
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PAGE = 4096
NATIVE = 0x1000_0000  # native code
COPY = 0x1200_0000  # relocated code
DATA = 0x1400_0000
STACK = 0x1600_0000
GS_DATA = 0x1800_0000
RSP = 4
INT3 = b"\xcc"

CARRY, PARITY, ADJUST, ZERO, SIGN, DIRECTION, OVERFLOW = (
    *(0x001, 0x004, 0x010, 0x040, 0x080),
    *(0x400, 0x800),
)
STATUS = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW
FLAGS = STATUS | DIRECTION
_FIXED_FLAGS = 0x202  # reserved bit 1, interrupts on

_MAX_MAPS = 8
_STATE = struct.Struct("<18Q")
_MAP = struct.Struct("<3Q")
_REPLY = struct.Struct("<qQ18Q")


@dataclass(frozen=True, slots=True)
class Map:
    """Bytes at an address: code (int3 where there is none) or data."""

    addr: int
    data: bytes
    code: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """All general registers in encoding order, flags (only `FLAGS` count), next address."""

    regs: tuple[int, ...]
    flags: int
    rip: int

    def with_reg(self, register: int, value: int) -> State:
        regs = list(self.regs)
        regs[register] = value & (1 << 64) - 1
        return replace(self, regs=tuple(regs))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where and how the code stopped.

    Attributes:
        signal: SIGTRAP on arrival at an int3; negative: the child died without a word.
        fault: address the fault was about.
        state: registers, flags, address of the int3 or of the faulting instruction.
        memory: data maps, in order.
    """

    signal: int
    fault: int
    state: State
    memory: tuple[bytes, ...]


def code_map(addr: int, *pieces: tuple[int, bytes]) -> Map:
    """A page of int3 with pieces of code at their addresses."""
    page = bytearray(INT3 * PAGE)
    for at, code in pieces:
        page[at - addr : at - addr + len(code)] = code
    if len(page) != PAGE:
        raise ValueError("code does not fit its page")
    return Map(addr, bytes(page), code=True)


def random_state(rng: random.Random, rip: int) -> State:
    """Any registers and flags, but for a stack pointer into the middle of the stack."""
    regs = [rng.choice((rng.getrandbits(64), rng.getrandbits(8), 0)) for _ in range(16)]
    regs[RSP] = STACK + PAGE // 2 + 8 * rng.randrange(-16, 16)
    return State(tuple(regs), rng.getrandbits(12) & FLAGS, rip)


def random_bytes(rng: random.Random, size: int = PAGE) -> bytes:
    return rng.getrandbits(8 * size).to_bytes(size, "little")


class Cpu:
    """The runner; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        """Compile the runner into `folder` and start it."""
        program = folder / "cpu"
        source = Path(__file__).with_name("cpu.c")
        flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", program, source], check=True)
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def close(self) -> None:
        self._process.communicate()

    def run(self, maps: Sequence[Map], state: State, gs: int = 0) -> Outcome:
        """Run from `state` until an int3 or a fault; `gs` is the base of the gs segment."""
        table = b"".join(_MAP.pack(m.addr, len(m.data), m.code) for m in maps)
        self._send(
            _STATE.pack(*state.regs, state.flags | _FIXED_FLAGS, state.rip)
            + struct.pack("<2Q", gs, len(maps))
            + table.ljust(_MAP.size * _MAX_MAPS, b"\0")
            + b"".join(m.data for m in maps)
        )
        end, fault, *numbers = _REPLY.unpack(self._receive(_REPLY.size))
        memory = tuple(self._receive(len(m.data)) for m in maps if not m.code)
        rip = numbers[17] - (end == signal.SIGTRAP)
        return Outcome(end, fault, State(tuple(numbers[:16]), numbers[16] & FLAGS, rip), memory)

    def arrive(self, maps: Sequence[Map], state: State, gs: int = 0) -> Outcome:
        """Like `run`, but anything else than an arrival at an int3 fails the test."""
        outcome = self.run(maps, state, gs)
        if outcome.signal != signal.SIGTRAP:
            code = "; ".join(f"{m.addr:#x}: {_shown(m.data)}" for m in maps if m.code)
            raise AssertionError(
                f"signal {outcome.signal} at {outcome.state.rip:#x} about {outcome.fault:#x}\n"
                f"code {code}\nstarted from {state}"
            )
        return outcome

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) :]

    def _receive(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = b""
        while len(data) < size:
            part = self._process.stdout.read(size - len(data))
            if not part:
                raise AssertionError("the runner of generated code died")
            data += part
        return data


def _shown(page: bytes) -> str:
    """Bytes in hex, long runs of int3 left out."""
    pieces = re.split(rb"\xcc{4,}", page)
    return " .. ".join(piece.hex(" ") for piece in pieces)
