# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel file as input of the analysis, at its link addresses.

Nothing in the file is patched for a machine.  Only the ftrace sites are made what every boot makes
of them, nops: a file has calls of __fentry__ there, and no other code reads what a call leaves.
Alternatives, return and retpoline sites, static keys and calls stay as they were built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from kernweave.analysis.code import Part
from kernweave.analysis.hints import (
    exported_addresses,
    find_btf,
    prototype_arguments,
    taken_addresses,
)
from kernweave.analysis.kernel import Hints
from kernweave.analysis.parts import make_parts
from kernweave.errors import Reason
from kernweave.image.columns import BUG_WARNING, EX_TYPE_ZEROPAD
from kernweave.image.sites import Sites, make_ranges
from kernweave.image.special import denied_text, special_text
from kernweave.image.symbols import Symbols, make_symbols
from kernweave.image.tables import Tables, find_spans, read_tables
from kernweave.image.vmlinuz import KernelFile

_NOP5 = bytes((0x0F, 0x1F, 0x44, 0x00, 0x00))


@dataclass(frozen=True)
class FileText:
    """What the analysis needs of a kernel file.

    Attributes:
        base: link address of the first byte of text.
        text: section .text, with nops as ftrace sites.
        symbols: its functions.
        tables: the kernel's tables about its text, init text and alternatives included.
        sites: the same for the analysis.
        hints: what data and types tell.
    """

    base: int
    text: bytes
    symbols: Symbols
    tables: Tables
    sites: Sites
    hints: Hints

    def parts(self) -> list[Part]:
        """All functions, ascending by address."""
        return make_parts(self.symbols, self.base, self.text, self.sites)


def load_file(kernel: KernelFile) -> FileText:
    """Read everything that the analysis needs.

    Raises:
        UnsupportedError: the file has no consistent symbols, or a table of a layout not known.
    """
    start, end = kernel.text_start, kernel.text_end
    symbols = make_symbols(None, *kernel.symbols, start, end)
    tables = read_tables(kernel.read, find_spans(kernel.lookup, live=False), kernel.bounds)
    hints = Hints(
        taken_addresses(partial(_read_padded, kernel), kernel.lookup, (start, end)),
        prototype_arguments(find_btf(kernel.read, kernel.lookup)),
        exported_addresses(kernel.read, kernel.lookup),
        symbols.local,
    )
    text = _with_nops(kernel.read(start, end - start), start, tables)
    return FileText(start, text, symbols, tables, sites_of_file(kernel, symbols, tables), hints)


def sites_of_file(kernel: KernelFile, symbols: Symbols, tables: Tables) -> Sites:
    """The tables of a kernel file in the form in which a running kernel's are read.

    Args:
        kernel: the file.
        symbols: its functions.
        tables: its tables.
    """
    special = special_text(symbols, kernel.lookup)
    spans = [span for span in map(symbols.bounds, tables.denylist.tolist()) if span]
    denied = np.array(spans, np.uint64).reshape(-1, 2)
    bugs, exceptions = tables.bugs, tables.exceptions
    return Sites(
        ranges=(
            *denied_text(symbols, kernel.lookup),
            make_ranges(Reason.DENYLIST, denied[:, 0], denied[:, 1]),
        ),
        jump_labels=tables.jump_labels.addr,
        jump_targets=tables.jump_labels.target,
        static_calls=tables.static_calls.addr,
        exceptions=exceptions.addr,
        fixups=exceptions.fixup,
        zeropads=exceptions.addr[exceptions.type == EX_TYPE_ZEROPAD],
        bugs=bugs.addr,
        fatal_bugs=bugs.addr[(bugs.flags & BUG_WARNING) == 0],
        ftrace=tables.ftrace,
        return_thunks=np.sort(special.return_thunks),
        thunks=special.thunks,
        static_text=special.static_text,
        other_modes=special.other_modes,
        tracer_calls=special.tracer_calls,
    )


def _read_padded(kernel: KernelFile, addr: int, size: int) -> bytes:
    """Bytes at a link address, zeros behind the segment: symbols name the end of its last page.

    Older kernels link per-CPU data at 0 and load them elsewhere.
    """
    (load,) = kernel.lookup(("__per_cpu_load",))
    if any(one.start == 0 <= addr - load < one.end for one in kernel.elf.segments):
        addr -= load
    ends = [one.end for one in kernel.elf.segments if one.start <= addr < one.end]
    held = min([addr + size, *ends]) - addr
    return kernel.read(addr, held) + bytes(size - held)


def _with_nops(text: bytes, base: int, tables: Tables) -> bytes:
    """The text with a nop at every ftrace site.

    References:
        arch/x86/kernel/ftrace.c, ftrace_init_nop()
    """
    code = np.frombuffer(text, np.uint8).copy()
    at = (tables.ftrace - np.uint64(base)).astype(np.int64)
    at = at[(at >= 0) & (at <= len(code) - len(_NOP5))]
    code[at[:, None] + np.arange(len(_NOP5))] = np.frombuffer(_NOP5, np.uint8)
    return code.tobytes()
