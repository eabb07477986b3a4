# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock kernels, their headers and QEMU: Debian packages unpacked in the cache, without root."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.apt import (
    BACKPORTS,
    CODENAME,
    library_folders,
    run_tool,
    series_apt,
    series_release,
    unpack,
)
from kernweave.lab.cache import (
    Progress,
    Values,
    fetch_once,
    packages_dir,
    read_stamp,
    settle,
    silent,
    tree_dir,
    unpack_aside,
)
from kernweave.lab.foreign import wrap_programs
from kernweave.lab.kmods import index_modules

KERNEL_SERIES = ("6.1", "6.12", "7.2")

_QEMU_PACKAGES = (
    f"qemu-system-x86/{BACKPORTS}",
    f"qemu-system-common/{BACKPORTS}",
    f"qemu-system-data/{BACKPORTS}",
    "seabios",
    "ipxe-qemu",
)
# the keys of a stamp whose paths must exist
_KERNEL = ("vmlinuz", "modules")
_QEMU = ("binary", "libs", "data")


@dataclass(frozen=True, slots=True)
class KernelTree:
    """A stock kernel, unpacked.

    Attributes:
        series: one of KERNEL_SERIES.
        release: what `uname -r` prints, such as `6.1.0-56-amd64`.
        version: of the Debian package, such as `6.1.192-2`.
        vmlinuz: the bootable image.
        modules: the folder `lib/modules/RELEASE`, with a modules.dep.
        headers: the build folder, when `fetch_headers` was called before.
    """

    series: str
    release: str
    version: str
    vmlinuz: Path
    modules: Path
    headers: Path | None = None


@dataclass(frozen=True, slots=True)
class HeadersTree:
    """The kernel's build folder and what its programs need to run.

    Attributes:
        build: for `make -C`.
        libs: folders for LD_LIBRARY_PATH while make runs; empty if the host has all.
    """

    build: Path
    libs: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class QemuTree:
    """A QEMU, unpacked.

    Attributes:
        binary: qemu-system-x86_64.
        version: such as `10.0.2`.
        libs: folders for LD_LIBRARY_PATH.
        data: folder for `-L`.
    """

    binary: Path
    version: str
    libs: tuple[Path, ...]
    data: Path


# ---- kernels -----------------------------------------------------------------------------------


def fetch_kernel(series: str = "6.1", progress: Progress = silent) -> KernelTree:
    """Return the stock kernel of a series, downloaded at the first call.

    Args:
        series: one of KERNEL_SERIES.
        progress: is called with one line per step.

    Raises:
        UsageError: the series is none of KERNEL_SERIES.
        UnsupportedError: the mirror cannot be reached or has no kernel of that series.
    """
    if series not in KERNEL_SERIES:
        raise UsageError(f"no kernel series {series}", help=f"use one of {_listed(KERNEL_SERIES)}")
    stamp = _kernel_stamp(series)
    values = fetch_once(stamp, _KERNEL, progress, lambda: _download_kernel(series, progress))
    return _kernel_tree(series, values)


def fetched_kernel(series: str) -> KernelTree | None:
    """Return the kernel of a series if it was fetched before."""
    values = read_stamp(_kernel_stamp(series), _KERNEL)
    return _kernel_tree(series, values) if values else None


def _kernel_stamp(series: str) -> Path:
    return packages_dir() / f"kernel-{series}.json"


def _kernel_tree(series: str, values: Mapping[str, object]) -> KernelTree:
    release = str(values["release"])
    headers = read_stamp(_headers_stamp(release), ("build",))
    return KernelTree(
        series=series,
        release=release,
        version=str(values["version"]),
        vmlinuz=Path(str(values["vmlinuz"])),
        modules=Path(str(values["modules"])),
        headers=Path(str(headers["build"])) if headers else None,
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _download_kernel(series: str, progress: Progress) -> Values:
    apt = series_apt(series, progress)
    release, version = newest_kernel(apt.shown("linux-image-amd64"), series)
    # up to 6.12 one package has image and modules, later kernels are split
    names = [f"linux-{part}-{release}" for part in ("image", "binary", "modules", "base")]
    known = sorted(pair for pair in apt.known(names) if pair[1] == version)
    final = tree_dir("kernel", release, version)
    with unpack_aside() as (debs, root):
        progress(f"downloading kernel {release} ({version})")
        apt.download([f"{name}={version}" for name, version in known], debs)
        progress(f"unpacking kernel {release}")
        packages = unpack(debs.iterdir(), root)
        vmlinuz, modules = _find_kernel(root, release)
        index_modules(modules)
        settle(root, final)
    return {
        "release": release,
        "version": version,
        "vmlinuz": str(final / vmlinuz.relative_to(root)),
        "modules": str(final / modules.relative_to(root)),
        "packages": [f"{name}={version}" for name, version in packages.items()],
    }


def newest_kernel(stanzas: Sequence[Mapping[str, str]], series: str) -> tuple[str, str]:
    """Return (release, version) of the newest kernel of a series the meta package points to.

    Args:
        stanzas: the fields of every known version of linux-image-amd64.
        series: such as `6.1`.
    """
    found = []
    for fields in stanzas:
        match = re.search(r"linux-image-(\d\S*)", fields.get("depends", ""))
        if match and fields["version"].startswith(f"{series}."):
            numbers = [int(number) for number in re.findall(r"\d+", fields["version"])]
            found.append((numbers, match[1], fields["version"]))
    if not found:
        there = sorted({fields["version"] for fields in stanzas if "version" in fields})
        raise UnsupportedError(
            f"the mirror has no kernel of series {series}",
            notes=[f"it has {_listed(there) or 'none at all'}"],
            help=f"use another series of {_listed(KERNEL_SERIES)}",
        )
    _, release, version = max(found)
    return release, version


def _find_kernel(root: Path, release: str) -> tuple[Path, Path]:
    modules = [
        path for path in root.glob(f"**/lib/modules/{release}") if (path / "kernel").is_dir()
    ]
    images = [root / "boot" / f"vmlinuz-{release}", *(path / "vmlinuz" for path in modules)]
    images = [path for path in images if path.is_file()]
    if not modules or not images:
        raise UnsupportedError(f"the packages of kernel {release} hold no image or no modules")
    return images[0], modules[0]


# ---- headers -----------------------------------------------------------------------------------


def fetch_headers(kernel: KernelTree, progress: Progress = silent) -> Path:
    """Return the build folder of a kernel, for `make -C FOLDER M=...`.

    Raises:
        UnsupportedError: the mirror no longer has headers of this very version.
    """
    return fetch_headers_tree(kernel, progress).build


def fetch_headers_tree(kernel: KernelTree, progress: Progress = silent) -> HeadersTree:
    """Return the build folder together with the libraries its programs need."""
    stamp = _headers_stamp(kernel.release)
    values = fetch_once(
        stamp, ("build", "libs"), progress, lambda: _download_headers(kernel, progress)
    )
    libs = values["libs"]
    assert isinstance(libs, list)
    return HeadersTree(Path(str(values["build"])), tuple(map(Path, libs)))


def _headers_stamp(release: str) -> Path:
    return packages_dir() / f"headers-{release}.json"


def _download_headers(kernel: KernelTree, progress: Progress) -> Values:
    apt = series_apt(kernel.series, progress)
    name = f"linux-headers-{kernel.release}"
    same = [fields for fields in apt.shown(name) if fields.get("version") == kernel.version]
    if not same:
        raise UnsupportedError(
            f"the mirror no longer has {name} {kernel.version}",
            help=f"remove {packages_dir()}/kernel-{kernel.series}.json to fetch a newer kernel",
        )
    needed = re.findall(r"linux-(?:headers|kbuild)-[^\s,(]+", same[0].get("depends", ""))
    release = series_release(kernel.series)
    final = tree_dir("headers", kernel.release, kernel.version)
    with unpack_aside() as (debs, root):
        progress(f"downloading headers of {kernel.release}")
        # the compiler that the headers depend on is left out: the host's gcc is taken
        apt.download([f"{name}={kernel.version}"], debs)
        libs = debs / "needed"
        libs.mkdir()
        apt.download_missing([f"{name}={kernel.version}" for name in needed], release, libs)
        progress(f"unpacking headers of {kernel.release}")
        packages = unpack(debs.rglob("*.deb"), root)
        relocate_headers(root, final)
        wrapped = release != CODENAME and wrap_programs(root, final, "usr/lib/linux-kbuild-*")
        settle(root, final)
    return {
        "build": str(final / "usr/src" / name),
        "libs": [] if wrapped else [str(folder) for folder in library_folders(final)],
        "packages": [f"{name}={version}" for name, version in packages.items()],
    }


_HEADERS_PATH = re.compile(r"(?<![\w/.])/usr/(?=src/linux-|lib/linux-kbuild-)")


def relocate_headers(root: Path, final: Path) -> None:
    """Make the absolute paths in unpacked headers, in Makefiles and links, point into `final`."""
    for folder in (root / "usr/src").glob("linux-headers-*"):
        for file in folder.iterdir():
            if file.is_file() and not file.is_symlink() and file.name != "Module.symvers":
                text = file.read_text(errors="surrogateescape")
                moved = _HEADERS_PATH.sub(f"{final}/usr/", text)
                if moved != text:
                    file.write_text(moved, errors="surrogateescape")
    for image in (root / "usr/src").glob("linux-headers-*/vmlinux"):
        image.unlink()  # only for a kmod's BTF; with it, kbuild would call pahole
    for link in (path for path in root.rglob("*") if path.is_symlink()):
        target = str(link.readlink())
        if target.startswith("/usr/"):
            link.unlink()
            link.symlink_to(f"{final}{target}")


# ---- QEMU --------------------------------------------------------------------------------------


def fetch_qemu(progress: Progress = silent) -> QemuTree:
    """Return the lab's own QEMU, downloaded at the first call; the host's is never used.

    Raises:
        UnsupportedError: the mirror cannot be reached, or the program does not run on this host.
    """
    stamp = _qemu_stamp()
    return _qemu_tree(fetch_once(stamp, _QEMU, progress, lambda: _download_qemu(progress)))


def fetched_qemu() -> QemuTree | None:
    """Return the QEMU if it was fetched before."""
    values = read_stamp(_qemu_stamp(), _QEMU)
    return _qemu_tree(values) if values else None


def _qemu_stamp() -> Path:
    return packages_dir() / "qemu.json"


def _qemu_tree(values: Mapping[str, object]) -> QemuTree:
    libs = values["libs"]
    assert isinstance(libs, list)
    return QemuTree(
        binary=Path(str(values["binary"])),
        version=str(values["version"]),
        libs=tuple(map(Path, libs)),
        data=Path(str(values["data"])),
    )


def _download_qemu(progress: Progress) -> Values:
    apt = series_apt("6.1", progress)
    with unpack_aside() as (debs, root):
        progress("downloading QEMU")
        apt.download_missing(_QEMU_PACKAGES, BACKPORTS, debs)
        progress("unpacking QEMU")
        packages = unpack(debs.iterdir(), root)
        version = _qemu_version(root / "usr/bin/qemu-system-x86_64", library_folders(root))
        _gather_firmware(root)
        final = tree_dir("qemu", packages["qemu-system-x86"])
        settle(root, final)
    return {
        "binary": str(final / "usr/bin/qemu-system-x86_64"),
        "version": version,
        "libs": [str(folder) for folder in library_folders(final)],
        "data": str(final / "usr/share/qemu"),
        "packages": [f"{name}={version}" for name, version in packages.items()],
    }


def _gather_firmware(root: Path) -> None:
    """Link the BIOS and the network cards' ROMs into QEMU's data folder, so one -L finds all."""
    data = root / "usr/share/qemu"
    for folder in ("usr/share/seabios", "usr/lib/ipxe/qemu"):
        for file in sorted((root / folder).iterdir()):
            if not (data / file.name).exists():
                (data / file.name).symlink_to(os.path.relpath(file, data))


def _qemu_version(binary: Path, libs: Sequence[Path]) -> str:
    path = ":".join(map(str, libs))
    shown = run_tool(
        [binary, "--version"],
        "run the fetched QEMU",
        library_path=path,
        help="run this on Debian 12: the fetched QEMU needs its C library or a newer one",
    )
    match = re.search(r"version (\d+(?:\.\d+)+)", shown)
    if match is None:
        raise UnsupportedError(f"the fetched QEMU names no version: {shown.strip()[:80]}")
    return match[1]
