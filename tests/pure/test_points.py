# SPDX-License-Identifier: GPL-2.0-or-later
"""Points: from words to rows of code and back; edges, loads and stores of a small function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from exec.asm import NOP5, RET, Item, call, jcc, jmp, op, program
from kernweave.analysis.code import Code, Mask, Part
from kernweave.analysis.kernel import Hints, analyse
from kernweave.errors import Reason, UsageError
from kernweave.image.sites import Sites
from kernweave.model.point import EdgeEnd, Kind, parse_point
from kernweave.session.attach import Decision, decide
from kernweave.session.counts import Counts
from kernweave.session.resolve import Resolver
from kernweave.session.resolved import Resolved
from kernweave.session.survey import Survey
from kernweave.session.woven import CLONE, find_clonable
from kernweave.splice.place import Rules
from kernweave.weave.counters import Place
from kernweave.weave.scope import Rules as WeaveRules
from kernweave.weave.source import make_source
from pure.kernels import STEP, symbols_of

ADDR = 0xFFFF_FFFF_8100_0000
F, COLD, QUITS, OTHER, OTHER_COLD = (ADDR + i * STEP for i in range(5))
ADD = bytes.fromhex("4801442408")  # add %rax,0x8(%rsp)
LOAD = bytes.fromhex("488b03")  # mov (%rbx),%rax
STORE = bytes.fromhex("488903")  # mov %rax,(%rbx)
LEA = bytes.fromhex("488d03")  # lea (%rbx),%rax
PUSH = op("PUSH_R64", "rax")

#: f: +0 nop, +5 jne f.cold, +b je +1b, +11 call, +16 jmp +0, +1b je +21, +21 call of who does not
#: return, +26 add, +2b load, +2e store, +31 lea, +34 push, +35 ret; the cold part jumps to +26
FUNCTIONS: dict[int, tuple[str, tuple[Item, ...]]] = {
    F: (
        "f",
        (
            NOP5, jcc("ne", COLD), jcc("e", "skip"), call(OTHER), jmp(F), "skip", jcc("e", "next"),
            "next", call(QUITS), "back", ADD, LOAD, STORE, LEA, PUSH, RET,
        ),
    ),
    COLD: ("f.cold", (LOAD, jcc("e", F + 0xB), jmp(F + 0x26))),
    QUITS: ("quits", (NOP5, "loop", jmp("loop"))),
    OTHER: ("twice", (NOP5, jcc("e", OTHER_COLD), RET)),
    OTHER_COLD: ("twice.cold", (jmp(OTHER + 5),)),
}  # fmt: skip
EDGES = {
    "f+0x5->+0xb": Place.BEHIND,
    "f+0x5->f.cold+0x0": Place.TAKEN,
    "f+0xb->+0x11": Place.BEHIND,
    "f+0xb->+0x1b": Place.TAKEN,
    "f+0x16->+0x0": Place.BEFORE,
    "f+0x1b->+0x21": Place.BEFORE,  # taken or not
    "f.cold+0x3->f+0xb": Place.TAKEN,
    "f.cold+0x3->+0x9": Place.BEHIND,
    "f.cold+0x9->f+0x26": Place.BEFORE,
}


class View:
    """What a resolver sees of a kernel of a few functions."""

    def __init__(self, functions: dict[int, tuple[str, tuple[Item, ...]]]) -> None:
        self.functions = functions
        self.images = [symbols_of(None, functions)]
        homes = [addr for addr, (name, _) in functions.items() if not name.endswith(".cold")]
        self.sites = Sites(ftrace=np.array(homes, np.uint64))

    def text(self, start: int) -> bytes:
        return program(start, *self.functions[start][1]).code.ljust(STEP, b"\xcc")

    def read_text(
        self, starts: npt.NDArray[np.uint64], ends: npt.NDArray[np.uint64]
    ) -> list[bytes]:
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return [self.text(start)[: end - start] for start, end in pairs]


def comes_back(code: Code) -> Mask:
    return np.asarray(code.target != QUITS)


def resolve(*points: str, functions: Any = None) -> Resolved:
    view = cast(Any, View(functions or FUNCTIONS))
    return Resolver(view, comes_back).resolve([parse_point(point) for point in points])


def texts(found: Resolved) -> list[str]:
    return [found.point(i).text for i in range(len(found.rows))]


# ---- grammar -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "offset", "to"),
    [
        ("f+0xA->+0xB", 0xA, EdgeEnd("", None, 0xB)),
        ("f+0xA->f.cold+0xB", 0xA, EdgeEnd("f.cold", None, 0xB)),
        ("f.cold+10->f+11", 0xA, EdgeEnd("f", None, 0xB)),
        ("9p:f#2+0xA->f.cold#1+0xB", 0xA, EdgeEnd("f.cold", 1, 0xB)),
        ("vfs_*+0xA->+0xB", 0xA, EdgeEnd("", None, 0xB)),
        ("f+0xA", 0xA, None),
    ],
)
def test_edge_is_an_offset_and_where_it_leads(text: str, offset: int, to: EdgeEnd | None) -> None:
    spec = parse_point(text)
    assert (spec.offset, spec.to) == (offset, to)
    assert spec.is_explicit != spec.is_glob


@pytest.mark.parametrize(
    "text",
    [
        "f->+0xB",
        "f+0xA->",
        "f+0xA->f",
        "f@edges->+0xB",
        "f+0xA->g*+0xB",
        "0xA->+0xB",
        "f+1->+2->+3",
    ],
)
def test_half_an_edge_is_no_point(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_point(text)
    assert "function+0xOFF->+0xOFF" in str(caught.value)


def test_edge_that_a_shell_cut_off_says_so() -> None:
    with pytest.raises(UsageError) as caught:
        parse_point("f+0xA-")
    assert "quote edges" in str(caught.value)


def test_selector_to_come_is_told_from_one_that_is_not() -> None:
    with pytest.raises(UsageError, match="is not there yet"):
        parse_point("f@paths")
    with pytest.raises(UsageError, match="does not exist"):
        parse_point("f@edge")


# ---- expansion -----------------------------------------------------------------------------------


def test_edges_are_those_between_blocks_of_the_function_and_its_cold_part() -> None:
    found = resolve("f@edges")
    places = dict(zip(texts(found), map(Place, found.place.tolist()), strict=True))
    assert places == EDGES
    assert found.refused == ()


def test_edge_has_the_addresses_of_both_its_ends() -> None:
    point = resolve("f.cold+0x3->f+0xb").point(0)
    assert (point.function, point.offset, point.kind) == ("f.cold", 3, Kind.EDGE)
    assert (point.addr, point.to_addr) == (COLD + 3, F + 0xB)


def test_every_printed_edge_is_accepted_as_input() -> None:
    again = resolve(*EDGES)
    assert dict(zip(texts(again), again.place.tolist(), strict=True)) == EDGES
    assert again.explicit.all()
    for text, place in EDGES.items():  # also alone
        found = resolve(text)
        assert (texts(found), found.place.tolist()) == ([text], [place])


def test_edges_of_a_glob_are_those_of_all_functions() -> None:
    assert set(EDGES) < set(texts(resolve("*@edges")))


def test_edges_of_a_cold_part_are_those_that_leave_it() -> None:
    assert set(texts(resolve("f.cold@edges"))) == {text for text in EDGES if text[:2] == "f."}


def test_edges_of_a_function_of_several_have_its_number() -> None:
    twins = {
        **FUNCTIONS,
        OTHER + 2 * STEP: ("twice", (NOP5, jcc("e", OTHER_COLD + 2 * STEP), RET)),
        OTHER_COLD + 2 * STEP: ("twice.cold", (jmp(OTHER + 2 * STEP + 5),)),
    }
    edges = [
        "twice#2+0x0->+0x5",
        "twice#2+0x5->+0xb",
        "twice#2+0x5->twice.cold#2+0x0",
        "twice.cold#2+0x0->twice#2+0x5",
    ]
    assert texts(resolve("twice#2@edges", functions=twins)) == edges
    assert texts(resolve(*edges, functions=twins)) == edges
    unnumbered = resolve("twice#2+0x5->twice.cold+0x0", functions=twins)
    assert texts(unnumbered) == edges[2:3]


@pytest.mark.parametrize(
    ("point", "reason", "detail"),
    [
        ("f+0x5->+0x11", Reason.NO_EDGE, "edges from there: +0x5->+0xb, +0x5->f.cold+0x0"),
        ("f+0x26->+0x2b", Reason.NO_EDGE, "no edge inside the function leaves +0x26"),
        ("f+0x21->+0x26", Reason.NO_EDGE, "no edge inside the function leaves +0x21"),
        ("f+0x5->quits+0x0", Reason.NO_EDGE, "quits is no part of the function of f"),
        ("f+0x6->+0xb", Reason.NOT_BOUNDARY, "starts at +0x5"),
        ("f+0x5->+0xc", Reason.NOT_BOUNDARY, "starts at +0xb"),
        ("g+0x5->+0xc", Reason.NO_SUCH_NAME, "no function g"),
    ],
)
def test_edge_that_is_none_is_refused(point: str, reason: Reason, detail: str) -> None:
    found = resolve(point)
    (refused,) = found.refused
    assert (refused.point, refused.reason) == (point, reason)
    assert detail in refused.detail
    assert (len(found.rows), found.refused_explicit) == (0, 1)


def test_loads_and_stores_are_explicit_memory_operands() -> None:
    assert texts(resolve("f@loads")) == ["f+0x26", "f+0x2b", "f.cold+0x0"]
    assert texts(resolve("f@stores")) == ["f+0x26", "f+0x2e"]
    both = resolve("f@stores", "f@loads")
    kinds = [both.point(i).kind for i in range(len(both.rows))]
    assert kinds == [Kind.STORE] * 2 + [Kind.LOAD] * 3


# ---- engines -------------------------------------------------------------------------------------


class Known:
    """What a whole kernel tells, of one that has nothing else."""

    def live(self, code: Code) -> npt.NDArray[np.uint32]:
        return np.zeros(len(code.addr), np.uint32)

    def landing(self, code: Code) -> Mask:
        return np.zeros(len(code.addr), bool)


def spliced(*points: str) -> Decision:
    view = View(FUNCTIONS)
    return decide(resolve(*points), view.sites, Rules(translates=True), Known(), lambda: True)


def test_edges_are_not_spliced_and_in_nobodys_way() -> None:
    decision = spliced("f@edges", "f@blocks", "f@loads")
    edges = decision.resolved.edges
    assert edges.sum() == len(EDGES)
    assert not decision.placed[edges].any()
    alone = spliced("f@blocks", "f@loads")
    assert decision.placed[~edges].tolist() == alone.placed.tolist()
    refused = decision.refused(0)
    assert (refused.point, refused.reason) == ("f+0x5->+0xb", Reason.EDGE)
    assert "in a clone only" in refused.detail
    assert spliced("f@edges").placed.tolist() == [False] * len(EDGES)


def test_survey_tells_edges_apart_from_what_is_spliced() -> None:
    decision = spliced("f+0x26", "f+0xb->+0x11", "f+0x16->+0x0")
    assert Survey(decision).tally() == {"edge": 2, "jmp32": 1}
    woven = SimpleNamespace(
        placed=np.array([True, False]),
        refused=lambda i: SimpleNamespace(reason=Reason.STI_SHADOW, detail=f"edge {i}"),
    )
    survey = Survey(decision, cast(Any, woven))
    assert survey.tally() == {"jmp32": 1, CLONE: 1, "sti_shadow": 1}
    insn, taken, lost = survey
    assert (insn.tactic, insn.kind, insn.site_addr) == ("jmp32", "insn", f"{F + 0x26:#x}")
    assert (taken.tactic, taken.reason, taken.kind, taken.site_addr) == (CLONE, None, "edge", None)
    assert (lost.tactic, lost.reason, lost.detail) == (None, "sti_shadow", "edge 1")
    assert list(survey.of(Reason.EDGE)) == []


def test_edges_loads_and_stores_are_counted_in_clones() -> None:
    view = View(FUNCTIONS)
    text = b"".join(view.text(start) for start in FUNCTIONS)
    parts = [
        Part(name, name, None, start, view.text(start), group, True)
        for start, name, group in (
            (F, "f", F), (COLD, "f.cold", F), (QUITS, "quits", QUITS), (OTHER, "twice", OTHER),
            (OTHER_COLD, "twice.cold", OTHER),
        )
    ]  # fmt: skip
    tables = analyse(parts, view.sites, Hints(np.zeros(0, np.uint64), {}))
    source = make_source(tables, text, ADDR, view.sites)
    found = find_clonable(resolve("f@edges", "f@loads", "f@stores"), source, WeaveRules())
    assert found.placed.all()
    rows, counters = found.counter.tolist(), found.counters
    places = [Place(int(counters.place[row])) for row in rows]
    assert places == [*EDGES.values(), *[Place.BEFORE] * 5]
    addrs = tables.instructions.addr[counters.insn[rows]]
    code = found.resolved.code
    assert np.array_equal(addrs, code.addr[found.resolved.rows])
    assert len(set(rows)) == len(rows) - 1  # the add is a load and a store


class Fixed(Counts):
    """Counts of some points that were never hit."""

    attached, evicted = False, 0

    def detach(self) -> None: ...

    def hits(self) -> npt.NDArray[np.uint64]:
        return np.zeros(len(self.placed), np.uint64)

    missed = hits

    def exact(self) -> Mask:
        return np.ones(len(self.placed), bool)

    @property
    def tactic_of(self) -> list[str]:
        return [CLONE] * len(self.placed)

    @property
    def engine_of(self) -> list[str]:
        return ["weave"] * len(self.placed)


def test_row_of_an_edge_says_where_it_leads() -> None:
    found = resolve("f+0x5->f.cold+0x0", "f+0x26")
    edge, insn = Fixed(tuple(found.point(i) for i in range(2)), ()).rows()
    assert (edge.point, edge.kind, edge.function) == ("f+0x5->f.cold+0x0", "edge", "f")
    assert (edge.offset, edge.addr, edge.to_addr) == (5, f"{F + 5:#x}", f"{COLD:#x}")
    assert (insn.kind, insn.to_addr) == ("insn", None)
