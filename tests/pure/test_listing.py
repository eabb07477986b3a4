# SPDX-License-Identifier: GPL-2.0-or-later
"""A function as text and as a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exec.asm import Item
from kernweave.analysis.code import build_code
from kernweave.cli.dot import dot_source, write_svg
from kernweave.errors import KernweaveError, UnsupportedError
from kernweave.session.listing import InsnInfo, Listing
from kernweave.session.survey import SiteVerdict
from kernweave.x86.effect import ALL_MASK
from kernweave.x86.text import disassemble, mask_names
from pure.kernels import COLD, KERNEL, MOVE, A, B, make_kernel, part_of, sites


def listing(*addrs: int) -> list[InsnInfo]:
    """What `Session.listing` makes of some functions, every place refused."""
    return _listing({addr: KERNEL[addr] for addr in addrs})


def _listing(functions: dict[int, tuple[str, tuple[Item, ...]]]) -> list[InsnInfo]:
    parts = [part_of(None, addr, name, items) for addr, (name, items) in functions.items()]
    code = build_code(parts, sites())
    kernel = make_kernel()
    verdicts = [
        SiteVerdict("", kernel.point_at(addr), f"{addr:#x}", *(None,) * 9)
        for addr in code.addr.tolist()
    ]
    live = np.full(len(code.addr), ALL_MASK & ~1, np.uint32)
    return Listing(kernel, code, sites()).rows(live, verdicts)


def edges_of(rows: list[InsnInfo]) -> list[tuple[str, str, str | None]]:
    return [(row.point, edge.kind, edge.to) for row in rows for edge in row.edges]


def test_edges_lead_to_points() -> None:
    assert edges_of(listing(A, COLD)) == [
        ("a", "fall", "a+0x5"),
        ("a+0x5", "fall", "a+0xb"),
        ("a+0x5", "taken", "a.cold"),
        ("a+0xb", "call", "b#1"),
        ("a+0x10", "call", "b#1"),
        ("a+0x15", "indirect", None),
        ("a+0x17", "sibling", "twice#1"),
        ("a.cold", "call", "twice#2"),
        ("a.cold+0x5", "taken", "a+0x5"),
    ]


def test_successors_are_short_inside_the_part_and_stand_at_a_block_s_end() -> None:
    rows = {row.point: row for row in listing(A, COLD)}
    assert rows["a+0x5"].successors == ("a.cold", "+0xb")
    assert rows["a.cold+0x5"].successors == ("a+0x5",)
    assert rows["a+0xb"].successors == rows["a+0x17"].successors == ()


def test_text_names_targets_and_dead_is_what_is_not_live() -> None:
    rows = {row.point: row for row in listing(A)}
    assert rows["a+0xb"].text == "call b#1" and rows["a+0x5"].text == "je a.cold"
    assert {row.dead for row in rows.values()} == {"rax"}
    assert rows["a+0x15"].edges[0].candidates == 3


def test_function_that_changed_since_has_the_edges_of_its_text_now() -> None:
    name, items = KERNEL[B]
    changed = _listing({B: (name, (items[0], MOVE, *items[1:]))})
    assert edges_of(changed) == [
        ("b#1+0x8", "fall", "b#1+0xe"),
        ("b#1+0x8", "taken", "b#1+0x11"),
        ("b#1+0xe", "fall", "b#1+0x11"),
        ("b#1+0x11", "return", None),
    ]


def test_dot_has_a_box_per_block_and_an_oval_per_function_left_for() -> None:
    source = dot_source('say "a"', listing(A, COLD))
    lines = [line.strip() for line in source.splitlines()]
    assert lines[0] == 'digraph "say \\"a\\"" {' and lines[-1] == "}"
    boxes = [line for line in lines if line.startswith('"0x') and "[label=" in line]
    assert len(boxes) == 4
    assert f'"{A + 5:#x}" -> "{COLD:#x}" [color="blue"];' in lines
    assert '"twice#1" [shape="oval"];' in lines
    assert f'"{A + 0xB:#x}" -> "twice#1" [color="gray40", label="sibling"];' in lines
    assert "candidates: 3" in boxes[2]


@pytest.fixture
def dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "dot"


def test_svg_without_graphviz_names_the_package(dot: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        write_svg("digraph {}", tmp_path / "x.svg")
    assert "apt install graphviz" in str(error.value)


def test_svg_is_what_dot_writes(dot: Path, tmp_path: Path) -> None:
    dot.write_text('#!/bin/sh\nread line\necho "$1 $line"\n')
    dot.chmod(0o755)
    write_svg("digraph {}\n", tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text() == "-Tsvg digraph {}\n"


def test_svg_that_dot_refuses_is_an_error_and_no_file(dot: Path, tmp_path: Path) -> None:
    dot.write_text("#!/bin/sh\necho 'syntax error' >&2\nexit 1\n")
    dot.chmod(0o755)
    with pytest.raises(KernweaveError) as error:
        write_svg("digraph {}\n", tmp_path / "x.svg")
    assert error.value.notes == ("syntax error",) and not (tmp_path / "x.svg").exists()


def test_disassemble_puts_a_name_in_the_place_of_a_target() -> None:
    code = bytes.fromhex("e8fbffffff")
    assert disassemble(code, 0x1000) == "call 0x1000"
    assert disassemble(code, 0x1000, "memcpy") == "call memcpy"


def test_mask_names_calls_all_status_flags_flags() -> None:
    assert mask_names(0x3F0801) == "rax r11 flags"
    assert mask_names(0x100001) == "rax cf"
