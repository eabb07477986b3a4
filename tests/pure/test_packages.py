# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kernel is taken, and trees that are there already; no network."""

from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab import packages
from kernweave.lab.cache import write_stamp


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNWEAVE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "packages").mkdir(parents=True)
    return tmp_path / "cache"


def test_fetch_with_a_good_stamp_runs_no_program(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vmlinuz", "modules"):
        (cache / name).mkdir()
    values = {"release": "r", "version": "v", **{n: str(cache / n) for n in ("vmlinuz", "modules")}}
    write_stamp(cache / "packages" / "kernel-6.12.json", values)
    monkeypatch.setenv("PATH", "")
    kernel = packages.fetch_kernel("6.12")
    assert (kernel.release, kernel.modules, kernel.headers) == ("r", cache / "modules", None)


META = [
    {"version": "6.12.95-1~bpo12+1", "depends": "linux-image-6.12.95+deb12-amd64 (= 6.12.95-1)"},
    {"version": "6.1.99-1", "depends": "linux-image-6.1.0-9-amd64 (= 6.1.99-1)"},
    {"version": "6.1.192-2", "depends": "linux-base, linux-image-6.1.0-56-amd64 (= 6.1.192-2)"},
]


def test_newest_kernel_compares_numbers_and_whole_series() -> None:
    assert packages.newest_kernel(META, "6.1") == ("6.1.0-56-amd64", "6.1.192-2")
    assert packages.newest_kernel(META, "6.12")[0] == "6.12.95+deb12-amd64"
    with pytest.raises(UnsupportedError, match=r"no kernel of series 7\.2"):
        packages.newest_kernel(META, "7.2")


def test_unknown_series_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no kernel series 5\.10"):
        packages.fetch_kernel("5.10")


def test_relocate_headers_moves_absolute_paths_only(tmp_path: Path) -> None:
    headers = tmp_path / "usr/src/linux-headers-1-amd64"
    headers.mkdir(parents=True)
    (headers / "Makefile").write_text(
        "include /usr/src/linux-headers-1-common/Makefile\nA=/usr/bin\n"
    )
    (headers / "scripts").symlink_to("../../lib/linux-kbuild-1/scripts")
    (headers / "tools").symlink_to("/usr/lib/linux-kbuild-1/tools")
    (headers / "vmlinux").touch()
    packages.relocate_headers(tmp_path, Path("/final"))
    text = (headers / "Makefile").read_text()
    assert text == "include /final/usr/src/linux-headers-1-common/Makefile\nA=/usr/bin\n"
    assert str((headers / "scripts").readlink()) == "../../lib/linux-kbuild-1/scripts"
    assert str((headers / "tools").readlink()) == "/final/usr/lib/linux-kbuild-1/tools"
    assert not (headers / "vmlinux").exists()
