# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line against a real kernel: rows, exit statuses, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernweave.driver.client import Driver
from kernweave.lab.machine import Lab
from kernweave.session.session import Session
from kernweave.session.target import driver_kmod

NAME = f"cli-{os.getpid()}"
KERNWEAVE = [sys.executable, "-m", "kernweave", "--target", f"lab:{NAME}"]


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[Lab]:
    """A lab with the driver; its log is clean when the tests are done."""
    lab = Lab(NAME)
    lab.up(kmod=driver_kmod(lab.series, print), progress=print)
    yield lab
    trouble = lab.trouble()
    lab.down()
    assert not trouble


def run(*args: str, status: int = 0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*KERNWEAVE, *args], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == status, done.stderr
    return done


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_count_entry_prints_a_row_and_an_end_row() -> None:
    row, end = rows(run("count", "vfs_read", "--json", "--", "true"))
    assert (row["schema"], row["point"], row["kind"]) == ("kernweave.count/1", "vfs_read", "entry")
    assert row["tactic"] == "nop5" and row["exact"] and row["hits"] > 0 and row["missed"] == 0
    assert (end["requested"], end["placed"], end["refused"]) == (1, 1, [])
    assert end["text_restored"] and end["unrestored"] == [] and end["hits"] == row["hits"]
    assert end["command"] == {"argv": ["true"], "exit": 0, "signal": None}


def test_count_known_workload_counts_it_exactly() -> None:
    command = ("dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=23", "status=none")
    found = {
        row["point"]: row["hits"]
        for row in rows(run("count", "read_zero", "write_null", "--json", "--", *command))
        if row["schema"] == "kernweave.count/1"
    }
    assert found == {"read_zero": 23, "write_null": 23}


def test_count_every_printed_point_is_accepted_as_input() -> None:
    first = rows(run("count", "vfs_read@blocks", "--json", "--", "true"))[:-1]
    points = [row["point"] for row in first]
    second = rows(run("count", *points, "--json", "--", "true"))[:-1]
    assert [row["addr"] for row in second] == [row["addr"] for row in first]


def test_count_placed_and_refused_add_up_to_requested() -> None:
    *placed, end = rows(run("count", "vfs_read@insns", "--json", "--", "true"))
    assert end["requested"] == end["placed"] + len(end["refused"])
    assert end["placed"] == len(placed)
    assert {one["reason"] for one in end["refused"]} <= {"too_short", "bug_entry", "jump_label"}


def test_count_command_status_is_passed_on() -> None:
    run("count", "vfs_read", "--", "sh", "-c", "exit 7", status=7)
    run("count", "vfs_read", "--", "sh", "-c", "kill -9 $$", status=137)
    run("count", "vfs_read", "--", "no-such-program", status=127)


def test_count_for_ends_the_command_with_sigterm() -> None:
    done = run("count", "vfs_read", "--for", "0.5", "--json", "--", "sleep", "600", status=143)
    assert rows(done)[-1]["command"] == {"argv": ["sleep", "600"], "exit": 143, "signal": 15}


def test_count_without_command_ends_at_interrupt_as_success() -> None:
    with subprocess.Popen(
        [*KERNWEAVE, "count", "vfs_read", "--json"], stdout=subprocess.PIPE, text=True
    ) as client:
        with Session(f"lab:{NAME}", writer=False) as watcher:
            entry = watcher.driver.lookup(["vfs_read"])[0]
            while entry not in watcher.driver.placed()["addr"]:
                assert client.poll() is None
        client.send_signal(signal.SIGINT)
        out, _ = client.communicate(timeout=60)
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
        (["count", "vfs_read@edges"], 2, ["@edges is not there yet"]),
        (["count", "vfs_read", "--scope", "flow"], 2, ["--scope is not there yet"]),
        (["count", "vfs_read", "--engine", "weave"], 2, ["weave is not there yet"]),
        (["count", "vfs_read", "-o", "x.csv"], 2, ["-o is not there yet"]),
        (["count", "vfs_read", "--tactic", "magic"], 2, ["no tactic 'magic'"]),
        (["count", "vfs read"], 2, ["not a point"]),
        (["count"], 2, ["POINT"]),
    ],
)
def test_count_bad_input_is_one_error_and_changes_nothing(
    args: list[str], status: int, words: list[str]
) -> None:
    done = run(*args, status=status)
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    with Session(f"lab:{NAME}", writer=False) as watcher:
        assert not len(watcher.driver.placed())


def test_count_own_failure_with_a_command_is_125() -> None:
    run("count", "vfs_raed", "--", "true", status=125)


def test_count_local_target_is_not_supported_yet() -> None:
    done = subprocess.run(
        [*KERNWEAVE[:3], "--target", "local", "count", "vfs_read"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "not there yet" in done.stderr


def test_count_second_writer_is_told_who_is_first() -> None:
    with Session(f"lab:{NAME}"):
        done = run("count", "vfs_read", "--", "true", status=125)
    assert f"pid {os.getpid()}" in done.stderr


def test_count_all_entries_is_placed_in_part() -> None:
    *placed, end = rows(run("count", "*", "--json", "--", "true"))
    assert len(placed) > 35000 and end["text_restored"]
    assert {one["reason"] for one in end["refused"]} >= {"too_short", "noinstr", "denylist"}


def test_count_human_output_fits_80_columns_and_says_how_it_went() -> None:
    done = run("count", "vfs_*", "--", "true")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 80
    assert "text restored" in lines[-1] and "more rows: add --all" in done.stdout


def test_driver_of_another_version_is_refused_by_name() -> None:
    kmod = driver_kmod("6.1", print, cflags=("-DKW_UAPI_VERSION=99",))
    other = Lab(f"{NAME}-other")
    other.up(kmod=kmod)
    try:
        with other.connect() as link, pytest.raises(Exception, match="interface 99"):
            Driver(link.call)
    finally:
        other.down()


def test_wheel_in_an_empty_folder_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
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
    Lab(NAME).down()  # its driver must come out of the wheel
    command = [str(folder / "venv" / "bin" / "kernweave"), "--target", f"lab:{NAME}"]
    subprocess.run([*command, "doctor"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [*command, "count", "vfs_read", "--json", "--", "true"],
        check=True, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert rows(done)[0]["hits"] > 0
