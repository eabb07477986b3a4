# SPDX-License-Identifier: GPL-2.0-or-later
"""The stock kernel's kmods: their files, what each depends on, the order they load in."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernweave.errors import UsageError

if TYPE_CHECKING:
    from kernweave.lab.packages import KernelTree


def read_module(path: Path) -> bytes:
    """Return a kmod file's ELF bytes, decompressed if its name ends in .xz."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def module_depends(elf: bytes) -> list[str]:
    """Return the names in the `depends=` field of a kmod's .modinfo section."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + row * size) for row in range(count)]
    for name, _, _, _, off, length in headers:
        if elf.startswith(b".modinfo\0", headers[names][4] + name):
            fields = elf[off : off + length].split(b"\0")
            depends = [field[8:] for field in fields if field.startswith(b"depends=")]
            return [name for name in b",".join(depends).decode().split(",") if name]
    return []


def index_modules(modules: Path) -> None:
    """Write modules.dep as depmod does, from each kmod's own list (the packages carry none)."""
    files = sorted(path for path in modules.rglob("*.ko*") if path.suffix in (".ko", ".xz"))
    by_name = {module_name(path.name): path.relative_to(modules) for path in files}
    lines = []
    for path in files:
        depends = [by_name[name] for name in module_depends(read_module(path)) if name in by_name]
        lines.append(f"{path.relative_to(modules)}: {' '.join(map(str, depends))}".rstrip() + "\n")
    (modules / "modules.dep").write_text("".join(lines))


def module_name(file: str) -> str:
    """Return the kmod's name in the kernel for a file name such as `dm-mod.ko.xz`."""
    return Path(file).name.split(".ko", 1)[0].replace("-", "_")


def load_order(kernel: KernelTree, names: Sequence[str]) -> list[Path]:
    """Return the kmod files that `names` need, each after those it depends on.

    Args:
        kernel: whose modules.dep is read.
        names: as `lsmod` or the file name has them; those built into the kernel add nothing.

    Raises:
        UsageError: the kernel has no kmod of that name.
    """
    depends = _read_modules_dep((kernel.modules / "modules.dep").read_text())
    files = {module_name(file): file for file in depends}
    builtin = kernel.modules / "modules.builtin"
    inside = set(map(module_name, builtin.read_text().split())) if builtin.is_file() else set()
    order: dict[str, None] = {}

    def visit(file: str) -> None:
        if file not in order:
            for needed in reversed(depends[file]):  # depmod names the deepest last
                visit(needed)
            order[file] = None

    for name in map(module_name, names):
        if name in files:
            visit(files[name])
        elif name not in inside:
            raise UsageError(f"kernel {kernel.release} has no kmod {name}")
    return [kernel.modules / file for file in order]


def _read_modules_dep(text: str) -> dict[str, list[str]]:
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {file: needed.split() for file, needed in pairs}
