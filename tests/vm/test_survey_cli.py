# SPDX-License-Identifier: GPL-2.0-or-later
"""`sites`, `list` and `show` against a real kernel; and kernweave inside its own lab."""

from __future__ import annotations

import json
import sys

import pytest
from command import Kernweave, rows

from kernweave.lab.machine import Lab
from kernweave.lab.packages import fetched_kernel
from kernweave.session.session import Session


@pytest.fixture
def run(machine: Lab) -> Kernweave:
    return Kernweave(machine.name)


def test_sites_verdicts_are_what_count_does(run: Kernweave) -> None:
    *verdicts, end = rows(run("sites", "vfs_read@insns", "--json"))
    assert {one["schema"] for one in verdicts} == {"kernweave.site/1"}
    assert end["requested"] == len(verdicts) == end["placed"] + len(end["refused"])
    *counts, _ = rows(run("count", "vfs_read@insns", "--json", "--", "true"))
    planned = {one["point"]: one["tactic"] for one in verdicts if one["tactic"]}
    assert {row["point"]: row["tactic"] for row in counts} == planned


def test_sites_every_verdict_has_a_tactic_or_a_reason(run: Kernweave) -> None:
    *verdicts, _ = rows(run("sites", "vfs_*@insns", "no_such", "init_once", "--json"))
    assert all((one["tactic"] is None) != (one["reason"] is None) for one in verdicts)
    assert [one["reason"] for one in verdicts[-2:]] == ["no_such_name", "ambiguous"]


def test_sites_changes_nothing_and_needs_no_writer(run: Kernweave, machine: Lab) -> None:
    with Session(f"lab:{machine.name}") as writer:
        assert rows(run("sites", "vfs_read", "--json"))[0]["tactic"] == "nop5"
        assert not len(writer.driver.placed())


def test_list_names_are_points(run: Kernweave) -> None:
    found = rows(run("list", "vfs_*", "--json"))
    names = [one["function"] for one in found]
    assert "vfs_read" in names and len(names) > 50
    assert all(one["tactic"] or one["reason"] for one in rows(run("sites", *names, "--json"))[:-1])
    assert "9p:" in run("list", "9p:*").stdout


def test_list_no_match_is_one_error(run: Kernweave) -> None:
    assert "no function matches no_such_*" in run("list", "no_such_*", status=1).stderr


def test_show_blocks_are_those_that_count_places(run: Kernweave) -> None:
    shown = rows(run("show", "vfs_read", "--json"))
    leaders = [one["addr"] for one in shown if one["leader"]]
    sites = rows(run("sites", "vfs_read@blocks", "--json"))[:-1]
    assert leaders == [one["addr"] for one in sites]
    every = rows(run("sites", "vfs_read@insns", "--json"))[:-1]
    assert [one["tactic"] for one in shown] == [one["tactic"] for one in every]


def test_show_entry_of_a_traced_function_has_dead_scratch(run: Kernweave) -> None:
    first = rows(run("show", "vfs_read", "--json"))[0]
    assert {"r10", "r11", "flags"} <= set(first["dead"].split())
    assert first["tactic"] == "nop5" and first["text"].startswith("nop")


def test_show_fits_80_columns(run: Kernweave) -> None:
    lines = run("show", "vfs_read").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("30 blocks, ") or " blocks, " in lines[-1]


def test_local_counts_inside_the_lab(run: Kernweave) -> None:
    tree = fetched_kernel("6.1")
    assert tree is not None
    inner = (
        f"mkdir -p /lib/modules; cd /lib/modules; test -e {tree.release} || ln -s {tree.modules} .;"
        f" {sys.executable} -m kernweave --target local count vfs_read@edges vfs_write"
        " --json -- sh -c 'echo > /dev/null; exit 3'"
    )
    done = run("lab", "exec", "--", "sh", "-c", inner, status=3)
    *counts, end = rows(done)
    assert {row["tactic"] for row in counts if row["hits"]} == {"clone", "nop5"}
    assert end["target"] == "local" and end["text_restored"]
    assert end["command"]["exit"] == 3


def test_local_second_writer_or_not_root_is_told_so(run: Kernweave, machine: Lab) -> None:
    program = (
        "import json, os, kernweave, kernweave.session.session as session\n"
        "session._LEAVING_S = 0\n"  # the first is of the host, where nobody here sees it alive
        "for user in (0, 65534):\n"
        "    os.setuid(user)\n"
        "    try: kernweave.connect('local')\n"
        "    except kernweave.KernweaveError as error: print(json.dumps(str(error)))"
    )
    with Session(f"lab:{machine.name}"):
        done = run("lab", "exec", "--", sys.executable, "-c", program)
    busy, denied = map(json.loads, done.stdout.splitlines())
    assert "another session is changing this kernel: pid" in busy
    assert denied.startswith("only root may open /dev/kernweave")
