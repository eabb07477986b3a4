# SPDX-License-Identifier: GPL-2.0-or-later
"""apt with folders of its own: package sources, lists, download, unpacking; no root."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernweave.errors import UnsupportedError
from kernweave.lab.cache import Progress, packages_dir, silent

CODENAME = "bookworm"
BACKPORTS = "bookworm-backports"
UNSTABLE = "sid"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DPKG_STATUS = Path("/var/lib/dpkg/status")
_CHECK = "check the network, the free space and the machine's apt sources, then try again"
_LIST_LIFE_S = 3600


@dataclass(frozen=True, slots=True)
class Source:
    """One line of a package source list.

    Attributes:
        uri: where the archive is, without a trailing slash.
        suite: such as `bookworm` or `bookworm-security`.
        components: such as `main`.
        signed_by: keyring file, or None for apt's default ones.
        trusted: the machine uses this archive without checking signatures.
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str | None = None
    trusted: bool = False

    def line(self) -> str:
        """Return this source as one line of a private sources.list."""
        options = ["arch=amd64", "target=Packages"]
        if self.signed_by:
            options.append(f"signed-by={self.signed_by}")
        if self.trusted:
            options.append("trusted=yes")
        return f"deb [{' '.join(options)}] {self.uri} {self.suite} {' '.join(self.components)}"


def run_tool(
    argv: Sequence[str | Path],
    what: str,
    *,
    cwd: Path | None = None,
    library_path: str | None = None,
    help: str = _CHECK,
) -> str:
    """Run a tool and return its stdout; a failure ends in UnsupportedError with its last lines."""
    env = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if library_path is not None:
        env["LD_LIBRARY_PATH"] = library_path
    try:
        done = subprocess.run(
            [str(arg) for arg in argv],
            capture_output=True,
            text=True,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"cannot {what}: {argv[0]} is not installed",
            help="kernweave fetches Debian packages and needs apt-get and dpkg-deb",
        ) from error
    if done.returncode != 0:
        raise UnsupportedError(
            f"cannot {what}: {argv[0]} ended with status {done.returncode}",
            notes=done.stderr.strip().splitlines()[-5:],
            help=help,
        )
    return done.stdout


# ---- the machine's package sources -------------------------------------------------------------


def parse_source_list(text: str) -> list[Source]:
    """Return the `deb` entries of a sources.list in the one-line format."""
    found = []
    pattern = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<rest>.+)")
    for line in text.splitlines():
        match = pattern.fullmatch(line.split("#", 1)[0].strip())
        if match is None:
            continue
        suite, *components = match["rest"].split()
        options = dict(
            option.split("=", 1) for option in (match["options"] or "").split() if "=" in option
        )
        found.append(
            _source(
                match["uri"], suite, components, options.get("signed-by"), options.get("trusted")
            )
        )
    return found


def parse_deb822(text: str) -> list[Source]:
    """Return the enabled `deb` entries of a .sources file, one per URI and suite."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = _deb822_fields(paragraph)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = fields.get("components", "").split()
                signed_by, trusted = fields.get("signed-by"), fields.get("trusted")
                found.append(_source(uri, suite, components, signed_by, trusted))
    return found


def _deb822_fields(paragraph: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in paragraph.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _source(
    uri: str, suite: str, components: Sequence[str], signed_by: str | None, trusted: str | None
) -> Source:
    # Signed-By may also hold a key itself or a fingerprint: only a file name is taken over
    keyring = (signed_by or "").split(",")[0].strip()
    return Source(
        uri=uri.rstrip("/"),
        suite=suite,
        components=tuple(components),
        signed_by=keyring if keyring.startswith("/") else None,
        trusted=(trusted or "no").lower() in ("yes", "true", "1"),
    )


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Return the package sources this machine is set up with."""
    found: list[Source] = []
    parts = sorted((etc / "sources.list.d").glob("*")) if etc.is_dir() else []
    for file in [etc / "sources.list", *parts]:
        if not file.is_file():
            continue
        if file.suffix == ".list":
            found += parse_source_list(file.read_text())
        elif file.suffix == ".sources":
            found += parse_deb822(file.read_text())
    return found


def debian_sources(machine: Sequence[Source], suites: Sequence[str]) -> list[Source]:
    """Return sources for `suites` on the Debian mirror the machine itself uses.

    Raises:
        UnsupportedError: no source of the machine is a Debian archive.
    """
    usable = [source for source in machine if "main" in source.components]
    security = [source for source in usable if source.suite.endswith("-security")]
    archive = [source for source in usable if source not in security]
    ranked = sorted(archive, key=lambda source: source.suite != CODENAME)
    for main in ranked:
        if main.suite == CODENAME or main.uri.endswith("/debian"):
            break
    else:
        raise UnsupportedError(
            "no Debian archive among this machine's apt sources",
            notes=[f"{len(machine)} sources were read from /etc/apt"],
            help="add a Debian mirror to /etc/apt/sources.list.d, it need not be used otherwise",
        )
    keyring = main.signed_by or (str(_KEYRING) if _KEYRING.is_file() else None)
    main = replace(main, components=("main",), signed_by=keyring)
    secure = security[0].uri if security else f"{main.uri}-security"
    return [
        replace(main, suite=suite, uri=secure if suite.endswith("-security") else main.uri)
        for suite in suites
    ]


# ---- apt with private folders ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Apt:
    """apt with lists, cache and settings of its own; the system's are only read.

    Attributes:
        folder: holds everything of it.
    """

    folder: Path

    def run(self, program: str, *args: str, what: str, cwd: Path | None = None) -> str:
        """Run apt-get or apt-cache with the private settings and return its stdout."""
        argv = [program, "-c", str(self.folder / "apt.conf"), *args]
        return run_tool(argv, what, cwd=cwd or self.folder)

    def shown(self, package: str) -> list[dict[str, str]]:
        """Return the fields of every version of a package the lists know."""
        text = self.run("apt-cache", "show", package, what=f"look up package {package}")
        return [_deb822_fields(stanza) for stanza in text.split("\n\n") if stanza.strip()]

    def known(self, packages: Sequence[str]) -> set[tuple[str, str]]:
        """Return (name, version) of those of `packages` that the lists have."""
        text = self.run("apt-cache", "madison", *packages, what="look up packages")
        rows = (line.split("|") for line in text.splitlines() if line.count("|") == 2)
        return {(row[0].strip(), row[1].strip()) for row in rows}

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Download exactly `packages` (`name=version`), without what they depend on."""
        self.run("apt-get", "-qq", "download", *packages, what="download packages", cwd=into)

    def download_missing(self, packages: Sequence[str], suite: str, into: Path) -> None:
        """Download `packages` and those of their dependencies that the host has not installed."""
        (into / "partial").mkdir()
        options = ["-qq", "--yes", "--reinstall", "--download-only", "--no-install-recommends"]
        options += ["--allow-downgrades", f"--option=Dir::Cache::archives={into}"]
        args = [*options, "--target-release", suite, "install", *packages]
        self.run("apt-get", *args, what="download packages")
        (into / "partial").rmdir()


_APT_CONF = """\
#clear APT::Update;
#clear APT::Default-Release;
APT::Get::Upgrade-By-Source-Package "false";
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";
Debug::NoLocking "true";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/state/lists";
Dir::State::status "{status}";
Dir::State::extended_states "{folder}/state/extended_states";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"""


def open_apt(
    folder: Path,
    sources: Sequence[Source],
    progress: Progress = silent,
    status: Path = _DPKG_STATUS,
) -> Apt:
    """Return apt working in `folder`, its package lists at most an hour old.

    Raises:
        UnsupportedError: apt is not installed, or the mirror does not answer.
    """
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    if not status.is_file():
        status = folder / "status"
        status.touch()
    (folder / "apt.conf").write_text(_APT_CONF.format(folder=folder, status=status))
    lines = "".join(f"{source.line()}\n" for source in sources)
    listed, updated = folder / "sources.list", folder / "updated"
    apt = Apt(folder)
    same = listed.is_file() and listed.read_text() == lines
    if same and updated.is_file() and time.time() - updated.stat().st_mtime < _LIST_LIFE_S:
        return apt
    updated.unlink(missing_ok=True)
    listed.write_text(lines)
    progress(f"reading the package lists of {', '.join(source.suite for source in sources)}")
    apt.run("apt-get", "-qq", "update", what="read the mirror's package lists")
    updated.touch()
    return apt


def series_release(series: str) -> str:
    """Return the Debian release that kernels of a series and their programs are built for."""
    return UNSTABLE if series == "7.2" else CODENAME


def series_apt(series: str, progress: Progress) -> Apt:
    """Return apt with the suites that kernels of a series come from.

    For another release than the host's it takes nothing for installed.
    """
    release = series_release(series)
    folder = packages_dir() / f"apt-{release}"
    suites = [release]
    status = folder / "status"
    if release == CODENAME:
        suites += [f"{CODENAME}-updates", f"{CODENAME}-security", BACKPORTS]
        status = _DPKG_STATUS
    return open_apt(folder, debian_sources(machine_sources(), suites), progress, status)


# ---- unpacking ---------------------------------------------------------------------------------


def unpack(debs: Iterable[Path], root: Path) -> dict[str, str]:
    """Unpack package files into `root`; return the version of each package by name."""
    versions = {}
    for deb in sorted(debs):
        shown = run_tool(
            ["dpkg-deb", "--show", "--showformat=${Package} ${Version}", deb], f"read {deb.name}"
        )
        name, version = shown.split()
        run_tool(["dpkg-deb", "--extract", deb, root], f"unpack {deb.name}")
        versions[name] = version
    return versions


def library_folders(root: Path) -> list[Path]:
    """Return the folders of an unpacked tree for LD_LIBRARY_PATH."""
    folders = (root / sub for sub in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    return [folder for folder in folders if any(folder.glob("*.so*"))]
