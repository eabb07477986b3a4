# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's interface as numpy dtypes: the mirror of csrc/kmod/kw_uapi.h."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

VERSION = 5
MAGIC = 0x5245574B

MAX_REQUEST = 64 << 20
MAX_REPLY = 33 << 20
MAX_READ = 32 << 20
MAX_POKES = 1 << 20
MAX_CODE = 256 << 20
MAX_PERCPU = 32 << 10
BATCH = 256
POKE_BYTES = 24


class Op(IntEnum):
    """Requests of `enum kw_op`."""

    HELLO = 1
    LOOKUP = 2
    READ = 3
    KMODS = 4
    DENYLIST = 5
    KPROBES = 6
    FTRACE = 7
    PLACED = 8
    AREA = 9
    PERCPU = 10
    WRITE = 11
    SEAL = 12
    COMMIT = 13
    UNDO = 14
    STATES = 15
    QUIESCE = 16
    COUNTERS = 17
    FREE = 18
    FORGET = 19
    ARM = 20
    DISARM = 21
    COPIES = 22
    RETURNS = 23
    WEAVE = 24
    MOVE = 25
    CLOSED = 26


class State(IntEnum):
    """Where a poke is: `enum kw_state`."""

    WAITING = 0
    PLACED = 1
    EVICTED = 2
    RESTORED = 3
    STUCK = 4
    ARMED = 5
    HELD = 6


class PokeFlag(IntFlag):
    """Bits of `kw_poke.flags`."""

    GROUP = 1
    HOST = 2
    KEEP = 4
    STAY = 8


class PatchedKind(IntEnum):
    """What a `kw_mirror` row is of: `enum kw_patched_kind`."""

    JUMP_LABEL = 0
    STATIC_CALL = 1


class Side(IntEnum):
    """Where tasks are to be: `enum kw_side`."""

    NATIVE = 0
    CLONE = 1


class Owner(IntEnum):
    """Whose change a `kw_patched` row is: `enum kw_owner`."""

    OTHERS = 0
    OURS = 1
    LEFT = 2


class Fact(IntFlag):
    """Bits of `kw_facts.flags`."""

    LOCKS_LIVE = 1
    FTRACE_YIELD = 2
    CALL_DEPTH = 4
    LINE = 8


WRITER = 1

CALL = np.dtype(
    [("req", "<u8"), ("req_len", "<u8"), ("rep", "<u8"), ("rep_cap", "<u8"), ("rep_len", "<u8")]
)
REQ = np.dtype([("magic", "<u4"), ("version", "<u2"), ("op", "<u2"), ("len", "<u8")])
REP = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("op", "<u2"),
        ("status", "<i4"),
        ("detail", "<u4"),
        ("len", "<u8"),
    ]
)
HELLO = np.dtype([("flags", "<u4"), ("pid", "<u4"), ("name", "S32")])
FACTS = np.dtype(
    [
        ("text_start", "<u8"),
        ("text_end", "<u8"),
        ("yield", "<u8"),
        ("kprobe_yield", "<u8"),
        ("text_yield", "<u8"),
        ("livepatch_yield", "<u8"),
        ("native", "<u8"),
        ("pinned", "<u8"),
        ("flags", "<u4"),
        ("cpus", "<u4"),
        ("sizes", "<u4", (6,)),
        ("release", "S64"),
        ("version", "S64"),
    ]
)
RANGE = np.dtype([("start", "<u8"), ("end", "<u8")])
KMOD = np.dtype(
    [
        ("name", "S56"),
        ("text_start", "<u8"),
        ("text_end", "<u8"),
        ("symtab", "<u8"),
        ("strtab", "<u8"),
        ("symbols", "<u8"),
        ("jump_labels", RANGE),
        ("static_calls", RANGE),
        ("exceptions", RANGE),
        ("bugs", RANGE),
    ]
)
PATCHED = np.dtype(
    [("addr", "<u8"), ("len", "<u4"), ("owner", "<u4"), ("original", "u1", (POKE_BYTES,))]
)
RECORD = np.dtype([("ip", "<u8"), ("flags", "<u8")])
SIZE = np.dtype([("value", "<u8")])
AREA = np.dtype([("id", "<u8"), ("addr", "<u8"), ("size", "<u8")])
SLICE = np.dtype([("area", "<u8"), ("off", "<u8"), ("len", "<u8")])
CHUNK = np.dtype([("index", "<u8"), ("offset", "<u8")])
COPY = np.dtype([("addr", "<u8"), ("native", "<u8")])
WEAVE = np.dtype(
    [
        ("area", "<u8"),
        ("native_base", "<u8"),
        ("entries", "<u4"),
        ("parts", "<u4"),
        ("mirrors", "<u4"),
        ("returns", "<u4"),
        ("insns", "<u4"),
        ("pad", "<u4"),
        ("kmod", "S56"),
    ]
)
ENTRY = np.dtype([("site", "<u8"), ("clone", "<u8"), ("slot", "<u8"), ("body", "<u8")])
PART = np.dtype([("start", "<u8"), ("end", "<u8"), ("entry", "<u8")])
MIRROR = np.dtype(
    [("native", "<u8"), ("clone", "<u8"), ("target", "<u8"), ("len", "<u4"), ("kind", "<u4")]
)
PLACE = np.dtype([("clone", "<u4"), ("native", "<u4")])
MOVED = np.dtype([("places", "<u8"), ("visitors", "<u8"), ("pid", "<u8"), ("stop_ns", "<u8")])
COMMIT = np.dtype([("area", "<u8"), ("count", "<u8")])
POKE = np.dtype(
    [
        ("addr", "<u8"),
        ("len", "<u4"),
        ("flags", "<u4"),
        ("old", "u1", (POKE_BYTES,)),
        ("new_", "u1", (POKE_BYTES,)),
    ]
)
TRAP = np.dtype([("addr", "<u8"), ("chunk", "<u8"), ("off", "<u8")])
UNDONE = np.dtype([("restored", "<u8"), ("evicted", "<u8"), ("stuck", "<u8")])

STRUCTS: dict[str, np.dtype[np.void]] = {
    "kw_call": CALL,
    "kw_req": REQ,
    "kw_rep": REP,
    "kw_hello": HELLO,
    "kw_facts": FACTS,
    "kw_range": RANGE,
    "kw_kmod": KMOD,
    "kw_patched": PATCHED,
    "kw_record": RECORD,
    "kw_size": SIZE,
    "kw_area": AREA,
    "kw_slice": SLICE,
    "kw_chunk": CHUNK,
    "kw_copy": COPY,
    "kw_weave": WEAVE,
    "kw_entry": ENTRY,
    "kw_part": PART,
    "kw_mirror": MIRROR,
    "kw_place": PLACE,
    "kw_moved": MOVED,
    "kw_commit": COMMIT,
    "kw_poke": POKE,
    "kw_trap": TRAP,
    "kw_undone": UNDONE,
}
