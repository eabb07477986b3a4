# SPDX-License-Identifier: GPL-2.0-or-later
"""What could be probed of three whole kernels, by tactic and by reason; writes docs/coverage.md.

Every instruction of every function at once, kmods of the lab included; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from _record import record

import kernweave
from kernweave.errors import Reason
from kernweave.lab.machine import Lab
from kernweave.lab.packages import KERNEL_SERIES
from kernweave.model.plan import Tactic
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from kernweave.splice import place
from kernweave.splice.board import Boards, find_boards

_DOC = Path(__file__).parents[1] / "docs" / "coverage.md"
_EVERYTHING = "*@insns"

#: instructions that a probe must leave alone, whatever it does
_FORBIDDEN = {
    Reason.DENYLIST: "the kernel allows no probe, or the code is copied or patched elsewhere",
    Reason.NOINSTR: "entry code, and what runs without per-CPU data or a usable stack",
    Reason.JUMP_LABEL: "the kernel rewrites it when a static key flips",
    Reason.STATIC_CALL: "the kernel rewrites it when a static call changes",
    Reason.STI_SHADOW: "interrupts stay off for exactly this instruction",
    Reason.SWAPGS: "its function changes the gs base",
    Reason.LOCK_PREFIX: "the kernel may rewrite the lock prefix",
    Reason.NOT_BOUNDARY: "bytes that are no instruction",
}
#: there is no room for a jump, or they stay at home, and a trap does not count them
_NO_ROOM = (Reason.TOO_SHORT, Reason.EXCEPTION_ENTRY, Reason.BUG_ENTRY)
_STEPS: list[tuple[str, list[Tactic]]] = [
    ("nop5, jmp32", [Tactic.NOP5, Tactic.JMP32]),
    ("and group", [Tactic.NOP5, Tactic.JMP32, Tactic.GROUP]),
    ("and springboard", [Tactic.NOP5, Tactic.JMP32, Tactic.GROUP, Tactic.SPRINGBOARD]),
]


def main() -> None:
    """Boot each kernel, survey it, write results/coverage.json and docs/coverage.md."""
    figures = {}
    for series in KERNEL_SERIES:
        lab = f"coverage-{series}"
        Lab(lab).down()
        try:
            with kernweave.connect(f"lab:{_up(lab, series)}", writer=False) as session:
                figures[series] = _measure(session)
        finally:
            Lab(lab).down()
    result = record("coverage", ", ".join(f["kernel"] for f in figures.values()), figures)
    _DOC.write_text(_document({series: result[series] for series in figures}))


def _up(name: str, series: str) -> str:
    Lab(name, kernel=series).up(kmod=driver_kmod(series, print), progress=print)
    return name


def _measure(session: Session) -> dict[str, Any]:
    whole = session.survey(_EVERYTHING)
    tally = whole.tally()
    forbidden = sum(tally.get(reason, 0) for reason in _FORBIDDEN)
    allowed = len(whole) - forbidden
    traps = list(whole.of(Tactic.INT3))
    shares = {name: _share(session, tactics, allowed) for name, tactics in _STEPS}
    with mock.patch.object(place, "find_boards", _without_eviction):
        shares["and springboard, without eviction"] = _share(session, _STEPS[-1][1], allowed)
    return {
        "kernel": session.kernel,
        "instructions": len(whole),
        "forbidden": forbidden,
        "tally": tally,
        "traps_by_bytes": _by_length([len(one.site_bytes or "") // 2 for one in traps]),
        "share_without_trap": shares,
    }


def _share(session: Session, tactics: Sequence[Tactic], allowed: int) -> float:
    tally = session.survey(_EVERYTHING, tactics=[one.value for one in tactics]).tally()
    return round(100 * sum(tally.get(one, 0) for one in tactics) / allowed, 3)


def _without_eviction(*args: Any) -> Boards:
    code, runs, windows, shorts, _ = args
    return find_boards(code, runs, windows, shorts, evict=False)


def _by_length(lengths: Sequence[int]) -> dict[str, int]:
    return {str(n): lengths.count(n) for n in sorted(set(lengths))}


# ---- the document --------------------------------------------------------------------------------


def _document(figures: dict[str, dict[str, Any]]) -> str:
    columns = list(figures.values())
    lines = [
        "# What can be probed",
        "",
        "Every instruction of every function of the stock kernels, and of the kmods that the lab",
        "loads, all at once: `kernweave sites '*@insns'`. Padding is no instruction. Made by",
        "`bench/coverage.py`; what fits together also fits alone.",
        "",
        _row("", [f["kernel"] for f in columns]),
        "|---|" + "--:|" * len(columns),
        _row("instructions", [f"{f['instructions']:,}" for f in columns]),
    ]
    for reason, meaning in _FORBIDDEN.items():
        counts = [f["tally"].get(reason, 0) for f in columns]
        if any(counts):
            lines.append(_row(f"`{reason}`: {meaning}", [f"{n:,}" for n in counts]))
    allowed = [f["instructions"] - f["forbidden"] for f in columns]
    lines.append(_row("**left**", [f"**{n:,}**" for n in allowed]))
    for word in (*Tactic, *_NO_ROOM):
        lines.append(_row(f"`{word}`", [_cell(f, word) for f in columns]))
    lines += [
        "",
        "The last three are refused: a jump has no room, or a fault is fixed up at home only (that",
        "of `load_unaligned_zeropad()`), and a trap would not be exact. All others with",
        "an entry in the exception table or in a bug table, about 8,000 in 6.1, are displaced: the",
        "kernel's searches find the native address for that of a copy.",
        "",
        "Traps, by bytes of the instruction: "
        + "; ".join(
            f"{series}: " + ", ".join(f"{n} of {size}" for size, n in f["traps_by_bytes"].items())
            for series, f in figures.items()
        )
        + ".",
        "",
        "## What each tactic adds",
        "",
        "Per cent of what is left that is counted without a trap:",
        "",
        _row("tactics", [f["kernel"] for f in columns]),
        "|---|" + "--:|" * len(columns),
    ]
    for name in columns[0]["share_without_trap"]:
        lines.append(_row(name, [f"{f['share_without_trap'][name]:.2f}" for f in columns]))
    return "\n".join(lines) + "\n"


def _row(head: str, cells: Sequence[str]) -> str:
    return f"| {head} | " + " | ".join(cells) + " |"


def _cell(figures: dict[str, Any], word: str) -> str:
    count = figures["tally"].get(word, 0)
    allowed = figures["instructions"] - figures["forbidden"]
    return f"{count:,} ({100 * count / allowed:.2f}%)"


if __name__ == "__main__":
    main()
