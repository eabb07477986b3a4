# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave bench`: finds a checkout's benchmarks, runs one, prints its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import kernweave
from kernweave.cli.bench import bench, bench_dir
from kernweave.errors import KernweaveError, UsageError

WRITES = """
import json, pathlib
folder = pathlib.Path(__file__).parent / "results"
folder.mkdir(exist_ok=True)
(folder / "small.json").write_text(json.dumps({"name": "small", "hits": 23}))
print("talk")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "src" / "kernweave"
    (tmp_path / "bench").mkdir()
    package.mkdir(parents=True)
    (tmp_path / "bench" / "_record.py").touch()
    (tmp_path / "bench" / "small.py").write_text(WRITES)
    (tmp_path / "bench" / "silent.py").touch()
    (tmp_path / "bench" / "broken.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(kernweave, "__file__", str(package / "__init__.py"))
    return tmp_path


def run(*args: str) -> tuple[int, str]:
    found = CliRunner().invoke(bench, list(args), standalone_mode=False, catch_exceptions=False)
    if found.exception:
        raise found.exception
    return int(found.return_value), found.stdout


def test_bench_dir_without_checkout_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need a checkout"):
        bench_dir(tmp_path / "lib" / "kernweave" / "__init__.py")


def test_bench_of_unknown_name_lists_the_known_ones(checkout: Path) -> None:
    with pytest.raises(UsageError, match="'_record'") as caught:
        run("_record")
    assert caught.value.help == "use one of: broken, silent, small"


def test_bench_json_prints_only_the_result(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["small", "--json"], standalone_mode=False) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"name": "small", "hits": 23}
    assert err == "talk\n"


def test_bench_failure_is_the_exit_status(checkout: Path) -> None:
    assert run("broken") == (1, "")


def test_bench_json_without_a_new_result_is_an_error(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KernweaveError, match="silent wrote no result"):
        bench.main(["silent", "--json"], standalone_mode=False)
