# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions that real kernels call where an int3 or a copy would be fatal are left alone.

Each group of names is compared with what the calls of three kernels say it has to be: it covers
each of them, and every name of it is needed by one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property

import iced_x86 as iced
import numpy as np
import pytest

from kernweave.analysis.code import Part, build_code
from kernweave.analysis.hints import find_btf
from kernweave.analysis.imagefile import FileText, load_file
from kernweave.image import denied, special
from kernweave.image.btf import Btf, Kind
from kernweave.image.sites import Addrs
from kernweave.image.vmlinuz import KernelFile, open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.x86.decode import Flow

#: only what ends in an oops, a warning or a report leads there
BROKEN = {"panic", "__stack_chk_fail", "__warn_printk", "_printk", "sev_es_terminate",
          "__ubsan_handle_out_of_bounds", "__ubsan_handle_shift_out_of_bounds",
          "static_key_enable", "kprobe_ftrace_kill"}  # fmt: skip
#: callbacks call these under their guard: the recursion bits, the counters of buffers and stacks
GUARDED = {"tracing_gen_ctx_irq_test", "trace_function", "trace_last_func_repeats",
           "ring_buffer_time_stamp", "__trace_stack", "perf_tp_event", "stack_trace_save",
           "ftrace_graph_ret_addr", "tracer_tracing_is_on", "kprobe_busy_begin",
           "kprobe_busy_end", "hash_contains_ip", "ftrace_find_rec_direct", "rht_bucket_nested",
           "function_graph_enter", "ftrace_ops_test", "__trace_graph_return",
           "fgraph_retrieve_data", "native_queued_spin_lock_slowpath",
           "__raw_callee_save___native_queued_spin_unlock"}  # fmt: skip
#: rethooks that are being freed, guests that were stopped, MSRs that are traced
RARE = {"call_rcu", "touch_softlockup_watchdog_sync", "clocksource_touch_watchdog",
        "rcu_cpu_stall_reset", "reset_hung_task_detector", "do_trace_read_msr",
        "do_trace_write_msr"}  # fmt: skip
#: of programs that sleep, which nobody puts on the way of an int3; of a task whose CPUs changed
#: meanwhile, while its count still says that it must not migrate, so once
UNGUARDED_ONCE = {"rcu_read_unlock_trace_special", "task_rq_lock", "___migrate_enable",
                  "__set_cpus_allowed_ptr_locked", "__set_cpus_allowed_ptr"}  # fmt: skip
#: called when FRED is in force, which needs no IDT
BEHIND_FRED = {"idt_invalidate", "setup_clear_cpu_cap"}
ENDS = BROKEN | GUARDED | RARE | UNGUARDED_ONCE | BEHIND_FRED

GRAPH = ("prepare_ftrace_return", "function_graph_enter_regs", "ftrace_return_to_handler")
RETHOOKS = ("arch_rethook_trampoline_callback", "rethook_trampoline_handler", "rethook_recycle")
BPF = ("__bpf_prog_enter", "__bpf_prog_exit", "__bpf_tramp_enter", "__bpf_tramp_exit")
STARTS = ("secondary_startup_64", "secondary_startup_64_no_verify", "common_startup_64")
LOADS_IDT = ("cpu_init_exception_handling", "cpu_init_secondary")
#: wakes others
KICKER = "smp_kick_mwait_play_dead"
SLEEPS = (b"\xf4", b"\x0f\x01\xc9")  # hlt, mwait


def base(name: str) -> str:
    return name.partition(".")[0]


@dataclass(frozen=True)
class Stock:
    """A kernel file and who calls whom in it."""

    kernel: KernelFile
    file: FileText
    _calls: dict[int, list[int]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[int, Part]:
        return {part.start: part for part in self.file.parts()}

    @cached_property
    def btf(self) -> Btf:
        found = find_btf(self.kernel.read, self.kernel.lookup)
        assert found is not None
        return found

    def named(self, fits: Callable[[str], bool]) -> list[int]:
        names = self.file.symbols.by_name
        return sorted({addr for name in names if fits(name) for addr in names[name]})

    def name(self, addr: int) -> str:
        return base(self.file.symbols.name_at[addr])

    def calls(self, start: int) -> list[int]:
        """Functions that one calls or jumps to, in its order: also by what memory names at boot,
        which is how paravirtual calls are made, and in alternatives."""
        if start not in self._calls:
            part = self.parts[start]
            code = build_code([part], self.file.sites)
            direct = np.isin(code.flow, (Flow.CALL, Flow.JUMP, Flow.BRANCH)) & (code.target != 0)
            targets = [
                int(code.target[row])
                if direct[row]
                else self._pointer(code.addr[row], code.raw(row))
                for row in range(len(code.addr))
            ]
            bounds = map(self.file.symbols.bounds, [*targets, *self._alternatives(part)])
            starts = dict.fromkeys(span[0] for span in bounds if span)
            self._calls[start] = [one for one in starts if one in self.parts and one != start]
        return self._calls[start]

    def _pointer(self, addr: int, raw: bytes) -> int:
        """What an indirect call through a fixed place leads to in the file, 0 if it is none."""
        if raw[:2] in (b"\xff\x15", b"\xff\x25"):
            place = int(addr) + 6 + struct.unpack("<i", raw[2:6])[0]
        elif raw[:3] in (b"\xff\x14\x25", b"\xff\x24\x25"):
            place = struct.unpack("<i", raw[3:7])[0] % (1 << 64)
        else:
            return 0
        return int.from_bytes(self.kernel.read(place, 8), "little")

    def _alternatives(self, part: Part) -> list[int]:
        table = self.file.tables.alternatives
        rows = np.flatnonzero((table.addr >= part.start) & (table.addr < part.end))
        codes = [
            iced.Decoder(64, self.kernel.read(at, size), ip=at)
            for at, size in zip(
                table.replacement[rows].tolist(),
                table.replacement_length[rows].tolist(),
                strict=True,
            )
            if size
        ]
        return [insn.near_branch_target for code in codes for insn in code]

    def denied(self) -> Callable[[int], bool]:
        """Asks for an address with the names of this moment."""
        named = special.denied_text(self.file.symbols, self.kernel.lookup)
        ranges = [*named, self.file.sites.ranges[-1]]
        return lambda addr: any(one.overlap(*_byte(addr))[0] for one in ranges)

    def reach(self, roots: Iterable[int], cut: tuple[str, ...] = ()) -> set[int]:
        """Functions that calls lead to without anything else denied between; `cut` names those
        that are left behind their call of the last of these."""
        stop = self.denied()
        seen: set[int] = set()
        todo = list(roots)
        while todo:
            addr = todo.pop()
            if addr in seen or self.name(addr) in ENDS or (addr not in roots and stop(addr)):
                continue
            seen.add(addr)
            todo += _until(self.calls(addr), self, cut)
        return {addr for addr in seen if not stop(addr)}

    def of_type(self, typedef: str) -> list[int]:
        """Functions whose prototype is that of a type of pointers to functions."""
        btf = self.btf
        rows = np.flatnonzero(btf.kind == Kind.TYPEDEF).tolist()
        (row,) = (row for row in rows if btf.type_name(row) == typedef)
        wanted = self._prototype(btf.target[btf.resolved[row]])
        return self._functions(lambda proto: self._prototype(proto) == wanted)

    def clocks(self) -> list[int]:
        """Functions without parameters that return 64 bits, and are called a sched_clock."""
        btf = self.btf
        found = self._functions(
            lambda proto: (
                btf.params.first[proto] == btf.params.first[proto + 1]
                and btf.type_name(btf.resolved[btf.target[proto]]) == "long long unsigned int"
            )
        )
        return [addr for addr in found if "sched_clock" in self.name(addr)]

    def _functions(self, fits: Callable[[int], bool]) -> list[int]:
        known = cache(fits)
        functions = self.btf.functions
        names = {
            self.btf.name(off)
            for off, proto in zip(
                functions.name_off.tolist(), functions.prototype.tolist(), strict=True
            )
            if known(proto)
        }
        return self.named(lambda name: base(name) in names)

    def _prototype(self, proto: int) -> tuple[str, ...]:
        first, last = self.btf.params.first[proto : proto + 2]
        types = (self.btf.target[proto], *self.btf.params.type_id[first:last])
        return tuple(self._type(one) for one in types)

    def _type(self, one: int) -> str:
        one = self.btf.resolved[one]
        pointed = self._type(self.btf.target[one]) if self.btf.kind[one] == Kind.PTR else None
        return self.btf.type_name(one) if pointed is None else f"{pointed}*"


def _byte(addr: int) -> tuple[Addrs, Addrs]:
    start = np.array([addr], np.uint64)
    return start, start + np.uint64(1)


def _until(calls: list[int], stock: Stock, cut: tuple[str, ...]) -> list[int]:
    """Calls up to the first that one of these names, and that one."""
    rows = [row for row, addr in enumerate(calls) if stock.name(addr) in cut]
    return calls[: rows[0] + 1] if rows else calls


@cache
def stock_of(series: str) -> Stock:
    tree = fetched_kernel(series)
    if tree is None:
        pytest.skip(f"kernel {series} was not fetched (kernweave lab up)")
    kernel = open_image(tree.vmlinuz)
    return Stock(kernel, load_file(kernel))


def tracers(stock: Stock) -> set[int]:
    """What a tracer runs without a guard when functions begin and return."""
    callbacks = stock.of_type("ftrace_func_t") + stock.of_type("trace_func_graph_ret_t")
    assert len(callbacks) >= 12
    named = stock.named(lambda name: base(name) in (*GRAPH, *RETHOOKS))
    assert len(named) >= 4
    return stock.reach([*callbacks, *named, *stock.clocks()])


def bpf_trampolines(stock: Stock) -> set[int]:
    roots = stock.named(lambda name: name.startswith(BPF) and "image" not in name)
    assert len(roots) == 12
    return {addr for addr in stock.reach(roots) if not stock.name(addr).startswith(BPF[:2])}


def ap_start(stock: Stock) -> set[int]:
    """What start_secondary() and what leads to it call until an IDT is loaded."""
    (start,) = stock.file.symbols.find("start_secondary")
    assert {stock.name(one) for one in stock.calls(start)} & set(LOADS_IDT)
    roots = [start, *stock.named(lambda name: base(name) in STARTS)]
    return stock.reach(roots, cut=LOADS_IDT)


def resume(stock: Stock) -> set[int]:
    """What restore_processor_state() calls until it has loaded an IDT, behind the gs base."""
    (start,) = stock.file.symbols.find("restore_processor_state")
    assert "native_load_idt" in {stock.name(one) for one in stock.calls(start)}
    return stock.reach([start], cut=("native_load_idt",))


def play_dead(stock: Stock) -> set[int]:
    stop = stock.denied()
    found = stock.named(lambda name: "play_dead" in name and base(name) != KICKER)
    return {addr for addr in found if not stop(addr)}


GROUPS: dict[Callable[[Stock], set[int]], set[str]] = {
    tracers: {*denied.TRACER_ENTRIES, *denied.TRACER_RETURNS},
    bpf_trampolines: {*denied.BPF_TRAMPOLINES},
    ap_start: {*denied.AP_START},
    resume: {*denied.RESUME},
    play_dead: {*denied.PLAY_DEAD},
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("series", KERNEL_SERIES)
def test_group_of_denied_functions_leaves_none_out(
    series: str, group: Callable[[Stock], set[int]]
) -> None:
    stock = stock_of(series)
    assert {stock.name(addr) for addr in group(stock)} == set()


@pytest.mark.parametrize("group", GROUPS)
def test_every_name_of_a_group_is_found_missing_by_one_kernel(
    group: Callable[[Stock], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denied, "DENIED_NAMES", denied.DENIED_NAMES - GROUPS[group])
    stocks = [stock_of(series) for series in KERNEL_SERIES]
    found = {stock.name(addr) for stock in stocks for addr in group(stock)}
    assert found == GROUPS[group]


@pytest.mark.parametrize("series", KERNEL_SERIES)
def test_no_name_with_play_dead_sleeps_outside_of_denied_text(series: str) -> None:
    stock = stock_of(series)
    found = stock.named(lambda name: "play_dead" in name and base(name) != KICKER)
    sleeping = {
        addr
        for addr in found
        if any(code in SLEEPS for code in _instructions(stock, addr))
        or any("play_dead" in stock.name(one) for one in stock.calls(addr))
    }
    stop = stock.denied()
    assert len(sleeping) >= 3 and all(map(stop, sleeping))
    assert not stop(stock.file.symbols.find(KICKER)[0])


def _instructions(stock: Stock, addr: int) -> list[bytes]:
    code = build_code([stock.parts[addr]], stock.file.sites)
    return [code.raw(row) for row in range(len(code.addr))]


@pytest.mark.parametrize("series", KERNEL_SERIES)
def test_program_entries_and_exits_of_bpf_are_denied(series: str) -> None:
    stock = stock_of(series)
    roots = stock.named(lambda name: name.startswith(BPF[:2]))
    assert len(roots) == 10 and all(map(stock.denied(), roots))
