# SPDX-License-Identifier: GPL-2.0-or-later
"""Points that are counted, however that is done: their numbers as rows and columns."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kernweave.model.plan import Point, Refused

COUNT_SCHEMA = "kernweave.count/1"


@dataclass(frozen=True, slots=True)
class Count:
    """One placed point and its hits: the fields of kernweave.count/1."""

    schema: str
    point: str
    kmod: str | None
    function: str
    offset: int
    addr: str
    to_addr: str | None
    kind: str
    hits: int
    missed: int
    exact: bool
    engine: str
    tactic: str


class Counts(ABC):
    """Counters of one `Session.count`; leaving its with block takes them out.

    Attributes:
        refused: points that are not counted, and why.
        unrestored: addresses that are not native again after `detach`.
        text_restored: whether all text was read again after `detach`, and is native.
        in_flight: tasks that are inside of what was put in, and will count nothing any more.
    """

    def __init__(self, points: tuple[Point, ...], refused: tuple[Refused, ...]) -> None:
        """Start the clock."""
        self.placed = points
        self.refused = refused
        self.unrestored: tuple[int, ...] = ()
        self.text_restored = False
        self.in_flight = 0
        self._began_ns = time.monotonic_ns()
        self._duration_ns: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the counters are still in the kernel."""

    @abstractmethod
    def detach(self) -> None:
        """Take the counters out and read them for the last time; idempotent."""

    @abstractmethod
    def hits(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: hits of each placed point; still rising while attached."""

    @abstractmethod
    def missed(self) -> npt.NDArray[np.uint64]:
        """uint64[m]: arrivals at each placed point that could not be counted; known at detach."""

    @abstractmethod
    def exact(self) -> npt.NDArray[np.bool_]:
        """bool[m]: whether each count is final and complete."""

    @property
    @abstractmethod
    def evicted(self) -> int:
        """Sites given back to others while they were counted."""

    @property
    @abstractmethod
    def tactic_of(self) -> Sequence[str]:
        """The tactic of each placed point."""

    @property
    @abstractmethod
    def engine_of(self) -> Sequence[str]:
        """The engine of each placed point: `splice` or `weave`."""

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from the end of commit to the start of detach, or until now."""
        if self._duration_ns is not None:
            return self._duration_ns
        return time.monotonic_ns() - self._began_ns

    def tactics(self) -> dict[str, int]:
        """Number of points per tactic, the most frequent first."""
        return dict(Tally(self.tactic_of).most_common())

    def rows(self) -> list[Count]:
        """One `Count` per placed point, in the order asked for."""
        columns = (self.hits().tolist(), self.missed().tolist(), self.exact().tolist())
        return [
            Count(
                schema=COUNT_SCHEMA,
                point=point.text,
                kmod=point.kmod,
                function=point.function,
                offset=point.offset,
                addr=f"{point.addr:#x}",
                to_addr=None if point.to_addr is None else f"{point.to_addr:#x}",
                kind=point.kind.value,
                hits=hits,
                missed=missed,
                exact=exact,
                engine=engine,
                tactic=tactic,
            )
            for point, engine, tactic, hits, missed, exact in zip(
                self.placed, self.engine_of, self.tactic_of, *columns, strict=True
            )
        ]

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The same as one numpy array per field; strings are objects."""
        rows = self.rows()
        numbers = {"offset": np.int64, "hits": np.uint64, "missed": np.uint64, "exact": np.bool_}
        return {
            name: np.array([getattr(row, name) for row in rows], numbers.get(name, object))
            for name in Count.__slots__
            if name != "schema"
        }

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{row.hits:,}</td><td>{row.point}</td><td>{row.tactic}</td></tr>"
            for row in sorted(self.rows(), key=lambda row: -row.hits)[:30]
        )
        return f"<table><tr><th>hits</th><th>point</th><th>tactic</th></tr>{body}</table>"
