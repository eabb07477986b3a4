# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters on ftrace nops, which every target has: laid out, not committed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, Driver, Rows
from kernweave.session.attach import make_pokes
from kernweave.splice.layout import COUNTER_BYTES, bind, draft, make_entries

NOP5 = bytes.fromhex("0f1f440000")
MANY = uapi.BATCH + 44  # pokes: more than one batch


@dataclass(frozen=True)
class Splice:
    """Counters on ftrace nops: sealed code and the pokes that lead to it, not committed."""

    area: Area
    chunk: Chunk
    pokes: Rows

    def text(self, driver: Driver) -> bytes:
        return driver.read_ranges(self.pokes["addr"], self.pokes["addr"] + np.uint64(5))


def nop_sites(driver: Driver, count: int) -> npt.NDArray[np.uint64]:
    """Addresses of ftrace nops where a probe is allowed."""
    records = np.sort(driver.ftrace_records()["ip"])
    start, end = driver.facts.text_start, driver.facts.text_end
    ips = records[(records >= start) & (records + np.uint64(5) <= end)][: 4 * count]
    text = np.frombuffer(driver.read_ranges(ips, ips + np.uint64(5)), "V5")
    denied = driver.denylist()
    allowed = [
        not ((denied["start"] <= ip) & (ip < denied["end"])).any() and bytes(now) == NOP5
        for ip, now in zip(ips, text, strict=True)
    ]
    sites: npt.NDArray[np.uint64] = ips[np.array(allowed, bool)][:count]
    assert len(sites) == count, "the target has too few ftrace nops"
    return sites


def make_splice(driver: Driver, count: int = 2, *, seal: bool = True) -> Splice:
    """Lay counters for some nops out and write them into an area."""
    rough = draft(make_entries(nop_sites(driver, count), np.zeros(count, np.uint32)), [])
    area = driver.area(rough.size)
    chunk = driver.percpu(area, COUNTER_BYTES * count)
    offsets = chunk.offset + COUNTER_BYTES * np.arange(count)
    plan = bind(rough, area.addr, offsets.astype(np.uint64))
    driver.write(area, 0, plan.code)
    if seal:
        driver.seal(area)
    return Splice(area, chunk, make_pokes(plan.pokes))


def take_out(driver: Driver, splice: Splice, txn: int) -> None:
    driver.undo(txn)
    driver.forget(txn)
    driver.quiesce()
    driver.free(splice.area)
