# SPDX-License-Identifier: GPL-2.0-or-later
"""Every recorded transfer put down to an edge of the control-flow graph, or to a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.model.tables import EdgeKind
from kernweave.x86.decode import Flow
from oracle.callees import Callees
from oracle.cfg import Cfg, Pairs, Way, direct_ways
from oracle.outside import Outside
from oracle.transfers import TransferClass, Transfers

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: prefixes of the instructions that QEMU may begin anew: rep, and atomics it does alone
_REPEATED = (0xF2, 0xF3, 0xF0)
_INTERRUPTS = ("asm_sysvec_", "irq_entries_start", "spurious_entries_start", "asm_exc_nmi")
_SITE_BYTES = 5  # of a static call
_STUB_BYTES = 8  # of irq_entries_start
_SYSTEM_CALLS = ("entry_SYSCALL_64", "entry_SYSCALL_compat", "entry_SYSENTER_compat")


@dataclass(frozen=True)
class Account:
    """What some transfers were put down to.

    Attributes:
        cfg: the graph.
        transfers: all of them.
        ways: uint8[n], a `Way` of each.
    """

    cfg: Cfg
    transfers: Transfers
    ways: U8

    def rows(self, *ways: Way) -> Rows:
        """int64[m]: which transfers went one of these ways."""
        return np.flatnonzero(np.isin(self.ways, ways))

    def pairs(self, *ways: Way) -> set[tuple[int, int]]:
        """(from, to) of those."""
        rows = self.rows(*ways)
        one, other = self.transfers.from_[rows].tolist(), self.transfers.to[rows].tolist()
        return set(zip(one, other, strict=True))

    def total(self, *ways: Way) -> int:
        """How many transfers they were."""
        return int(self.transfers.count[self.rows(*ways)].sum())

    def describe(self, *ways: Way) -> list[str]:
        """The same as text."""
        transfers = self.transfers
        return [
            f"{TransferClass(int(transfers.cls[row])).name.lower()} "
            f"{self.cfg.name(int(transfers.from_[row]))} -> "
            f"{self.cfg.name(int(transfers.to[row]))}: {transfers.count[row]}"
            for row in self.rows(*ways).tolist()
        ]


class Accountant:
    """The rules, applied to one kernel's transfers."""

    def __init__(
        self, cfg: Cfg, transfers: Transfers, outside: Outside, probed: Sequence[int] = ()
    ) -> None:
        """Find what was called.

        Args:
            cfg: the graph.
            transfers: all recorded ones.
            outside: code that the graph does not have.
            probed: addresses at which there were kprobes.
        """
        self._cfg = cfg
        self._sync = _select(transfers, transfers.of(TransferClass.SYNC))
        self._rest = _select(transfers, ~transfers.of(TransferClass.SYNC))
        parted = self._parted()
        self._callees = Callees(
            cfg,
            Pairs(
                np.concatenate([self._sync.from_, parted.from_]),
                np.concatenate([self._sync.to, parted.to]),
            ),
        )
        self._outside = outside
        self._probed = set(probed)
        sites = cfg.sites
        tables = (sites.ftrace, sites.jump_labels, sites.static_calls, probed)
        self._sites = np.concatenate([np.asarray(table, np.uint64) for table in tables])

    def _parted(self) -> Pairs:
        """Indirect transfers and calls of static sites between whose ends an interrupt came.

        They are no pairs; which of what was stopped went on to which of what was resumed is not
        known.
        """
        cfg = self._cfg
        delivered = self._rest.of(TransferClass.DELIVER)
        one = np.unique(self._rest.from_[delivered])
        row = cfg.rows(one)
        several = (row >= 0) & (cfg.passes[row] >= 0) | cfg.in_thunk(one)
        one = one[several | np.isin(one, cfg.sites.static_calls)]
        to = np.unique(self._rest.to[self._rest.of(TransferClass.RESUME)])
        to = to[(cfg.function_at(to) >= 0) | cfg.in_thunk(to)]
        pairs = Pairs(np.repeat(one, len(to)), np.tile(to, len(one)))
        row, entered = cfg.rows(pairs.from_), cfg.function_at(pairs.to)
        may = np.isin(direct_ways(cfg, pairs), (Way.THUNK, Way.INDIRECT))
        may |= cfg.in_thunk(pairs.from_) & cfg.returns[row] & (entered >= 0)
        may |= np.isin(pairs.from_, cfg.sites.static_calls) & (entered >= 0)
        return Pairs(pairs.from_[may], pairs.to[may])

    # ---- completed instructions ----------------------------------------------------------------

    def completed(self) -> Account:
        """Account for those of the class SYNC."""
        sync = self._sync
        ways = self._steps(Pairs(sync.from_, sync.to))
        for row in np.flatnonzero(ways == Way.NONE).tolist():
            one, length, other = (int(c[row]) for c in (sync.from_, sync.from_length, sync.to))
            ways[row] = self._rare_way(one, length, other)
        return Account(self._cfg, sync, ways)

    def _steps(self, pairs: Pairs) -> U8:
        """How control may get straight from each instruction to the other."""
        cfg = self._cfg
        ways = direct_ways(cfg, pairs)
        one, other = cfg.rows(pairs.from_), cfg.rows(pairs.to)
        returns = (ways == Way.NONE) & (one >= 0) & cfg.returns[one]
        thunk = returns & cfg.in_thunk(pairs.from_)
        ways[thunk & self._is_candidate(one, pairs.to)] = Way.INDIRECT
        call = cfg.before(pairs.to)
        rows = np.flatnonzero(returns & ~thunk & cfg.comes_back(call, other))
        seen, unseen = self._callees.may_return(call[rows], one[rows])
        ways[rows[unseen]] = Way.OPEN
        ways[rows[seen]] = Way.RETURN
        return ways

    def _is_candidate(self, thunk: Rows, to: U64) -> Mask:
        """Whether some site that went to a thunk may lead to a function."""
        entered = self._cfg.function_at(to)
        fits = self._cfg.needs[entered] <= self._callees.most_passed(thunk)
        return np.asarray((entered >= 0) & fits)

    def _rare_way(self, one: int, length: int, other: int) -> Way:
        names = self._cfg.name(one).split("+")[0], self._cfg.name(other)
        if names == ("__switch_to", "ret_from_fork+0x0"):
            return Way.FORK  # copy_thread() made that frame
        if one == other and self._outside.code(one, length)[:1] in map(_byte, _REPEATED):
            return Way.AGAIN
        if not self._outside.explains(one, length, other):
            return Way.NONE
        if not self._in_kernel(one):
            return Way.UNLISTED
        if not self._in_kernel(other):
            return Way.REWRITTEN if one in self._sites else Way.UNLISTED
        if not self._outside.held(one):  # a return behind what was a call then
            return Way.REWRITTEN if other - _SITE_BYTES in self._sites else Way.NONE
        return Way.REWRITTEN if one in self._sites else Way.NONE

    def _in_kernel(self, addr: int) -> bool:
        """Whether an address is in the kernel's own functions; kmods come and go."""
        functions = self._cfg.functions
        own = functions.addr[functions.kmod == 0]
        return bool(own.min() <= addr < own.max() + functions.size[functions.kmod == 0][-1])

    # ---- exceptions, interrupts, user mode -----------------------------------------------------

    def events(self) -> Account:
        """Account for all others."""
        rest = self._rest
        ways = np.zeros(len(rest.cls), np.uint8)
        columns = (rest.cls.tolist(), rest.from_.tolist(), rest.to.tolist())
        for row, (cls, one, other) in enumerate(zip(*columns, strict=True)):
            if cls != TransferClass.RESUME:
                ways[row] = self._event_way(cls, one, other)
        resumed = rest.of(TransferClass.RESUME)
        ways[resumed] = self._resumptions(_select(rest, resumed))
        return Account(self._cfg, rest, ways)

    def _event_way(self, cls: int, one: int, other: int) -> Way:
        if cls == TransferClass.LEAVE:
            row = int(self._cfg.rows(np.array([one], np.uint64))[0])
            leaves = row >= 0 and self._cfg.insns.flow[row] == Flow.LEAVE
            return Way.LEAVE if leaves else Way.NONE
        symbol, _, off = self._cfg.name(other).partition("+")
        stubs = symbol in ("irq_entries_start", "spurious_entries_start")
        if int(off or "1", 16) % (_STUB_BYTES if stubs else 1 << 32):
            return Way.NONE
        interrupts = symbol.startswith(_INTERRUPTS)
        if cls == TransferClass.ENTER:
            gate = interrupts or symbol.startswith("asm_exc_") or symbol in _SYSTEM_CALLS
            return Way.ENTER if gate else Way.NONE
        if interrupts:
            known = self._cfg.rows(np.array([one], np.uint64))[0] >= 0
            return Way.INTERRUPT if known or self._outside.held(one) else Way.NONE
        return Way.FAULT if self._may_cause(symbol, one) else Way.NONE

    def _may_cause(self, symbol: str, addr: int) -> bool:
        """Whether an instruction may cause an exception in the kernel."""
        sites = self._cfg.sites
        row = int(self._cfg.rows(np.array([addr], np.uint64))[0])
        # a page fault on the first instruction of user mode is put down to what led there
        leaves = row >= 0 and self._cfg.insns.flow[row] == Flow.LEAVE
        causes = {
            "asm_exc_page_fault": addr in sites.exceptions or leaves,
            "asm_exc_general_protection": addr in sites.exceptions or leaves,
            "asm_exc_invalid_op": addr in sites.bugs,
            "asm_exc_int3": addr in self._sites,
        }
        return bool(causes.get(symbol, False))

    def _resumptions(self, resumed: Transfers) -> U8:
        """What each iretq to the kernel went back to, on whichever CPU."""
        delivered = _select(self._rest, self._rest.of(TransferClass.DELIVER))
        stopped = np.unique(delivered.from_)
        ways = np.zeros(len(resumed.to), np.uint8)
        ways[resumed.to == resumed.from_ + resumed.from_length] = Way.SERIALIZE
        ways[(ways == Way.NONE) & np.isin(resumed.to, stopped)] = Way.BACK
        ways[(ways == Way.NONE) & self._is_fixup(stopped, resumed.to)] = Way.FIXUP
        rows = np.flatnonzero(ways == Way.NONE)
        # what an interrupt came behind has completed, what an int3 stood for is emulated
        names = [self._cfg.name(to).split("+")[0] for to in delivered.to.tolist()]
        goes_on = [name.startswith((*_INTERRUPTS, "asm_exc_int3")) for name in names]
        past = np.unique(delivered.from_[goes_on])
        pairs = Pairs(np.repeat(past, len(rows)), np.tile(resumed.to[rows], len(past)))
        steps = self._steps(pairs).reshape(len(past), len(rows))
        ways[rows[(steps != Way.NONE).any(axis=0)]] = Way.BACK
        for row in np.flatnonzero(ways == Way.NONE).tolist():
            ways[row] = self._rare_resumption(int(resumed.to[row]), delivered)
        return ways

    def _is_fixup(self, stopped: U64, to: U64) -> Mask:
        """Whether an instruction that faulted has an edge there."""
        edges, cfg = self._cfg.edges, self._cfg
        chosen = (edges.kind == EdgeKind.FIXUP) & (edges.target >= 0)
        chosen[chosen] = np.isin(cfg.insns.addr[edges.insn[chosen]], stopped)
        return np.isin(to, cfg.blocks.addr[edges.target[chosen]])

    def _rare_resumption(self, to: int, delivered: Transfers) -> Way:
        """Back to code outside of the tables, or from it; a kprobe's int3 leads to its slot."""
        stopped = dict(zip(delivered.from_.tolist(), delivered.from_length.tolist(), strict=True))
        if self._outside.held(to) and self._probed & stopped.keys():
            return Way.BACK
        stepped = any(self._outside.explains(one, size, to) for one, size in stopped.items())
        return Way.BACK if stepped else Way.NONE


def _byte(value: int) -> bytes:
    return bytes([value])


def _select(transfers: Transfers, rows: Rows | Mask) -> Transfers:
    return Transfers(
        transfers.from_[rows],
        transfers.to[rows],
        transfers.count[rows],
        transfers.cls[rows],
        transfers.from_length[rows],
        transfers.dropped,
    )
