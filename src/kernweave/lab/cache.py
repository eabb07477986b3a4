# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: its folder, and stamps and locks that let several processes fill it."""

# How a fetch goes; the numbers are repeated in `fetch_once`:
#   1. the stamp names a tree that is there: done, without network
#   2. take the lock, look again (another process may have been faster)
#   3. bring apt's own private lists up to date, download, unpack aside
#   4. check the tree, rename it to its final name, write the stamp last

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from kernweave.errors import LabError, UsageError

Progress = Callable[[str], None]
Values = Mapping[str, str | Sequence[str] | None]

_STAMP_SCHEMA = 1


def silent(line: str) -> None:
    """Drop a line of progress."""
    del line


def cache_dir() -> Path:
    """Return the folder of all downloads and builds (KERNWEAVE_CACHE, or the user's cache).

    Raises:
        UsageError: its path has a blank or colon, which make and LD_LIBRARY_PATH cannot take.
    """
    named = os.environ.get("KERNWEAVE_CACHE")
    folder = Path(named).absolute() if named else platformdirs.user_cache_path("kernweave")
    if re.search(r"[\s:]", str(folder)):
        raise UsageError(
            f"the cache folder's path has a blank or colon: {folder}",
            help="set KERNWEAVE_CACHE to another folder",
        )
    return folder


def write_stamp(file: Path, values: Values) -> None:
    """Write a stamp atomically: after it exists, everything it names is complete."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({"schema": _STAMP_SCHEMA, **values}, indent=1) + "\n")
    aside.rename(file)


def read_stamp(file: Path, paths: Iterable[str]) -> dict[str, object] | None:
    """Return a stamp's values, or None if it is absent, foreign, or names something that is gone.

    Args:
        file: the stamp.
        paths: keys whose values are paths, or lists of them, that must exist.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("schema") != _STAMP_SCHEMA:
        return None
    for key in paths:
        value = values.get(key)
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str) or not Path(path).exists():
                return None
    return values


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full or unwritable disk below into one error that names it.

    Raises:
        LabError: ENOSPC, EDQUOT, EROFS, EFBIG or EACCES of any file system call in the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES
        ):  # fmt: skip
            raise
        where = error.filename or error.filename2 or cache_dir()
        raise LabError(
            f"cannot write {where}: {error.strerror}",
            notes=[f"the cache is {cache_dir()}, labs live in {tempfile.gettempdir()}"],
            help="make room there, or set KERNWEAVE_CACHE (TMPDIR for labs) to another disk",
        ) from error


@contextmanager
def locked(folder: Path, progress: Progress = silent) -> Iterator[None]:
    """Hold the folder's lock file; a second process waits until the first is done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that fetches")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- trees of packages -------------------------------------------------------------------------


def packages_dir() -> Path:
    """Return the folder of all unpacked packages, their stamps and apt's private folders."""
    return cache_dir() / "packages"


def tree_dir(*parts: str) -> Path:
    """Return the final folder of a tree of that name and version."""
    # make cannot take a colon or blank in a path, nor can LD_LIBRARY_PATH
    return packages_dir() / "_".join(re.sub(r"[^\w.+-]", "_", part) for part in parts)


def fetch_once(
    stamp: Path, paths: Sequence[str], progress: Progress, fetch: Callable[[], Values]
) -> dict[str, object]:
    """Return a stamp's values; `fetch` makes its tree and them, unless they are there.

    Args:
        stamp: the file, in `packages_dir`.
        paths: as for `read_stamp`.
        progress: is called when another process fetches.
        fetch: is called with the lock held.
    """
    values = read_stamp(stamp, paths)  # 1
    if values is not None:
        return values
    with disk_errors(), locked(packages_dir(), progress):
        values = read_stamp(stamp, paths)  # 2
        if values is None:
            write_stamp(stamp, fetch())  # 3, 4
            values = read_stamp(stamp, paths)
    assert values is not None, f"{stamp} was written just now"
    return values


@contextmanager
def unpack_aside() -> Iterator[tuple[Path, Path]]:
    """Give an empty download folder and an empty root, on the cache's own file system."""
    for stale in packages_dir().glob(".fetch-*"):  # the lock is ours: left by a killed process
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=packages_dir()) as work:
        debs, root = Path(work) / "debs", Path(work) / "root"
        debs.mkdir()
        root.mkdir()
        yield debs, root


def settle(root: Path, final: Path) -> None:
    """Rename a checked tree to its final name."""
    if final.exists():  # without its stamp: left by an interrupted fetch
        shutil.rmtree(final)
    root.rename(final)
