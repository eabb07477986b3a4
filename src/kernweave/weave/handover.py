# SPDX-License-Identifier: GPL-2.0-or-later
"""What the driver has to know of a generation: rows of its interface, from the clone map."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernweave.analysis.flow import CALLS
from kernweave.driver import uapi
from kernweave.driver.client import Generation
from kernweave.driver.uapi import PatchedKind
from kernweave.errors import InternalError
from kernweave.image.sites import contains
from kernweave.weave.clonemap import (
    Addrs,
    Entries,
    Patched,
    make_entries,
    make_map,
    make_mirror,
)
from kernweave.weave.generation import Woven

Rows = npt.NDArray[np.void]

_KINDS = {Patched.JUMP_LABEL: PatchedKind.JUMP_LABEL, Patched.STATIC_CALL: PatchedKind.STATIC_CALL}


def make_handover(woven: Woven, kmod: str, base: int) -> Generation:
    """The rows for a generation whose text is at `base`.

    Args:
        woven: what it is made of.
        kmod: its name.
        base: run-time address of its text.
    """
    clones = make_map(woven.source, woven.layout, base)
    entries = make_entries(woven.source, woven.layout, base)
    flow = woven.source.tables.instructions.flow[clones.insn]
    call = np.isin(flow, CALLS) | woven.scope.shapes.static[clones.insn]
    native_base = woven.source.base
    ends = clones.clone + clones.size, clones.native + clones.length
    # control arrives before a counter, which is the same place to a task as behind it
    begins = (
        np.concatenate((clones.arrival, clones.clone, entries.clone)),
        np.concatenate((clones.native, clones.native, entries.body)),
    )
    order = np.lexsort(begins[::-1])
    return Generation(
        kmod=kmod,
        entries=_entries(woven, entries),
        parts=_parts(woven),
        mirrors=_mirrors(woven, base),
        native_base=native_base,
        returns=_places(ends[0][call], ends[1][call], base, native_base),
        insns=_places(begins[0][order], begins[1][order], base, native_base),
    )


def _entries(woven: Woven, found: Entries) -> Rows:
    """`uapi.ENTRY` rows, in the order of the functions."""
    if not contains(woven.source.sites.ftrace, found.body).all():
        raise InternalError("a woven function has no ftrace site at its entry")
    rows = np.zeros(len(found.body), uapi.ENTRY)
    rows["site"], rows["clone"], rows["slot"] = found.body, found.clone, found.slot
    rows["body"] = found.body
    return rows


def _parts(woven: Woven) -> Rows:
    """`uapi.PART` rows of all that is woven."""
    functions = woven.source.tables.functions
    homes = woven.source.tables.instructions.function[woven.layout.slots.insn]
    part = np.flatnonzero(woven.scope.woven & (functions.first_insn >= 0))
    rows = np.zeros(len(part), uapi.PART)
    rows["start"] = functions.addr[part]
    rows["end"] = functions.addr[part] + functions.size[part].astype(np.uint64)
    rows["entry"] = np.searchsorted(homes, functions.parent[part])
    return rows


def _mirrors(woven: Woven, base: int) -> Rows:
    """`uapi.MIRROR` rows; what ftrace does to its sites is done natively only."""
    found = make_mirror(woven.source, woven.scope, woven.layout, base)
    chosen = found.kind != Patched.FTRACE
    rows = np.zeros(int(chosen.sum()), uapi.MIRROR)
    rows["native"], rows["clone"] = found.native[chosen], found.clone[chosen]
    rows["target"], rows["len"] = found.target[chosen], found.length[chosen]
    kinds = np.zeros(len(Patched), np.uint32)
    kinds[list(_KINDS)] = list(_KINDS.values())
    rows["kind"] = kinds[found.kind[chosen]]
    return rows


def _places(clone: Addrs, native: Addrs, base: int, native_base: int) -> Rows:
    rows = np.zeros(len(clone), uapi.PLACE)
    rows["clone"] = clone - np.uint64(base)
    rows["native"] = native - np.uint64(native_base)
    return rows
