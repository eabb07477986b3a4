# SPDX-License-Identifier: GPL-2.0-or-later
"""The long version of `tests/vm/test_weave_faults.py`: every stage, both kernels, no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest import shell, target
from test_weave_faults import (
    ALL_STAGES,
    EVERYTHING,
    fault_lab,
    kill_at,
    kill_while,
    lab,
    link,
    native,
)

import kernweave
from kernweave.driver.link import Link
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab

__all__ = ("lab", "link", "native")  # fixtures


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def machine(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with fault_lab(request.param) as booted:
        yield booted


def test_no_memory_left_is_told_or_enough(lab: Lab, link: Link) -> None:
    """A file in memory takes all but some of it; nobody is there whom the kernel could end."""
    folder = "/tmp/kw-full"
    free = int(shell(link, "awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo"))
    with kernweave.connect(target(lab)) as session:
        session.view.refresh()
        session.weaver.prepare()
        shell(
            link,
            f"mkdir -p {folder}; mount -t tmpfs -o size=100% none {folder};"
            f"head -c {free - 48}M /dev/zero > {folder}/file",
        )
        try:
            with session.weave(EVERYTHING, partial=True) as woven:
                print("woven")
            assert woven.text_restored
        except KernweaveError as error:
            print(error)
    with lab.connect() as again:  # theirs may have been ended
        shell(again, f"umount {folder}")


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_client_killed_at_any_stage_leaves_nothing(lab: Lab, stage: str) -> None:
    kill_at(lab, stage)


@pytest.mark.parametrize("stage", ["enters", "leaves"])
def test_client_killed_while_it_enters_or_leaves_many_leaves_nothing(lab: Lab, stage: str) -> None:
    kill_while(lab, stage)
