# SPDX-License-Identifier: GPL-2.0-or-later
"""Count, trace and change any instruction of a running Linux kernel, from Python.

errors     what can go wrong, and the reason codes
model      values that pass between the stages
x86        machine code
driver     the kernel side and its client
image      kernel memory to tables
analysis   tables to tables
splice     points and tables to a plan
lab        a throw-away machine with a stock kernel
session    attach, detach, run, read
cli        the command line
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernweave.errors import KernweaveError, Reason

if TYPE_CHECKING:
    from kernweave.session.session import Session

__all__ = ["KernweaveError", "Reason", "__version__", "connect"]
__version__ = "0.1.0"


def connect(
    target: str = "lab",
    *,
    writer: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Session:
    """Open a session with a kernel; leaving its with block undoes everything.

    Args:
        target: `lab` or `lab:NAME`; a lab that does not run is booted first.
        writer: whether this session may change the kernel; one at a time may.
        progress: called with one line per slow step.

    Raises:
        UsageError: not a target.
        UnsupportedError: a tool, a package or the network is missing.
        LabError: the lab does not boot.
        DriverError: EBUSY, another session is changing this kernel.

    Example:
        >>> import kernweave as kw
        >>> with kw.connect("lab") as k, k.count("vfs_read") as hits:  # doctest: +SKIP
        ...     k.run(["true"], check=True)
    """
    from kernweave.session.session import Session

    if progress is None:
        return Session(target, writer=writer)
    return Session(target, writer=writer, progress=progress)
