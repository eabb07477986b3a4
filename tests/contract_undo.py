# SPDX-License-Identifier: GPL-2.0-or-later
"""How every driver puts the text back."""

from __future__ import annotations

import pytest

from contract_sessions import Sessions, refusal
from contract_splice import MANY, NOP5, make_splice, take_out
from kernweave.driver.uapi import Owner, State
from kernweave.errors import DriverError


class UndoContract:
    """How everything is put back."""

    def test_undo_restores_identical_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        before = splice.text(driver)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) != before
        done = driver.undo(txn)
        assert (done.restored, done.evicted, done.stuck) == (MANY, 0, 0)
        assert done.stuck_addrs == ()
        assert splice.text(driver) == before
        assert driver.states(txn).tolist() == [State.RESTORED] * MANY

    def test_undo_twice_says_the_same(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        assert driver.undo(txn) == driver.undo(txn)
        assert splice.text(driver) == 2 * NOP5
        take_out(driver, splice, txn)

    def test_undo_of_unknown_transaction_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        for use in (driver.undo, driver.states, driver.forget):
            with pytest.raises(DriverError) as error:
                use(txn + 1000)
            assert refusal(error) == "ENOENT"

    def test_free_of_reachable_area_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.commit(splice.area, splice.pokes)
        driver.quiesce()
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EBUSY"

    def test_free_before_quiesce_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.quiesce()  # one that comes too early does not count
        driver.undo(driver.commit(splice.area, splice.pokes))
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EAGAIN"
        driver.quiesce()
        driver.free(splice.area)

    def test_free_needs_every_transaction_undone(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        first = driver.commit(splice.area, splice.pokes[:1])
        second = driver.commit(splice.area, splice.pokes[1:])
        driver.undo(first)
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EBUSY"
        assert splice.text(driver)[:5] == NOP5
        assert splice.text(driver)[5:] != NOP5
        driver.undo(second)
        driver.quiesce()
        driver.free(splice.area)

    def test_counters_outlive_the_undo(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.undo(driver.commit(splice.area, splice.pokes))
        assert driver.counters(splice.area, splice.chunk, 16).shape == (driver.facts.cpus, 2)

    def test_placed_lists_original_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        rows = sessions.driver(writer=False).placed()
        assert rows["addr"].tolist() == splice.pokes["addr"].tolist()
        assert rows["len"].tolist() == [5, 5]
        assert rows["owner"].tolist() == [Owner.OURS] * 2
        assert rows["original"][:, :5].tobytes() == 2 * NOP5
        driver.undo(txn)
        assert not len(driver.placed())

    def test_forget_of_placed_transaction_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        with pytest.raises(DriverError) as error:
            driver.forget(txn)
        assert refusal(error) == "EBUSY"
        assert len(driver.placed()) == 2

    def test_forget_of_undone_transaction_drops_it(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        driver.undo(txn)
        driver.forget(txn)
        with pytest.raises(DriverError) as error:
            driver.states(txn)
        assert refusal(error) == "ENOENT"

    def test_close_restores_everything(self, sessions: Sessions) -> None:
        reader = sessions.driver(writer=False)
        writer = sessions.driver()
        splice = make_splice(writer, MANY)
        writer.commit(splice.area, splice.pokes)
        assert len(reader.placed()) == MANY
        sessions.close_last()
        assert splice.text(reader) == MANY * NOP5
        assert not len(reader.placed())
