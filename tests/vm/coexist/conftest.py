# SPDX-License-Identifier: GPL-2.0-or-later
"""One lab for all of these tests: a session that counts, and somebody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest import TRACING, assert_exact, booted, read_text, target

import kernweave
from coexist.others import EVENT, OPTIMIZE, PREEMPT, TRAPS_ARMED, shell
from kernweave.driver.link import Link
from kernweave.lab.machine import Lab
from kernweave.session.session import Session


@pytest.fixture(scope="package")
def one_boot() -> Iterator[Lab]:
    with booted("coexist") as lab:
        yield lab


@pytest.fixture(scope="module")
def machine(one_boot: Lab) -> Iterator[Lab]:
    """The lab; after a module's tests its text is what it was, and a new session counts right."""
    before = read_text(one_boot)
    yield one_boot
    assert_exact(one_boot)
    assert not before.changed(read_text(one_boot))


@pytest.fixture
def lab(machine: Lab) -> Iterator[Lab]:
    """The lab, whose log must stay clean."""
    yield machine
    assert not machine.trouble()


@pytest.fixture
def session(lab: Lab) -> Iterator[Session]:
    with kernweave.connect(target(lab)) as made:
        yield made


@pytest.fixture
def link(lab: Lab) -> Iterator[Link]:
    """A second session, of somebody else, who tidies up."""
    with lab.connect() as opened:
        yield opened
        shell(
            opened,
            f"""cd {TRACING}
            echo nop > current_tracer
            echo > set_ftrace_filter
            for e in events/kprobes/*/enable; do [ ! -e $e ] || echo 0 > $e; done
            echo > kprobe_events
            echo 0 > {EVENT}
            echo > trace
            echo 1 > {OPTIMIZE}
            echo 1 > {TRAPS_ARMED}
            echo voluntary > {PREEMPT}""",
        )
