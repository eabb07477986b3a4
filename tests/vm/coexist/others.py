# SPDX-License-Identifier: GPL-2.0-or-later
"""Other users of a function's entry or of its instructions: tracers, kprobes, BPF programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from guest import TRACING, program
from guest import shell as fresh_shell

from kernweave.driver.link import Link

EVENT = f"{TRACING}/events/timer/itimer_state/enable"
PREEMPT = "/sys/kernel/debug/sched/preempt"
OPTIMIZE = "/proc/sys/debug/kprobes-optimization"
TRAPS_ARMED = "/sys/kernel/debug/kprobes/enabled"


def shell(link: Link, script: str) -> str:
    """Standard output of a script that must succeed, from what the guest has cached."""
    return fresh_shell(link, script, fresh=False)


class Other(Protocol):
    """Somebody who counts the calls of one function."""

    def attach(self, link: Link) -> None:
        """Come; from now on every call counts."""

    def hits(self, link: Link) -> int:
        """Calls so far."""

    def detach(self, link: Link) -> None:
        """Go; idempotent."""


@dataclass(frozen=True)
class Tracer:
    """The function tracer or the function-graph tracer, of one function or of more."""

    function: str
    kind: str
    filters: str = ""

    def attach(self, link: Link) -> None:
        shell(
            link,
            f"""cd {TRACING}
            echo > trace
            echo '{self.filters or self.function}' > set_ftrace_filter
            echo {self.kind} > current_tracer""",
        )

    def hits(self, link: Link) -> int:
        shape = f"{self.function} <-" if self.kind == "function" else f"{self.function}()"
        return int(shell(link, f"grep -c '{shape}' {TRACING}/trace || true"))

    def detach(self, link: Link) -> None:
        shell(link, f"cd {TRACING}; echo nop > current_tracer; echo > set_ftrace_filter")


@dataclass(frozen=True)
class Kprobes:
    """Kprobes of trace events, as `perf probe` makes them: some offsets of one function."""

    function: str
    offsets: Sequence[int] = (0,)
    is_return: bool = False

    def _name(self, offset: int) -> str:
        return f"{'r' if self.is_return else 'p'}_{self.function}_{offset:x}"

    def register(self, link: Link) -> None:
        """Define the events without enabling them."""
        kind = "r" if self.is_return else "p"
        lines = [f"{kind}:{self._name(at)} {self.function}+{at}" for at in self.offsets]
        shell(
            link, "\n".join(f"echo '{line}' >> {TRACING}/kprobe_events" for line in lines) or "true"
        )

    def enable(self, link: Link, value: int = 1) -> None:
        shell(
            link,
            f"""cd {TRACING}/events
            for e in kprobes/{"r" if self.is_return else "p"}_{self.function}_*/enable
            do [ ! -e $e ] || echo {value} > $e; done""",
        )

    def attach(self, link: Link) -> None:
        self.register(link)
        self.enable(link)

    def hits_by_offset(self, link: Link) -> dict[int, int]:
        """Hits of each event; none may have been missed."""
        found = {}
        profile = shell(link, f"cat {TRACING}/kprobe_profile")
        for at in self.offsets:
            row = re.search(rf"^\s*{self._name(at)}\s+(\d+)\s+(\d+)$", profile, re.M)
            assert row is not None, profile
            assert row[2] == "0", profile
            found[at] = int(row[1])
        return found

    def hits(self, link: Link) -> int:
        return self.hits_by_offset(link)[self.offsets[0]]

    def detach(self, link: Link) -> None:
        self.enable(link, 0)
        names = " ".join(self._name(at) for at in self.offsets)
        shell(
            link,
            f"""cd {TRACING}
            for n in {names}
            do [ ! -e events/kprobes/$n ] || echo -:kprobes/$n >> kprobe_events; done""",
        )


@dataclass(frozen=True)
class Bpf:
    """A BPF program behind a kprobe, a kretprobe, at a function's entry or at its exit."""

    function: str
    kind: str
    offset: int = 0

    @property
    def _name(self) -> str:
        return f"{self.kind}_{self.function}_{self.offset:x}"

    def attach(self, link: Link) -> None:
        shell(
            link,
            f"{program('bpfcount')} attach {self.kind} {self.function} {self.offset} {self._name}",
        )

    def hits(self, link: Link) -> int:
        return int(shell(link, f"{program('bpfcount')} read {self._name}"))

    def detach(self, link: Link) -> None:
        pinned = f"/sys/fs/bpf/{self._name}_link"
        shell(link, f"[ ! -e {pinned} ] || {program('bpfcount')} detach {self._name}")


#: who can want a function's entry, by name
ENTRY_USERS: dict[str, Callable[[str], Other]] = {
    "function": lambda function: Tracer(function, "function"),
    "function_graph": lambda function: Tracer(function, "function_graph"),
    "kprobe": lambda function: Kprobes(function),
    "kretprobe": lambda function: Kprobes(function, is_return=True),
    "bpf_kprobe": lambda function: Bpf(function, "kprobe"),
    "bpf_kretprobe": lambda function: Bpf(function, "kretprobe"),
    "bpf_fentry": lambda function: Bpf(function, "fentry"),
    "bpf_fexit": lambda function: Bpf(function, "fexit"),
}
