# SPDX-License-Identifier: GPL-2.0-or-later
"""What the analysis calls dead may be overwritten while the kernel works; what is live may not.

`tests/stress/test_poison_long.py` is the long version.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import kernweave
from kernweave.errors import KernweaveError
from kernweave.lab.machine import Lab
from kernweave.session.attach import overwrite_dead
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod
from kernweave.x86.decode import REG_NAMES
from poison import check_poisoned_kernel, load, poisoned

SERIES = "6.1"
HOT = ("vfs_*", "pipe_*", "ksys_*", "*_fair", "futex_*", "handle_*", "kmem_*", "d_*", "sock_*")
SECONDS = 8


def boot(new_lab: Callable[[str], Lab], name: str) -> Lab:
    machine = new_lab(name)
    machine.up(kmod=driver_kmod(SERIES, print), progress=print)
    return machine


def test_kernel_with_everything_dead_overwritten_works(new_lab: Callable[[str], Lab]) -> None:
    machine = boot(new_lab, "poison")
    assert check_poisoned_kernel(machine, SECONDS, HOT) > 3000
    assert "BUG" not in machine.log() and "WARNING" not in machine.log()


def test_live_register_called_dead_is_found_out(new_lab: Callable[[str], Lab]) -> None:
    machine = boot(new_lab, "seeded")
    with pytest.raises(KernweaveError) as caught:  # noqa: SIM117
        with kernweave.connect(f"lab:{machine.name}") as session:
            seeded = seed(session, "vfs_write+0x81", "rbp")
            with poisoned(session, HOT[:1], seeded):
                load(session, SECONDS)
    print(str(caught.value)[:400])
    assert "non-canonical address 0xdead57ab" in machine.log()


def seed(session: Session, point: str, register: str) -> Callable[[int, int], int]:
    """At one point a register that is live counts as dead."""
    (site,) = session.sites(point)
    assert site.addr is not None
    place, wrong = int(site.addr, 16), 1 << REG_NAMES.index(register)

    def clobber(addr: int, dead: int) -> int:
        if addr != place:
            return overwrite_dead(addr, dead)
        assert not dead & wrong
        return dead | wrong

    return clobber
