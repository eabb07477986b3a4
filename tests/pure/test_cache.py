# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache's folder, stamps and locks."""

import threading
from pathlib import Path

import pytest

from kernweave.errors import UsageError
from kernweave.lab import cache


def test_stamp_round_trip(tmp_path: Path) -> None:
    stamp = tmp_path / "a.json"
    cache.write_stamp(stamp, {"tree": str(tmp_path), "libs": [str(tmp_path)], "version": "1"})
    values = cache.read_stamp(stamp, ("tree", "libs"))
    assert values is not None
    assert (values["tree"], values["libs"], values["version"]) == (
        str(tmp_path),
        [str(tmp_path)],
        "1",
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 0, "tree": "/"}',
        '{"schema": 1}',
        '{"schema": 1, "tree": "/no/x"}',
    ],
)
def test_stamp_that_is_torn_foreign_or_names_nothing_is_as_good_as_none(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert cache.read_stamp(tmp_path / "a.json", ("tree",)) is None
    assert cache.read_stamp(tmp_path / "absent.json", ("tree",)) is None


def test_cache_folder_that_make_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNWEAVE_CACHE", "/a b")
    with pytest.raises(UsageError, match="blank or colon"):
        cache.cache_dir()


def test_second_process_waits_for_the_lock_and_says_so(tmp_path: Path) -> None:
    waits, lines = threading.Event(), list[str]()

    def note(line: str) -> None:
        lines.append(line)
        waits.set()

    def other() -> None:
        with cache.locked(tmp_path, note):
            lines.append("in")

    thread = threading.Thread(target=other)
    with cache.locked(tmp_path):
        thread.start()
        assert waits.wait(60)
        lines.append("out")
    thread.join(60)
    assert lines == ["waiting for another process that fetches", "out", "in"]
