# SPDX-License-Identifier: GPL-2.0-or-later
"""What every driver does with executable memory and counters."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from contract_sessions import PAGE, Sessions, ask, refusal
from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, Driver
from kernweave.driver.uapi import Op
from kernweave.errors import DriverError


class AreaContract:
    """Executable memory and counters."""

    def test_area_new_is_whole_pages_of_int3(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE + 1)
        assert area.size == 2 * PAGE
        assert driver.read(area.addr, area.size) == b"\xcc" * area.size

    @pytest.mark.parametrize("size", [uapi.MAX_CODE + 1, 1 << 63])
    def test_area_of_wrong_size_is_refused(self, sessions: Sessions, size: int) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver().area(size)
        assert refusal(error) == "E2BIG"

    def test_area_written_holds_the_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.write(area, PAGE - 3, b"abc")
        assert driver.read(area.addr + PAGE - 4, 4) == b"\xccabc"

    @pytest.mark.parametrize("off", [PAGE - 2, PAGE, PAGE + 1, 1 << 63, (1 << 64) - 1])
    def test_area_write_beyond_its_end_is_refused(self, sessions: Sessions, off: int) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        with pytest.raises(DriverError) as error:
            driver.write(area, off, b"abc")
        assert refusal(error) == "E2BIG"
        assert driver.read(area.addr, PAGE) == b"\xcc" * PAGE

    def test_area_write_with_wrong_length_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        area = Driver(session.call).area(PAGE)
        row = np.zeros(1, uapi.SLICE)
        row["area"], row["len"] = area.id, 4
        assert ask(session, Op.WRITE, row.tobytes() + b"abc").status == -errno.E2BIG

    def test_area_write_after_seal_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.write(area, 0, b"abc")
        driver.seal(area)
        driver.seal(area)
        with pytest.raises(DriverError) as error:
            driver.write(area, 0, b"xyz")
        assert refusal(error) == "EPERM"
        assert driver.read(area.addr, 3) == b"abc"

    def test_area_never_reachable_is_freed_at_once(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.free(area)
        with pytest.raises(DriverError) as error:
            driver.free(area)
        assert refusal(error) == "ENOENT"

    def test_area_of_another_number_is_unknown(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        wrong = Area(driver.area(PAGE).id + 1000, 0, PAGE)
        for use in (driver.seal, driver.free, lambda area: driver.percpu(area, 8)):
            with pytest.raises(DriverError) as error:
                use(wrong)
            assert refusal(error) == "ENOENT"

    def test_counters_new_are_zero_for_every_cpu(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        first, second = driver.percpu(area, 24), driver.percpu(area, uapi.MAX_PERCPU)
        assert (first.index, second.index) == (0, 1)
        assert first.offset != second.offset
        hits = driver.counters(area, first, 24)
        assert hits.shape == (driver.facts.cpus, 3)
        assert not hits.any()
        assert driver.counters(area, second, 8).shape == (driver.facts.cpus, 1)

    @pytest.mark.parametrize("size", [0, 12, uapi.MAX_PERCPU + 8])
    def test_counters_of_wrong_size_are_refused(self, sessions: Sessions, size: int) -> None:
        driver = sessions.driver()
        with pytest.raises(DriverError) as error:
            driver.percpu(driver.area(PAGE), size)
        assert refusal(error) == "E2BIG"

    @pytest.mark.parametrize(
        ("index", "size", "code"), [(1, 8, "ENOENT"), (0, 24, "E2BIG"), (0, 4, "E2BIG")]
    )
    def test_counters_read_outside_are_refused(
        self, sessions: Sessions, index: int, size: int, code: str
    ) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        chunk = driver.percpu(area, 16)
        with pytest.raises(DriverError) as error:
            driver.counters(area, Chunk(index, chunk.offset), size)
        assert refusal(error) == code
