# SPDX-License-Identifier: GPL-2.0-or-later
"""A bootable kernel file (bzImage, `vmlinuz`): the kernel as built, at its link addresses.

Nothing in it is patched for a machine yet: lock prefixes, alternatives, return and retpoline
sites, static keys and ftrace nops differ from the text of the running kernel.
"""

from __future__ import annotations

import bz2
import importlib
import importlib.util
import io
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernweave.errors import UnsupportedError
from kernweave.image.elf import Elf, parse_elf
from kernweave.image.kallsyms_scan import find_kallsyms
from kernweave.image.symbols import build_id

Addrs = npt.NDArray[np.uint64]

# offsets in the setup header: Documentation/arch/x86/boot.rst
_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_PROTOCOL = 0x206
_VERSION = 0x20E
_PAYLOAD_OFF = 0x248
_PAYLOAD_BYTES = 0x24C
_HEADER_END = 0x250
_PAYLOAD_PROTOCOL = 0x0208  # the first one with the two payload fields
_SECTOR = 512

# a kernel image may take 1 GiB (KERNEL_IMAGE_SIZE); its relocations follow it in the payload
_MOST_BYTES = 3 << 29


@dataclass(frozen=True)
class KernelFile:
    """A kernel as built.

    Attributes:
        release: what `uname -r` prints when it runs.
        build_id: the GNU build id, hexadecimal, or None if it has none.
        elf: the ELF file inside.
    """

    release: str
    build_id: str | None
    elf: Elf

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        """(start, end) link addresses of the sections that take memory, by name."""
        return self.elf.sections

    @property
    def text_start(self) -> int:
        """Link address of `_text` and `_stext`: the start of section .text."""
        return self.elf.sections[".text"][0]

    @property
    def text_end(self) -> int:
        """Link address of `_etext`: the end of section .text; init text is not in it."""
        return self.elf.sections[".text"][1]

    @property
    def bounds(self) -> tuple[int, int]:
        """(start, end) of the image, text, data and init sections; per-CPU offsets are outside."""
        return self.text_start, max(end for _, end in self.elf.sections.values())

    @cached_property
    def symbols(self) -> tuple[Addrs, list[bytes]]:
        """uint64[n] link addresses and n names with their type letter, as `read_kallsyms` gives.

        Raises:
            UnsupportedError: section .rodata holds no consistent kallsyms tables.
        """
        start, end = self.elf.sections[".rodata"]
        return find_kallsyms(self.read(start, end - start), start, self.text_start)

    @cached_property
    def _addr_of(self) -> dict[bytes, int]:
        addrs, names = self.symbols
        return dict(zip((name[1:] for name in names), addrs.tolist(), strict=True))

    def read(self, addr: int, size: int) -> bytes:
        """Bytes at a link address; zeros where the file holds none.

        Raises:
            UnsupportedError: the file loads nothing there.
        """
        return self.elf.read(addr, size)

    def lookup(self, names: Sequence[str]) -> list[int]:
        """Link address of each symbol of any type, 0 where there is none."""
        return [self._addr_of.get(name.encode(), 0) for name in names]


def open_image(path: Path) -> KernelFile:
    """Unpack a bootable kernel file.

    Raises:
        UnsupportedError: it is not a bzImage of x86-64, or its compression is not known or not
            possible here.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnsupportedError(f"cannot read {path}: {error.strerror}") from error
    _check_header(data, path)
    elf = parse_elf(_decompress(_payload(data, path)))
    for name in (".text", ".rodata"):
        if name not in elf.sections:
            raise UnsupportedError(f"the kernel in {path} has no section {name}")
    return KernelFile(_release(data), _read_build_id(elf), elf)


# ---- the boot file -----------------------------------------------------------------------------


def _uint(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _check_header(data: bytes, path: Path) -> None:
    if len(data) < _HEADER_END or data[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise UnsupportedError(
            f"{path} is no bootable x86 kernel: {len(data)} bytes without a setup header",
            help="name a vmlinuz, such as /boot/vmlinuz-$(uname -r)",
        )
    protocol = _uint(data, _PROTOCOL, 2)
    if protocol < _PAYLOAD_PROTOCOL:
        raise UnsupportedError(
            f"{path} has boot protocol {protocol:#06x}, {_PAYLOAD_PROTOCOL:#06x} is needed"
        )


def _payload(data: bytes, path: Path) -> bytes:
    """The compressed kernel and the 4 bytes after it that hold its uncompressed size."""
    setup_bytes = ((data[_SETUP_SECTORS] or 4) + 1) * _SECTOR
    start = setup_bytes + _uint(data, _PAYLOAD_OFF, 4)
    size = _uint(data, _PAYLOAD_BYTES, 4)
    if start + size > len(data) or size < 10:
        raise UnsupportedError(
            f"{path} has {len(data)} bytes, its payload of {size} begins at {start}"
        )
    return data[start : start + size]


def _release(data: bytes) -> str:
    pointer = _uint(data, _VERSION, 2)
    at = pointer + 0x200
    text = data[at : at + 256].split(b"\0", 1)[0].decode(errors="replace") if pointer else ""
    if not text.split():
        raise UnsupportedError("the kernel's setup header names no version")
    return text.split()[0]


def _read_build_id(elf: Elf) -> str | None:
    start, end = elf.sections.get(".notes", (0, 0))
    return build_id(elf.read(start, end - start)) if end > start else None


# ---- decompression -----------------------------------------------------------------------------


def _gunzip(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data, size + 1)


def _unxz(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, size + 1)


def _unlzma(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data, size + 1)


def _bunzip2(data: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _unzstd(data: bytes, size: int) -> bytes:
    # Python has zstd from 3.14 on
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        try:
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as stream:
                return bytes(stream.read(size + 1))
        except zstandard.ZstdError as error:
            raise ValueError(error) from error
    program = shutil.which("zstd")
    if program is None:
        raise UnsupportedError(
            "this kernel is compressed with zstd, which nothing here can unpack",
            help="install the Python package zstandard, or the program zstd",
        )
    done = subprocess.run([program, "-dcq"], input=data[:-4], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip()[:200])
    return done.stdout


#: (first bytes, name, decompressor taking the payload and the size to expect)
#:
#: References: linux/scripts/extract-vmlinux, lib/decompress.c
_FORMATS: tuple[tuple[bytes, str, Callable[[bytes, int], bytes] | None], ...] = (
    (b"\x1f\x8b\x08", "gzip", _gunzip),
    (b"\xfd7zXZ\0", "xz", _unxz),
    (b"\x28\xb5\x2f\xfd", "zstd", _unzstd),
    (b"\x5d\0\0", "lzma", _unlzma),
    (b"BZh", "bzip2", _bunzip2),
    (b"\x02\x21\x4c\x18", "lz4", None),
    (b"\x89LZO", "lzo", None),
)


def _decompress(payload: bytes) -> bytes:
    name, unpack = next(
        ((name, unpack) for magic, name, unpack in _FORMATS if payload.startswith(magic)),
        (f"an unknown method, first bytes {payload[:6].hex()}", None),
    )
    if unpack is None:
        known = ", ".join(name for _, name, unpack in _FORMATS if unpack)
        raise UnsupportedError(f"the kernel is compressed with {name}; known are {known}")
    size = _uint(payload, len(payload) - 4, 4)
    if size > _MOST_BYTES:
        raise UnsupportedError(f"the kernel's payload claims {size} bytes unpacked")
    try:
        data = unpack(payload, size)
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UnsupportedError(f"the kernel's {name} payload is broken: {error}") from error
    if len(data) != size:
        raise UnsupportedError(
            f"the kernel's {name} payload unpacks to {len(data)} bytes, {size} are announced"
        )
    return data
