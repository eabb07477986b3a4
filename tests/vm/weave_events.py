# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults, warnings and stack traces in functions that are entered and left meanwhile."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from guest import CSRC, ENV, LONGEST_S, booted, kmodctl, program, shell, target, until

import kernweave
from kernweave.driver.link import Link
from kernweave.driver.records import ExitStatus
from kernweave.image.sites import contains
from kernweave.lab.build import build_kmod
from kernweave.lab.packages import fetch_kernel
from kernweave.session.generations import Live
from kernweave.session.session import Session
from kernweave.session.woven import WovenCounts
from stacks import SUFFIX, Frame, is_right, parse_stack

ODDITY = "/sys/module/kw_subject/parameters/oddity"
#: what these events run through; the copies themselves are in `lib`, which is not woven
SCOPE = ("vfs_read", "ksys_read", "read_iter_zero", "copy_*", "getname*", "do_sys_open*",
         "put_timespec64", "__x64_sys_*", "__warn*", "proc_single_show", "seq_read*",
         "stack_trace_save*", "arch_stack_walk*", "unwind_*", "vfs_write", "param_attr_store",
         "module_attr_store", "kernfs_fop_*", "fixup_exception", "ex_handler_*", "search_*",
         "sprint_*", "iterate_dir", "flush_work")  # fmt: skip
#: in these a fault, a warning and the reading of a stack happen
FAULT, WARNING, STACK = "filldir64", "__flush_work*", "proc_pid_stack"
POINTS = (*(f"{name}@blocks" for name in (*SCOPE, STACK)), f"{FAULT}@insns", f"{WARNING}@insns")
#: what is worse than a warning is on the console, still
_QUIET = "echo 0 > /sys/module/printk/parameters/ignore_loglevel; echo 4 > /proc/sys/kernel/printk"
_PAUSE_S = 0.1  # of each round, in which events happen in clones


@dataclass
class Seen:
    """What happened in clones.

    Attributes:
        rounds: how often the scope was woven.
        faults: that were fixed up.
        warnings: of the kernel.
        stacks: times the stack was asked for.
        clones: `stacks.Clones`.
    """

    rounds: int = 0
    faults: int = 0
    warnings: int = 0
    stacks: int = 0
    clones: dict[str, dict[Frame, Frame]] = field(default_factory=dict, repr=False)

    def add(self, k: Session, woven: WovenCounts, live: Live, native: list[Frame]) -> None:
        """One more round, which is over."""
        hits, sites = woven.hits(), k.view.sites
        addrs = np.array([point.addr for point in woven.placed], np.uint64)
        names = np.array([point.function for point in woven.placed])
        entry = np.array(k.view.images[0].find(STACK), np.uint64)
        fixups = contains(np.sort(sites.fixups), addrs) & (names == FAULT)
        self.rounds += 1
        self.faults += int(hits[fixups].sum())
        self.warnings += int(hits[contains(sites.bugs, addrs)].sum())
        self.stacks += int(hits[contains(entry, addrs)].sum())
        self.clones[live.kmod] = _clones(k, live, native)

    @property
    def least(self) -> int:
        """Events of the kind that happened least."""
        return min(self.faults, self.warnings, self.stacks)


@dataclass(frozen=True)
class Told:
    """What the program said in the end: its turns, and text -> times of each stack."""

    turns: int
    stacks: dict[str, int]


def events_while_scopes_come_and_go(series: str, number: int, rounds: int) -> None:
    """So many events of each kind in clones, which are woven so often; all are as natively."""
    with (
        booted(f"weave-events-{series}", kernel=series) as machine,
        machine.connect() as link,
        machine.connect() as runner,
        kernweave.connect(target(machine), progress=print) as k,
    ):
        kmod = build_kmod(fetch_kernel(series, print), CSRC / "subject", progress=print)
        assert kmodctl(link, "load", str(kmod)) == "ok"
        shell(link, _QUIET)
        before = _warn_count(link)
        output = bytearray()
        runner.exec_start([program("events"), ODDITY], env=ENV, cwd="/", fresh=True)
        until("a turn is done", lambda: b"\n\n" in _follow(runner, output))
        first = bytes(output).decode()
        native = parse_stack(first.strip())
        assert {STACK, "vfs_read", "do_syscall_64"} <= {frame.function for frame in native}
        places = _places_of_warnings(link)
        assert len(places) == 1
        seen = Seen()
        while seen.rounds < rounds or seen.least < number + seen.rounds:
            with k.weave(*POINTS, partial=True) as woven:
                live = woven.live
                _follow(runner, output)
                places |= _places_of_warnings(link)
            assert woven.text_restored and woven.in_flight == 0, woven._left
            seen.add(k, woven, live, native)
        told = _finish(runner, output, first)
        print(seen, f"{told.turns} turns, {len(told.stacks)} different stacks")
        _check_stacks(told, native, seen, number)
        assert _warn_count(link) - before == told.turns
        assert len(places) == 2 and len({place for place, _ in places}) == 1, places


def _check_stacks(told: Told, native: list[Frame], seen: Seen, number: int) -> None:
    """All are right, and so many of them were read in clones."""
    wrong = [text for text in told.stacks if not is_right(text, native, seen.clones)]
    assert not wrong, wrong
    assert sum(told.stacks.values()) == told.turns
    in_clones = sum(n for text, n in told.stacks.items() if f"{STACK}{SUFFIX}+" in text)
    # who is inside when the scope is left reads the rest of its stack natively
    assert seen.stacks >= in_clones >= max(number, seen.stacks - seen.rounds)


def _clones(k: Session, live: Live, native: list[Frame]) -> dict[Frame, Frame]:
    """What a stack has to show of each native frame whose function is woven."""
    layout, addrs = live.woven.layout, live.woven.source.tables.instructions.addr
    starts = layout.start[layout.slots.insn].astype(np.uint64) + np.uint64(live.base)
    clone_of = dict(zip(addrs[layout.slots.insn].tolist(), starts.tolist(), strict=True))
    returns, base = live.handover.returns, live.handover.native_base
    return_of = dict(zip(returns["native"].tolist(), returns["clone"].tolist(), strict=True))
    found = {}
    for frame in native:
        (addr,) = k.view.images[0].find(frame.function) or (0,)
        if addr in clone_of:
            off = return_of[addr + frame.off - base] + live.base - clone_of[addr]
            found[frame] = Frame(frame.function + SUFFIX, off, live.kmod)
    return found


def _warn_count(link: Link) -> int:
    return int(shell(link, "cat /sys/kernel/warn_count", fresh=False))


def _places_of_warnings(link: Link) -> set[tuple[str, str]]:
    """(file and line, function) of the last warnings; of clones without their distinct offsets."""
    log = shell(link, "dmesg --syslog", fresh=False)  # at once: the other way never ends
    found = re.findall(r"WARNING: CPU: \d+ PID: \d+ at (\S+) (\S+?)\+0x", log)
    assert len(found) == log.count("WARNING: ")
    return set(found)


def _follow(runner: Link, output: bytearray) -> bytearray:
    """Let the program run for a while."""
    with suppress(TimeoutError):
        for _, data in runner.exec_events(_PAUSE_S):
            assert not isinstance(data, ExitStatus), (data, bytes(output))
            output += data
    return output


def _finish(runner: Link, output: bytearray, first: str) -> Told:
    """End the program."""
    runner.signal(signal.SIGTERM)
    for _, data in runner.exec_events(LONGEST_S):
        if isinstance(data, ExitStatus):
            assert data.exit == 0, (data, bytes(output))
        else:
            output += data
    turns, *stacks = re.split(r"^(\d+) (?:turns|times)\n", output.decode(), flags=re.MULTILINE)
    assert turns == first
    times, texts = map(int, stacks[::2]), stacks[1::2]
    return Told(next(times), dict(zip(texts[1:], times, strict=True)))
