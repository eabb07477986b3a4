# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver does with groups and springboards: the fake and the real one."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from contract_sessions import Sessions, frame, refusal
from contract_splice import MANY, NOP5, Splice, make_splice, nop_sites
from kernweave.driver import uapi
from kernweave.driver.client import CommitError, Driver
from kernweave.driver.uapi import Op, PokeFlag, State

CANDIDATES = 600
REACH = 100
PATIENCE_S = 120.0


def near_sites(driver: Driver) -> int:
    """The first nop that has another one in reach of a short jump."""
    ips = nop_sites(driver, CANDIDATES if driver.facts.release != "0.0-fake" else 8)
    return int(np.flatnonzero(np.diff(ips) <= REACH)[0])


def make_short(driver: Driver, *, seal: bool = True) -> Splice:
    """Two counters on nops near each other: the first is reached through the second's jump."""
    splice = make_splice(driver, near_sites(driver) + 2, seal=seal)
    pokes = splice.pokes[-2:].copy()
    distance = int(pokes["addr"][1] - pokes["addr"][0]) - 2
    pokes["new_"][0, :5] = [0xEB, distance, 0xCC, 0xCC, 0xCC]
    pokes["flags"] = [0, PokeFlag.HOST]
    return replace(splice, pokes=pokes)


def commit_groups(splice: Splice) -> bytes:
    """The request, for a session that does not wait for the answer."""
    splice.pokes["flags"] = PokeFlag.GROUP
    head = np.zeros(1, uapi.COMMIT)
    head["area"], head["count"] = splice.area.id, len(splice.pokes)
    return frame(Op.COMMIT, head.tobytes() + splice.pokes.tobytes())


class GroupContract:
    """Somebody may be between the instructions of a group, and on a springboard."""

    def test_group_is_placed_and_restored(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        splice.pokes["flags"] = PokeFlag.GROUP
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        assert driver.states(txn).tolist() == [State.PLACED] * 2
        assert driver.undo(txn).restored == 2
        assert splice.text(driver) == 2 * NOP5

    def test_group_of_stale_bytes_takes_the_others_back(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        splice.pokes["flags"] = PokeFlag.GROUP
        splice.pokes["old"][1, 4] ^= 1
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert (refusal(error), error.value.index) == ("ESTALE", 1)
        assert splice.text(driver) == 2 * NOP5
        assert not len(driver.placed())

    def test_commit_whose_client_vanishes_leaves_nothing(self, sessions: Sessions) -> None:
        splice = make_splice(sessions.driver(), MANY)
        sessions.vanish_last(commit_groups(splice))
        following = sessions.driver()
        assert splice.text(following) == MANY * NOP5
        assert not len(following.placed())

    def test_short_jump_is_placed_and_restored(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_short(driver)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        assert driver.undo(txn).restored == 2
        assert splice.text(driver) == 2 * NOP5
        driver.forget(txn)
        driver.quiesce()
        driver.free(splice.area)

    def test_short_jump_in_a_group_is_placed(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_short(driver)
        splice.pokes["flags"] |= np.uint32(PokeFlag.GROUP)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        assert driver.undo(txn).restored == 2

    @pytest.mark.parametrize("off", [1, 2, 5])
    def test_short_jump_beside_a_springboard_is_refused(self, sessions: Sessions, off: int) -> None:
        driver = sessions.driver()
        splice = make_short(driver)
        splice.pokes["new_"][0, 1] += off
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 0)

    def test_short_jump_to_what_is_no_host_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_short(driver)
        splice.pokes["flags"] = 0
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 0)

    def test_close_restores_springboards_in_the_end(self, sessions: Sessions) -> None:
        reader, writer = sessions.driver(writer=False), sessions.driver()
        splice = make_short(writer)
        writer.commit(splice.area, splice.pokes)
        sessions.close_last()
        assert splice.text(reader)[:5] == NOP5  # nobody gets there any more
        deadline = time.monotonic() + PATIENCE_S
        while len(reader.placed()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert splice.text(reader) == 2 * NOP5
        assert not len(reader.placed())
