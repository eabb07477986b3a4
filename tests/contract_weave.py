# SPDX-License-Identifier: GPL-2.0-or-later
"""What a driver refuses of generations: wrong areas, wrong kmods, clones that are not there."""

from __future__ import annotations

import numpy as np
import pytest

from contract_sessions import PAGE, Sessions, refusal
from kernweave.driver import uapi
from kernweave.driver.client import Area, Driver, Generation
from kernweave.driver.uapi import Side
from kernweave.errors import DriverError

NONE = Area(4711, 0, 0)


def generation(kmod: str) -> Generation:
    """One entry, at no useful address."""
    rows = {name: np.zeros(0, dtype) for name, dtype in (("p", uapi.PART), ("m", uapi.MIRROR))}
    places = np.zeros(0, uapi.PLACE)
    return Generation(kmod, np.zeros(1, uapi.ENTRY), rows["p"], rows["m"], 0, places, places)


class WeaveContract:
    """Clones in kmods."""

    def test_area_of_no_bytes_has_counters_but_cannot_be_sealed(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(0)
        assert area.size == 0
        chunk = driver.percpu(area, 64)
        assert not driver.counters(area, chunk, 64).any()
        with pytest.raises(DriverError) as error:
            driver.seal(area)
        assert refusal(error) == "EPERM"
        assert driver.free(area) == 0

    def test_area_with_bytes_gets_no_clones(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        with pytest.raises(DriverError) as error:
            driver.weave(driver.area(PAGE), generation("nobody"))
        assert refusal(error) == "EPERM"

    def test_clones_of_a_kmod_that_is_not_there_are_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        for area in (driver.area(0), NONE):
            with pytest.raises(DriverError) as error:
                driver.weave(area, generation("nobody"))
            assert refusal(error) == "ENOENT"

    def test_driver_itself_is_no_generation(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        with pytest.raises(DriverError) as error:
            driver.weave(driver.area(0), generation("kernweave"))
        assert refusal(error) == "ENOENT"

    def test_area_without_clones_has_nobody_to_be_moved(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        for area in (driver.area(0), driver.area(PAGE), NONE):
            for request in (self._move, Driver.closed):
                with pytest.raises(DriverError) as error:
                    request(driver, area)
                assert refusal(error) == "ENOENT"

    @staticmethod
    def _move(driver: Driver, area: Area) -> None:
        driver.move(area, Side.NATIVE)
