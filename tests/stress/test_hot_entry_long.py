# SPDX-License-Identifier: GPL-2.0-or-later
"""A hot entry with a kprobe is written; `coexist/test_coexist_tracers.py` is the short version.

An emulated CPU may run an int3 that is gone, and kprobes send it to address 0 there: a lab died of
it within 300 rounds before the driver stopped the machine for these writes (docs/design/0007).
"""

from __future__ import annotations

import pytest
from coexist.hot import write_where_all_call
from guest import booted

ROUNDS = 1000


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["splice", "weave"])
@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
def test_who_calls_an_entry_with_a_kprobe_comes_through_a_write(kernel: str, engine: str) -> None:
    with booted("hot-entry", kernel=kernel) as machine:
        write_where_all_call(machine, engine, ROUNDS)
