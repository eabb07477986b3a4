# SPDX-License-Identifier: GPL-2.0-or-later
"""A generation: clones as a kmod, with the tables that the kernel looks them up in.

Before anything leads to a clone the kernel's loader has placed it, and knows how a fault in it is
fixed up, what a trap in it means, how to unwind it and what it is called.  None of that changes as
long as its code can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError
from kernweave.image.orc import OrcReg
from kernweave.image.tables import Tables
from kernweave.weave.bind import Outward, emit
from kernweave.weave.clonemap import CloneMap, bugs_of, exceptions_of, make_map
from kernweave.weave.layout import Layout
from kernweave.weave.object import (
    Fields,
    Flags,
    Section,
    Symbols,
    read_sections,
    write_object,
)
from kernweave.weave.orc import orc_of
from kernweave.weave.scope import Scope
from kernweave.weave.source import Source

SUFFIX = ".kw"  # of clones' names: none equals a native one, or look-ups by name would fail

_TEXT_ALIGN = 64  # what is safe by its place in a cache line keeps it
_THIS_MODULE = ".gnu.linkonce.this_module"
_MODULE_NAME_BYTES = 56
#: what a kmod says of itself, and what of that holds for the clones
_KEPT = (b"license=", b"vermagic=", b"retpoline=")
_NAME = b"name="

_EXCEPTION = np.dtype([("addr", "<i4"), ("fixup", "<i4"), ("data", "<u4")])
_BUG = {
    size: np.dtype(
        [("addr", "<i4"), *((name, "<i4") for name in names), ("line", "<u2"), ("flags", "<u2")]
    )
    for size, names in ((12, ("file",)), (16, ("text", "file")))
}
_ORC = np.dtype([("sp_offset", "<i2"), ("bp_offset", "<i2"), ("bits", "<u2")])


@dataclass(frozen=True)
class Template:
    """What a kmod of the kernel at hand must have, taken from any other.

    Attributes:
        info: lines of `.modinfo`.
        module: `struct module` as the linker leaves it.
        name_at: where its name is in it.
        others: sections taken over as they are: checksums of symbols, format of ORC.
    """

    info: tuple[bytes, ...]
    module: bytes
    name_at: int
    others: tuple[Section, ...]


def read_template(kmod: bytes) -> Template:
    """Take the template from the file of a kmod.

    Raises:
        UnsupportedError: it is no kmod.
    """
    found = read_sections(kmod)
    module, lines = found.get(_THIS_MODULE, b""), found.get(".modinfo", b"").split(b"\0")
    names = [line.removeprefix(_NAME) for line in lines if line.startswith(_NAME)]
    name_at = module.find(names[0] + b"\0") if names else -1
    if name_at < 0:
        raise UnsupportedError("this is not the file of a kmod")
    others = [
        Section(kept, found[kept], align=align)
        for kept, align in (("__versions", 32), (".orc_header", 4))
        if kept in found
    ]
    info = [line for line in lines if line.startswith(_KEPT)]
    return Template(tuple(info), module, name_at, tuple(others))


@dataclass(frozen=True)
class Woven:
    """What a generation is made of.

    Attributes:
        source: the image.
        scope: what is woven.
        layout: of the clones.
        offsets: uint64[c], gs-relative address of each counter.
        names: of all functions of the image, by row.
        native: the kernel's tables.
    """

    source: Source
    scope: Scope
    layout: Layout
    offsets: npt.NDArray[np.uint64]
    names: Sequence[str]
    native: Tables


def make_generation(woven: Woven, template: Template, name: str) -> bytes:
    """The file of a kmod.

    Args:
        woven: what it is made of.
        template: what every kmod of this kernel has.
        name: of the kmod.

    Raises:
        UnsupportedError: the kernel's bug table has rows that are not known.
    """
    if len(name) >= _MODULE_NAME_BYTES:
        raise ValueError(f"{name} is too long for a kmod's name")
    code, outward = emit(woven.source, woven.scope, woven.layout, woven.offsets)
    clones = make_map(woven.source, woven.layout, 0)
    module = bytearray(template.module)
    module[template.name_at : template.name_at + _MODULE_NAME_BYTES] = name.encode().ljust(
        _MODULE_NAME_BYTES, b"\0"
    )
    info = b"\0".join((*template.info, b"depends=", _NAME + name.encode(), b""))
    sections = [
        Section(
            ".text", code.tobytes(), Flags.ALLOC | Flags.EXEC, _TEXT_ALIGN, _leads_out(outward)
        ),
        *(one for one in (_exceptions(woven, clones), _bugs(woven, clones)) if one.data),
        *_orc(woven),
        Section(".modinfo", info, align=1),
        *template.others,
        Section(_THIS_MODULE, bytes(module), Flags.ALLOC | Flags.WRITE, 64),
    ]
    return write_object(sections, _symbols(woven))


def _leads_out(outward: Outward) -> tuple[Fields]:
    """The displacements of code that lead to native memory count from their instruction's end."""
    off = (outward.at - outward.end).astype(np.int64)
    return (Fields(outward.at.astype(np.int64), outward.native, np.zeros(len(off), bool), off),)


def _column(
    rows: npt.NDArray[np.void], name: str, to: npt.NDArray[np.uint64], bytes_: int
) -> Fields:
    """One column of a table, of distances from their own place.

    Args:
        rows: of the table.
        name: of the column.
        to: uint64[r], where each leads: positions in the text below `bytes_`, else addresses.
        bytes_: of the text.
    """
    dtype = rows.dtype
    assert dtype.fields is not None
    at = np.arange(len(rows), dtype=np.int64) * dtype.itemsize + dtype.fields[name][1]
    return Fields(at, to, to < np.uint64(bytes_), np.zeros(len(rows), np.int64))


def _exceptions(woven: Woven, clones: CloneMap) -> Section:
    native, total = woven.native.exceptions, woven.layout.total
    found = exceptions_of(woven.source, clones)
    row = np.searchsorted(native.addr, woven.source.sites.exceptions[found.row])
    rows = np.zeros(len(row), _EXCEPTION)
    rows["data"] = (
        native.type[row].astype(np.uint32)
        | native.reg[row].astype(np.uint32) << 8
        | native.flags[row].astype(np.uint32) << 12
        | native.imm[row].astype(np.uint16).astype(np.uint32) << 16
    )
    columns = (_column(rows, "addr", found.addr, total), _column(rows, "fixup", found.other, total))
    return Section("__ex_table", rows.tobytes(), align=4, fields=columns)


def _bugs(woven: Woven, clones: CloneMap) -> Section:
    native, total = woven.native.bugs, woven.layout.total
    found = bugs_of(woven.source, clones)
    size = woven.native.layout.bug_bytes if len(found.row) else max(_BUG)
    if size not in _BUG:
        raise UnsupportedError(
            f"rows of {size} bytes of the kernel's bug table are not written, only those of "
            f"{' or '.join(map(str, _BUG))}"
        )
    row = np.searchsorted(native.addr, woven.source.sites.bugs[found.row])
    rows = np.zeros(len(row), _BUG[size])
    rows["line"], rows["flags"] = native.line[row], native.flags[row]
    leads = {"addr": found.addr, "file": native.file[row], "text": native.text[row]}
    names = rows.dtype.names or ()
    columns = [_column(rows, name, to, total) for name, to in leads.items() if name in names]
    return Section("__bug_table", rows.tobytes(), Flags.ALLOC | Flags.WRITE, 4, columns)


def _orc(woven: Woven) -> tuple[Section, Section]:
    """Where no native row holds, and behind the last clone, the unwinder gives up."""
    native = woven.native.orc
    found = orc_of(woven.source, woven.scope, woven.layout, native, 0)
    rows = np.zeros(len(found.addr), _ORC)
    known = np.flatnonzero(found.row >= 0)
    row = found.row[known]
    sp = np.isin(native.sp_reg[row], (OrcReg.SP, OrcReg.SP_INDIRECT))
    rows["sp_offset"][known] = native.sp_offset[row] + np.where(sp, found.pushed[known], 0)
    rows["bp_offset"][known] = native.bp_offset[row]
    rows["bits"][known] = native.bits[row]
    places = np.zeros(len(rows), np.dtype([("ip", "<i4")]))
    column = _column(places, "ip", found.addr, woven.layout.total)
    return (
        Section(".orc_unwind_ip", places.tobytes(), align=4, fields=(column,)),
        Section(".orc_unwind", rows.tobytes(), align=2),
    )


def _symbols(woven: Woven) -> Symbols:
    """Functions and their parts, each up to the next one."""
    functions = woven.source.tables.functions
    rows = np.flatnonzero(woven.scope.woven & (functions.first_insn >= 0))
    start = woven.layout.start[functions.first_insn[rows]].astype(np.int64)
    names = [woven.names[row] + SUFFIX for row in rows.tolist()]
    return Symbols(names, start, np.append(start[1:], woven.layout.total) - start)
