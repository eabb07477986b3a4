# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave show`: a function's code by blocks, with what could be probed where."""

from __future__ import annotations

from typing import Any

import click
import iced_x86 as iced
import numpy as np
import numpy.typing as npt

from kernweave import connect
from kernweave.analysis.code import Code
from kernweave.cli.output import print_json, progress
from kernweave.session.session import Session
from kernweave.session.survey import SiteVerdict
from kernweave.x86.decode import ALL_MASK, FLAG_NAMES, FLAGS_MASK, FLAGS_SHIFT, REG_NAMES, Flow

INSN_SCHEMA = "kernweave.insn/1"
_NO_FALL = (Flow.JUMP, Flow.RETURN, Flow.INDIRECT_JUMP, Flow.LEAVE)
_WIDTH = 44


@click.command()
@click.argument("function", metavar="FUNCTION")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per instruction.")
@click.pass_obj
def show(obj: dict[str, Any], function: str, as_json: bool) -> None:
    """Disassemble FUNCTION by blocks: edges, tactic and dead registers per instruction.

    \b
    Example:
      kernweave show vfs_read

    A register or flag is listed as dead where that is certain from this function alone.
    """  # noqa: D301
    with connect(obj["target"], writer=False, progress=progress) as session:
        code, live = session.decode(function)
        verdicts = {one.addr: one for one in session.sites(f"{function}@insns")}
        rows = [_describe(session, code, row, int(live[row]), verdicts) for row in range(len(live))]
    if as_json:
        for row in rows:
            print_json({"schema": INSN_SCHEMA, **row})
        return
    _print_human(code, rows)


def _describe(
    session: Session, code: Code, row: int, live: int, verdicts: dict[str | None, SiteVerdict]
) -> dict[str, Any]:
    addr = int(code.addr[row])
    part = code.parts[int(code.part[row])]
    verdict = verdicts[f"{addr:#x}"]
    return {
        "point": verdict.point,
        "addr": f"{addr:#x}",
        "function": part.symbol,
        "offset": addr - part.start,
        "bytes": code.raw(row).hex(),
        "text": _disassemble(session, code, row),
        "leader": bool(code.leader[row]),
        "successors": _successors(session, code, row),
        "tactic": verdict.tactic,
        "reason": verdict.reason,
        "dead": _names(ALL_MASK & ~live),
    }


def _disassemble(session: Session, code: Code, row: int) -> str:
    """Intel syntax; a branch or call target by its name."""
    addr = int(code.addr[row])
    ins = iced.Decoder(64, code.raw(row), ip=addr).decode()
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.uppercase_hex = False
    formatter.show_branch_size = False
    target = int(code.target[row])
    if not target:
        return formatter.format(ins)
    mnemonic = formatter.format_mnemonic(ins)
    return f"{mnemonic} {_name(session, code, row, target)}"


def _name(session: Session, code: Code, row: int, target: int) -> str:
    """A target in the words of a point: `+0x31` inside the part, `f+0x31` elsewhere."""
    part = code.parts[int(code.part[row])]
    if part.start <= target < part.end:
        return f"+{target - part.start:#x}"
    for image in session.view.images:
        bounds = image.bounds(target) if len(image.addr) else None
        if bounds:
            off = target - bounds[0]
            return image.name_at[bounds[0]] + (f"+{off:#x}" if off else "")
    return f"{target:#x}"


def _successors(session: Session, code: Code, row: int) -> list[str]:
    """Where control goes behind the last instruction of a block, inside the function."""
    last = row + 1 == len(code.addr) or bool(code.leader[row + 1])
    if not last:
        return []
    found = []
    if code.flow[row] in (Flow.JUMP, Flow.BRANCH):
        found.append(_name(session, code, row, int(code.target[row])))
    falls = code.flow[row] not in _NO_FALL and row + 1 < len(code.addr)
    if falls and code.part[row + 1] == code.part[row]:
        found.append(_name(session, code, row, int(code.addr[row + 1])))
    return found


def _names(mask: int) -> str:
    """Registers and flags of a mask; all six status flags are called `flags`."""
    names = [name for bit, name in enumerate(REG_NAMES) if mask >> bit & 1]
    flags = [name for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1]
    return " ".join(names + (["flags"] if mask & FLAGS_MASK == FLAGS_MASK else flags))


def _print_human(code: Code, rows: list[dict[str, Any]]) -> None:
    first = _rows_of_blocks(code)
    for number, start in enumerate(first.tolist()):
        end = first[number + 1] if number + 1 < len(first) else len(rows)
        block = rows[start:end]
        leads = ", ".join(block[-1]["successors"]) or "leaves"
        print(f"{block[0]['point']}  ->  {leads}")
        for row in block:
            text = row["text"] if len(row["text"]) <= _WIDTH else row["text"][: _WIDTH - 1] + "~"
            head = f"  +{row['offset']:<#6x} {row['tactic'] or row['reason']:10}"
            print(f"{head} {text:{_WIDTH}} {_short(row['dead'])}".rstrip())
    print(f"{len(first)} blocks, {len(rows)} instructions; last column: dead registers and flags")


def _rows_of_blocks(code: Code) -> npt.NDArray[np.int64]:
    return np.flatnonzero(code.leader)


def _short(dead: str) -> str:
    """What fits: the best scratch registers first."""
    names = dead.split()
    chosen = [name for name in ("flags", "r11", "r10", "rax") if name in names]
    more = len([name for name in names if name not in chosen])
    return " ".join(chosen[:2]) + (f" +{more + len(chosen[2:])}" if more + len(chosen[2:]) else "")
