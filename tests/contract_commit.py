# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver pokes, and what it refuses to."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from contract_sessions import Sessions, ask, refusal
from contract_splice import MANY, NOP5, make_splice, take_out
from kernweave.driver import uapi
from kernweave.driver.client import CommitError, Driver
from kernweave.driver.uapi import Op, State


class CommitContract:
    """What may be poked."""

    def test_commit_into_unsealed_area_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, seal=False)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert refusal(error) == "ENOENT"
        assert splice.text(driver) == 2 * NOP5

    def test_commit_without_pokes_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes[:0])
        assert refusal(error) == "EINVAL"

    def test_commit_with_another_count_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        driver = Driver(session.call)
        splice = make_splice(driver)
        head = np.zeros(1, uapi.COMMIT)
        head["area"], head["count"] = splice.area.id, 3
        request = head.tobytes() + splice.pokes.tobytes()
        assert ask(session, Op.COMMIT, request).status == -errno.EINVAL
        assert splice.text(driver) == 2 * NOP5

    def test_commit_outside_text_is_refused_at_the_poke(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, 2)
        pokes = splice.pokes.copy()
        pokes["addr"][1] = splice.area.addr  # executable, but nobody's text
        pokes["new_"][1, 1:5] = np.frombuffer((0).to_bytes(4, "little"), np.uint8)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EFAULT", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("shift", [-1, +1])
    def test_commit_of_jump_beside_the_area_is_refused(
        self, sessions: Sessions, shift: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        target = splice.area.addr - 1 if shift < 0 else splice.area.addr + splice.area.size
        pokes = splice.pokes.copy()
        distance = target - (int(pokes["addr"][1]) + 5)
        pokes["new_"][1, 1:5] = list(distance.to_bytes(4, "little", signed=True))
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize(
        ("field", "value"),
        [("len", 4), ("len", 6), ("len", 0), ("len", 16), ("new_", 0xE8), ("new_", 0xEB)],
    )
    def test_commit_of_other_than_jump_is_refused(
        self, sessions: Sessions, field: str, value: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        pokes = splice.pokes.copy()
        if field == "len":
            pokes["len"][0] = value
        else:
            pokes["new_"][0, 0] = value
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 0)
        assert splice.text(driver) == 2 * NOP5

    def test_commit_not_ascending_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes[::-1])
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("distance", [0, 4])
    def test_commit_overlapping_is_refused(self, sessions: Sessions, distance: int) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        pokes = splice.pokes[[0, 0]]
        pokes["addr"][1] += np.uint64(distance)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("stale", [0, uapi.BATCH - 1, uapi.BATCH, MANY - 1])
    def test_commit_of_stale_poke_rolls_back_and_names_it(
        self, sessions: Sessions, stale: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        pokes = splice.pokes.copy()
        pokes["old"][stale, 4] ^= 1
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("ESTALE", stale)
        assert splice.text(driver) == MANY * NOP5
        assert not len(driver.placed())
        driver.quiesce()
        driver.free(splice.area)

    def test_commit_places_every_poke(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        assert driver.states(txn).tolist() == [State.PLACED] * MANY
        take_out(driver, splice, txn)

    def test_commit_twice_finds_the_first_in_its_way(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert (refusal(error), error.value.index) == ("ESTALE", 0)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        take_out(driver, splice, txn)
