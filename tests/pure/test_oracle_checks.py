# SPDX-License-Identifier: GPL-2.0-or-later
"""The oracle's judges: each seeded fault is caught, and what is right passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from oracle.audit import Poke, Verdict, check_pokes
from oracle.copies import same_instruction, why_different
from oracle.oracle import EVENT, MARK, ROW, WRITE, Counts, Records, counts_from_rows, qemu_args

SYNC, FINISH = 0xFFFFFFFF8103ADC0, 0xFFFFFFFF8103CC30
A, B = 0xFFFFFFFF81100000, 0xFFFFFFFF81100FFD  # B's bytes straddle two pages
NOP5, JMP = bytes.fromhex("0f1f440000"), bytes.fromhex("e911223344")
BOTH: list[Poke] = [(A, NOP5, JMP), (B, NOP5, JMP)]
Line = tuple[int, int, int, bytes]  # kind, cpu, address, bytes written


def sync() -> list[Line]:
    return [(MARK, 0, SYNC, b""), (MARK, 1, SYNC, b"")]


def batch(pokes: Sequence[Poke], chunk: int = 4) -> list[Line]:
    """The kernel's protocol, tails in pieces of `chunk` bytes."""
    lines = [(MARK, 0, FINISH, b"")]
    lines += [(WRITE, 0, addr, b"\xcc") for addr, _, _ in pokes] + sync()
    for addr, _, new in pokes:
        for off in range(1, len(new), chunk):
            lines.append((WRITE, 0, addr + off, new[off : off + chunk]))
    lines += sync()
    lines += [(WRITE, 0, addr, new[:1]) for addr, _, new in pokes if new[0] != 0xCC]
    return lines + sync()


def to_events(lines: Sequence[Line]) -> Records:
    events = np.zeros(len(lines), EVENT)
    for seq, (kind, cpu, addr, data) in enumerate(lines):
        value = int.from_bytes(data, "little")
        events[seq] = (seq, kind, cpu, len(data), 0, addr, addr & 0xFFFFFFF, value, 0x99)
    return events


def judge(lines: Sequence[Line], pokes: Sequence[Poke] = BOTH) -> Verdict:
    return check_pokes(to_events(lines), pokes, SYNC, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_check_pokes_protocol_kept_passes(chunk: int) -> None:
    assert judge(batch(BOTH, chunk)) == ([], [])


def test_check_pokes_placed_and_removed_passes() -> None:
    undo = [(addr, new, old) for addr, old, new in BOTH]
    assert judge(batch(BOTH) + batch(undo), BOTH + undo) == ([], [])


def test_check_pokes_removal_of_other_bytes_is_caught() -> None:
    undo = [(A, b"\xe9\0\0\0\0", NOP5)]
    assert "old bytes" in judge(batch(BOTH) + batch(undo), BOTH + undo).violations[0]


def test_check_pokes_new_first_byte_int3_needs_no_head() -> None:
    pokes = [(A, b"\x90", b"\xcc")]
    lines = [(WRITE, 0, A, b"\xcc"), *sync()]
    assert judge(lines, pokes) == ([], [])
    assert judge(lines[:-1], pokes).violations


def test_check_pokes_unchanged_tail_may_be_left_out() -> None:
    pokes = [(A, b"\x0f\x1f", b"\xeb\x1f")]
    lines = [(WRITE, 0, A, b"\xcc"), *sync(), (WRITE, 0, A, b"\xeb"), *sync()]
    assert judge(lines, pokes) == ([], [])
    assert judge(batch(pokes), pokes) == ([], [])
    changed = [(A, b"\x0f\x1f", b"\xeb\x20")]
    assert judge(lines, changed).violations


SYNC_LINES = [i for i, line in enumerate(batch(BOTH)) if line[2] == SYNC]


@pytest.mark.parametrize("line", SYNC_LINES)
def test_check_pokes_missing_sync_is_caught(line: int) -> None:
    lines = batch(BOTH)
    cpu = lines.pop(line)[1]
    violations = judge(lines).violations
    assert len(violations) == len(BOTH)
    assert all(f"no sync on cpu {cpu} between" in text for text in violations)


@pytest.mark.parametrize("cpu", [0, 1])
def test_check_pokes_missing_last_sync_is_not_made_up_by_the_next_batch(cpu: int) -> None:
    first, second = batch(BOTH[:1]), batch(BOTH[1:])
    assert judge(first + second) == ([], [])
    del first[-2 + cpu]
    assert len(judge(first + second).violations) == 1


WRITE_LINES = [i for i, line in enumerate(batch(BOTH)) if line[0] == WRITE]


@pytest.mark.parametrize("line", WRITE_LINES)
def test_check_pokes_missing_write_is_caught(line: int) -> None:
    lines = batch(BOTH)
    addr = lines.pop(line)[2]
    site = A if addr < B else B
    assert [f"poke of {site:#x}" in text for text in judge(lines).violations] == [True]


@pytest.mark.parametrize("line", WRITE_LINES)
def test_check_pokes_wrong_value_is_caught(line: int) -> None:
    lines = batch(BOTH)
    kind, cpu, addr, data = lines[line]
    lines[line] = (kind, cpu, addr, data[:-1] + bytes([data[-1] ^ 1]))
    assert len(judge(lines).violations) == 1


def test_check_pokes_head_before_tail_is_caught() -> None:
    tail = [(WRITE, 0, A + 1, JMP[1:]), *sync()]
    head = [(WRITE, 0, A, JMP[:1]), *sync()]
    lines = [(WRITE, 0, A, b"\xcc"), *sync(), *head, *tail]
    assert "tail" in judge(lines, BOTH[:1]).violations[0]


def test_check_pokes_plain_write_of_the_whole_jump_is_caught() -> None:
    lines = [*sync(), (WRITE, 0, A, JMP), *sync()]
    assert "int3: 0xe9 written to byte 0" in judge(lines, BOTH[:1]).violations[0]


def test_check_pokes_nothing_written_is_caught() -> None:
    assert len(judge(sync()).violations) == 2


def test_check_pokes_overlapping_pokes_are_caught() -> None:
    assert "overlap" in judge(batch(BOTH), [*BOTH, (A + 2, b"\x90", b"\xc3")]).violations[0]


@pytest.mark.parametrize(
    ("addr", "caller"), [(A - 1, FINISH), (A + 5, FINISH), (0, FINISH), (B + 100, None)]
)
def test_check_pokes_foreign_write_is_listed_with_its_caller(addr: int, caller: int | None) -> None:
    cpu = 0 if caller else 1
    lines = [*batch(BOTH), (WRITE, cpu, addr, b"\x90\x91")]
    violations, foreign = judge(lines)
    assert violations == []
    assert [(f.addr, f.size, f.value, f.caller) for f in foreign] == [(addr, 2, 0x9190, caller)]


def test_check_pokes_write_across_a_site_end_is_foreign_too() -> None:
    lines = batch(BOTH)
    at = lines.index((WRITE, 0, A + 1, JMP[1:]))
    lines[at] = (WRITE, 0, A + 1, JMP[1:] + b"\x00")
    violations, foreign = judge(lines)
    assert (violations, [f.addr for f in foreign]) == ([], [A + 1])


def test_check_pokes_later_write_to_a_site_is_foreign() -> None:
    violations, foreign = judge([*batch(BOTH), (WRITE, 1, A, b"\xcc"), *sync()])
    assert (violations, [f.cpu for f in foreign]) == ([], [1])


# ---- counts ------------------------------------------------------------------------------------


def counts(*rows: tuple[int, bytes, int]) -> Counts:
    records = np.zeros(len(rows), ROW)
    for record, (vaddr, code, count) in zip(records, rows, strict=True):
        record["vaddr"], record["length"], record["count"] = vaddr, len(code), count
        record["code"][: len(code)] = list(code)
        record["cpu"] = count, 0
    return counts_from_rows(records)


def test_counts_at_sums_all_contents_of_an_address() -> None:
    seen = counts((B, b"\x90", 5), (A, NOP5, 7), (A, JMP, 11))
    assert seen.at([A, B, A + 1]).tolist() == [18, 5, 0]
    assert seen.at([]).tolist() == []


def test_counts_at_code_takes_one_content_only() -> None:
    seen = counts((B, b"\x90", 5), (A, NOP5, 7), (A, JMP, 11))
    wanted = [NOP5, JMP, JMP[:4], b"\x90"]
    assert seen.at_code([A, A, A, B], wanted).tolist() == [7, 11, 0, 5]
    assert seen.at_code([B], [b"\x90\x00"]).tolist() == [0]


def test_counts_since_subtracts_rows_seen_before() -> None:
    later = counts((A, NOP5, 9), (A, JMP, 11))
    assert later.since(counts((A, NOP5, 7))).count.tolist() == [2, 11]
    with pytest.raises(ValueError, match="another machine"):
        later.since(counts((B, NOP5, 7)))


def test_qemu_args_path_that_qemu_would_split_is_refused(tmp_path: object) -> None:
    from pathlib import Path

    with pytest.raises(ValueError, match="splits"):
        qemu_args(Path("/a,b/plugin.so"), Path("/c"))


# ---- copies ------------------------------------------------------------------------------------

NATIVE, COPY = 0xFFFFFFFF81234560, 0xFFFFFFFFC0A00010


def rel32(opcode: bytes, addr: int, target: int) -> bytes:
    return opcode + (target - addr - len(opcode) - 4).to_bytes(4, "little", signed=True)


@pytest.mark.parametrize(
    "code", ["4889e5", "f3a4", "f048ff07", "65488b042528000000", "48b91122334455667788", "0f1f4000"]
)
def test_same_instruction_position_independent_copy_is_the_same(code: str) -> None:
    assert why_different(bytes.fromhex(code), NATIVE, bytes.fromhex(code), COPY) == ""


@pytest.mark.parametrize(
    ("native", "copy"),
    [
        ("4889e5", "4889ec"),  # other register
        ("4889e5", "89e5"),  # other width
        ("f3a4", "a4"),  # rep dropped
        ("f048ff07", "48ff07"),  # lock dropped
        ("65488b042528000000", "488b042528000000"),  # gs dropped
        ("65488b042528000000", "65488b042530000000"),  # other displacement
        ("83c001", "83c002"),  # other immediate
        ("ff0490", "ff0488"),  # other index
        ("4889e5", "4889e590"),  # something behind it
        ("4889e5", "48"),  # cut off
        ("ffd0", "682010000050"),  # an indirect call has no accepted displaced form
    ],
)
def test_same_instruction_other_instruction_is_told(native: str, copy: str) -> None:
    assert not same_instruction(bytes.fromhex(native), NATIVE, bytes.fromhex(copy), COPY)


def test_same_instruction_rip_relative_operand_is_compared_by_target() -> None:
    load = bytes.fromhex("488b05")
    target = 0xFFFFFFFF82000000
    native = rel32(load, NATIVE, target)
    assert same_instruction(native, NATIVE, rel32(load, COPY, target), COPY)
    assert not same_instruction(native, NATIVE, native, COPY)
    assert not same_instruction(native, NATIVE, rel32(load, COPY, target + 8), COPY)


def test_same_instruction_rip_relative_with_immediate_counts_from_its_end() -> None:
    native = bytes.fromhex("8305") + (0x100).to_bytes(4, "little") + b"\x01"
    moved = bytes.fromhex("8305") + (0x100 - 0x40).to_bytes(4, "little") + b"\x01"
    assert same_instruction(native, NATIVE, moved, NATIVE + 0x40)


@pytest.mark.parametrize(("short", "near"), [(b"\xeb", b"\xe9"), (b"\x75", b"\x0f\x85")])
def test_same_instruction_short_branch_may_become_near(short: bytes, near: bytes) -> None:
    native = short + b"\x10"
    target = NATIVE + 0x12
    assert same_instruction(native, NATIVE, rel32(near, COPY, target), COPY)
    assert not same_instruction(native, NATIVE, rel32(near, COPY, target + 1), COPY)
    assert not same_instruction(native, NATIVE, rel32(b"\x0f\x84", COPY, target), COPY)


@pytest.mark.parametrize("prefix", [b"", b"\x2e"])
def test_same_instruction_direct_call_becomes_push_and_jmp(prefix: bytes) -> None:
    target = 0xFFFFFFFF81E01000
    native = rel32(prefix + b"\xe8", NATIVE, target)

    def displaced(back: int, to: int) -> bytes:
        push = b"\x68" + (back & 0xFFFFFFFF).to_bytes(4, "little")
        return push + rel32(b"\xe9", COPY + 5, to)

    back = NATIVE + len(native)
    assert same_instruction(native, NATIVE, displaced(back, target), COPY)
    assert not same_instruction(native, NATIVE, displaced(back + 1, target), COPY)
    assert not same_instruction(native, NATIVE, displaced(back, target + 1), COPY)
    assert not same_instruction(native, NATIVE, rel32(b"\xe8", COPY, target), COPY)
