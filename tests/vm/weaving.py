# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of weaving share: functions drawn by chance, and everything in them counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.weave.counters import make_counters
from kernweave.weave.scope import find_scope
from kernweave.weave.source import Source
from woven import Select

Mask = npt.NDArray[np.bool_]


def prepared(session: Session) -> Source:
    """The running kernel's text; what others patch in it is mirrored from now on."""
    session.view.refresh()
    session.weaver.prepare()
    session.view.refresh()
    return session.analysis.source()


def functions_that_run(session: Session, command: list[str], least: int) -> npt.NDArray[np.uint64]:
    """uint64[n]: functions of the kernel that a command enters so often, by name."""
    with session.count("vmlinux:*", partial=True, tactics=["nop5"]) as hits:
        session.run(command, check=True, capture=True)
    pairs = zip(hits.placed, hits.hits(), strict=True)
    ran = sorted({point.function for point, n in pairs if n >= least})
    find = session.view.images[0].find
    return np.array([addr for name in ran for addr in find(name)], np.uint64)


def draw(source: Source, number: int, seed: int) -> Mask:
    """bool[f]: some functions, drawn by chance; at most all."""
    count = len(source.tables.functions.addr)
    return np.random.default_rng(seed).permutation(count) < number


def load(session: Session, source: Source, asked: Mask, selects: Sequence[Select]) -> Live:
    """Clones of some functions; nothing leads to them yet.

    Args:
        session: with the kernel.
        source: as `prepared` gave it.
        asked: bool[f], which functions.
        selects: what is counted.
    """
    scope = find_scope(source, asked=asked)
    found = [select(source, scope) for select in selects]
    insn = np.concatenate([rows for rows, _ in found])
    counters, _ = make_counters(source, scope, insn, np.concatenate([at for _, at in found]))
    return session.weaver.load(source, scope, counters)
