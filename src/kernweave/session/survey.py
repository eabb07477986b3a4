# SPDX-License-Identifier: GPL-2.0-or-later
"""What could be done, without doing it: verdicts on points, lists of functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.errors import Reason
from kernweave.image.btf import Btf
from kernweave.image.btf_text import prototype
from kernweave.model.plan import Point, Refused, Tactic
from kernweave.model.point import PointSpec
from kernweave.session.attach import Decision
from kernweave.session.names import images_of, printed_name
from kernweave.session.view import KernelView
from kernweave.session.woven import CLONE, Clonable
from kernweave.splice.window import SHORT_BYTES, SITE_BYTES

SITE_SCHEMA = "kernweave.site/1"


@dataclass(frozen=True, slots=True)
class SiteVerdict:
    """One point and what would happen to it: the fields of kernweave.site/1."""

    schema: str
    point: str
    addr: str | None
    kmod: str | None
    function: str | None
    offset: int | None
    kind: str | None
    tactic: str | None
    reason: str | None
    detail: str | None
    site_addr: str | None
    site_bytes: str | None


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """A function: name as a point, kmod, run-time address, bytes up to the next symbol, symbol."""

    name: str
    kmod: str | None
    addr: int
    size: int
    symbol: str


class Survey:
    """What would be done with each point asked for; points that do not exist come last."""

    def __init__(self, decision: Decision, edges: Clonable | None = None) -> None:
        """Find the site of every instruction; made by `Session.survey`.

        Args:
            decision: on all points, spliced.
            edges: on the edges among them, woven; None: they are not.
        """
        self._decision, self._edges = decision, edges
        placement, code = decision.placement, decision.code
        rows = placement.rows
        self._first_edge = len(rows) - int(decision.resolved.edges.sum())
        self._tactic, self._reason = placement.tactic.copy(), placement.reason.copy()
        for i, woven in enumerate(edges.placed.tolist() if edges else ()):
            row = self._first_edge + i
            self._tactic[row] = CLONE if woven else None
            self._reason[row] = None if woven else self._refused(i, row).reason
        first, end = rows.copy(), rows + 1
        for windows in (placement.boards.windows, placement.boards.shorts):
            number = windows.of(rows)
            inside = number >= 0
            first[inside] = windows.first[number[inside]]
            end[inside] = windows.end[number[inside]]
        self._site = code.addr[first]
        self._size = code.addr[end - 1] + code.length[end - 1] - self._site
        self._size = np.maximum(self._size, _least(placement.tactic))

    def __len__(self) -> int:
        return len(self._decision.back) + len(self._decision.resolved.refused)

    def __iter__(self) -> Iterator[SiteVerdict]:
        """One verdict per point, in the order asked for."""
        for i, row in enumerate(self._decision.back.tolist()):
            yield self._verdict(i, row)
        nowhere = (None,) * 5
        for one in self._decision.resolved.refused:
            yield SiteVerdict(
                SITE_SCHEMA, one.point, *nowhere, None, one.reason.value, one.detail, None, None
            )

    def of(self, word: Tactic | Reason) -> Iterator[SiteVerdict]:
        """Verdicts with one tactic, or one reason, of points that exist."""
        back = self._decision.back
        wanted = self._tactic if isinstance(word, Tactic) else self._reason
        for i in np.flatnonzero((wanted == word)[back]).tolist():
            yield self._verdict(i, int(back[i]))

    def tally(self) -> dict[str, int]:
        """Number of points per tactic and per reason, the most frequent first."""
        back = self._decision.back
        words = [
            str(tactic or reason) for tactic, reason in zip(self._tactic, self._reason, strict=True)
        ]
        names, number = np.unique(np.array(words, "U32"), return_inverse=True)
        counts = np.bincount(number[back], minlength=len(names))
        found = Counter(dict(zip(names.tolist(), counts.tolist(), strict=True)))
        found.update(one.reason.value for one in self._decision.resolved.refused)
        return dict(found.most_common())

    def _verdict(self, i: int, row: int) -> SiteVerdict:
        decision, tactic = self._decision, self._tactic[row]
        no = None if tactic else self._refused(i, row)
        spliced = tactic not in (None, CLONE)
        native = decision.code.raw(int(decision.placement.rows[row]))
        return SiteVerdict(
            *_place(decision.resolved.point(i)),
            tactic=str(tactic) if tactic else None,
            reason=no.reason.value if no else None,
            detail=no.detail if no else None,
            site_addr=f"{int(self._site[row]):#x}" if spliced else None,
            site_bytes=(self._bytes(row) if spliced else native).hex(),
        )

    def _refused(self, i: int, row: int) -> Refused:
        if self._edges and row >= self._first_edge:
            return self._edges.refused(row - self._first_edge)
        return self._decision.refused(i)

    def _bytes(self, row: int) -> bytes:
        code = self._decision.code
        part = code.parts[int(code.part[self._decision.placement.rows[row]])]
        at = int(self._site[row]) - part.start
        return part.code[at : at + int(self._size[row])]


def _place(point: Point) -> tuple[str, str, str, str | None, str, int, str]:
    return (
        SITE_SCHEMA,
        point.text,
        f"{point.addr:#x}",
        point.kmod,
        point.function,
        point.offset,
        point.kind.value,
    )


def _least(tactic: npt.NDArray[np.object_]) -> npt.NDArray[np.uint64]:
    """uint64[u]: bytes that a site has at least."""
    found = np.full(len(tactic), SITE_BYTES, np.uint64)
    found[tactic == Tactic.SPRINGBOARD] = SHORT_BYTES
    found[tactic == Tactic.INT3] = 1
    return found


def list_functions(view: KernelView, spec: PointSpec) -> list[FunctionInfo]:
    """Functions that match a glob; the names are points."""
    found = []
    for image in images_of(view.images, spec.kmod):
        for symbol, addr in image.match(spec.function):
            bounds = image.bounds(addr) or (addr, addr)
            name = printed_name(view.images, image, symbol, addr)
            found.append(FunctionInfo(name, image.kmod, addr, bounds[1] - addr, symbol))
    return found


def prototype_of(btf: Btf | None, kmod: str | None, symbol: str) -> str | None:
    """C declaration of a function; None for a kmod's, and where BTF has none or several."""
    found = btf.find_function(symbol) if btf and kmod is None else None
    return prototype(btf, found) if btf and found is not None else None
