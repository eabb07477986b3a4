# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels newer than the one that all other tests run on: counts, the tables, the way back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from command import Kernweave, rows
from guest import assert_exact, booted, read_text, target

import kernweave
from kernweave.errors import UnsupportedError
from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetch_headers, fetch_kernel
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session

READS = 1000


@pytest.fixture(scope="module")
def newer(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab of the series; skipped where its packages cannot be had, their versions come and go."""
    try:
        fetch_headers(fetch_kernel(request.param, print), print)
    except UnsupportedError as error:
        pytest.skip(f"kernel {request.param} cannot be fetched: {error}")
    with booted(f"newer-{request.param}", kernel=request.param) as lab:
        yield lab


def counts(hits: Attachment) -> dict[tuple[str, str], int]:
    return {(row.point, row.kind): row.hits for row in hits.rows()}


def read_zeros(session: Session) -> None:
    argv = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", f"count={READS}", "status=none"]
    session.run(argv, check=True)


@pytest.mark.parametrize("newer", ["6.12", "7.2"], indirect=True)
def test_newer_kernel_counts_exactly_and_restores_its_text(newer: Lab) -> None:
    before = read_text(newer)
    assert_exact(newer)
    points = ("read_zero@insns", "write_null@insns", "vfs_read", "vfs_read@blocks")
    with kernweave.connect(target(newer)) as session:
        with session.splice(*points, "vfs_read@return", partial=True) as hits:
            read_zeros(session)  # whoever was inside when the counters came is gone
            first = counts(hits)
            read_zeros(session)
            more = {key: count - first[key] for key, count in counts(hits).items()}
        assert hits.text_restored
        assert all(row.exact and not row.missed for row in hits.rows())
        with session.splice("read_zero@blocks", tactics=("int3",), partial=True) as traps:
            read_zeros(session)
        assert {row.hits for row in traps.rows()} == {0, READS} and traps.text_restored
    only_dd = {count for (point, _), count in more.items() if "vfs_read" not in point}
    assert only_dd == {0, READS}
    # others read as well, but whoever enters a function leaves it
    entered = more["vfs_read", "entry"]
    assert READS <= entered < 2 * READS
    assert entered == sum(count for (_, kind), count in more.items() if kind == "return")
    assert {"nop5", "jmp32"} <= set(hits.tactics())
    assert not before.changed(read_text(newer))


@pytest.mark.parametrize("newer", ["7.2"], indirect=True)
def test_newer_kernel_is_analysed_listed_and_shown(newer: Lab) -> None:
    run = Kernweave(newer.name)
    (found,) = rows(run("analyze", "--json"))
    assert found["kernel"].startswith(newer.series) and found["functions"] > 50_000
    assert (
        "ssize_t vfs_read(struct file *file, char *buf, size_t count"
        in run("list", "vfs_r*").stdout
    )
    shown = run("show", "vfs_read").stdout
    assert "nop5" in shown and "call rw_verify_area" in shown
