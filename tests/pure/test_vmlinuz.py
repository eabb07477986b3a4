# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel files: unpacked, readable at link addresses, with the symbols of their own tables."""

import bz2
import contextlib
import functools
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernweave.errors import UnsupportedError
from kernweave.image.kallsyms import read_kallsyms
from kernweave.image.kallsyms_scan import find_kallsyms
from kernweave.image.symbols import make_symbols
from kernweave.image.vmlinuz import open_image

Form = Literal["6.1", "6.12", "7.2"]
Symbols = Sequence[tuple[int, bytes]]

FORMS: tuple[Form, ...] = ("6.1", "6.12", "7.2")
TEXT = 0xFFFFFFFF81000000
RODATA = TEXT + 0x2000
TEXT_BYTES = bytes(range(256)) * 8
LONG = b"t" + bytes(range(0x80, 0xF0)) * 2
SYMBOLS: Symbols = (
    (TEXT, b"T_text"),
    (TEXT, b"T_stext"),
    *((TEXT + 2 * i, b"tvfs_read_%d" % i) for i in range(1, 600)),
    (TEXT + 1201, LONG),
    (TEXT + 0x7FF, b"T_etext"),
    (TEXT + 0x5000, b"Dinit_task"),
)
PER_CPU: Symbols = ((0, b"A__per_cpu_start"), (0x1000, b"Acpu_number"))


# ---- a kallsyms writer ---------------------------------------------------------------------------


def tokens_for(symbols: Symbols) -> list[bytes]:
    """Each used byte stands for itself, two free ones for longer strings, the rest for nothing."""
    used = set(b"".join(name for _, name in symbols))
    tokens = [bytes([code]) if code in used else b"" for code in range(256)]
    free = [code for code in range(1, 256) if code not in used]
    tokens[free[0]], tokens[free[1]] = b"tvfs_", b"read_"
    return tokens


def pack_name(name: bytes, tokens: list[bytes]) -> bytes:
    for token in (b"tvfs_", b"read_"):
        name = name.replace(token, bytes([tokens.index(token)]))
    size = len(name)
    return (bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])) + name


class Kallsyms:
    """The tables in one form, at `base`; `addr` has the address of each."""

    def __init__(self, symbols: Symbols, form: Form, base: int, front: bytes = b"") -> None:
        self.symbols, self.base, self.data = symbols, base, bytearray(front)
        self.align = 4 if form == "7.2" else 8
        self.addr: dict[str, int] = {}
        tokens = tokens_for(symbols)
        if form == "6.1":
            self.put_offsets(form)
        self.put_names(tokens)
        if form == "6.1":
            self.put("seqs_of_names", b"".join(i.to_bytes(3, "big") for i in range(len(symbols))))
        begins = [sum(len(token) + 1 for token in tokens[:i]) for i in range(256)]
        self.put("token_table", b"".join(token + b"\0" for token in tokens))
        self.put("token_index", struct.pack("<256H", *begins))
        if form != "6.1":
            self.put_offsets(form)

    def put(self, name: str, data: bytes) -> None:
        self.data += bytes(-len(self.data) % self.align)
        self.addr[name] = self.base + len(self.data)
        self.data += data

    def put_names(self, tokens: list[bytes]) -> None:
        packed = [pack_name(name, tokens) for _, name in self.symbols]
        marks = [sum(map(len, packed[:i])) for i in range(0, len(packed), 256)]
        self.put("num_syms", struct.pack("<I", len(packed)))
        self.put("names", b"".join(packed))
        self.put("markers", struct.pack(f"<{len(marks)}I", *marks))

    def put_offsets(self, form: Form) -> None:
        addrs = [addr for addr, _ in self.symbols]
        if form == "7.2":
            at = self.base + len(self.data) + -len(self.data) % 4
            raw = [addr - at - 4 * i for i, addr in enumerate(addrs)]
        elif addrs[0] < TEXT:  # absolute per-CPU symbols
            raw = [addr if addr < TEXT else TEXT - 1 - addr for addr in addrs]
        else:
            raw = [addr - TEXT for addr in addrs]
        self.put("offsets", struct.pack(f"<{len(raw)}i", *raw))
        if form != "7.2":
            self.put("relative_base", struct.pack("<Q", TEXT))


# ---- a kernel file writer ------------------------------------------------------------------------


def elf_file(sections: Iterable[tuple[str, int, bytes, int]]) -> bytes:
    """Build an ELF file with one segment per section of (name, address, bytes, zeros after)."""
    rows = list(sections)
    names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in rows) + b".shstrtab\0"
    body, headers, segments = bytearray(64 + 56 * len(rows)), [bytes(64)], []
    for name, addr, data, zeros in rows:
        at, size, kind = len(body), len(data) + zeros, 1 if data else 8
        segments.append(struct.pack("<IIQQQQQQ", 1, 5, at, addr, addr, len(data), size, 4096))
        row = (names.index(name.encode()), kind, 2, addr, at, size, 0, 0, 8, 0)
        headers.append(struct.pack("<IIQQQQIIQQ", *row))
        body += data
    row = (names.index(b".shstrtab"), 3, 0, 0, len(body), len(names), 0, 0, 1, 0)
    headers.append(struct.pack("<IIQQQQIIQQ", *row))
    body += names
    table = len(body)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    counts = (64, 56, len(segments), 64, len(headers), len(headers) - 1)
    body[:64] = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, TEXT, 64, table, 0, *counts)
    body[64 : 64 + 56 * len(rows)] = b"".join(segments)
    return bytes(body + b"".join(headers))


@functools.cache
def kernel_elf(form: Form = "6.12", symbols: Symbols = SYMBOLS) -> bytes:
    note = struct.pack("<III", 4, 4, 3) + b"GNU\0" + bytes.fromhex("deadbeef")
    rodata = bytes(Kallsyms(symbols, form, RODATA, b"\0\1\2\3" * 100).data)
    return elf_file(
        [
            (".text", TEXT, TEXT_BYTES, 0),
            (".rodata", RODATA, rodata, 0),
            (".notes", TEXT + 0x8000, note, 0),
            (".data", TEXT + 0x9000, b"data", 12),
            (".bss", TEXT + 0xA000, b"", 64),
        ]
    )


def boot_file(payload: bytes, size: int, *, protocol: int = 0x20F, magic: bytes = b"HdrS") -> bytes:
    """Build a bzImage: two setup sectors, 16 bytes of decompressor, payload and its size."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = magic
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x300)
    struct.pack_into("<II", setup, 0x248, 16, len(payload) + 4)
    setup[0x500:0x520] = b"6.1.0-made-up (someone) #1 SMP\0".ljust(32, b"\0")
    return bytes(setup) + bytes(16) + payload + struct.pack("<I", size) + bytes(100)


def zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        pytest.skip("the program zstd, which builds this input, is not here")
    return subprocess.run(["zstd", "-q"], input=data, capture_output=True, check=True).stdout


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": zstd,
}


def write_kernel(folder: Path, elf: bytes, pack: Callable[[bytes], bytes] = gzip.compress) -> Path:
    path = folder / "vmlinuz"
    path.write_bytes(boot_file(pack(elf), len(elf)))
    return path


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PACKERS)
def test_open_image_unpacks_every_known_compression(tmp_path: Path, method: str) -> None:
    kernel = open_image(write_kernel(tmp_path, kernel_elf(), PACKERS[method]))
    assert (kernel.release, kernel.build_id) == ("6.1.0-made-up", "deadbeef")
    assert (kernel.text_start, kernel.text_end) == (TEXT, TEXT + len(TEXT_BYTES))
    assert kernel.read(TEXT + 250, 10) == TEXT_BYTES[250:260]


def test_read_fills_what_the_file_does_not_hold_with_zeros(tmp_path: Path) -> None:
    kernel = open_image(write_kernel(tmp_path, kernel_elf()))
    assert kernel.sections[".bss"] == (TEXT + 0xA000, TEXT + 0xA040)
    assert kernel.bounds == (TEXT, TEXT + 0xA040)
    assert kernel.read(TEXT + 0xA000, 64) == bytes(64)
    assert kernel.read(TEXT + 0x9002, 14) == b"ta" + bytes(12)
    assert kernel.read(TEXT + 0x9008, 8) == bytes(8)
    for addr, size in ((TEXT - 1, 1), (TEXT + 0xA000, 65), (TEXT + 0x1000, 1), (TEXT, -1)):
        with pytest.raises(UnsupportedError, match="loads nothing"):
            kernel.read(addr, size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MZ", "no bootable x86 kernel"),
        (boot_file(b"", 0, magic=b"none"), "no bootable x86 kernel"),
        (boot_file(gzip.compress(b""), 0, protocol=0x207), "boot protocol 0x0207"),
        (boot_file(b"\x02\x21\x4c\x18" + bytes(99), 9), "lz4; known are gzip, xz, zstd"),
        (boot_file(b"\x89LZO" + bytes(99), 9), "compressed with lzo"),
        (boot_file(b"?" * 99, 9), "unknown method, first bytes 3f3f3f3f3f3f"),
        (boot_file(gzip.compress(bytes(99)), 98), "99 bytes, 98 are announced"),
        (boot_file(gzip.compress(bytes(99)), 1 << 31), "claims 2147483648 bytes"),
        (boot_file(lzma.compress(b"#!/bin/sh"), 9), "cut short"),
        (boot_file(gzip.compress(elf_file([])), len(elf_file([]))), "no section .text"),
    ],
)
def test_open_image_refuses_other_files_and_says_why(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=message):
        open_image(path)
    with pytest.raises(UnsupportedError, match="cannot read"):
        open_image(tmp_path / "absent")


def test_open_image_without_zstd_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(boot_file(b"\x28\xb5\x2f\xfd" + bytes(20), 9))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="install the Python package zstandard"):
        open_image(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_open_image_of_a_truncated_file_is_unsupported(tmp_path: Path, data: st.DataObject) -> None:
    elf = kernel_elf()
    whole = boot_file(gzip.compress(elf), len(elf))
    path = tmp_path / "vmlinuz"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 101))])
    with pytest.raises(UnsupportedError):
        open_image(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_open_image_of_a_damaged_kernel_works_or_is_unsupported(
    tmp_path: Path, data: st.DataObject
) -> None:
    elf = bytearray(kernel_elf())
    at = data.draw(st.integers(0, len(elf) - 9))
    elf[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    end = data.draw(st.integers(0, len(elf)) | st.just(len(elf)))
    with contextlib.suppress(UnsupportedError):
        open_image(write_kernel(tmp_path, bytes(elf[:end]))).lookup(["_stext"])


# ---- symbols -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_symbols_are_found_in_every_form(tmp_path: Path, form: Form) -> None:
    kernel = open_image(write_kernel(tmp_path, kernel_elf(form)))
    addrs, names = kernel.symbols
    assert list(zip(addrs.tolist(), names, strict=True)) == list(SYMBOLS)
    assert kernel.lookup(["init_task", "absent", "_stext"]) == [TEXT + 0x5000, 0, TEXT]
    table = make_symbols(None, addrs, names, kernel.text_start, kernel.text_end)
    assert table.find("vfs_read_7") == [TEXT + 14]
    assert table.find("init_task") == []


@pytest.mark.parametrize("form", FORMS[:2])
def test_symbols_with_absolute_per_cpu_offsets_keep_both_kinds(tmp_path: Path, form: Form) -> None:
    symbols = (*PER_CPU, *SYMBOLS)
    addrs, names = open_image(write_kernel(tmp_path, kernel_elf(form, symbols))).symbols
    assert list(zip(addrs.tolist(), names, strict=True)) == list(symbols)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("table", ["num_syms", "markers", "names", "token_index", "offsets"])
def test_symbols_whose_tables_disagree_are_unsupported(form: Form, table: str) -> None:
    made = Kallsyms(SYMBOLS, form, RODATA)
    assert len(find_kallsyms(bytes(made.data), RODATA, TEXT)[0]) == len(SYMBOLS)
    made.data[made.addr[table] - RODATA + 4 * (table == "markers")] ^= 1
    with pytest.raises(UnsupportedError, match="no kallsyms tables"):
        find_kallsyms(bytes(made.data), RODATA, TEXT)


def test_symbols_without_stext_at_the_start_of_text_are_unsupported() -> None:
    made = Kallsyms(SYMBOLS, "6.12", RODATA)
    with pytest.raises(UnsupportedError, match="1 lists of names found"):
        find_kallsyms(bytes(made.data), RODATA, TEXT + 2)


@pytest.mark.parametrize("form", FORMS)
def test_read_kallsyms_of_a_running_kernel_takes_every_form(form: Form) -> None:
    made = Kallsyms(SYMBOLS, form, RODATA)
    lines = [b"SYMBOL(kallsyms_%s)=%x" % (k.encode(), v) for k, v in made.addr.items()]
    note = b"\n".join(lines)
    end = len(made.data)
    memory = bytes(made.data) + note + struct.pack("<QQ", RODATA + end, len(note)) + bytes(512)
    pointers = RODATA + end + len(note)

    def read(addr: int, size: int) -> bytes:
        return memory[addr - RODATA : addr - RODATA + size]

    addrs, names = read_kallsyms(read, pointers, pointers + 8, TEXT)
    assert list(zip(addrs.tolist(), names, strict=True)) == list(SYMBOLS)
