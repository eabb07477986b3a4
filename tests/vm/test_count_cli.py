# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line against a real kernel: rows, exit statuses, errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from command import Kernweave, rows
from guest import LONGEST_S

from kernweave.driver.client import Driver
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod


@pytest.fixture
def run(machine: Lab) -> Kernweave:
    return Kernweave(machine.name)


def test_count_entry_prints_a_row_and_an_end_row(run: Kernweave) -> None:
    row, end = rows(run("count", "vfs_read", "--json", "--", "true"))
    assert (row["schema"], row["point"], row["kind"]) == ("kernweave.count/1", "vfs_read", "entry")
    assert row["tactic"] == "nop5" and row["exact"] and row["hits"] > 0 and row["missed"] == 0
    assert (end["requested"], end["placed"], end["refused"]) == (1, 1, [])
    assert end["text_restored"] and end["unrestored"] == [] and end["hits"] == row["hits"]
    assert end["command"] == {"argv": ["true"], "exit": 0, "signal": None}


def test_count_known_workload_counts_it_exactly(run: Kernweave) -> None:
    command = ("dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=23", "status=none")
    found = {
        row["point"]: row["hits"]
        for row in rows(run("count", "read_zero", "write_null", "--json", "--", *command))
        if row["schema"] == "kernweave.count/1"
    }
    assert found == {"read_zero": 23, "write_null": 23}


def test_count_every_printed_point_is_accepted_as_input(run: Kernweave) -> None:
    first = rows(run("count", "vfs_read@blocks", "--json", "--", "true"))[:-1]
    points = [row["point"] for row in first]
    second = rows(run("count", *points, "--json", "--", "true"))[:-1]
    assert [row["addr"] for row in second] == [row["addr"] for row in first]


def test_count_placed_and_refused_add_up_to_requested(run: Kernweave) -> None:
    *placed, end = rows(run("count", "vfs_read@insns", "--json", "--", "true"))
    assert end["requested"] == end["placed"] + len(end["refused"])
    assert end["placed"] == len(placed)
    assert {one["reason"] for one in end["refused"]} <= {"bug_entry", "jump_label"}
    assert {"nop5", "jmp32", "group"} <= set(end["tactics"])


def test_count_traps_are_named_in_a_warning_and_can_be_forbidden(run: Kernweave) -> None:
    some = ("count", "vfs_read@blocks", "--json", "--tactic")
    done = run(*some, "nop5,jmp32,int3", "--", "true")
    traps = rows(done)[-1]["tactics"]["int3"]
    assert f"{traps} of " in done.stderr and "trap" in done.stderr
    done = run(*some, "nop5,jmp32", "--no-trap", "--", "true")
    end = rows(done)[-1]
    assert "int3" not in end["tactics"] and "trap" not in done.stderr
    assert sum(one["reason"] == "too_short" for one in end["refused"]) == traps


def test_count_trap_counts_a_known_workload_exactly(run: Kernweave) -> None:
    command = ("dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=23", "status=none")
    points = [row["point"] for row in rows(run("sites", "read_zero@blocks", "--json"))[:-1]]
    tactics = ("--tactic", "int3,nop5", "--partial")
    done = run("count", *points, "read_zero", *tactics, "--json", "--", *command)
    found = [row for row in rows(done) if row["schema"] == "kernweave.count/1"]
    traps = {row["hits"] for row in found if row["tactic"] == "int3"}
    assert traps <= {0, 23} and 23 in traps
    assert all(row["missed"] == 0 for row in found)


def test_count_command_status_is_passed_on(run: Kernweave) -> None:
    run("count", "vfs_read", "--", "sh", "-c", "exit 7", status=7)
    run("count", "vfs_read", "--", "sh", "-c", "kill -9 $$", status=137)
    run("count", "vfs_read", "--", "no-such-program", status=127)


def test_count_for_ends_the_command_with_sigterm(run: Kernweave) -> None:
    done = run("count", "vfs_read", "--for", "0.5", "--json", "--", "sleep", "600", status=143)
    assert rows(done)[-1]["command"] == {"argv": ["sleep", "600"], "exit": 143, "signal": 15}


def test_count_without_command_ends_at_interrupt_as_success(run: Kernweave, machine: Lab) -> None:
    with subprocess.Popen(
        [*run.argv, "count", "vfs_read", "--json"], stdout=subprocess.PIPE, text=True
    ) as client:
        with Session(f"lab:{machine.name}", writer=False) as watcher:
            entry = watcher.driver.lookup(["vfs_read"])[0]
            while entry not in watcher.driver.placed()["addr"]:
                assert client.poll() is None
        client.send_signal(signal.SIGINT)
        out, _ = client.communicate(timeout=LONGEST_S)
    assert client.returncode == 0
    assert json.loads(out.splitlines()[-1])["text_restored"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["count", "vfs_raed"], 1, ["no function vfs_raed", "near: vfs_read"]),
        (["count", "init_once"], 1, ["init_once#1", "init_once#2", "ambiguous"]),
        (["count", "vfs_read+0x3"], 1, ["starts at +0x0", "next at +0x5", "not_boundary"]),
        (["count", "no_such_*"], 1, ["no function matches no_such_*"]),
        (["count", "vfs_read", "--for", "0"], 2, ["--for 0 is no time"]),
        (["count", "vfs_read@paths"], 2, ["@paths is not there yet"]),
        (["count", "vfs_read@edges", "--engine", "splice"], 1, ["counted in a clone only", "edge"]),
        (
            ["count", "vfs_read+0x0->+0x0"],
            1,
            ["no edge inside the function leaves +0x0", "no_edge"],
        ),
        (["count", "vfs_read->+0x5"], 2, ["not a point", "function+0xOFF->+0xOFF"]),
        (["count", "vfs_read", "--scope", "flow"], 2, ["--scope is not there yet"]),
        (["count", "vfs_read", "--engine", "weave", "--tactic", "jmp32"], 2, ["contradict"]),
        (["count", "vfs_read", "-o", "x.xml"], 2, ["cannot write x.xml", ".jsonl, .csv"]),
        (["count", "vfs_read", "-o", "/no/folder/x.csv"], 2, ["no folder /no/folder"]),
        (["count", "vfs_read", "--no-trap", "--tactic", "int3"], 2, ["contradict"]),
        (["count", "vfs_read+0x5", "--tactic", "jmp32"], 1, ["site needs 5 bytes", "too_short"]),
        (["count", "vfs_read", "--tactic", "magic"], 2, ["no tactic 'magic'"]),
        (["count", "vfs read"], 2, ["not a point"]),
        (["count"], 2, ["POINT"]),
    ],
)
def test_count_bad_input_is_one_error_and_changes_nothing(
    run: Kernweave, machine: Lab, args: list[str], status: int, words: list[str]
) -> None:
    done = run(*args, status=status)
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    with Session(f"lab:{machine.name}", writer=False) as watcher:
        assert not len(watcher.driver.placed())


def test_count_poison_is_for_labs_only(run: Kernweave) -> None:
    for target in ("local", "ssh://there"):
        run.argv[run.argv.index("--target") + 1] = target
        done = run("count", "vfs_read", "--poison", "--json", status=2)
        assert f"not on {target}" in done.stderr


def test_count_edges_leading_to_a_block_add_up_to_its_hits(run: Kernweave) -> None:
    """Woven, with everything dead overwritten; every printed point means the same again."""
    points = [f"vfs_read@{one}" for one in ("blocks", "edges", "loads", "stores")]
    command = ("dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=1000", "status=none")
    *found, end = rows(run("count", *points, "--poison", "--json", "--", *command))
    assert end["tactics"] == {"clone": len(found)} and end["refused"] == [] and end["text_restored"]
    assert {row["engine"] for row in found} == {"weave"} and all(row["exact"] for row in found)
    of_kind = {
        kind: [row for row in found if row["kind"] == kind]
        for kind in ("block", "edge", "load", "store")
    }
    arrivals: dict[str, int] = {}
    for edge in of_kind["edge"]:
        arrivals[edge["to_addr"]] = arrivals.get(edge["to_addr"], 0) + edge["hits"]
    entry, *inner = of_kind["block"]
    assert entry["point"] == "vfs_read" and entry["hits"] >= 1000
    assert {row["addr"]: row["hits"] for row in inner} == {
        row["addr"]: arrivals[row["addr"]] for row in inner
    }
    assert sum(arrivals.values()) > 5000
    for kind in ("load", "store"):
        assert max(row["hits"] for row in of_kind[kind]) >= 1000
    again = rows(run("sites", *(row["point"] for row in of_kind["edge"]), "--json"))[:-1]
    assert [(one["addr"], one["tactic"]) for one in again] == [
        (row["addr"], "clone") for row in of_kind["edge"]
    ]


def test_count_edges_that_cannot_be_woven_do_not_keep_the_rest_out(run: Kernweave) -> None:
    row, end = rows(run("count", "vfs_read", "9p:v9fs_mount@edges", "--json", "--", "true"))
    assert (row["point"], row["engine"]) == ("vfs_read", "splice") and row["hits"] > 0
    assert {one["reason"] for one in end["refused"]} == {"no_clone"}
    assert len(end["refused"]) == end["requested"] - 1 > 50


def test_count_own_failure_with_a_command_is_125(run: Kernweave) -> None:
    run("count", "vfs_raed", "--", "true", status=125)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_count_file_holds_every_row(run: Kernweave, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"rows.{ending}"
    done = run("count", "vfs_read@blocks", "--json", "-o", str(file), "--", "true")
    wanted = [(row["point"], row["hits"]) for row in rows(done)[:-1]]
    assert read_file(file) == wanted


def read_file(file: Path) -> list[tuple[str, int]]:
    if file.suffix == ".csv":
        with file.open(newline="") as lines:
            return [(row["point"], int(row["hits"])) for row in csv.DictReader(lines)]
    if file.suffix == ".jsonl":
        found = [json.loads(line) for line in file.read_text().splitlines()]
        return [(row["point"], row["hits"]) for row in found if row["schema"] != "kernweave.end/1"]
    table = duckdb.sql(f"select point, hits from '{file}'")
    assert table is not None
    return [(str(a), int(b)) for a, b in table.fetchall()]


def test_count_second_writer_is_told_who_is_first(run: Kernweave, machine: Lab) -> None:
    with Session(f"lab:{machine.name}"):
        done = run("count", "vfs_read", "--", "true", status=125)
    assert f"pid {os.getpid()}" in done.stderr


def test_count_all_entries_is_placed_in_part(run: Kernweave) -> None:
    *placed, end = rows(run("count", "*", "--json", "--no-trap", "--", "true"))
    assert len(placed) > 35000 and end["text_restored"]
    assert {one["reason"] for one in end["refused"]} >= {"noinstr", "denylist"}


def test_count_of_entries_alone_does_not_read_the_whole_text(
    machine: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = Driver.read_ranges

    def measured(self: Driver, starts: Any, ends: Any) -> bytes:
        data = read(self, starts, ends)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Driver, "read_ranges", measured)
    with Session(f"lab:{machine.name}") as session:
        assert session.view.images  # tables are read here
        sizes.clear()
        with session.count("vfs_read", "vfs_write"):
            entries, whole = max(sizes), session.driver.facts
        sizes.clear()
        with session.count("vfs_read@blocks"):
            pass
    assert entries < 1 << 20
    assert max(sizes) > (whole.text_end - whole.text_start) // 2  # the check can fail


def test_count_human_output_fits_80_columns_and_says_how_it_went(run: Kernweave) -> None:
    done = run("count", "vfs_*", "--", "true")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 80
    assert "text restored" in lines[-1] and "more rows: add --all" in done.stdout


def test_driver_of_another_version_is_refused_by_name(machine: Lab) -> None:
    kmod = driver_kmod("6.1", print, cflags=("-DKW_UAPI_VERSION=99",))
    other = Lab(f"{machine.name}-other")
    other.up(kmod=kmod)
    try:
        with other.connect() as link, pytest.raises(Exception, match="interface 99"):
            Driver(link.call)
    finally:
        other.down()


def test_wheel_in_an_empty_folder_counts(
    new_lab: Callable[[str], Lab], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parent.parent.parent
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "-o", str(folder), str(root)],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    wheel = next(folder.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    fresh = new_lab("wheel")  # its driver must come out of the wheel
    command = [str(folder / "venv" / "bin" / "kernweave"), "--target", f"lab:{fresh.name}"]
    subprocess.run([*command, "doctor"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [*command, "count", "vfs_read", "--json", "--", "true"],
        check=True, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert rows(done)[0]["hits"] > 0
