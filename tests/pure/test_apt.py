# SPDX-License-Identifier: GPL-2.0-or-later
"""Package sources, and apt with folders of its own; no network."""

import shutil
from pathlib import Path

import pytest

from kernweave.errors import UnsupportedError
from kernweave.lab import apt
from kernweave.lab.apt import Source

DEB822 = """\
Types: deb deb-src
# an old URI
URIs: file:///srv/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/a.gpg

Types: deb
URIs: file:///srv/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: file:///srv/off
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb file:///srv/commented bookworm main
deb [arch=amd64 signed-by=/k.gpg trusted=yes] file:///srv/debian bookworm main contrib # note
deb-src file:///srv/debian bookworm main
deb file:///srv/debian-security/ bookworm-security main
"""


def test_deb822_gives_one_source_per_suite_and_leaves_out_disabled_ones() -> None:
    assert apt.parse_deb822(DEB822) == [
        Source("file:///srv/debian", "bookworm", ("main", "contrib"), "/usr/share/keyrings/a.gpg"),
        Source(
            "file:///srv/debian",
            "bookworm-updates",
            ("main", "contrib"),
            "/usr/share/keyrings/a.gpg",
        ),
        Source("file:///srv/debian-security", "bookworm-security", ("main",), None),
    ]


def test_one_line_format_takes_options_and_skips_comments_and_source_packages() -> None:
    assert apt.parse_source_list(ONE_LINE) == [
        Source("file:///srv/debian", "bookworm", ("main", "contrib"), "/k.gpg", True),
        Source("file:///srv/debian-security", "bookworm-security", ("main",)),
    ]


def test_machine_sources_reads_both_formats_and_no_other_file(tmp_path: Path) -> None:
    parts = tmp_path / "apt" / "sources.list.d"
    parts.mkdir(parents=True)
    (tmp_path / "apt" / "sources.list").write_text("deb file:///one bookworm main\n")
    (parts / "two.sources").write_text(DEB822)
    (parts / "three.list").write_text("deb file:///three bookworm main\n")
    (parts / "four.list.disabled").write_text("deb file:///four bookworm main\n")
    uris = [source.uri for source in apt.machine_sources(tmp_path / "apt")]
    assert sorted(set(uris)) == [
        "file:///one",
        "file:///srv/debian",
        "file:///srv/debian-security",
        "file:///three",
    ]


def test_debian_sources_use_the_machines_mirrors() -> None:
    foreign = Source("file:///tool", "stable", ("main",))
    wanted = ["bookworm", "bookworm-security", "bookworm-backports"]
    found = apt.debian_sources([foreign, *apt.parse_deb822(DEB822)], wanted)
    assert [(source.uri, source.suite) for source in found] == [
        ("file:///srv/debian", "bookworm"),
        ("file:///srv/debian-security", "bookworm-security"),
        ("file:///srv/debian", "bookworm-backports"),
    ]
    assert {source.signed_by for source in found} == {"/usr/share/keyrings/a.gpg"}
    assert found[0].line() == (
        "deb [arch=amd64 target=Packages signed-by=/usr/share/keyrings/a.gpg] "
        "file:///srv/debian bookworm main"
    )


def test_debian_sources_without_a_debian_archive_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no Debian archive"):
        apt.debian_sources([Source("file:///tool", "stable", ("main",))], ["bookworm"])


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_unreachable_mirror_ends_in_an_error_that_says_what_to_check(tmp_path: Path) -> None:
    source = Source("file:///nonexistent", "bookworm", ("main",), trusted=True)
    with pytest.raises(UnsupportedError) as caught:
        apt.open_apt(tmp_path / "apt", [source])
    assert caught.value.message.startswith("cannot read the mirror's package lists: apt-get ended")
    assert any("file:/nonexistent" in note for note in caught.value.notes)
    assert caught.value.help == (
        "check the network, the free space and the machine's apt sources, then try again"
    )
    assert not (tmp_path / "apt" / "updated").exists()


def test_missing_apt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="apt-get is not installed"):
        apt.open_apt(tmp_path / "apt", [Source("file:///x", "bookworm", ("main",))])
