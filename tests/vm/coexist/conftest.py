# SPDX-License-Identifier: GPL-2.0-or-later
"""The text before and after, a session that counts, and somebody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest import TRACING, Text, assert_exact, read_text, target

import kernweave
from coexist.others import EVENT, OPTIMIZE, PREEMPT, TRAPS_ARMED, shell
from kernweave.driver.link import Link
from kernweave.lab.machine import Lab
from kernweave.session.session import Session


@pytest.fixture(scope="module")
def native(machine: Lab) -> Iterator[Text]:
    """Text as a file finds it and leaves it, with a new session that counts right in the end."""
    before = read_text(machine)
    yield before
    assert_exact(machine)
    assert not before.changed(read_text(machine))


@pytest.fixture
def lab(machine: Lab, native: Text) -> Iterator[Lab]:
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
