# SPDX-License-Identifier: GPL-2.0-or-later
"""The control-flow graph against every transfer that a kernel under load was seen to make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from guest import program

import kernweave
from kernweave.analysis.kernel import KernelTables
from kernweave.image.sites import Sites
from kernweave.lab.packages import fetch_kernel
from kernweave.model.table import select
from kernweave.model.tables import EdgeKind
from kernweave.session.session import Session
from oracle.account import Account, Accountant
from oracle.cfg import Cfg, Way
from oracle.lab import SERIES, no_trouble, oracle_lab, storm
from oracle.oracle import TRANSFERS_ON, Counts
from oracle.outside import Outside
from oracle.transfers import Transfers

SEED = 20251122
#: as Debian boots it: indirect calls go through thunks, so that a pair does not tell which site
#: went where; without them every pair does (`tests/stress/test_cfg_without_thunks.py`)
THUNKS: tuple[str, ...] = ()
NO_THUNKS = ("spectre_v2=off",)

WALK = "ls -lR /etc 2>/dev/null | head -100 >/dev/null"
#: text that comes and goes: keys and calls switched, an ftrace trampoline, a kprobe
TRACE = """
echo 1 >/proc/sys/kernel/sched_schedstats
cd /sys/kernel/tracing
echo vfs_read vfs_write >set_ftrace_filter
echo function >current_tracer
echo p:middle vfs_write+{offset:#x} >kprobe_events
echo 1 >events/kprobes/enable
echo 1 >events/sched/sched_switch/enable
"""
UNTRACE = """
cd /sys/kernel/tracing
echo 0 >events/sched/sched_switch/enable
echo 0 >events/kprobes/enable
echo >kprobe_events
echo nop >current_tracer
echo >set_ftrace_filter
echo 0 >/proc/sys/kernel/sched_schedstats
"""
RESOLVE = Path(kernweave.__file__).parent / "driver" / "csrc" / "kmod" / "resolve.c"

SYNC_WAYS = (
    Way.INSIDE, Way.FALL, Way.TAKEN, Way.LABEL, Way.CALL, Way.SIBLING, Way.INDIRECT, Way.RETURN,
    Way.OPEN, Way.FORK, Way.AGAIN, Way.REWRITTEN, Way.UNLISTED,
)  # fmt: skip
EVENT_WAYS = (
    Way.ENTER, Way.LEAVE, Way.INTERRUPT, Way.FAULT, Way.BACK, Way.FIXUP, Way.SERIALIZE,
)  # fmt: skip
FEW = 200  # tasks at the time of the first user process, and then some


@dataclass(frozen=True)
class Recording:
    """A kernel, and what it was seen to do.

    Attributes:
        tables: of the kernel and its kmods, made while nothing was traced.
        sites: what the kernel rewrites.
        text: (address, bytes) of each image.
        transfers: since the first user process.
        counts: what ran since boot.
        probed: where there was a kprobe.
        pages: names of text made at run time, by page.
    """

    tables: KernelTables
    sites: Sites
    text: list[tuple[int, bytes]]
    transfers: Transfers
    counts: Counts
    probed: int
    pages: dict[int, str]

    def judge(self, tables: KernelTables) -> Accountant:
        """The rules for some other tables of the same kernel."""
        cfg = Cfg(tables, self.sites, re.findall(r'"(\w+)"', RESOLVE.read_text()))
        outside = Outside(cfg, self.counts, self.text)
        return Accountant(cfg, self.transfers, outside, [self.probed])

    @cached_property
    def right(self) -> Account:
        """What completed, by the tables as they are."""
        return self.judge(self.tables).completed()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("cfg"), THUNKS)


def record(folder: Path, args: Sequence[str]) -> Recording:
    """Boot a kernel with these arguments, load it, and keep what it did."""
    with oracle_lab("cfg", folder, kernel_args=args, options=[TRANSFERS_ON]) as machine:
        print(f"seed {SEED}")
        with (
            no_trouble(machine),
            kernweave.connect(machine.target, writer=False, progress=print) as k,
        ):
            load_kmod(k, "loop")
            tables, sites = k.tables.tables, k.view.sites
            text = read_text(k)
            probed, pages = work(k)
            with machine.stopped():
                transfers, counts = machine.oracle.transfers(), machine.oracle.snapshot()
    return Recording(tables, sites, text, transfers, counts, probed, pages)


def load_kmod(k: Session, name: str) -> None:
    (path,) = fetch_kernel(SERIES, print).modules.rglob(f"{name}.ko")
    k.run([program("kmodctl"), "load", str(path)], check=True)


def read_text(k: Session) -> list[tuple[int, bytes]]:
    starts = np.array([image.starts[0] for image in k.view.images], np.uint64)
    ends = np.array([image.end for image in k.view.images], np.uint64)
    return list(zip(starts.tolist(), k.view.read_text(starts, ends), strict=True))


def work(k: Session) -> tuple[int, dict[int, str]]:
    """The workload; the kprobed address, and names of text made meanwhile, by page."""
    k.run(["sh", "-c", WALK], check=True)
    k.run(storm(SEED, 20, spawns=4), check=True)
    k.run([program("mixed"), "1"], check=True)
    tables = k.tables.tables
    function = k.functions["vfs_write"]
    probed = int(tables.instructions.addr[tables.functions.first_insn[function.row] + 1])
    k.run(["sh", "-ec", TRACE.format(offset=probed - function.addr)], check=True)
    k.run([program("mixed"), "1"], check=True)
    symbols = k.run([program("rare"), "100"], check=True, capture=True).stdout.decode()
    k.run(["sh", "-ec", UNTRACE], check=True)
    k.run([program("mixed"), "1"], check=True)
    made = re.findall(r"^(\w+) \w (\w+)\t\[__builtin__", symbols, re.MULTILINE)
    return probed, {int(addr, 16) >> 12: name for addr, name in made}


# ---- what was recorded is in the graph ---------------------------------------------------------


def test_completed_instructions_lead_along_edges(recording: Recording) -> None:
    transfers, found = recording.transfers, recording.right
    print_ways(found)
    print_sites(recording)
    print_unlisted(recording)
    assert transfers.dropped * 100 <= transfers.total
    assert found.describe(Way.NONE) == []
    assert transfers.total > 10_000_000
    assert {way for way in SYNC_WAYS if not len(found.rows(way))} <= {Way.OPEN}
    # all but what is the graph's to tell is rare
    assert found.total(Way.OPEN) <= FEW
    assert found.describe(Way.FORK)[0].startswith("sync __switch_to+")
    assert len(found.rows(Way.FORK)) == 1
    assert len(found.rows(Way.AGAIN, Way.REWRITTEN, Way.UNLISTED)) * 100 <= len(found.ways)
    # such text is entered by a pointer once per kmod for its init text, and at the BPF filter
    entered = {to for one, to in found.pairs(Way.UNLISTED) if is_indirect(recording, one)}
    assert len(entered) <= len(recording.text) + 1


def test_exceptions_and_interrupts_come_and_go_where_they_may(recording: Recording) -> None:
    found = recording.judge(recording.tables).events()
    print_ways(found)
    print("\n".join(found.describe(Way.FAULT, Way.FIXUP, Way.SERIALIZE)))
    assert found.describe(Way.NONE) == []
    assert all(len(found.rows(way)) for way in EVENT_WAYS)


def is_indirect(recording: Recording, addr: int) -> bool:
    """Whether it is an indirect call or jump, or the last instruction of a thunk."""
    cfg = recording.right.cfg
    where = np.array([addr], np.uint64)
    row = int(cfg.rows(where)[0])
    return row >= 0 and bool(cfg.passes[row] >= 0 or cfg.in_thunk(where)[0])


def print_ways(found: Account) -> None:
    print(f"\n{'way':<12}{'pairs':>9}{'transfers':>14}")
    for way in Way:
        rows = len(found.rows(way))
        if rows:
            print(f"{way.name:<12}{rows:>9,}{found.total(way):>14,}")


def print_sites(recording: Recording) -> None:
    """Of those, what starts at text that the kernel rewrites."""
    sites, found = recording.sites, recording.right
    one = found.transfers.from_
    trampolines = np.zeros(len(one), bool)
    for start, end in sites.static_text:
        trampolines |= (one >= np.uint64(start)) & (one < np.uint64(end))
    kinds = {
        "at jump labels": np.isin(one, sites.jump_labels),
        "at static calls": np.isin(one, sites.static_calls),
        "in their trampolines": trampolines,
        "at ftrace sites": np.isin(one, sites.ftrace),
    }
    for name, mask in kinds.items():
        ways = Counter(Way(way).name for way in found.ways[mask].tolist())
        print(f"{name}: {', '.join(f'{n} {way}' for way, n in ways.most_common())}")


def print_unlisted(recording: Recording) -> None:
    """Where text is that is in no table."""
    found, names = recording.right, Counter[str]()
    for one, other in found.pairs(Way.UNLISTED):
        ends = {recording.pages.get(addr >> 12) for addr in (one, other)} - {None}
        names[ends.pop() or "" if ends else "init text of kmods, BPF"] += 1
    print(f"unlisted: {', '.join(f'{n} {name}' for name, n in names.most_common())}")


# ---- a check that cannot fail is a defect ------------------------------------------------------

KINDS = {
    Way.FALL: EdgeKind.FALL, Way.TAKEN: EdgeKind.TAKEN, Way.LABEL: EdgeKind.LABEL,
    Way.CALL: EdgeKind.CALL, Way.SIBLING: EdgeKind.SIBLING,
}  # fmt: skip


def hottest(found: Account, way: Way, fits: Callable[[int], bool]) -> int:
    """The row of that way with the highest count of which something holds."""
    rows = found.rows(way)
    for row in rows[np.argsort(found.transfers.count[rows])[::-1]].tolist():
        if fits(row):
            return int(row)
    raise AssertionError(f"no row of {way.name} fits")


def edges_of(cfg: Cfg, insn: int, to: int) -> list[int]:
    """Rows of all edges by an instruction to the block that begins at an address."""
    (block,) = cfg.block_at(np.array([to], np.uint64))
    rows = np.flatnonzero((cfg.edges.insn == insn) & (cfg.edges.target == block))
    return [int(row) for row in rows]


def without_edges(tables: KernelTables, rows: Sequence[int]) -> KernelTables:
    kept = np.ones(len(tables.edges.kind), bool)
    kept[list(rows)] = False
    return replace(tables, edges=select(tables.edges, kept))


@pytest.mark.parametrize("way", KINDS, ids=lambda way: way.name)
def test_one_edge_deleted_its_transfer_is_reported(recording: Recording, way: Way) -> None:
    found, cfg = recording.right, recording.right.cfg
    one, other = found.transfers.from_, found.transfers.to
    insn = cfg.rows(one)
    row = hottest(found, way, lambda row: len(edges_of(cfg, int(insn[row]), int(other[row]))) == 1)
    edges = edges_of(cfg, int(insn[row]), int(other[row]))
    assert cfg.edges.kind[edges[0]] == KINDS[way]
    wrong = recording.judge(without_edges(recording.tables, edges)).completed()
    assert wrong.pairs(Way.NONE) == {(int(one[row]), int(other[row]))}


def test_fall_through_of_a_call_deleted_its_return_is_reported(recording: Recording) -> None:
    found, cfg = recording.right, recording.right.cfg
    one, other = found.transfers.from_, found.transfers.to
    calls = cfg.before(other)
    arrivals = Counter(other[found.rows(Way.RETURN)].tolist())
    row = hottest(
        found,
        Way.RETURN,
        lambda row: (
            arrivals[int(other[row])] == 1
            and len(edges_of(cfg, int(calls[row]), int(other[row]))) == 1
        ),
    )
    edges = edges_of(cfg, int(calls[row]), int(other[row]))
    wrong = recording.judge(without_edges(recording.tables, edges)).completed()
    assert wrong.pairs(Way.NONE) == {(int(one[row]), int(other[row]))}


def test_candidate_removed_its_indirect_calls_are_reported(recording: Recording) -> None:
    found, cfg = recording.right, recording.right.cfg
    entered = cfg.function_at(found.transfers.to)
    edges, function = cfg.edges, cfg.blocks.function
    direct = np.isin(edges.kind, (EdgeKind.CALL,)) & (edges.target >= 0)
    called = np.unique(function[edges.target[direct]])
    looked_up = re.findall(r'"(\w+)"', RESOLVE.read_text())
    row = hottest(
        found,
        Way.INDIRECT,
        lambda row: entered[row] in called and cfg.tables.names[int(entered[row])] not in looked_up,
    )
    taken = cfg.functions.address_taken.copy()
    taken[entered[row]] = False
    tables = replace(recording.tables, functions=replace(cfg.functions, address_taken=taken))
    wrong = recording.judge(tables).completed()
    arrivals = {
        pair for pair in found.pairs(Way.INDIRECT) if pair[1] == int(found.transfers.to[row])
    }
    assert arrivals <= wrong.pairs(Way.NONE)
    # through a thunk each of its returns tells which site had called it
    for one, other in wrong.pairs(Way.NONE) - arrivals:
        (ret,), (call,) = (cfg.rows(np.array([one], "u8")), cfg.before(np.array([other], "u8")))
        assert cfg.owner(np.array([ret]))[0] == entered[row]
        assert cfg.passes[call] >= 0


def test_fixup_deleted_its_resumption_is_reported(recording: Recording) -> None:
    found, cfg = recording.judge(recording.tables).events(), recording.right.cfg
    edges = cfg.edges
    others = np.unique(edges.target[edges.kind != EdgeKind.FIXUP])
    block = cfg.block_at(found.transfers.to)
    row = hottest(found, Way.FIXUP, lambda row: block[row] not in others)
    pair = int(found.transfers.from_[row]), int(found.transfers.to[row])
    rows = np.flatnonzero((edges.kind == EdgeKind.FIXUP) & (edges.target == block[row]))
    wrong = recording.judge(without_edges(recording.tables, rows.tolist())).events()
    assert wrong.pairs(Way.NONE) == {pair}
