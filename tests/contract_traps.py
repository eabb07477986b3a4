# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver does with kprobes of its own."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from contract_sessions import PAGE, Sessions, refusal
from contract_splice import nop_sites
from kernweave.driver import uapi
from kernweave.driver.uapi import Owner
from kernweave.errors import DriverError


class TrapContract:
    """Traps that count, through the kernel's own kprobes."""

    def test_traps_are_armed_where_allowed_and_taken_out(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        site = int(nop_sites(driver, 1)[0]) + 5  # the instruction behind an ftrace nop
        area = driver.area(PAGE)
        chunk = driver.percpu(area, 16)
        traps = np.zeros(4, uapi.TRAP)
        traps["addr"] = [site, area.addr, site, site]
        traps["chunk"] = [chunk.index, chunk.index, chunk.index + 1, chunk.index]
        traps["off"] = [8, 0, 0, 16]
        before = driver.read(site, 1)
        number, statuses = driver.arm(area, traps)
        codes = [0, -errno.ENOENT, -errno.ENOENT, -errno.E2BIG]  # no text, no chunk, no room
        assert statuses.tolist() == codes, f"{statuses} at {site:#x}"
        rows = driver.kprobes()
        found = rows[["addr", "len", "owner"]].tolist()
        assert found == [(site, 1, Owner.OURS)], found
        assert rows["original"][0, :1].tobytes() == before
        with pytest.raises(DriverError) as error:
            driver.free(area)
        assert refusal(error) == "EBUSY"
        assert driver.disarm(number).shape == (4,)
        assert driver.read(site, 1) == before
        assert not len(driver.kprobes())
        assert driver.disarm(number).shape == (4,)
        driver.quiesce()
        driver.free(area)

    def test_traps_are_taken_out_by_close(self, sessions: Sessions) -> None:
        reader, writer = sessions.driver(writer=False), sessions.driver()
        site = int(nop_sites(writer, 1)[0]) + 5
        before = reader.read(site, 1)
        area = writer.area(PAGE)
        traps = np.zeros(1, uapi.TRAP)
        traps["addr"], traps["chunk"] = site, writer.percpu(area, 8).index
        assert writer.arm(area, traps)[1].tolist() == [0]
        assert reader.read(site, 1) == b"\xcc" != before
        sessions.close_last()
        assert reader.read(site, 1) == before
