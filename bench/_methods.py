# SPDX-License-Identifier: GPL-2.0-or-later
"""Ways to count arrivals at one place: kernweave's tactics, kprobes of all kinds, BPF.

Each proves while it is measured that it counts: a probe that never fires is cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import iced_x86 as iced
from _workload import CSRC, Workload

from kernweave.errors import KernweaveError
from kernweave.lab.build import build_kmod, build_static
from kernweave.lab.packages import fetch_kernel
from kernweave.model.plan import Tactic
from kernweave.session.session import Session

FUNCTION = "vfs_read"  # one `read` of /dev/zero enters it once
_KMOD = "kw_bench_kprobe"
_WAIT_S = 20.0  # the kernel's optimizer runs some ticks and two grace periods later
_TRY_S = 5.0
_SWITCH = "/proc/sys/debug/kprobes-optimization"

#: puts one counter in while the context lasts; its value goes before the workload's command
Attach = Callable[[Workload], AbstractContextManager[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to count.

    Attributes:
        name: in tables and charts.
        point: where, printed as a point.
        attach: how.
    """

    name: str
    point: str
    attach: Attach


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that every call hits once: its place, how kernweave splices it, what that saves."""

    point: str
    offset: int
    addr: int
    tactic: str
    spills: tuple[str, ...]

    @property
    def name(self) -> str:
        """For instance `kernweave jmp32, saves flags`."""
        saved = f", saves {' and '.join(self.spills)}" if self.spills else ""
        return f"kernweave {self.tactic}{saved}"


# ---- places ------------------------------------------------------------------------------------


def candidates(workload: Workload, *points: str) -> list[Candidate]:
    """Those of the points that one call hits exactly once and that a jump can reach."""
    workload = replace(workload, rounds=1)
    jumps = [tactic.value for tactic in Tactic if tactic is not Tactic.INT3]
    with workload.session.splice(*points, partial=True, tactics=jumps) as hits:
        workload.cost()
    spills = dict(zip(hits.plan.addr.tolist(), hits.plan.spills, strict=True))
    return [
        Candidate(row.point, row.offset, addr, row.tactic, spills[addr])
        for row, addr in ((row, int(row.addr, 16)) for row in hits.rows())
        if workload.total <= row.hits < workload.total * 1.05
    ]


def optimisable(workload: Workload, found: Sequence[Candidate]) -> Candidate:
    """The first point behind the entry where kernweave saves nothing and kprobes get optimised.

    Raises:
        KernweaveError: there is none.
    """
    for one in found:
        if one.tactic != "jmp32" or one.spills or _branches(workload.session, one.addr):
            continue
        try:
            with _loaded(workload.session, [f"offset={one.offset}"], "[OPTIMIZED]", _TRY_S):
                return one
        except TimeoutError:
            continue
    raise KernweaveError(f"no kprobe in {FUNCTION} gets optimised")


def _branches(session: Session, addr: int) -> bool:
    ins = iced.Decoder(64, session.read(addr, 15), ip=addr).decode()
    return bool(ins.flow_control != iced.FlowControl.NEXT)


# ---- methods -----------------------------------------------------------------------------------


def kernweave_methods(found: Sequence[Candidate], inside: Candidate) -> list[Method]:
    """One method per tactic and set of saved things, at `inside` where that is possible."""
    chosen = {inside.name: inside}
    for one in found:
        chosen.setdefault(one.name, one)
    trap = Method("kernweave int3", inside.point, partial(_counter, inside.point, ("int3",)))
    spliced = [
        Method(name, one.point, partial(_counter, one.point, tactics_for(one.tactic)))
        for name, one in sorted(chosen.items(), key=lambda item: _order(item[1]))
    ]
    return [*spliced, trap]


def tactics_for(tactic: str) -> list[str]:
    """What to allow so that a point gets a tactic: springboards may have to be made by groups."""
    return [Tactic.GROUP, Tactic.SPRINGBOARD] if tactic == Tactic.SPRINGBOARD else [tactic]


def _order(one: Candidate) -> tuple[bool, int, str]:
    return one.tactic != "nop5", len(one.spills), one.name


def kprobe_methods(inside: Candidate, boosted: bool) -> list[Method]:
    """Every kind of kprobe; those that are not at the function's entry are at `inside`."""
    here = f"offset={inside.offset}"
    trap = "boosted" if boosted else "not boosted"
    return [
        Method("kprobe, optimised", inside.point, partial(_kprobe, [here], "[OPTIMIZED]")),
        Method("kprobe on ftrace", FUNCTION, partial(_kprobe, [], "[FTRACE]")),
        Method("kretprobe", FUNCTION, partial(_kprobe, ["at_return=1"], "[FTRACE]")),
        Method(f"kprobe int3, {trap}", inside.point, partial(_unoptimised, here)),
        Method("kprobe int3, post handler", inside.point, partial(_kprobe, [here, "post=1"], "")),
    ]


def bpf_methods() -> list[Method]:
    """A BPF program at the entry that does nothing, and one that counts in a map."""
    return [
        Method(f"BPF fentry, {what}", FUNCTION, partial(_fentry, mode))
        for mode, what in (("empty", "empty"), ("count", "counting"))
    ]


@contextmanager
def _counter(point: str, tactics: Sequence[str], workload: Workload) -> Iterator[Sequence[str]]:
    with workload.session.splice(point, tactics=tactics) as hits:
        yield ()
        _expect(point, int(hits.hits()[0]), workload)


@contextmanager
def _fentry(mode: str, workload: Workload) -> Iterator[Sequence[str]]:
    yield (str(build_static(CSRC / "fentry.c")), FUNCTION, mode)


@contextmanager
def _unoptimised(param: str, workload: Workload) -> Iterator[Sequence[str]]:
    with _no_optimiser(workload.session), _kprobe([param], "", workload) as prefix:
        yield prefix


def is_boosted(workload: Workload, inside: Candidate) -> bool:
    """Whether a kprobe without a post handler gets along without a second trap there.

    References: prepare_singlestep() in arch/x86/kernel/kprobes/core.c; not with CONFIG_PREEMPTION
    in 6.1, which PREEMPT_DYNAMIC selects.
    """
    session = workload.session
    with _no_optimiser(session), _loaded(session, [f"offset={inside.offset}"], "", _WAIT_S):
        return bool(_param(session, "boosted"))


@contextmanager
def _no_optimiser(session: Session) -> Iterator[None]:
    _write(session, _SWITCH, "0")
    try:
        yield
    finally:
        _write(session, _SWITCH, "1")


@contextmanager
def _kprobe(params: Sequence[str], flag: str, workload: Workload) -> Iterator[Sequence[str]]:
    """A kprobe that has and keeps a flag, and counts every call."""
    session = workload.session
    with _loaded(session, params, flag, _WAIT_S):
        before = _param(session, "hits")
        yield ()
        _expect(" ".join(params), _param(session, "hits") - before, workload)
        _wait_listed(session, flag, 0.0)


@contextmanager
def _loaded(session: Session, params: Sequence[str], flag: str, limit_s: float) -> Iterator[None]:
    """The kmod in csrc/kprobe, once the kernel lists its probe with exactly that flag."""
    tool, kmod = str(build_static(CSRC / "kmod.c")), probe_kmod()
    session.run([tool, "load", str(kmod), f"symbol={FUNCTION}", *params], check=True)
    try:
        _wait_listed(session, flag, limit_s)
        yield
    finally:
        session.run([tool, "unload", _KMOD], check=True)


def probe_kmod() -> Path:
    """The kmod of all kprobes, built at the first call."""
    return build_kmod(fetch_kernel("6.1"), CSRC / "kprobe")


def _wait_listed(session: Session, flag: str, limit_s: float) -> None:
    """Poll the kernel's list of kprobes until the only one in FUNCTION has that flag and no other.

    Raises:
        TimeoutError: it has not within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        listed = _cat(session, "/sys/kernel/debug/kprobes/list").splitlines()
        mine = [line.split() for line in listed if f" {FUNCTION}+" in line]
        flags = [[word for word in words if word.startswith("[")] for words in mine]
        if flags == [[flag] if flag else []]:
            return
        if time.monotonic() >= deadline:
            raise TimeoutError(f"kprobes are {listed}, not one {flag}")


def _expect(what: str, hits: int, workload: Workload) -> None:
    if hits < workload.total:
        raise KernweaveError(f"{what}: {hits} hits counted, at least {workload.total} happened")


def _param(session: Session, name: str) -> int:
    return int(_cat(session, f"/sys/module/{_KMOD}/parameters/{name}"))


def _cat(session: Session, path: str) -> str:
    return session.run(["cat", path], check=True, capture=True).stdout.decode()


def _write(session: Session, path: str, text: str) -> None:
    session.run(["sh", "-c", 'echo "$1" > "$2"', "sh", text, path], check=True)
