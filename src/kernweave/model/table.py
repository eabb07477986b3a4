# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables: frozen dataclasses of equally long numpy arrays, in memory and on disk.

The row number is the identity.  On disk a set of tables is one folder of `.npy` files with a
`table.json`; it is written aside and renamed, so it is there whole or not at all, and whoever
comes second leaves the first one's alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]
T = TypeVar("T")

_HEAD = "table.json"


def columns(table: Any) -> dict[str, Column]:
    """The arrays of a table by the names of its fields."""
    return {field.name: getattr(table, field.name) for field in fields(table)}


def concat(tables: Sequence[T]) -> T:
    """One table of the rows of several of the same kind, in that order."""
    found = [columns(table) for table in tables]
    kind: Any = type(tables[0])
    return kind(**{name: np.concatenate([one[name] for one in found]) for name in found[0]})  # type: ignore[no-any-return]


def select(table: T, rows: Column) -> T:
    """The table of some rows, by number or by mask."""
    kind: Any = type(table)
    return kind(**{name: column[rows] for name, column in columns(table).items()})  # type: ignore[no-any-return]


def save_tables(folder: Path, head: Mapping[str, Any], arrays: Mapping[str, Column]) -> None:
    """Store arrays and a head that `load_tables` asks for; a folder that is there stays.

    Where nothing can be written nothing is stored.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".aside-", dir=folder.parent))
    except OSError:  # nothing can be stored there
        return
    try:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        sizes = {name: (aside / f"{name}.npy").stat().st_size for name in arrays}
        (aside / _HEAD).write_text(json.dumps({**head, "files": sizes}))
        _flush(aside)
        aside.rename(folder)
    except OSError:  # somebody else was first, or the disk is full
        shutil.rmtree(aside, ignore_errors=True)


def load_tables(folder: Path, head: Mapping[str, Any]) -> dict[str, Column] | None:
    """The stored arrays, mapped into memory; None if they are not there or not as they should be.

    A folder with another head, or with a file that is missing, cut or not an array, is removed,
    so that it can be stored again.
    """
    try:
        found = json.loads((folder / _HEAD).read_text())
        sizes = found.pop("files")
        if found != dict(head):
            raise ValueError("another version")
        for name, size in sizes.items():
            if (folder / f"{name}.npy").stat().st_size != size:
                raise ValueError(f"{name} was cut")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in sizes}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _flush(folder: Path) -> None:
    """Make what was written last longer than a power failure."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
