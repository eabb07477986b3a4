# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver reads of the kernel: names, memory, tables."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from contract_sessions import PAGE, UNMAPPED, Sessions, ask, hello, refusal
from contract_splice import MANY
from kernweave.driver import uapi
from kernweave.driver.client import Driver
from kernweave.driver.uapi import Op
from kernweave.errors import DriverError


class TextContract:
    """Names and memory."""

    def test_lookup_unknown_name_is_zero(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        start, nothing = driver.lookup(["_stext", "no_such_name_kw"])
        assert (start, nothing) == (driver.facts.text_start, 0)

    def test_lookup_nothing_is_empty(self, sessions: Sessions) -> None:
        assert sessions.driver(writer=False).lookup([]) == []

    def test_lookup_unterminated_name_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        assert ask(session, Op.LOOKUP, b"_stext").status == -errno.EINVAL

    def test_read_unmapped_address_faults(self, sessions: Sessions) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver(writer=False).read(UNMAPPED, 8)
        assert refusal(error) == "EFAULT"

    def test_read_user_address_is_refused(self, sessions: Sessions) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver(writer=False).read(PAGE, 8)
        assert refusal(error) == "ERANGE"

    def test_read_fault_names_the_range(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        starts = np.array([driver.facts.text_start, UNMAPPED], np.uint64)
        with pytest.raises(DriverError, match=r"\(item 1\)"):
            driver.read_ranges(starts, starts + np.uint64(8))

    @pytest.mark.parametrize(
        ("sizes", "item"), [((uapi.MAX_READ + 1,), 0), ((uapi.MAX_READ, 1), 1), ((-1,), 0)]
    )
    def test_read_too_large_is_refused_at_its_range(
        self, sessions: Sessions, sizes: tuple[int, ...], item: int
    ) -> None:
        session = sessions.raw()
        start = Driver(session.call, writer=False).facts.text_start
        rows = np.zeros(len(sizes), uapi.RANGE)
        rows["start"] = start
        rows["end"] = [start + size for size in sizes]
        reply = ask(session, Op.READ, rows.tobytes())
        assert (reply.status, reply.detail) == (-errno.E2BIG, item)

    def test_read_part_of_a_row_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        odd = bytes(uapi.RANGE.itemsize + 8)
        assert ask(session, Op.READ, odd).status == -errno.EINVAL

    def test_read_ranges_are_joined_in_order(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        start = driver.facts.text_start
        whole = driver.read(start, 64)
        starts = np.array([start + 32, start], np.uint64)
        assert driver.read_ranges(starts, starts + np.uint64(32)) == whole[32:] + whole[:32]
        assert len(set(whole)) > 1

    def test_read_nothing_is_empty(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        assert driver.read(driver.facts.text_start, 0) == b""

    def test_tables_have_whole_rows(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        assert len(driver.ftrace_records()) >= MANY
        assert (driver.denylist()["start"] <= driver.denylist()["end"]).all()
        assert (driver.kmods()["text_start"] < driver.kmods()["text_end"]).all()
        assert not len(driver.kprobes())
        assert not len(driver.placed())
