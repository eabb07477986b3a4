# SPDX-License-Identifier: GPL-2.0-or-later
"""Which engine counts what: jumps where they fit everywhere, clones elsewhere, never both."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from kernweave.errors import Reason, UsageError
from kernweave.model.plan import Point, Refused, Tactic
from kernweave.model.point import Kind
from kernweave.session.counts import Counts
from kernweave.session.engines import BothCounts, Joint, choose_woven, find_engine, lacks_jump

JUMP, TRAP, EDGE = Tactic.JMP32, Tactic.INT3, Reason.EDGE
Mask = npt.NDArray[np.bool_]


def point(i: int) -> Point:
    return Point(f"f{i}", f"f{i}", None, 0, 0x1000 + i, Kind.INSN)


def decided(functions: list[int], tactics: Sequence[Tactic | Reason | None]) -> Any:
    """The verdict on one point per function named; None is a refusal, `EDGE` that of an edge."""
    parts = [SimpleNamespace(group=0x1000 * one) for one in range(10)]
    count = len(functions)
    code = SimpleNamespace(parts=parts, part=np.array(functions))
    resolved = SimpleNamespace(
        code=code,
        rows=np.arange(count),
        edges=np.array([tactic is EDGE for tactic in tactics]),
        refused=(),
        point=point,
    )
    tactics = [None if tactic is EDGE else tactic for tactic in tactics]
    return SimpleNamespace(
        resolved=resolved,
        back=np.arange(count),
        placement=SimpleNamespace(tactic=np.array(tactics, object)),
        placed=np.array([tactic is not None for tactic in tactics]),
        refused=lambda i: Refused(f"f{i}", Reason.TOO_SHORT, "no room"),
    )


def clonable(placed: list[bool], complete: list[bool] | None = None) -> Any:
    return SimpleNamespace(
        placed=np.array(placed),
        complete=np.array(placed if complete is None else complete),
        refused=lambda i: Refused(f"f{i}", Reason.NO_CLONE, "no clone"),
    )


@pytest.mark.parametrize(
    ("functions", "tactics", "can", "woven"),
    [
        ([1, 2], [JUMP, JUMP], [True, True], [False, False]),
        ([1, 2], [JUMP, TRAP], [True, True], [False, True]),
        ([1, 1, 2], [JUMP, TRAP, JUMP], [True, True, True], [True, True, False]),
        ([1, 1], [JUMP, TRAP], [False, True], [False, False]),  # one cannot be counted there
        ([1, 2], [None, JUMP], [True, False], [True, False]),
        ([1, 2], [None, TRAP], [False, True], [False, True]),
        ([1, 2], [EDGE, JUMP], [True, True], [True, False]),
        ([1, 1, 1], [EDGE, EDGE, JUMP], [True, False, True], [True, True, True]),
        ([1, 1], [EDGE, JUMP], [False, True], [False, False]),
    ],
)
def test_functions_where_a_jump_does_not_fit_everywhere_are_woven(
    functions: list[int], tactics: list[Tactic | Reason | None], can: list[bool], woven: list[bool]
) -> None:
    found = choose_woven(decided(functions, tactics), clonable(can))
    assert found.tolist() == woven


def test_functions_in_which_a_count_would_not_be_complete_are_spliced() -> None:
    decision = decided([1, 1, 2], [JUMP, TRAP, TRAP])
    found = choose_woven(decision, clonable([True, True, True], [True, False, True]))
    assert found.tolist() == [False, False, True]


def test_traps_and_refusals_lack_a_jump() -> None:
    assert lacks_jump(decided([1, 2, 3], [JUMP, TRAP, None])).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("engine", "tactics", "found"),
    [
        ("auto", None, "auto"),
        ("weave", None, "weave"),
        ("auto", ["clone"], "weave"),
        ("weave", ["clone"], "weave"),
        ("auto", ["jmp32"], "splice"),
        ("splice", ["int3", "jmp32"], "splice"),
        ("auto", ["jmp32", "clone"], "auto"),
    ],
)
def test_tactics_tell_the_engine(engine: str, tactics: list[str] | None, found: str) -> None:
    assert find_engine(engine, tactics) == found


@pytest.mark.parametrize(
    ("engine", "tactics"),
    [("weave", ["jmp32"]), ("splice", ["clone"]), ("weave", ["jmp32", "clone"]), ("fly", None)],
)
def test_engine_and_tactics_that_contradict_are_an_error(
    engine: str, tactics: list[str] | None
) -> None:
    with pytest.raises(UsageError):
        find_engine(engine, tactics)


class Fixed(Counts):
    """Counts that are known."""

    def __init__(self, numbers: list[int], engine: str, inside: int = 0) -> None:
        super().__init__(tuple(map(point, numbers)), ())
        self._engine, self._numbers, self._inside, self._over = engine, numbers, inside, False

    @property
    def attached(self) -> bool:
        return not self._over

    def detach(self) -> None:
        self._over = self.text_restored = True
        self.in_flight = self._inside

    def hits(self) -> npt.NDArray[np.uint64]:
        return np.array(self._numbers, np.uint64) * np.uint64(10)

    def missed(self) -> npt.NDArray[np.uint64]:
        return np.array(self._numbers, np.uint64)

    def exact(self) -> Mask:
        return np.full(len(self._numbers), self._engine == "weave")

    @property
    def evicted(self) -> int:
        return len(self._numbers)

    @property
    def tactic_of(self) -> list[str]:
        return [self._engine] * len(self._numbers)

    @property
    def engine_of(self) -> list[str]:
        return [self._engine] * len(self._numbers)


def test_numbers_of_both_engines_come_in_the_order_asked_for() -> None:
    decision = decided([0, 1, 2, 3, 4], [JUMP, TRAP, None, TRAP, JUMP])
    can = clonable([True, True, False, True, True])
    joint = Joint(cast(Any, decision), can, np.array([False, True, False, True, False]))
    both = BothCounts([Fixed([1, 3], "weave", inside=2), Fixed([0, 4], "splice")], joint)
    assert [one.text for one in both.placed] == ["f0", "f1", "f3", "f4"]
    assert [one.point for one in both.refused] == ["f2"]
    assert both.attached
    both.detach()
    assert not both.attached and both.text_restored and both.in_flight == 2
    rows = both.rows()
    assert [row.hits for row in rows] == [0, 10, 30, 40]
    assert [row.missed for row in rows] == [0, 1, 3, 4]
    assert [row.engine for row in rows] == ["splice", "weave", "weave", "splice"]
    assert [row.exact for row in rows] == [False, True, True, False]
    assert both.evicted == 4


def test_what_is_woven_alone_is_told_with_what_is_refused() -> None:
    decision = decided([0, 1], [None, TRAP])
    joint = Joint(cast(Any, decision), clonable([False, True]), np.array([False, True]))
    both = BothCounts([Fixed([1], "weave")], joint)
    assert [row.hits for row in both.rows()] == [10]
    assert [one.point for one in both.refused] == ["f0"]


def test_what_a_woven_function_has_no_clone_of_is_refused_for_that_reason() -> None:
    decision = decided([1, 1, 1, 2], [EDGE, EDGE, JUMP, EDGE])
    can = clonable([True, False, False, False])
    joint = Joint(cast(Any, decision), can, choose_woven(decision, can))
    assert joint.woven.tolist() == joint.placed.tolist() == [True, False, False, False]
    assert not joint.spliced.any()
    assert [(one.point, one.reason) for one in joint.all_refused()] == [
        (name, Reason.NO_CLONE) for name in ("f1", "f2", "f3")
    ]
