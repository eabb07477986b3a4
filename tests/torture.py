# SPDX-License-Identifier: GPL-2.0-or-later
"""Torture: random counters come and go while a load runs that checks its own results.

The draw is seeded; what the load does meanwhile is not. `tests/stress/run_torture.py` is the long
version, for every kernel and boot mode.
"""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from guest import Text, read_text, shell, target

import kernweave
from kernweave.driver.link import Link
from kernweave.driver.records import ExitStatus
from kernweave.errors import KernweaveError, RefusedError
from kernweave.lab.machine import Lab
from kernweave.model.plan import Tactic
from kernweave.session.attach import Amend
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from poison import GLOBS
from stress_ng import STRESSORS, stress_ng

OK = "ok"
MOST_POINTS = 5000
MOST_TRAPS = 100  # each takes the kernel 5 ms to arm
MOST_ATTACHED = 3
LEAST_ROUNDS = 5  # however long they take
JUMPS = tuple(tactic.value for tactic in Tactic if tactic is not Tactic.INT3)
TRAPS = (Tactic.NOP5.value, Tactic.JMP32.value, Tactic.INT3.value)
_TRAP_SHARE = 1 / 6  # of the requests, which may then trap
_HOT_SHARE = 1 / 2  # of the requests, which are drawn from what the load runs through
_STRESSORS = 3  # at a time
_SHIFT_S = 12
_ENDING_S = 120.0  # for a shift to end after its time
_CPU_BUGS = "/sys/devices/system/cpu/vulnerabilities"
_PREEMPT = "/sys/kernel/debug/sched/preempt"


# ---- how the kernel is booted ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to boot.

    Attributes:
        minutes: of torture, unless told.
        args: added to the kernel's command line.
        file: of the guest, which tells whether the kernel does what the arguments ask for.
        sign: regular expression found there if so.
        cpu: to emulate instead of the usual one, for what the kernel does only where it must.
    """

    minutes: float
    args: tuple[str, ...]
    file: str
    sign: str
    cpu: str = ""


_ZEN2 = "max,vendor=AuthenticAMD,family=23,model=49,stepping=0"
_SKYLAKE = "max,vendor=GenuineIntel,family=6,model=85,stepping=4"

MODES = {
    "voluntary": Mode(10, (), _PREEMPT, r"\(voluntary\)"),
    "full": Mode(10, ("preempt=full",), _PREEMPT, r"\(full\)"),
    "mitigations-off": Mode(2, ("mitigations=off",), f"{_CPU_BUGS}/spectre_v2", "^Vulnerable"),
    # without the second argument another kind of thunk takes the place of this one
    "unret": Mode(
        2, ("retbleed=unret", "spec_rstack_overflow=off"),
        f"{_CPU_BUGS}/retbleed", "untrained return thunk", _ZEN2,
    ),
    "retpoline": Mode(2, ("spectre_v2=retpoline",), f"{_CPU_BUGS}/spectre_v2", "Retpolines"),
    "stuff": Mode(2, ("retbleed=stuff",), f"{_CPU_BUGS}/retbleed", "Stuffing", _SKYLAKE),
}  # fmt: skip


class ModeError(KernweaveError):
    """The kernel does not know, or does not do, what a mode asks for."""


@contextmanager
def booted(series: str, name: str, kernel_args: tuple[str, ...] = ()) -> Iterator[Lab]:
    """A lab in a mode, gone afterwards.

    Args:
        series: of the kernel.
        name: of the mode.
        kernel_args: added to the mode's own.

    Raises:
        ModeError: the kernel runs in another mode.
    """
    mode = MODES[name]
    lab = Lab(f"torture-{os.getpid()}", kernel=series)
    lab.down()
    try:
        lab.up(
            kmod=driver_kmod(series, print),
            kernel_args=(*mode.args, *kernel_args),
            qemu_args=("-cpu", mode.cpu) if mode.cpu else (),
            progress=print,
        )
        with lab.connect() as link:
            said = shell(link, f"cat {mode.file} || true").strip()
        if not re.search(mode.sign, said):
            raise ModeError(f"kernel {series} is not in mode {name}: {mode.file} says {said!r}")
        yield lab
    finally:
        lab.down()


# ---- where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Every instruction that a draw may hit.

    Attributes:
        names: of the functions, as in points.
        function: int32[n], row of each instruction in `names`.
        off: uint32[n], bytes from its function's start.
        hot: int64[k], rows of instructions in functions that the load runs through.
    """

    names: Sequence[str]
    function: npt.NDArray[np.int32]
    off: npt.NDArray[np.uint32]
    hot: npt.NDArray[np.int64]


def find_places(session: Session) -> Places:
    """All instructions of the kernel and its kmods."""
    functions, insns = session.functions.columns(), session.instructions.columns()
    names = [str(name) for name in functions["name"]]
    function = insns["function"]
    off = (insns["addr"] - functions["addr"][function]).astype(np.uint32)
    wanted = re.compile("|".join(fnmatch.translate(glob) for glob in GLOBS))
    is_hot = np.array([wanted.match(name) is not None for name in names])
    return Places(names, function, off, np.flatnonzero(is_hot[function]))


@dataclass(frozen=True, slots=True)
class Request:
    """What one round asks for."""

    points: tuple[str, ...]
    tactics: tuple[str, ...]


class Draw:
    """The seeded source of all that is random here."""

    def __init__(self, places: Places, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self._places = places
        self._all = np.arange(len(places.off))

    def request(self) -> Request:
        """Some points, fewer if they may trap; small numbers are as usual as large ones."""
        chance, places = self.chance, self._places
        traps = chance.random() < _TRAP_SHARE
        pool = places.hot if chance.random() < _HOT_SHARE else self._all
        most = min(MOST_TRAPS if traps else MOST_POINTS, len(pool))
        count = 1 + int((most - 1) * chance.random() ** 2)
        rows = np.unique(pool[chance.integers(len(pool), size=count)])
        functions, offs = places.function[rows].tolist(), places.off[rows].tolist()
        points = (f"{places.names[row]}+{off:#x}" for row, off in zip(functions, offs, strict=True))
        return Request(tuple(points), TRAPS if traps else JUMPS)


# ---- rounds ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the rounds did so far."""

    rounds: int = 0
    placed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    missed: int = 0
    unrestored: list[str] = field(default_factory=list)


class Load:
    """stress-ng in a session of its own, every few seconds with some other stressors.

    Never with all of them: many tasks on two CPUs make a grace period take half a minute.
    """

    def __init__(self, link: Link, seed: int, seconds: float) -> None:
        self._link = link
        self._chance = np.random.default_rng((seed, 1))
        self._seconds = seconds
        self._end: float | None = None
        self._running = False
        self._deadline = 0.0
        self.shifts: list[str] = []
        self.problems: list[str] = []

    def running(self, needed: bool = False) -> bool:
        """Take what it wrote, start the next shift; whether there is one.

        Args:
            needed: go on, even if time is up.

        Raises:
            TimeoutError: a shift should have ended long since.
        """
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        if self._running:
            self._follow()
        if not self._running and (needed or time.monotonic() < self._end):
            self._start()
        return self._running

    def _start(self) -> None:
        names = self._chance.choice(list(STRESSORS), _STRESSORS, replace=False).tolist()
        argv, env = stress_ng(_SHIFT_S, names)
        self._link.exec_start(argv, env=env, cwd="/", fresh=not self.shifts)
        self.shifts.append(", ".join(names))
        self._output = ""
        self._running = True
        self._deadline = time.monotonic() + _SHIFT_S + _ENDING_S

    def _follow(self) -> None:
        try:
            for _, data in self._link.exec_events(0.0):
                if isinstance(data, ExitStatus):
                    self._running = False
                    self.problems += judge_shift(self.shifts[-1], data.exit, self._output)
                else:
                    self._output += data.decode(errors="replace")
        except TimeoutError:
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"the load does not end: {self.shifts[-1]}") from None


def judge_shift(names: str, status: int, output: str) -> list[str]:
    """What is wrong with how a shift of the load ended, by its own checks."""
    if status == 0 and "successful run completed" in output:
        return []
    words = "; ".join(output.strip().splitlines()[-4:])
    return [f"the load ({names}) ended with {status}: {words}"]


@dataclass(frozen=True)
class Game:
    """What a torture is played with."""

    lab: Lab
    session: Session
    load: Load
    seed: int
    tally: Tally


Play = Callable[[Game], None]


def play_splices(game: Game, amend: Amend | None = None) -> None:
    """Attach and detach, several attachments side by side, as long as the load runs.

    Args:
        game: what to play with.
        amend: changes every plan; seeds a fault.
    """
    session, load, tally = game.session, game.load, game.tally
    draw = Draw(find_places(session), game.seed)
    chance = draw.chance
    attached: list[Attachment] = []
    while load.running(needed=tally.rounds < LEAST_ROUNDS):
        if attached and (len(attached) == MOST_ATTACHED or chance.random() < 0.5):
            _detach(attached.pop(int(chance.integers(len(attached)))), tally)
            continue
        tally.rounds += 1
        request = draw.request()
        try:
            attached.append(
                session.splice(*request.points, partial=True, tactics=request.tactics, amend=amend)
            )
        except RefusedError as error:
            tally.refused.update(reason.value for _, reason, _ in error.refused)
    while attached:
        _detach(attached.pop(), tally)


def _detach(attachment: Attachment, tally: Tally) -> None:
    attachment.detach()
    tally.placed.update(attachment.tactics())
    tally.refused.update(one.reason.value for one in attachment.refused)
    tally.hits += int(attachment.hits().sum())
    tally.missed += int(attachment.missed().sum())
    tally.unrestored += [f"{addr:#x}" for addr in attachment.unrestored]
    if not attachment.text_restored and not attachment.unrestored:
        tally.unrestored.append(f"text of round {tally.rounds}")


# ---- the verdict -------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """What is left when a torture is over: both texts, what the kernel and the load complain of."""

    before: Text
    after: Text
    trouble: Sequence[str]
    load: Sequence[str]


def find_problems(tally: Tally, end: End) -> list[str]:
    """Everything that is not as it should be, in a line each."""
    found = []
    if tally.unrestored:
        found.append(f"not restored: {', '.join(tally.unrestored[:8])}")
    changed = end.before.changed(end.after)
    if changed:
        found.append(f"{len(changed)} bytes of text differ: {', '.join(changed[:8])}")
    if end.trouble:
        found.append(f"the kernel complains: {'; '.join(end.trouble[:4])}")
    found += end.load
    if not (tally.rounds and tally.placed.total() and tally.hits):
        found.append(
            f"{tally.rounds} rounds, {tally.placed.total()} points, {tally.hits} hits prove nothing"
        )
    return found


def torture(lab: Lab, seed: int, seconds: int, tally: Tally, play: Play | None = None) -> list[str]:
    """Torture a lab for so long.

    Args:
        lab: with the driver; nobody else changes its text.
        seed: of the draw.
        seconds: that the load runs.
        tally: receives what was done, as it is done.
        play: what is done meanwhile; None: counters are spliced in.

    Returns:
        What is wrong; nothing if all is well.

    Raises:
        KernweaveError: the kernel died or the driver refused.
        TimeoutError: the load does not end.
    """
    before = read_text(lab)
    at_boot = len(lab.trouble())  # the kernel warns of some mitigations
    with lab.connect() as link:
        with kernweave.connect(target(lab), progress=print) as session:
            load = Load(link, seed, seconds)
            (play or play_splices)(Game(lab, session, load, seed, tally))
        end = End(before, read_text(lab), lab.trouble()[at_boot:], load.problems)
    return find_problems(tally, end)


def describe_death(lab: Lab, error: Exception) -> str:
    """Why a torture ended before its time, with the first of the kernel's last words."""
    notes = error.notes if isinstance(error, KernweaveError) else ()
    words = [line.strip() for line in (*notes[:8], *lab.trouble()[:4])]
    return "; ".join([f"{type(error).__name__}: {str(error).splitlines()[0]}", *words])
