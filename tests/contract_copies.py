# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver does with copies that are looked up by their address: fake and real one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from contract_group import make_short, near_sites
from contract_sessions import Sessions, refusal
from contract_splice import NOP5, Splice, make_splice, take_out
from kernweave.driver import uapi
from kernweave.driver.client import Area, Driver, Rows
from kernweave.driver.uapi import PokeFlag
from kernweave.errors import DriverError

PATIENCE_S = 120.0


def make_hook(driver: Driver) -> tuple[Splice, int]:
    """A poke that stays as long as there are copies, placed, and its transaction."""
    splice = make_splice(driver, 1)
    splice.pokes["flags"] = PokeFlag.KEEP
    return splice, driver.commit(splice.area, splice.pokes)


def copies(area: Area, *offs: int) -> Rows:
    rows = np.zeros(len(offs), uapi.COPY)
    rows["addr"] = np.uint64(area.addr) + np.array(offs, np.uint64)
    rows["native"] = 1 + np.arange(len(offs))
    return rows


class CopiesContract:
    """An area with copies needs a splice that translates their addresses, and outlives it not."""

    def test_copies_without_a_hook_are_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        hook, txn = make_hook(driver)
        take_out(driver, hook, txn)
        area = driver.area(64)
        with pytest.raises(DriverError) as error:
            driver.copies(area, copies(area, 0))
        assert refusal(error) == "ENOLINK"

    @pytest.mark.parametrize("offs", [(), (8, 8), (8, 0), (4096,), (-1,)], ids=str)
    def test_copies_of_wrong_place_or_order_are_refused(
        self, sessions: Sessions, offs: tuple[int, ...]
    ) -> None:
        driver = sessions.driver()
        make_hook(driver)
        area = driver.area(64)
        rows = copies(area, *(off % (1 << 64) for off in offs))
        with pytest.raises(DriverError) as error:
            driver.copies(area, rows)
        assert refusal(error) == "EINVAL"

    def test_copies_are_told_once_and_before_the_area_is_sealed(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        make_hook(driver)
        areas = [driver.area(64), driver.area(64)]
        driver.copies(areas[0], copies(areas[0], 0, 8))
        driver.seal(areas[1])
        for area in areas:
            with pytest.raises(DriverError) as error:
                driver.copies(area, copies(area, 0))
            assert refusal(error) == "EPERM"

    def test_hook_stays_as_long_as_an_area_has_copies(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        hook, txn = make_hook(driver)
        area = driver.area(64)
        driver.copies(area, copies(area, 0, 63))
        done = driver.undo(txn)
        assert done.stuck_addrs == tuple(hook.pokes["addr"].tolist())
        assert hook.text(driver) != NOP5
        assert driver.free(area) == 0
        assert driver.undo(txn).restored == 1
        assert hook.text(driver) == NOP5

    def test_close_restores_the_hook_in_the_end(self, sessions: Sessions) -> None:
        reader, writer = sessions.driver(writer=False), sessions.driver()
        hook, _ = make_hook(writer)
        area = writer.area(64)
        writer.copies(area, copies(area, 0))
        sessions.close_last()
        deadline = time.monotonic() + PATIENCE_S
        while len(reader.placed()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hook.text(reader) == NOP5
        assert not len(reader.placed())

    def test_new_session_finds_neither_springboards_nor_a_hook(self, sessions: Sessions) -> None:
        """Though the hook must outlive the springboards' area, and that the springboards."""
        writer = sessions.driver()
        hook = make_splice(writer, near_sites(writer) + 3)
        hook.pokes["flags"] = PokeFlag.KEEP
        writer.commit(hook.area, hook.pokes[-1:])
        short = make_short(writer, seal=False)
        writer.copies(short.area, copies(short.area, 0))
        writer.seal(short.area)
        writer.commit(short.area, short.pokes)
        sessions.close_last()
        following = sessions.driver()
        assert following.facts.pinned == 0
        assert not len(following.placed())

    def test_new_session_finds_no_hook_that_only_waits(self, sessions: Sessions) -> None:
        writer = sessions.driver()
        make_hook(writer)
        area = writer.area(64)
        writer.copies(area, copies(area, 0))
        sessions.close_last()
        assert not len(sessions.driver().placed())
