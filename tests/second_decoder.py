# SPDX-License-Identifier: GPL-2.0-or-later
"""Instruction boundaries by another disassembler, and why both differ where they do.

Capstone decodes each function from its start and skips what it does not know byte by byte.  Where
the two differ, a *region* begins and ends at a boundary that both have.  It is explained if it
begins with an instruction listed here, of the length that its manual gives it, and capstone,
started again behind it, agrees with the rest.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import capstone
import numpy as np
import numpy.typing as npt

from kernweave.analysis.code import Part
from kernweave.x86.decode import Decoded, Flow

Addrs = npt.NDArray[np.uint64]

_ROW_BYTES = ctypes.sizeof(capstone._cs_insn)
_SIZE_AT = capstone._cs_insn.size.offset

UD1 = "ud1: capstone leaves its operand out"
NEITHER = "rmpread: neither knows it"
GOES_ON = "goes on in the next function (srso_untrain_ret, retbleed_untrain_ret)"
UDB = "udb (d6): neither knows it"

#: (bytes of the whole instruction, why): what capstone 5.0 does not know
#:
#: References: SDM volume 2; AMD64 manual volume 3 (rmpadjust to tlbsync)
LISTED: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\x0f\xb9\xcc"), UD1),  # ud1 %esp, %ecx
    (re.compile(rb"\x67\x48\x0f\xb9[\x38-\x3b\x3e\x3f]"), UD1),  # ud1 (%edx), %rdi
    (re.compile(rb"\xf2\x0f\x01\xfd"), NEITHER),
    *(
        (re.compile(re.escape(bytes.fromhex(code))), f"{name}: capstone does not know it")
        for name, code in (
            ("serialize", "0f01e8"),
            ("rmpadjust", "f30f01fe"),
            ("pvalidate", "f20f01ff"),
            ("psmash", "f30f01ff"),
            ("rmpupdate", "f20f01fe"),
            ("invlpgb", "0f01fe"),
            ("tlbsync", "0f01ff"),
            ("tdcall", "660f01cc"),
            ("lkgs", "f20f00f7"),
            ("tilerelease", "c4e27849c0"),
        )
    ),
)


@dataclass(frozen=True)
class Region:
    """Where two decoders differ.

    Attributes:
        start: address of the last boundary that both have before.
        code: bytes up to the next one.
        ours: our lengths.
        part_ends: whether the function ends with it.
    """

    start: int
    code: bytes
    ours: tuple[int, ...]
    part_ends: bool

    def __str__(self) -> str:
        return f"{self.start:#x}: {self.code.hex()} as {self.ours}"


def sizes_of(code: bytes) -> npt.NDArray[np.uint16]:
    """Lengths of the instructions in some bytes; 1 for each byte that is none."""
    if not code:
        return np.zeros(0, np.uint16)
    rows = ctypes.POINTER(capstone._cs_insn)()
    count = capstone._cs.cs_disasm(_MACHINE.csh, code, len(code), 0, 0, ctypes.byref(rows))
    try:
        raw = ctypes.string_at(rows, count * _ROW_BYTES)
    finally:
        capstone._cs.cs_free(rows, count)
    table = np.frombuffer(raw, np.uint8).reshape(count, _ROW_BYTES)
    return np.ascontiguousarray(table[:, _SIZE_AT : _SIZE_AT + 2]).view(np.uint16)[:, 0]


def _machine() -> capstone.Cs:
    machine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    machine.skipdata = True
    return machine


_MACHINE = _machine()


def boundaries(parts: Sequence[Part]) -> Addrs:
    """uint64[n]: address of every instruction of some functions."""
    found = []
    for part in parts:
        size = sizes_of(part.code).astype(np.uint64)
        found.append(np.uint64(part.start) + np.cumsum(size) - size)
    return np.concatenate([np.zeros(0, np.uint64), *found]).astype(np.uint64)


def differences(parts: Sequence[Part], ours: Addrs, theirs: Addrs) -> list[Region]:
    """Regions in which only one of the two has a boundary, ascending."""
    starts = np.array([part.start for part in parts], np.uint64)
    ends = np.array([part.end for part in parts], np.uint64)
    shared = _contains(theirs, ours)
    common = np.sort(np.concatenate((ours[shared], ends)))
    single = np.concatenate((ours[~shared], theirs[~_contains(ours, theirs)]))
    after = np.searchsorted(common, single, side="right")
    found = []
    for first, last in sorted(set(zip((after - 1).tolist(), after.tolist(), strict=True))):
        start, end = int(common[first]), int(common[last])
        part = parts[int(np.searchsorted(starts, np.uint64(start), side="right")) - 1]
        inside = ours[slice(*np.searchsorted(ours, common[[first, last]]).tolist())]
        at = [*map(int, inside), end]
        lengths = [behind - here for here, behind in itertools.pairwise(at)]
        code = part.code[start - part.start : end - part.start]
        found.append(Region(start, code, tuple(lengths), end == part.end))
    return found


def _contains(table: Addrs, addrs: Addrs) -> npt.NDArray[np.bool_]:
    """Which addresses an ascending table has; sets of numpy take seconds for millions."""
    at = np.minimum(np.searchsorted(table, addrs), len(table) - 1)
    return np.asarray(table[at] == addrs)


def explain(region: Region) -> str | None:
    """The class of a difference, None if there is no explanation."""
    for pattern, why in LISTED:
        found = pattern.match(region.code)
        if found and region.ours[:1] == (found.end(),):
            rest = tuple(sizes_of(region.code[found.end() :]).tolist())
            return why if rest == region.ours[1:] else None
    # movabs with its operand in the next function
    if region.part_ends and region.code == b"\x48\xb8" and len(region.ours) == 1:
        return GOES_ON
    return None


def explain_invalid(parts: Sequence[Part], decoded: Decoded) -> list[tuple[int, str | None]]:
    """Address and class of every instruction that we do not know."""
    found: list[tuple[int, str | None]] = []
    for row in np.flatnonzero(decoded.flow == Flow.INVALID).tolist():
        part = parts[int(decoded.stretch[row])]
        at = int(decoded.addr[row])
        code = part.code[at - part.start :][: int(decoded.length[row])]
        why = {b"\xf2\x0f\x01\xfd": NEITHER, b"\xd6": UDB}.get(code)
        if code in (b"\x48\xb8", b"\xf6") and at + len(code) == part.end:
            why = GOES_ON
        found.append((at, why))
    return found
