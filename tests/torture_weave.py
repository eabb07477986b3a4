# SPDX-License-Identifier: GPL-2.0-or-later
"""Torture of weaving: random scopes come and go under load, while others patch the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from guest import CSRC, ENV, program, shell

from kernweave.driver.records import ExitStatus
from kernweave.lab.build import build_kmod
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_kernel
from kernweave.session.attach import overwrite_dead
from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.session.woven import poison_counters
from kernweave.weave.counters import (
    make_counters,
    select_blocks,
    select_calls,
    select_edges,
    select_insns,
    select_loads,
    select_returns,
    select_stores,
)
from kernweave.weave.scope import find_scope
from torture import Game, Load, Tally

Mask = npt.NDArray[np.bool_]

MOST_FUNCTIONS = 5000
MOST_LIVE = 2
LEAST_ROUNDS = 5
_ENDING_S = 120.0
_SELECTS = (select_blocks, select_edges, select_insns, select_calls, select_loads, select_stores,
            select_returns)  # fmt: skip
_STOP = "/tmp/kernweave-torture-over"
#: static keys, static calls, tracepoints, ftrace, kprobes and a kmod, again and again
_PATCHES = f"""
cd /sys/kernel/tracing
while [ ! -e {_STOP} ]; do
    for on in 1 0; do
        echo $on > /proc/sys/kernel/sched_schedstats
        echo $on > events/sched/enable
        echo $on > events/kmem/enable
        sleep 0.2
    done
    "$KMODCTL" load "$KMOD"
    echo 'p:kw_torture vfs_read+0' > kprobe_events
    sleep 0.2
    echo 1 > events/kprobes/enable
    echo 1 > /sys/module/kw_subject/parameters/work
    sleep 0.2
    echo 0 > events/kprobes/enable
    echo > kprobe_events
    "$KMODCTL" unload kw_subject
    sleep 0.2
done > /dev/null
"""


class Scopes:
    """The seeded source of what is woven."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)

    def asked(self, taken: Mask) -> Mask:
        """bool[f]: some functions that are not taken; few are as usual as many."""
        free = np.flatnonzero(~taken)
        number = 1 + int((MOST_FUNCTIONS - 1) * self.chance.random() ** 2)
        asked = np.zeros(len(taken), bool)
        asked[self.chance.choice(free, min(number, len(free)), replace=False)] = True
        return asked


def play_weaves(game: Game, *, poison: bool = False) -> None:
    """Enter and leave, two generations side by side, as long as the load runs."""
    game.session.view.refresh()
    game.session.weaver.prepare()
    with patching(game.lab):
        _play(game.session, game.load, game.tally, Scopes(game.seed), poison=poison)


def _play(session: Session, load: Load, tally: Tally, scopes: Scopes, *, poison: bool) -> None:
    lives: list[Live] = []
    while load.running(needed=tally.rounds < LEAST_ROUNDS):
        if lives and (len(lives) == MOST_LIVE or scopes.chance.random() < 0.5):
            _leave(lives.pop(int(scopes.chance.integers(len(lives)))), tally)
            continue
        tally.rounds += 1
        live = _enter(session, scopes, lives, poison=poison)
        if live is None:
            tally.refused["changed"] += 1
        else:
            lives.append(live)
    while lives:
        _leave(lives.pop(), tally)


def _enter(session: Session, scopes: Scopes, lives: list[Live], *, poison: bool) -> Live | None:
    session.view.refresh()
    source = session.analysis.source()
    taken = np.zeros(len(source.tables.functions.addr), bool)
    for live in lives:
        taken |= live.woven.scope.woven
    scope = find_scope(source, session.weaver.rules, scopes.asked(taken))
    while not scope.woven.any():
        scope = find_scope(source, session.weaver.rules, scopes.asked(taken))
    found = [select(source, scope) for select in _SELECTS if scopes.chance.random() < 0.5]
    insn = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found)])
    place = np.concatenate([np.zeros(0, np.uint8), *(places for _, places in found)])
    counters, _ = make_counters(source, scope, insn, place)
    if poison and len(counters.insn):
        counters = poison_counters(source, scope, counters, overwrite_dead)
    return session.weaver.enter(source, scope, counters)


def _leave(live: Live, tally: Tally) -> None:
    left = live.leave()
    tally.placed["clone"] += len(live.counters.insn)
    tally.hits += int(live.hits().sum())
    tally.refused["closed"] += int(left.closed.sum())
    tally.unrestored += [f"{addr:#x}" for addr in left.stuck]
    if left.visitors:
        tally.unrestored.append(f"tasks in clones of round {tally.rounds}: {left.stops}")
    if not left.stuck and not left.visitors:
        live.free()


@contextmanager
def patching(lab: Lab) -> Iterator[None]:
    """Others patch the kernel's text meanwhile.

    Raises:
        AssertionError: at the end, if they complained.
    """
    kmod = build_kmod(fetch_kernel(lab.series, print), CSRC / "subject", progress=print)
    env = {**ENV, "KMODCTL": program("kmodctl"), "KMOD": str(kmod)}
    words = bytearray()
    with lab.connect() as link, lab.connect() as other:
        link.exec_start(["sh", "-c", f"rm -f {_STOP}; {_PATCHES}"], env=env, cwd="/", fresh=True)
        try:
            yield
        finally:
            shell(other, f"touch {_STOP}")
            for _, data in link.exec_events(_ENDING_S):
                if not isinstance(data, ExitStatus):
                    words += data
        assert not words, words.decode()
