# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel modules and static programs, compiled once into the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kernweave.errors import UnsupportedError, UsageError
from kernweave.lab.cache import Progress, cache_dir, disk_errors, locked, silent
from kernweave.lab.packages import KernelTree, fetch_headers_tree

_SOURCES = ("*.c", "*.h", "*.S", "Kbuild")
_ERROR_LINES = 20
# set by an outer make or a kernel developer's shell; they would change what is built
_FOREIGN_ENV = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARCH", "CROSS_COMPILE")
# what a configuration says of the kernel's own compiler, by the option that the host's may lack
_COMPILER_CONFIG = {"-fmin-function-alignment=16": "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT"}
_FOREIGN_KBUILD = ("KCFLAGS", "KCPPFLAGS", "KAFLAGS", "KBUILD_OUTPUT", "KBUILD_EXTMOD", "CC", "V")


def build_kmod(
    kernel: KernelTree,
    source_dir: Path,
    *,
    cflags: Sequence[str] = (),
    progress: Progress = silent,
) -> Path:
    """Return the .ko of a kmod's sources, compiled at the first call.

    Args:
        kernel: to build for; its headers are fetched when needed.
        source_dir: holds a `Kbuild` file naming exactly one kmod in obj-m.
        cflags: added to the kernel's own compiler options.
        progress: is called with one line per step.

    Raises:
        UsageError: there is no Kbuild file, or it does not make exactly one kmod.
        UnsupportedError: the compiler or its tools fail; the notes are their last lines.
    """
    if not (source_dir / "Kbuild").is_file():
        raise UsageError(f"{source_dir} has no Kbuild file")
    compiler = kernel_compiler()
    files = _contents(source_dir, _SOURCES)
    key = cache_key(files, [kernel.release, kernel.version, *cflags, _version_of(compiler)])
    final = _builds_dir() / f"kmod-{key}"
    if not final.is_dir():
        headers = fetch_headers_tree(kernel, progress)
        with disk_errors(), locked(_builds_dir(), progress):
            if not final.is_dir():
                progress(f"compiling the kmod in {source_dir} for {kernel.release}")
                _make_kmod(files, headers.build, headers.libs, compiler, cflags, final)
    return next(final.glob("*.ko"))


def _make_kmod(
    files: Mapping[str, bytes],
    build: Path,
    libs: Sequence[Path],
    compiler: str,
    cflags: Sequence[str],
    final: Path,
) -> None:
    """Compile `files` aside; the folder `final` appears complete or not at all."""
    with tempfile.TemporaryDirectory(prefix=".make-", dir=_builds_dir()) as aside:
        work, done = Path(aside) / "work", Path(aside) / "done"
        for name, data in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(data)
        # the folder's random name must not get into the kmod (WARN and assert name files)
        flags = [f"-ffile-prefix-map={work}=.", *cflags]
        argv = ["make", "-j2", "-C", str(build), f"M={work}", *compiler_args(compiler)]
        env = {"LD_LIBRARY_PATH": ":".join(map(str, libs))} if libs else {}
        _compile([*argv, f"KCFLAGS={' '.join(flags)}", "modules"], "build the kmod", env)
        made = sorted(work.glob("*.ko"))
        if len(made) != 1:
            raise UsageError(f"the Kbuild file makes {len(made)} kmods, 1 is needed")
        done.mkdir()
        made[0].rename(done / made[0].name)
        done.rename(final)


def kernel_compiler() -> str:
    """Name the compiler Debian built the kernel with if it is there, else the host's."""
    return "gcc-12" if shutil.which("gcc-12") else "gcc"


def compiler_args(compiler: str) -> list[str]:
    """Return what make is told of the compiler, which may be older than the kernel's own."""
    lacks = [config for option, config in _COMPILER_CONFIG.items() if not _has(compiler, option)]
    return [f"CC={compiler}", *(f"{config}=" for config in lacks)]


def build_static(source: Path, *, include: Path | None = None, cflags: Sequence[str] = ()) -> Path:
    """Return a static program made of one C file, compiled at the first call.

    Args:
        source: the C file; headers beside it may be included with quotes.
        include: one more folder of headers.
        cflags: added behind -O2 -Wall -Wextra.

    Raises:
        UnsupportedError: the compiler fails; the notes are its last lines.
    """
    compiler = "gcc"
    files = {source.name: source.read_bytes()}
    for folder in (source.parent, include):
        if folder is not None:
            files |= {f"{folder.name}/{name}": data for name, data in _headers(folder).items()}
    key = cache_key(files, ["static", *cflags, _version_of(compiler)])
    final = _builds_dir() / f"static-{key}" / source.stem
    if final.is_file():
        return final
    with disk_errors():
        _builds_dir().mkdir(parents=True, exist_ok=True)
    with disk_errors(), tempfile.TemporaryDirectory(prefix=".gcc-", dir=_builds_dir()) as aside:
        made = Path(aside) / source.stem
        includes = [f"-I{include}"] if include is not None else []
        flags = ["-static", "-O2", "-Wall", "-Wextra", *cflags, *includes]
        _compile([compiler, *flags, "-o", str(made), str(source)], f"compile {source.name}", {})
        final.parent.mkdir(exist_ok=True)
        made.rename(final)
    return final


def cache_key(files: Mapping[str, bytes], parts: Iterable[str]) -> str:
    """Return 24 hex digits that change with any file's name or bytes and with any part."""
    digest = hashlib.sha256()
    named = ((name.encode(), data) for name, data in sorted(files.items()))
    for name, data in [*named, *((b"", part.encode()) for part in parts)]:
        digest.update(b"%d %d " % (len(name), len(data)) + name + data)
    return digest.hexdigest()[:24]


def _builds_dir() -> Path:
    return cache_dir() / "builds"


def _contents(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    files = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _headers(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.h")}


def _has(compiler: str, option: str) -> bool:
    argv = [compiler, option, "-fsyntax-only", "-x", "c", os.devnull]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def _version_of(compiler: str) -> str:
    return _compile([compiler, "--version"], "build programs", {}).partition("\n")[0]


def _compile(argv: Sequence[str], what: str, extra: Mapping[str, str]) -> str:
    foreign = {*_FOREIGN_ENV, *_FOREIGN_KBUILD}
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    env |= {"LC_ALL": "C", **extra}
    try:
        done = subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"cannot {what}: {argv[0]} is not installed",
            help="run `kernweave doctor` for the packages this machine needs",
        ) from error
    if done.returncode != 0 and os.strerror(errno.ENOSPC) in done.stdout:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_builds_dir()))
    if done.returncode != 0:
        raise UnsupportedError(
            f"cannot {what}: {argv[0]} ended with status {done.returncode}",
            notes=done.stdout.strip().splitlines()[-_ERROR_LINES:],
            help="read the compiler's lines above",
        )
    return done.stdout
