# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's first root file system: a cpio archive of init, agent, kmods and the driver."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernweave.lab.build import build_static
from kernweave.lab.cache import cache_dir
from kernweave.lab.kmods import load_order, read_module
from kernweave.lab.packages import KernelTree

# What the guest needs to reach the ports and the host's files; dependencies come with them.
# The watchdog is last: nothing waits for it.
GUEST_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "i6300esb")

_PACKAGE = Path(__file__).parent.parent
_INIT = _PACKAGE / "lab/csrc/init.c"
_AGENT = _PACKAGE / "driver/csrc/agent/agent.c"


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder of the archive.

    Attributes:
        name: path without a leading slash.
        mode: as in st_mode, with the type.
        data: contents; empty for a folder.
    """

    name: str
    mode: int
    data: bytes = b""


def encode_cpio(members: Iterable[Member]) -> bytes:
    """Return a "newc" archive, the same bytes for the same members.

    References: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
    """
    chunks: list[bytes] = []
    for inode, member in enumerate([*members, Member("TRAILER!!!", 0)], start=1):
        name = member.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(member.mode) else 1
        fields = (inode, member.mode, 0, 0, links, 0, len(member.data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        chunks += [_pad4(head), _pad4(member.data)]
    return b"".join(chunks)


def build_initramfs(kernel: KernelTree, kmod: Path | None) -> Path:
    """Return the archive for a kernel and a driver (or none), from the cache if it is there.

    Its name holds a hash of its contents, so that equal names mean equal machines.
    """
    archive = encode_cpio(_members(kernel, kmod))
    name = f"initramfs-{kernel.release}-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    final = cache_dir() / "builds" / name
    if not final.is_file():
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = final.with_name(f".{name}.{os.getpid()}")
        try:
            aside.write_bytes(archive)
            aside.rename(final)
        finally:
            aside.unlink(missing_ok=True)
    return final


def _members(kernel: KernelTree, kmod: Path | None) -> Iterator[Member]:
    init = build_static(_INIT, include=_AGENT.parent)
    agent = build_static(_AGENT)
    for folder in ("proc", "sys", "dev", "modules"):
        yield Member(folder, stat.S_IFDIR | 0o755)
    yield Member("init", stat.S_IFREG | 0o755, init.read_bytes())
    yield Member("agent", stat.S_IFREG | 0o755, agent.read_bytes())
    for number, path in enumerate(load_order(kernel, GUEST_MODULES)):
        stem = path.name.split(".")[0]
        yield Member(f"modules/{number:02}-{stem}.ko", stat.S_IFREG | 0o644, read_module(path))
    if kmod is not None:
        yield Member("kernweave.ko", stat.S_IFREG | 0o644, kmod.read_bytes())


def _pad4(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
