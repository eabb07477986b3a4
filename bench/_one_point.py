# SPDX-License-Identifier: GPL-2.0-or-later
"""How long one counter takes to get in and out, and which request to the driver that time is."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from _stats import percentiles

from kernweave.driver.client import Driver
from kernweave.session.session import Session

_REQUESTS = (
    "kmods", "kprobes", "placed", "ftrace_records", "read", "read_ranges", "area", "percpu",
    "write", "seal", "commit", "undo", "states", "quiesce", "counters", "free", "forget",
)  # fmt: skip


def one_point(session: Session, point: str, runs: int) -> dict[str, Any]:
    """Attach and detach one point many times.

    Returns:
        Milliseconds: `commit` and `undo` change the text, `count` and `detach` are the whole calls,
        `round_trip` is a request that does next to nothing; `requests` is what each request takes
        per attach and detach at the median, `python` the rest of both.
    """
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        spent: dict[str, float] = defaultdict(float)
        with stopwatch(session.driver, spent):
            began = time.perf_counter()
            hits = session.count(point)
            attached = time.perf_counter()
            hits.detach()
            ended = time.perf_counter()
        spent["python"] = ended - began - sum(spent.values())
        spent["count()"], spent["detach()"] = attached - began, ended - attached
        for name, seconds in spent.items():
            parts[name].append(seconds)
    figures = {name: percentiles(values) for name, values in parts.items()}
    whole = {name: figures.pop(f"{name}()") for name in ("count", "detach")}
    slowest = sorted(figures.items(), key=lambda item: -item[1]["p50"])
    return {
        "point": point,
        "runs": runs,
        "commit": figures["commit"],
        "undo": figures["undo"],
        "round_trip": figures["placed"],
        **whole,
        "requests": {name: value["p50"] for name, value in slowest},
    }


@contextmanager
def stopwatch(driver: Driver, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every request to `spent` while the context lasts."""

    def timed(name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(request)
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return request(*args)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name in _REQUESTS:
        setattr(driver, name, timed(name, getattr(driver, name)))
    try:
        yield
    finally:
        for name in _REQUESTS:
            delattr(driver, name)
