# SPDX-License-Identifier: GPL-2.0-or-later
"""What kmods depend on, and the order they load in."""

import lzma
import struct
from pathlib import Path

import pytest

from kernweave.errors import UsageError
from kernweave.lab.kmods import index_modules, load_order, read_module
from kernweave.lab.packages import KernelTree


def kernel_tree(modules: Path) -> KernelTree:
    return KernelTree("6.1", "1-amd64", "1-1", modules / "vmlinuz", modules)


def elf_with_modinfo(modinfo: bytes) -> bytes:
    """Build the least ELF file that has a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(names) + len(modinfo)
    rows = [
        struct.pack("<IIQQQQIIQQ", *([0] * 10)),
        struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64 + len(names), len(modinfo), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64, len(names), 0, 0, 1, 0),
    ]
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, len(rows), 2)
    return ident + header + names + modinfo + b"".join(rows)


def test_load_order_puts_each_kmod_once_after_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc-x.ko\n")
    (tmp_path / "modules.dep").write_text(
        "k/top-a.ko.xz: k/left.ko k/right.ko\n"
        "k/left.ko: k/base.ko\n"
        "k/right.ko: k/base.ko\n"
        "k/base.ko:\n"
        "k/lone.ko:\n"
    )
    kernel = kernel_tree(tmp_path)
    order = load_order(kernel, ["top_a", "crc-x", "left", "lone"])
    names = [str(path.relative_to(tmp_path)) for path in order]
    assert names == ["k/base.ko", "k/right.ko", "k/left.ko", "k/top-a.ko.xz", "k/lone.ko"]
    assert load_order(kernel, ["top-a"]) == load_order(kernel, ["top_a"])
    with pytest.raises(UsageError, match="no kmod absent"):
        load_order(kernel, ["absent"])


def test_load_order_takes_depmods_own_deep_lists(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("c.ko: b.ko a.ko\nb.ko: a.ko\na.ko:\n")
    order = load_order(kernel_tree(tmp_path), ["c"])
    assert [path.name for path in order] == ["a.ko", "b.ko", "c.ko"]


def test_index_modules_reads_the_kmods_themselves(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    needy = elf_with_modinfo(b"license=GPL\0depends=the_base,inside\0name=needy\0")
    (tmp_path / "kernel" / "needy.ko.xz").write_bytes(lzma.compress(needy))
    (tmp_path / "kernel" / "the-base.ko").write_bytes(elf_with_modinfo(b"depends=\0"))
    index_modules(tmp_path)
    text = (tmp_path / "modules.dep").read_text()
    assert text == "kernel/needy.ko.xz: kernel/the-base.ko\nkernel/the-base.ko:\n"
    assert read_module(tmp_path / "kernel" / "needy.ko.xz") == needy
