# SPDX-License-Identifier: GPL-2.0-or-later
"""The correctness oracle's Python side: build the plug-in, talk to it, read its counters."""

from __future__ import annotations

import itertools
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oracle.transfers import TRANSFER, Transfers, transfers_from_rows

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Addrs = npt.NDArray[Any] | Sequence[int]
Records = npt.NDArray[np.void]

ROW = np.dtype(
    [("vaddr", "<u8"), ("length", "u1"), ("code", "u1", 15), ("count", "<u8"), ("cpu", "<u8", 2)]
)
EVENT = np.dtype(
    [
        ("seq", "<u8"),
        ("kind", "u1"),  # WRITE or MARK
        ("cpu", "u1"),
        ("size", "u1"),  # bytes written, 1..8
        ("pad", "u1", 5),
        ("addr", "<u8"),  # text address of a write (0: unknown), or the marked address
        ("phys", "<u8"),
        ("value", "<u8"),  # what was written
        ("pc", "<u8"),  # the storing instruction
    ]
)
RESTARTS = np.dtype([("vaddr", "<u8"), ("restarts", "<u8")])
WRITE, MARK = 1, 2
TRANSFERS_ON = "transfers=on"

_SOURCES = ("plugin.c", "control.c", "count.c", "audit.c", "restart.c", "transfer.c")
_FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden")
_WORDS_PER_LINE = 2000


def build_plugin(out_dir: Path, cflags: Sequence[str] = ()) -> Path:
    """Compile the plug-in for the machine's QEMU 10.0 and return its path in `out_dir`.

    Args:
        cflags: faults to be seeded.
    """
    here = Path(__file__).parent
    out = out_dir / "kernweave-oracle.so"
    out_dir.mkdir(parents=True, exist_ok=True)
    sources = [str(here / name) for name in _SOURCES]
    subprocess.run(["gcc", *_FLAGS, *cflags, "-o", str(out), *sources], check=True)
    return out


def qemu_args(plugin: Path, ctl_path: Path, *options: str) -> list[str]:
    """Return the arguments that load the plug-in; QEMU takes the first one for the file.

    Args:
        options: of the plug-in: TRANSFERS_ON records transfers from the first user process on.
    """
    for path in (plugin, ctl_path):
        if "," in str(path) or "=" in str(path):
            raise ValueError(f"QEMU splits plug-in arguments at ',' and '=': {path}")
    if len(str(ctl_path)) > 107:
        raise ValueError(f"a unix socket's path has at most 107 bytes: {ctl_path}")
    return ["-plugin", ",".join([str(plugin), f"ctl={ctl_path}", *options])]


def pack_codes(codes: Sequence[bytes]) -> tuple[U8, U8]:
    """Return lengths (uint8[n]) and zero-padded bytes (uint8[n, 15]) of instructions."""
    lengths = np.fromiter(map(len, codes), np.uint8, len(codes))
    packed = np.frombuffer(b"".join(c.ljust(15, b"\0") for c in codes), np.uint8)
    return lengths, packed.reshape(-1, 15)


@dataclass(frozen=True, slots=True)
class Counts:
    """Executions per (address, instruction bytes); rows in the order they were first seen.

    Attributes:
        vaddr: uint64[n]; an address has one row per content it was translated with.
        length: uint8[n], bytes.
        code: uint8[n, 15], zero padded.
        count: uint64[n], starts of the instruction on all CPUs (see count.c, and hits).
        per_cpu: uint64[n, 2], the same for CPUs 0 and 1.
    """

    vaddr: U64
    length: U8
    code: U8
    count: U64
    per_cpu: U64

    def at(self, vaddr: Addrs) -> U64:
        """Return executions at each address, whatever its bytes were: uint64[len(vaddr)]."""
        order, start, end = self._find(vaddr)
        total = np.zeros(len(order) + 1, np.uint64)
        total[1:] = np.cumsum(self.count[order])
        result: U64 = total[end] - total[start]
        return result

    def at_code(self, vaddr: Addrs, code: Sequence[bytes]) -> U64:
        """Return executions at each address while it held exactly that instruction."""
        order, start, end = self._find(vaddr)
        lengths, codes = pack_codes(code)
        result = np.zeros(len(start), np.uint64)
        for nth in range(int((end - start).max(initial=0))):
            here = np.flatnonzero(start + nth < end)
            rows = order[start[here] + nth]
            same = (self.length[rows] == lengths[here]) & (self.code[rows] == codes[here]).all(
                axis=1
            )
            result[here[same]] += self.count[rows[same]]
        return result

    def since(self, earlier: Counts) -> Counts:
        """Return what was executed after `earlier`, a snapshot of the same machine."""
        n = len(earlier.vaddr)
        if n > len(self.vaddr) or not np.array_equal(self.vaddr[:n], earlier.vaddr):
            raise ValueError("the earlier snapshot is of another machine, or later")
        count, per_cpu = self.count.copy(), self.per_cpu.copy()
        count[:n] -= earlier.count
        per_cpu[:n] -= earlier.per_cpu
        return Counts(self.vaddr, self.length, self.code, count, per_cpu)

    def _find(self, vaddr: Addrs) -> tuple[npt.NDArray[np.intp], Any, Any]:
        order = np.argsort(self.vaddr, kind="stable")
        wanted = np.asarray(vaddr, np.uint64)
        start, end = (np.searchsorted(self.vaddr, wanted, s, order) for s in ("left", "right"))
        return order, start, end


def counts_from_rows(rows: Records) -> Counts:
    """Return the columns of a snapshot's records (dtype ROW)."""
    names = ("vaddr", "length", "code", "count", "cpu")
    return Counts(*(np.ascontiguousarray(rows[name]) for name in names))


class Oracle:
    """A connection to the plug-in of one running machine."""

    def __init__(self, ctl_path: Path, timeout_s: float = 120) -> None:
        self._socket = _connect(ctl_path, timeout_s)
        self._answers = self._socket.makefile("r")
        self._dir = tempfile.TemporaryDirectory(prefix="oracle-")

    def close(self) -> None:
        """Hang up; the plug-in keeps counting, and keeps an audit going."""
        self._answers.close()
        self._socket.close()
        self._dir.cleanup()

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def snapshot(self) -> Counts:
        """Return all counters since boot; exact when the machine is quiescent."""
        return counts_from_rows(self._take("snapshot", ROW))

    def audit_on(
        self,
        phys_base: int,
        marks: Iterable[int] = (),
        text: Iterable[tuple[int, int]] = (),
        pages: Iterable[int] = (),
    ) -> None:
        """Start recording writes to executable pages, and executions of `marks`.

        Args:
            phys_base: the value of the kernel's variable `phys_base` (0 without KASLR).
            marks: virtual addresses of instructions.
            text: virtual ranges [lo, hi) that are executable: kernel text, live kmods.
                Pages executed while the audit is on are added by themselves.
            pages: physical addresses of further executable pages.
        """
        self._tell_all("mark", marks)
        self._tell_all("text", itertools.chain.from_iterable(text))
        self._tell_all("exec", pages)
        self._command(f"audit on {phys_base:#x}")

    def audit_off(self) -> Records:
        """Stop recording and return the events (dtype EVENT) in their total order."""
        return self._take("audit off", EVENT)

    def watch(
        self, vaddr: Sequence[int], length: Sequence[int], fault_entries: Iterable[int]
    ) -> None:
        """Start measuring restarts of the instructions at `vaddr`, `length` bytes each.

        Args:
            fault_entries: addresses of `asm_exc_page_fault`, `asm_exc_general_protection`:
                exception entries that push an error code.
        """
        words = [f"{a:#x}+{n}" for a, n in sorted(set(zip(vaddr, length, strict=True)))]
        self._tell_all("faults", fault_entries)
        self._command("watch " + " ".join(words))

    def unwatch(self) -> Records:
        """Stop measuring; return records (dtype RESTARTS): hits = executions - restarts."""
        return self._take("unwatch", RESTARTS)

    def transfers_on(self) -> None:
        """Record transfers, from the next return to user mode on; counts go on."""
        self._command("transfers on")

    def transfers_off(self) -> None:
        """Stop recording transfers; those recorded can still be fetched."""
        self._command("transfers off")

    def transfers(self) -> Transfers:
        """Return all transfers recorded; exact when the machine is stopped or quiescent."""
        rows, dropped = self._fetch("transfers get", TRANSFER)
        return transfers_from_rows(rows, dropped)

    def _tell_all(self, verb: str, addrs: Iterable[int]) -> None:
        for words in _batched(addrs, _WORDS_PER_LINE):
            self._command(f"{verb} " + " ".join(f"{a:#x}" for a in words))

    def _take(self, verb: str, dtype: np.dtype[Any]) -> Records:
        result, lost = self._fetch(verb, dtype)
        if lost:
            raise RuntimeError(f"oracle: {verb}: {len(result)} rows, {lost} lost")
        return result

    def _fetch(self, verb: str, dtype: np.dtype[Any]) -> tuple[Records, int]:
        path = Path(self._dir.name) / "rows"
        rows, lost = self._command(f"{verb} {path}")
        result: Records = np.fromfile(path, dtype)
        path.unlink()
        if len(result) != rows:
            raise RuntimeError(f"oracle: {verb}: {len(result)} of {rows} rows")
        return result, lost

    def _command(self, line: str) -> list[int]:
        self._socket.sendall(line.encode() + b"\n")
        answer = self._answers.readline().split()
        if not answer or answer[0] != "ok":
            raise RuntimeError(f"oracle: {line[:80]}: {' '.join(answer) or 'hung up'}")
        return [int(word) for word in answer[1:]]


def _connect(path: Path, timeout_s: float) -> socket.socket:
    # The plug-in binds when the first virtual CPU appears, some time after QEMU's start.
    until = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return sock


def _batched(items: Iterable[int], n: int) -> Iterable[list[int]]:
    left = iter(items)
    while batch := list(itertools.islice(left, n)):
        yield batch
